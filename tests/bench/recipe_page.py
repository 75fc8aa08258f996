"""Writes docs/recipe.md and its curve from the measured rows."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs" / "recipe"
ROWS = FOLDER / "rows.csv"
SUMMARY = FOLDER / "summary.md"
REMARKS = FOLDER / "remarks.md"
ELSEWHERE = FOLDER / "elsewhere.csv"
CURVE = FOLDER / "curve.svg"
PAGE = FOLDER.parent / "recipe.md"
BOUND = "\N{NO-BREAK SPACE}"  # between a number and its unit, in cells that are narrow
CALLS = (6, 10, 20, 50)  # of the network, that samplers are compared at
DEFAULT_CALLS = "dpm++2m-20"  # what the default row is among them
FLOORS = {  # rows without a U-Net: what is left of the distance if all that follows is right
    "photographs": "other photographs than these 5,000, as they are",
    "decoded-mu": "those, encoded and decoded by the default's VAE: from mu, which is what the U-Net learns",
    "decoded-draws": "the same, from draws of the posterior",
    "decoded-by-equivariance": "from mu, by the VAE of `equivariance`",
    "decoded-by-vae-original": "from mu, by the VAE of `vae-original`",
    "decoded-by-kl-1e-3": "from mu, by the VAE of `kl-1e-3`",
    "decoded-by-kl-1e-2": "from mu, by the VAE of `kl-1e-2`",
}
INTRODUCTION = """\
# The recipe, measured

*Tables and curve on this page are written by `nox -s recipe -- --write` from [the rows](recipe/rows.csv); summary and
remarks are written by hand.*

The budget is processor time, user and system of all threads: 900 s for the VAE and 1,500 s for the U-Net, on 10,000
photographs of faces at 64 px. Short runs tell how many steps it buys the default recipe. Every other row takes as
many, or more or fewer where a step costs something else: both recipes are then timed in turn. Every process computes in
one thread, and two of them run side by side on two cores. Drawing is not in the budget. What a second buys depends on
the processor, so there is a part of the page for each that rows were measured on, and a choice is compared with the
default of the same processor, and of the same seed.

The distance is the Frechet distance of Inception's 768 features between as many samples and 5,000 of the photographs:
lower is better, and it is no FID."""


def read(path: Path = ROWS) -> list[dict[str, Any]]:
    """The rows of a table, with numbers converted."""
    if not path.is_file():
        return []
    with path.open(newline="") as stream:
        return [{name: number(value) for name, value in row.items()} for row in csv.DictReader(stream)]


def number(text: str) -> Any:
    """A number where the text is one, else the text."""
    try:
        return float(text)
    except ValueError:
        return text


def table(rows: list[dict[str, Any]], about: dict[str, str], baseline: dict[float, float] | None = None) -> str:
    """Rows as a table; with a baseline for each seed, what each choice is worth."""
    head = ["", "seed", "Frechet-768", *(["worse than the default of that seed by"] if baseline else [])]
    head += ["PSNR", "VAE", "steps", "U-Net", "steps"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = [f"**{row['row']}**: {about[row['row']]}", f"{row['seed']:.0f}", f"{row['frechet']:.3f}"]
        if baseline:
            worse = row["frechet"] - baseline.get(row["seed"], math.nan)
            cells.append("" if row["row"] == "default" or math.isnan(worse) else f"{worse:+.3f}")
        cells += [f"{row['psnr']:.1f}{BOUND}dB"]
        for stage in ("vae", "unet"):
            cells += [f"{row[f'{stage}_parameters'] / 1e6:.2f}{BOUND}M", f"{row[f'{stage}_steps']:,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def floors_table(rows: list[dict[str, Any]]) -> str:
    """A table of the distances of images that no U-Net drew."""
    cells = [f"| {FLOORS[row['row']]} | {row['seed']:.0f} | {row['frechet']:.3f} |" for row in rows]
    return "\n".join(["| | seed | Frechet-768 |", "|---|---:|---:|", *cells])


def calls_table(rows: list[dict[str, Any]]) -> str:
    """A table of samplers against calls of the network."""
    found = {row["row"]: row["frechet"] for row in rows if row["seed"] == 0}
    splits = [name.rpartition("-") for name in found]
    samplers = dict.fromkeys(sampler for sampler, _, calls in splits if calls in map(str, CALLS))
    found |= {DEFAULT_CALLS: found["default"]} if "default" in found else {}
    values = {sampler: [found.get(f"{sampler}-{calls}") for calls in CALLS] for sampler in samplers}
    return by_calls(values) if values else ""


def by_calls(values: Mapping[str, Sequence[float | None]]) -> str:
    """A line for each sampler, with a value for each number of CALLS."""
    lines = [
        "| `--sampler` | " + " | ".join(f"{calls} calls" for calls in CALLS) + " |",
        "|---|" + "---:|" * len(CALLS),
    ]
    for sampler, row in values.items():
        cells = ("" if value is None else f"{value:.3f}" for value in row)
        lines.append(f"| `{sampler}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def steps_for(sampler: str, calls: int) -> int:
    """Number of steps in which a sampler makes `calls` calls of the network; heun's last step makes one."""
    return calls // 2 if sampler == "heun" else calls


def on_curve(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of whole recipes at several shares of the budget; none where there is only one share."""
    found = [row for row in rows if row["samples"] == 1000 and row["row"] in ("default", "original")]
    return found if len({row["share"] for row in found}) > 1 else []


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Distance against the share of the budget, of what was measured at several shares."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lightdiff"
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for line in dict.fromkeys((row["row"], row["processor"]) for row in rows):
        mine = [row for row in rows if (row["row"], row["processor"]) == line]
        shares = sorted({row["share"] for row in mine})
        means = [mean([row["frechet"] for row in mine if row["share"] == share]) for share in shares]
        if len(shares) > 1:
            axis.plot([2400 * share for share in shares], means, marker="o", label=", ".join(line))
    axis.set(xscale="log", yscale="log", xlabel="processor time of both trainings, s", ylabel="Frechet-768")
    shares = sorted({row["share"] for row in rows})
    axis.set_xticks([2400 * share for share in shares], [f"{2400 * share:,.0f}" for share in shares])
    axis.set_yticks(ticks := [0.3, 0.5, 1, 2, 3, 5], [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="center")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def elsewhere_table(rows: list[dict[str, Any]]) -> str:
    """Lightdiff beside its peer on each set: rows of one set and share come in pairs, and the ratio is of distances."""
    head = ["set", "px", "seed", "processor time", "contender", "PSNR", "Frechet-768", "of the peer's"]
    head += ["VAE", "steps", "U-Net", "steps"]
    lines = ["| " + " | ".join(head) + " |", "|---|---:|---:|---:|---|" + "---:|" * 7]
    key = ("set", "seed", "share", "samples", "processor")
    peers = {tuple(row[name] for name in key): row["frechet"] for row in rows if row["contender"] != "lightdiff"}
    for row in rows:
        ratio = row["frechet"] / peers[tuple(row[name] for name in key)] if row["contender"] == "lightdiff" else None
        seconds = f"{row['vae_cpu']:.0f} + {row['unet_cpu']:.0f}{BOUND}s"
        cells = [row["set"], f"{row['resolution']:.0f}", f"{row['seed']:.0f}", seconds, row["contender"]]
        cells += [f"{row['psnr']:.1f}{BOUND}dB", f"{row['frechet']:.3f}", "" if ratio is None else f"{ratio:.2f}"]
        for stage in ("vae", "unet"):
            cells += [f"{row[f'{stage}_parameters'] / 1e6:.2f}{BOUND}M", f"{row[f'{stage}_steps']:,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def page(rows: list[dict[str, Any]], about: dict[str, str]) -> str:
    """The page's text."""
    parts = [INTRODUCTION, SUMMARY.read_text().strip()]
    for processor in dict.fromkeys(row["processor"] for row in reversed(rows)):  # the last one measured on comes first
        parts += measured_on(processor, [row for row in rows if row["processor"] == processor], about)
    if curve := on_curve(rows):
        parts += ["## Distance against compute", "![Distance against processor time](recipe/curve.svg)"]
        cells = [
            f"| {row['row']} | {row['processor']} | {2400 * row['share']:,.0f} s | {row['seed']:.0f} | "
            f"{row['frechet']:.3f} |"
            for row in sorted(curve, key=lambda row: (row["row"], row["processor"], row["share"], row["seed"]))
        ]
        parts.append("\n".join(["| | | processor time | seed | Frechet-768 |", "|---|---|---:|---:|---:|", *cells]))
    if elsewhere := read(ELSEWHERE):
        parts += ["## Elsewhere, beside tuned diffusers", elsewhere_table(elsewhere)]
    return "\n\n".join([*parts, REMARKS.read_text().strip()]) + "\n"


def measured_on(processor: str, rows: list[dict[str, Any]], about: dict[str, str]) -> list[str]:
    """The tables of one processor's rows."""
    parts = [f"## Measured on two cores of: {processor}"]
    whole = [row for row in rows if row["row"] in ("default", "original") and row["samples"] == 2000]
    if whole:
        in_order = sorted(whole, key=lambda row: (row["row"], row["seed"]))
        parts += ["### The whole recipes, 2,000 samples", table(in_order, about)]
    few = [row for row in rows if row["samples"] == 1000]
    for share in sorted({row["share"] for row in few}, reverse=True):
        single = [row for row in few if row["row"] in about and row["share"] == share]
        base = {row["seed"]: row["frechet"] for row in single if row["row"] == "default"}
        if base and {row["row"] for row in single} - {"default", "original"}:
            budget = f" at {share:.2g} of the budget" if share < 1 else ""
            dearest_first = sorted(single, key=lambda row: (row["row"] != "default", -row["frechet"], row["seed"]))
            parts += [f"### What each choice is worth{budget}, 1,000 samples", table(dearest_first, about, base)]
    few = [row for row in few if row["share"] == 1]
    if floors := [row for row in few if row["row"] in FLOORS]:
        parts += ["### What is left if the U-Net is perfect, 1,000 images", floors_table(floors)]
    if calls := calls_table(few):
        parts += ["### Quality against calls of the network, 1,000 samples", calls]
    return parts


def write(about: dict[str, str]) -> None:
    """Write page and curve."""
    rows = read()
    if curve := on_curve(rows):
        plot(curve, CURVE)
    PAGE.write_text(page(rows, about))
