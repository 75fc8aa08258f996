"""What lists of many images cost: `python -m tests.bench.images [COUNT ...]`, processor time and memory for each count.

A source of made-up names stands for archives, whose index lists them; files and pixels are none. Each step is a process
of its own: the first search, the start after it (a list that is taken over, an order, batches), and latents' index.
Results are added to docs/benchmarks/images.json, from which images.svg beside it is drawn (needs matplotlib).
"""

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lightdiff.data import files
from lightdiff.data.files import Source, find_images
from lightdiff.data.index import read_index
from lightdiff.data.order import batch_at
from lightdiff.data.table import ImageList, ImageTable
from tests.bench.contest import resident
from tests.bench.growth import apart
from tests.bench.index import finished_index

COUNTS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
SECONDS = {
    "search s": "first search",
    "start s": "start",
    "index s": "index of latents",
    "train-unet s": "train-unet's start",
}
MEMORY = {
    "its peak B an image": "first search, peak",
    "list B an image": "its list",
    "train-vae B an image": "train-vae's own",
}
HIDDEN = 100_000  # images, below which what a process takes anyway hides the memory of a list


def made_up(place: Path, passed_over: Counter[str]) -> Iterator[str]:
    """Names in folders of a thousand, of 21 bytes, as many as the place is called."""
    return (f"{i // 1000:05d}/img{i:08d}.jpg" for i in range(int(place.stem)))


files.SOURCES[".names"] = Source(made_up, files.open_in_folder)


def used(before: float) -> int:
    """Bytes of this process's own memory beyond what it had before."""
    return int(resident("RssAnon") - before)


def search(folder: Path, count: int) -> dict[str, float]:
    """The first search for images, and the list that is kept."""
    place = folder / f"{count}.names"
    place.touch()
    before, whole, began = resident("RssAnon"), resident("VmRSS"), time.process_time()
    found = find_images((place,), 0.05)
    seconds = time.process_time() - began
    peak = resident("VmHWM") - whole
    found.files.table.write(folder / "images.safetensors")
    return {"search s": seconds, "its peak B an image": peak / count, "list B an image": used(before) / count}


def start(folder: Path, count: int) -> dict[str, float]:
    """What a training does with a list that is taken over, until it has the first batches."""
    before, began = resident("RssAnon"), time.process_time()
    images = ImageList(ImageTable.read(folder / "images.safetensors"))
    images.where(np.isin(images.table.endings, (b".tif", b".png")))
    digest, train, val = images.table.list_digest(), images.of_split("train"), images.of_split("val")
    batches = [[train[i].path for _, i in batch_at(at, 64, len(train), seed=0)] for at in range(0, 640, 64)]
    seconds = time.process_time() - began
    assert digest
    assert len(val) < len(train)
    assert len(batches[-1]) == 64
    mapped = resident("RssFile")
    return {"start s": seconds, "train-vae B an image": used(before) / count, "of all processes MB": mapped / 1e6}


def latents(folder: Path, count: int) -> dict[str, float]:
    """The index of latents: made and written by encode, read by train-unet."""
    images = ImageList(ImageTable.read(folder / "images.safetensors"))
    began = time.process_time()
    index = finished_index(images, (4, 32, 32))
    parts = index.by_shard()
    index.write(folder / "index.safetensors")
    assert len(parts) == len(index.shards)
    return {"index s": time.process_time() - began}


def unet(folder: Path, count: int) -> dict[str, float]:
    """What train-unet does with the index until it has the first batch, but for the latents."""
    before, began = resident("RssAnon"), time.process_time()
    index = read_index(folder, finished=True)
    parts, train = index.by_shard(), index.positions("train").astype(np.int32)
    del parts
    batch = batch_at(0, 64, len(train), seed=0)
    assert len(batch) == 64
    return {"train-unet s": time.process_time() - began, "train-unet B an image": used(before) / count}


def measure(counts: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """All steps for each count."""
    found: dict[str, dict[str, Any]] = {}
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="lightdiff-bench-") as folder:
            row: dict[str, Any] = {}
            for step in (search, start, latents, unet):
                row |= apart(step, Path(folder), count)
        found[str(count)] = {name: round(value, 2) for name, value in row.items()}
        print(count, json.dumps(found[str(count)]), flush=True)
    return found


def plot(found: dict[str, dict[str, float]], path: Path) -> None:
    """Seconds, and bytes an image, against the number of images."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lightdiff"
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, rows, least in ((left, SECONDS, 0), (right, MEMORY, HIDDEN)):
        at = sorted(count for count in map(int, found) if count >= least)
        for name, label in rows.items():
            axis.plot(at, [max(found[str(count)][name], 1e-2) for count in at], marker="o", label=label)
        axis.set(xscale="log", yscale="log", xlabel="images")
        axis.legend(frameon=False, fontsize=9)
    left.set_ylabel("seconds of processor time")
    right.set_ylabel("bytes an image")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure the counts given, or all, and draw all that have been measured."""
    kept = json.loads((FOLDER / "images.json").read_text()) if (FOLDER / "images.json").is_file() else {}
    kept |= measure(tuple(map(int, sys.argv[1:])) or COUNTS)
    (FOLDER / "images.json").write_text(json.dumps(kept, indent=1) + "\n")
    plot(kept, FOLDER / "images.svg")


if __name__ == "__main__":
    main()
