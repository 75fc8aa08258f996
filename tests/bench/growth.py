"""Time and memory against the number of images, their size, and the number of processes; a process for each point."""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.bench.contest import resident, timed

CPU = torch.device("cpu")
COUNTS = (1_000, 10_000, 100_000, 1_000_000)
SIDES = (32, 64, 128, 256)


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def make_latents(folder: Path, count: int) -> None:
    """Write `count` random latents of 4 x 4 x 4."""
    from tests.bench.cases import made_up_latents

    made_up_latents(folder, count, 4, shard_size=20_000)


def latents(count: int, folder: Path) -> dict[str, float]:
    """Time to open `count` latents, to gather a training batch of 64, and to compute their statistics; memory."""
    from lightdiff.data.latents import LatentSet
    from lightdiff.stages import scale

    before = resident("RssAnon")
    began = time.perf_counter()
    opened = LatentSet(folder)
    seconds = time.perf_counter() - began
    generator = torch.Generator().manual_seed(0)
    batches = [
        [opened.train[i] for i in torch.randint(len(opened.train), (64,), generator=generator).tolist()]
        for _ in range(50)
    ]
    batch = statistics.median(timed(lambda chosen=chosen: opened.gather(chosen), CPU) for chosen in batches)
    anonymous = resident("RssAnon")
    statistics_seconds = timed(lambda: scale.run(scale.ScaleSettings(latents=folder)), CPU)
    return {
        "open": seconds,
        "batch of 64": batch,
        "scale": statistics_seconds,
        "memory": anonymous - before,
    }


def names(count: int) -> dict[str, float]:
    """Time to find `count` files, and the memory of their list."""
    from lightdiff.data.files import find_images
    from tests.bench.cases import room

    folder = room()
    for i in range(count):
        if i % 1000 == 0:
            (folder / f"{i // 1000:04d}").mkdir()
        (folder / f"{i // 1000:04d}" / f"{i:07d}.jpg").touch()
    before = resident("RssAnon")
    kept: list[Any] = []
    seconds = timed(lambda: kept.append(find_images((folder,), 0.05).files), CPU)
    return {"scan": seconds, "memory": resident("RssAnon") - before}


def resolution(side: int) -> dict[str, float]:
    """A training step of the default VAE on four images of this size."""
    from tests.bench import cases

    cases.SMALL_VAE = {}  # the default architecture, which gets deeper with the size
    work = cases.vae_step("lightdiff", CPU, side=side, batch=4, steps=1)
    timed(work.round, CPU)
    seconds = statistics.median(timed(work.round, CPU) for _ in range(5))
    return {"step": seconds, "GFLOP an image": work.flops / 4 / 1e9, "memory": resident("VmHWM")}


def processes(count: int) -> dict[str, float]:
    """Images per second of train-unet with `count` processes, from its own metrics."""
    from lightdiff.run_folder import RunFolder
    from lightdiff.stages import scale
    from tests.bench.cases import made_up_latents, room

    run = room() / "run"
    made_up_latents(RunFolder(run).latents, 2048, 16)
    scale.run(scale.ScaleSettings(run=run))
    words = [sys.executable, "-m", "lightdiff", "train-unet", "--run", str(run), "--steps", "40", "--val-every", "0"]
    words += ["--model.width", "64", "--log-every", "10", "--nproc-per-node", str(count)]
    subprocess.run(words, check=True, capture_output=True)
    rows = [json.loads(line) for line in RunFolder(run).unet.metrics.read_text().splitlines()]
    first, last = rows[0], rows[-1]
    return {"images a second": (last["images_seen"] - first["images_seen"]) / (last["time"] - first["time"])}


def measure() -> dict[str, dict[str, dict[str, float]]]:
    """Every series of points."""
    most = int(os.environ.get("LIGHTDIFF_BENCH_MOST", COUNTS[-1]))
    found: dict[str, dict[str, dict[str, float]]] = {}
    series: list[tuple[str, Callable[..., Any], tuple[int, ...]]] = [
        ("latents", latents, tuple(n for n in COUNTS if n <= most)),
        ("names", names, tuple(n for n in COUNTS if n <= most)),
        ("resolution", resolution, SIDES),
        ("processes", processes, (1, 2)),
    ]
    for title, work, values in series:
        found[title] = {}
        for value in values:
            if work is latents:
                with tempfile.TemporaryDirectory(prefix="lightdiff-bench-") as folder:
                    apart(make_latents, Path(folder), value)
                    found[title][str(value)] = apart(work, value, Path(folder))
            else:
                found[title][str(value)] = apart(work, value)
            print(title, value, {name: round(v, 4) for name, v in found[title][str(value)].items()}, flush=True)
    return found


def plot(found: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Four panels on logarithmic axes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lightdiff"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    panels: list[tuple[Any, str, str, dict[str, float], str]] = [
        (axes[0, 0], "latents", "latents", {"open": 1, "batch of 64": 1, "scale": 1}, "seconds"),
        (axes[0, 1], "names", "image files", {"scan": 1}, "seconds"),
        (axes[1, 0], "resolution", "side of an image, px", {"step": 1}, "seconds a step of 4"),
    ]
    for axis, title, label, lines, unit in panels:
        at = [int(value) for value in found[title]]
        for name in lines:
            axis.plot(at, [row[name] for row in found[title].values()], marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel=unit)
        axis.set_xticks(at, [f"{value:,}" for value in at])
        axis.minorticks_off()
        axis.legend(frameon=False)
    axis = axes[1, 1]
    for title, label in (("latents", "latents"), ("names", "list of image files")):
        at = [int(value) for value in found[title]]
        axis.plot(at, [max(row["memory"], 1e5) / 1e6 for row in found[title].values()], marker="o", label=label)
    axis.set(xscale="log", yscale="log", xlabel="images", ylabel="MB of memory")
    axis.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
