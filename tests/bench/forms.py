"""What loading costs from archives and tables beside a folder, in processor time: `python -m tests.bench.forms`.

JPEGs of 256 px, read, decoded, cropped and resized to 256 px as for a training, at random and in order. Rounds of a few
images of each form in turn, in this process; medians. Needs the extra `parquet`.
"""

import io
import statistics
import tarfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from lightdiff.data.files import scan
from lightdiff.data.loading import ImageDataset
from lightdiff.settings import ImageSettings
from tests.bench.cases import photographs, room

COUNT, ROUNDS, PER_ROUND = 2_000, 7, 100
SHARDS = 4
GROUP = 100  # rows, as `datasets` writes images


def forms_of(folder: Path) -> dict[str, Path]:
    """The same images in each form, by its title."""
    home, images = folder.parent, [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]
    for name, method in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(home / f"{name}.zip", "w", method) as archive:
            for of, data in images:
                archive.writestr(of, data)
    for number in range(SHARDS):
        with tarfile.open(home / f"shard-{number}.tar", "w") as shard:
            for of, data in images[number::SHARDS]:
                member = tarfile.TarInfo(of)
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    table = pa.table({"image": [{"bytes": data, "path": of} for of, data in images]})
    parquet.write_table(table, home / "images.parquet", row_group_size=GROUP)
    return {
        "folder": folder,
        "zip, stored": home / "stored.zip",
        "zip, deflated": home / "deflated.zip",
        "tar, four shards": home / "shard-*.tar",
        f"Parquet, row groups of {GROUP}": home / "images.parquet",
    }


def seconds(data: ImageDataset, positions: Sequence[int]) -> float:
    """Processor time of an image at these positions."""
    began = time.process_time()
    assert all(data[0, position].x is not None for position in positions)
    return (time.process_time() - began) / len(positions)


def main() -> None:
    """Print the table."""
    sets = {
        title: ImageDataset(scan([place], 0), ImageSettings(data=(place,), resolution=256), seed=0, train=True)
        for title, place in forms_of(photographs(room() / "images", COUNT, 256)).items()
    }
    order = np.random.default_rng(0).permutation(COUNT)
    taken: dict[tuple[str, bool], list[float]] = {}
    for start in range(0, (ROUNDS + 1) * PER_ROUND, PER_ROUND):
        for title, data in sets.items():
            for at_random in (True, False):
                at = order[start : start + PER_ROUND].tolist() if at_random else range(start, start + PER_ROUND)
                taken.setdefault((title, at_random), []).append(seconds(data, at))
    print("| | microseconds, at random | of a folder | in order | of a folder |\n|---|---:|---:|---:|---:|")
    found = {key: statistics.median(times[1:]) for key, times in taken.items()}  # the first round warms up
    for title in sets:
        pairs = [(found[title, way], found["folder", way]) for way in (True, False)]
        print(f"| {title} | {' | '.join(f'{1e6 * own:,.0f} | {own / folder:.3g}' for own, folder in pairs)} |")


if __name__ == "__main__":
    main()
