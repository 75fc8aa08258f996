"""Writes docs/benchmarks.md from the files of results."""

import json
import statistics
from pathlib import Path
from typing import Any

from tests.bench.contest import Row, processor, ratio

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
PAGE = FOLDER.parent / "benchmarks.md"
REMARKS = FOLDER / "remarks.md"
TITLES = {"cuda": "CUDA", "cpu-amx": "CPU, with AMX", "cpu": "CPU"}  # of the files of results
INTRODUCTION = """\
Each case runs lightdiff and its peers in processes of their own, one round each in turn, so that all meet the same
machine. A ratio is the median, over rounds, of how many times as many images a second lightdiff makes. The *original*
is lightdiff's re-creation of the scripts it began from, run as they ran: float32, AdamW without fused kernels, an
averaging loop in Python, Pillow and torchvision's transforms, pickled latents. *diffusers* is run as its training
examples do. *Of the peak* is the share of what this machine multiplies at best, measured in the same run. Memory is
the peak of the process, or of the GPU's allocator; in brackets, beyond its imports."""
HEAD = (
    "| | {unit} | lightdiff's ratio | wanted | memory | parameters | GFLOP an image | of the peak | precision |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---|"
)


def lines(case: dict[str, Any], absolute: bool = True) -> list[str]:
    """A case as rows of a table; images a second are left out where they say nothing about another machine."""
    rows = [Row(**row) for row in case["rows"]]
    ours = rows[0]
    found = []
    for row in rows:
        rate = row.flops / statistics.median(row.seconds)
        best = max((v for name, v in case["peak"].items() if name.endswith(row.precision)), default=0.0)
        speed = f"{row.speed if absolute else row.speed / ours.speed:.3g}"
        if row.images == 1:  # a command
            speed = f"{statistics.median(row.seconds):.2f} s"
        cells = [
            row.contender,
            speed,
            f"{ratio(ours, row):.2f} x" if row is not ours else "",
            f"{case['wanted'][row.contender]:g} x" if row.contender in case["wanted"] else "",
            f"{row.memory / 1e6:,.0f} MB ({(row.memory - row.memory_before) / 1e6:+,.0f})",
            f"{row.parameters / 1e6:.1f} M" if row.parameters else "",
            f"{row.flops / row.images / 1e9:.3g}" if row.flops else "",
            f"{rate / best:.0%}" if row.flops else "",
            row.precision if row.flops else "",
        ]
        found.append("| " + " | ".join(cells) + " |")
    return found


def name_of(device: str) -> str:
    """The name of the results on this machine: processors with instructions for matrices in bf16 have their own."""
    return "cpu-amx" if device == "cpu" and "AMX" in processor() else device


def write() -> None:
    """Write the page."""
    parts = [
        "# Benchmarks",
        "*This page is written by `nox -s bench -- --write` from the results beside it; only the "
        "remarks at its end are written by hand.*",
        INTRODUCTION,
    ]
    for name, title in TITLES.items():
        path = FOLDER / f"{name}.json"
        if path.is_file():
            parts += section(title, json.loads(path.read_text()))
        else:
            parts += [f"## {title}", "Not measured yet."]
    if REMARKS.is_file():
        parts.append(REMARKS.read_text().strip())
    PAGE.write_text("\n\n".join(parts) + "\n")


def section(title: str, kept: dict[str, Any]) -> list[str]:
    """Every measurement on one kind of machine."""
    about = [kept["machine"], f"Python {kept['python']}"]
    about += [f"{name} {kept[name]}" for name in ("torch", "torchvision", "diffusers", "pillow")]
    tried = next(iter(kept["cases"].values()))["peak"]
    peaks = ", ".join(f"{name} {max(c['peak'][name] for c in kept['cases'].values()) / 1e12:.3g}" for name in tried)
    device = title.partition(",")[0].lower()
    absolute = device != "cpu"
    parts = [
        f"## {title}",
        f"{'; '.join(about)}; {kept['date']}; `nox -s bench -- --device {device}`. Peaks in TFLOP/s: {peaks}."
        + ("" if absolute else " Speeds are relative to lightdiff's: absolute ones vary from day to day."),
    ]
    for case in kept["cases"].values():
        head = HEAD.format(unit="images/s" if absolute else "speed")
        parts.append(f"**{case['title']}**\n\n{head}\n" + "\n".join(lines(case, absolute)))
    if "profile" in kept:
        parts += profile(kept["profile"])
    if "memory" in kept:
        parts += memory(kept["memory"])
    if "growth" in kept:
        parts += growth(kept["growth"])
    if "quality" in kept:
        parts += quality(kept["quality"])
    return parts


def profile(found: dict[str, Any]) -> list[str]:
    """Time of each part of a training step."""
    parts = ["### Where the time of a training step goes (`nox -s bench -- profile`)"]
    for title, contenders in found.items():
        names = list(dict.fromkeys(name for _, shares in contenders.values() for name in shares))
        rows = [f"| {title} | " + " | ".join(contenders) + " |", "|---|" + "---:|" * len(contenders)]
        base, (first, parts_of_base) = next(iter(contenders.items()))
        for name in sorted(names, key=lambda n: -parts_of_base.get(n, 0)):
            rows.append(f"| {name} | " + " | ".join(f"{s.get(name, 0):.1%}" for _, s in contenders.values()) + " |")
        times = " | ".join(f"{t / first:.2f}" for t, _ in contenders.values())
        rows.append(f"| time of a step, {base} = 1 | {times} |")
        parts.append("\n".join(rows))
    return parts


def memory(rows: list[dict[str, Any]]) -> list[str]:
    """Peak memory against batch."""
    table = ["| preset | batch | all activations kept | `--checkpoint-activations` |", "|---|---:|---:|---:|"]
    for row in rows:
        cells = [f"{row[name] / 1e9:.2f} GB" if row[name] else "too large" for name in ("kept", "computed again")]
        table.append(f"| {row['preset']} | {row['batch']} | {cells[0]} | {cells[1]} |")
    return ["### Peak memory (`nox -s bench -- memory`): U-Nets on 4 x 32 x 32, VAEs on 256 px", "\n".join(table)]


def growth(found: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Time and memory against the number of images, their size and the number of processes."""
    parts = ["### What grows with what (`nox -s bench -- growth`)", "![Growth](benchmarks/growth.svg)"]
    for title, rows in found.items():
        names = list(next(iter(rows.values())))
        table = [f"| {title} | " + " | ".join(names) + " |", "|---:|" + "---:|" * len(names)]
        for value, row in rows.items():
            cells = [f"{row[n] / 1e6:,.0f} MB" if n == "memory" else f"{row[n]:.3g}" for n in names]
            table.append(f"| {int(value):,} | " + " | ".join(cells) + " |")
        parts.append("\n".join(table))
    plot = "![Seconds grow with the number of images, bytes an image hardly](benchmarks/images.svg)"
    return [*parts, f"{plot}\n\n*Lists of images, `python -m tests.bench.images`; [remarks](#remarks) have the table.*"]


def quality(found: dict[str, Any]) -> list[str]:
    """Losses and distances of the fast defaults beside those of float32."""
    table = ["| precision | seed | " + " | ".join(found["names"]) + " |", "|---|---:|" + "---:|" * len(found["names"])]
    for row in found["rows"]:
        numbers = " | ".join(f"{row[name]:.4g}" for name in found["names"])
        table.append(f"| {row['precision']} | {row['seed']} | {numbers} |")
    return ["### Is what is faster as good? (`nox -s bench -- quality`)", found["about"], "\n".join(table)]
