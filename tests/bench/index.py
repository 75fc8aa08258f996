"""What the index of many latents costs: seconds to make, write, read and compare it, memory, and size.

python -m tests.bench.index [COUNT]    # 500,000 images by default
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lightdiff.data.files import ImageFile
from lightdiff.data.index import LatentIndex, read_index
from lightdiff.data.table import fingerprint
from lightdiff.extras.data.changes import compare
from lightdiff.settings import ImageSettings
from tests.bench.contest import resident
from tests.bench.growth import apart

SHARD = 2048


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Print seconds, and by how much the peak of memory rose."""
    before, began = resident("VmHWM"), time.perf_counter()
    yield
    seconds, memory = time.perf_counter() - began, resident("VmHWM") - before
    print(f"{what}: {seconds:.2f} s, {memory / 1e6:.0f} MB")


def finished_index(files: Sequence[ImageFile], shape: tuple[int, int, int]) -> LatentIndex:
    """The index of finished latents of these images, in shards that are full."""
    n = np.arange(len(files), dtype=np.int32)
    return LatentIndex.of(
        files,
        shape=shape,
        dtype="float16",
        mirrored=True,
        vae_digest="0" * 64,
        images=ImageSettings(),
        shard_size=SHARD,
        shards=["0" * 64] * -(-len(files) // SHARD),
        digest="0" * 64,
        shard=n // SHARD,
        row=n % SHARD,
    )


def made_up(count: int) -> LatentIndex:
    """The index of images in a thousand class folders, a twentieth of them for validation."""
    names = [(f"person-{i % 1000:04d}", f"photo-{i:08d}.jpg", "train" if i % 20 else "val") for i in range(count)]
    files: list[Any] = [ImageFile(0, f"{of}/{name}", split, {"class": of}) for of, name, split in names]  # type: ignore[arg-type]
    with measured("make"):
        index = finished_index(files, (4, 8, 8))
    index.fingerprints[:] = np.random.default_rng(0).integers(0, 256, index.fingerprints.shape)
    return index


def write(count: int, folder: Path) -> None:
    """Make and write the index."""
    index = made_up(count)
    with measured("write"):
        index.write(folder / "index.safetensors")


def read(folder: Path) -> None:
    """Read it, and ask it what a training asks."""
    with measured("read"):
        index = read_index(folder)
    with measured("use"):
        index.positions("train"), index.label_values(index.of_split("train"))
    older = index.model_copy()
    index = index.model_copy(update={"splits": 1 - index.splits})
    with measured("compare with another list"):
        compare(index, older, [partial(fingerprint, folder)], contents=True)


def look(folder: Path, count: int = 10_000) -> None:
    """Size and time of change of files."""
    for i in range(count):
        (folder / f"{i}.jpg").touch()
    with measured(f"look at {count:,} files"):
        for i in range(count):
            fingerprint(folder, f"{i}.jpg")


def main() -> None:
    """Measure each in a process of its own."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 500_000
    with tempfile.TemporaryDirectory() as folder:
        steps: list[tuple[Callable[..., None], tuple[Any, ...]]] = [(write, (count,)), (read, ()), (look, ())]
        for step, arguments in steps:
            apart(step, *arguments, Path(folder))
        print(f"size: {(Path(folder) / 'index.safetensors').stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
