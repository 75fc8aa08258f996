"""What was collected -> one HTML page that needs no network: plotly for curves, a little script for sliders."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightdiff import __version__
from lightdiff.extras.evidence import question
from lightdiff.extras.latent_facts import EDGES
from lightdiff.extras.report.collect import Curve, RunFacts, Training
from lightdiff.extras.report.measure import Picture
from lightdiff.extras.settings_rows import words

HERE = Path(__file__).parent
MARK = "<!-- a report of lightdiff -->"
STAGES = {"vae": "VAE", "unet": "U-Net"}
CHARTS: dict[str, list[tuple[str, dict[str, str], bool]]] = {  # title, curves with their names, whether log
    "vae": [
        ("Loss", {"loss": "training", "val_loss": "validation"}, True),
        ("Error of the pixels (MSE)", {"mse": "training", "val_mse": "validation"}, True),
        ("Error of the pixels (L1)", {"l1": "training", "val_l1": "validation"}, True),
        ("KL divergence, nats an element", {"kl": "training", "val_kl": "validation"}, False),
        ("LPIPS", {"lpips": "training", "val_lpips": "validation"}, False),
        ("PSNR of validation images, dB", {"val_psnr": "validation"}, False),
    ],
    "unet": [
        ("Loss", {"loss": "training", "val_loss": "validation"}, False),
        (
            "Validation loss by noise band (1: the least noise)",
            {f"val_loss_band_{b}": f"band {b}" for b in range(1, 5)},
            True,
        ),
    ],
}
BOTH = [
    ("Norm of the gradient", {"grad_norm": "gradient"}, True),
    ("Learning rate", {"lr": "learning rate"}, False),
]
MACHINE = [
    ("Images a second", {"images_per_s": "images a second"}, False),
    ("Memory of the process or the GPU, MB", {"memory_mb": "memory"}, False),
]
MEASURES = {  # of a snapshot, in words
    "val_loss": "validation loss",
    "val_mse": "error of the pixels (MSE)",
    "val_l1": "error of the pixels (L1)",
    "val_kl": "KL, nats an element",
    "val_kl_sum": "KL, nats an image",
    "val_lpips": "LPIPS",
    "val_psnr": "PSNR (dB)",
    "val_loss_band_1": "loss in band 1 (the least noise)",
    "val_loss_band_2": "loss in band 2",
    "val_loss_band_3": "loss in band 3",
    "val_loss_band_4": "loss in band 4 (the most noise)",
}
BETTER = {  # which of two values is the better one
    "PSNR (dB)": max,
    "SSIM": max,
    "precision": max,
    "recall": max,
    "LPIPS": min,
    "loss": min,
    "error": min,
    "FID": min,
    "KID": min,
    "Frechet distance": min,
    "kernel distance": min,
}


def render(runs: Sequence[RunFacts]) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    several = len(runs) > 1
    names = unique([run.name for run in runs])
    charts: list[dict[str, Any]] = []
    sliders: list[dict[str, Any]] = []
    context = {
        "mark": MARK,
        "version": __version__,
        "title": " and ".join(names) if several else names[0],
        "several": several,
        "names": names,
        "runs": runs,
        "stages": STAGES,
        "metrics": metrics_table(runs),
        "differences": differences(runs) if several else [],
        "time_table": time_table(runs),
        "charts": {
            **{stage: add_charts(charts, runs, names, stage, [*CHARTS[stage], *BOTH]) for stage in STAGES},
            **{f"{stage} machine": add_charts(charts, runs, names, stage, MACHINE) for stage in STAGES},
            "latents": add_histograms(charts, runs, names),
        },
        "sliders": {
            **{stage: add_slider(sliders, names, grids_of(runs, stage), "step") for stage in STAGES},
            "trajectory": add_slider(sliders, names, trajectories_of(runs), "moment"),
        },
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "script": (HERE / "page.js").read_text(encoding="utf-8"),
        "plotly": get_plotlyjs(),
        "words": words,
        "scaling": [scaling_words(run) for run in runs],
    }
    context["data"] = {"charts": charts, "sliders": sliders}
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(context)


def unique(names: list[str]) -> list[str]:
    """Names that differ, where two runs are called the same."""
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


# --- tables -------------------------------------------------------------------------------------------------------


def metrics_table(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """What was measured of each run: a name, a value for each run, and which is the best."""
    measured: dict[str, dict[int, float]] = {}
    for number, run in enumerate(runs):
        for stage, training in run.trainings():
            for name, value in training.metadata.metrics.items():
                called = MEASURES.get(name, name.removeprefix("val_"))
                measured.setdefault(f"{STAGES[stage]}: {called}", {})[number] = value
        for stage, results in run.evaluation.items():
            for name, value in results.items():
                if isinstance(value, (int, float)) and not name.endswith("+-"):
                    measured.setdefault(f"{STAGES.get(stage, stage)}, evaluated: {name}", {})[number] = value
    return [
        {
            "name": name,
            "values": [number_words(values.get(i)) for i in range(len(runs))],
            "best": best(runs, name, values),
        }
        for name, values in measured.items()
    ]


def best(runs: Sequence[RunFacts], name: str, values: dict[int, float]) -> list[int]:
    """The runs with the better value, where that can be said and they differ."""
    choose = next((choose for word, choose in BETTER.items() if word in name), None)
    if choose is None or len(set(values.values())) < 2:
        return []
    if "loss" in name:
        stage = next(stage for stage, title in STAGES.items() if name.startswith(title))
        first, *others = [question(getattr(runs[i], stage).metadata) for i in values]
        if any(other != first for other in others):
            return []
    wanted = choose(values.values())
    return [number for number, value in values.items() if value == wanted]


def differences(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """The settings that differ between runs: stage, flag, a value for each run."""
    rows = []
    for stage, title in STAGES.items():
        tables = [{row.flag: row.value for row in t.rows} if (t := getattr(run, stage)) else {} for run in runs]
        flags = [flag for flag in dict.fromkeys(flag for table in tables for flag in table) if flag != "run"]
        for flag in flags:
            if len({table.get(flag, "-") for table in tables if table}) > 1:  # a run without the stage has none
                rows.append({"stage": title, "flag": flag, "values": [table.get(flag, "-") for table in tables]})
    for what in ("shift", "scale"):
        values = [
            ", ".join(f"{v:.3g}" for v in getattr(run.index.statistics, what))
            if run.index and run.index.statistics
            else "-"
            for run in runs
        ]
        if len(set(values)) > 1:
            rows.append({"stage": "latents", "flag": what, "values": values})
    return rows


def time_table(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """What each training took."""
    rows = []
    for stage, title in STAGES.items():
        if any(getattr(run, stage) for run in runs):
            rows.append({"name": title, "values": [time_words(getattr(run, stage)) for run in runs]})
    return rows


def time_words(training: Training | None) -> str:
    """A training's steps, speed, time and memory in words."""
    if training is None:
        return "-"
    speed, memory = training.middle("images_per_s"), training.curves.get("memory_mb")
    said = f"{training.metadata.step:,} steps, {training.metadata.images_seen:,} images"
    if speed:
        said += f", {speed:.3g} images/s, about {duration(training.metadata.images_seen / speed)}"
    return said + (f", {max(memory.values) / 1000:.2f} GB" if memory else "")


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def number_words(value: float | None) -> str:
    """A number for a table."""
    return (
        "-"
        if value is None
        else f"{value:,.0f}"
        if float(value).is_integer() and abs(value) >= 1000
        else f"{value:.4g}"
    )


def scaling_words(run: RunFacts) -> str:
    """What scaling does, in words."""
    if run.index is None or run.index.statistics is None:
        return "The latents have not been scaled yet."
    s = run.index.statistics
    kind = "each channel its own" if len(s.scale) > 1 else "one for all"
    shift, scale = (", ".join(f"{v:.3f}" for v in values) for values in (s.shift, s.scale))
    return (
        f"Over {run.index.splits.count('t'):,} training images the latents have mean {s.mean:.3f} and standard "
        f"deviation {s.std:.3f}. The U-Net sees (z - shift) * scale with shift {shift} and scale {scale} ({kind}), "
        "so that signal and unit noise are of one size."
    )


# --- charts and sliders -------------------------------------------------------------------------------------------


def add_charts(
    charts: list[dict[str, Any]],
    runs: Sequence[RunFacts],
    names: list[str],
    stage: str,
    wanted: list[tuple[str, dict[str, str], bool]],
) -> list[dict[str, Any]]:
    """Charts of a stage's curves; those without any curve are left out."""
    added = []
    for title, curves, log in wanted:
        series = []
        for number, run in enumerate(runs):
            training: Training | None = getattr(run, stage)
            for style, (key, called) in enumerate(curves.items()):
                if training and key in training.curves:
                    label = f"{names[number]}: {called}" if len(runs) > 1 else called
                    series.append(line(label, training.curves[key], number, style, len(runs) > 1))
        if series:
            log = log and all(v > 0 for s in series for v in s["y"] if v is not None)
            added.append(new_chart(charts, f"{STAGES[stage]}: {title}", "optimizer step", series, log))
    return added


def line(label: str, curve: Curve, run: int, style: int, several: bool) -> dict[str, Any]:
    """A line: in comparisons the colour is the run's and the dash the curve's, else the colour is the curve's."""
    finite = [v if math.isfinite(v) else None for v in curve.values]
    colour, dash = (run, style) if several else (style, 0)
    return {"name": label, "x": curve.steps, "y": finite, "colour": colour, "dash": dash, "marks": len(finite) < 30}


def new_chart(
    charts: list[dict[str, Any]], title: str, x: str, series: list[dict[str, Any]], log: bool
) -> dict[str, Any]:
    """Put a chart on the list."""
    chart = {"id": f"chart-{len(charts)}", "title": title, "x": x, "log": log, "series": series}
    charts.append(chart)
    return chart


def add_histograms(charts: list[dict[str, Any]], runs: Sequence[RunFacts], names: list[str]) -> list[dict[str, Any]]:
    """Latents' histograms, channel by channel, against the unit normal."""
    middles = [(a + b) / 2 for a, b in pairwise(EDGES)]
    normal = [math.exp(-m * m / 2) / math.sqrt(2 * math.pi) for m in middles]
    added = []
    for number, run in enumerate(runs):
        if run.latents is None:
            continue
        series = [
            {"name": f"channel {c}", "x": middles, "y": channel.histogram, "colour": c, "dash": 0, "marks": False}
            for c, channel in enumerate(run.latents.channels)
        ]
        series.append({"name": "unit normal", "x": middles, "y": normal, "colour": -1, "dash": 1, "marks": False})
        whose = f" of {names[number]}" if len(runs) > 1 else ""
        added.append(new_chart(charts, f"Scaled latents{whose}, density", "value", series, False))
    return added


def grids_of(runs: Sequence[RunFacts], stage: str) -> list[list[tuple[float, str, Picture]]]:
    """Each run's grids through time."""
    return [[(step, f"step {step:,}", p) for step, p in t.grids] if (t := getattr(run, stage)) else [] for run in runs]


def trajectories_of(runs: Sequence[RunFacts]) -> list[list[tuple[float, str, Picture]]]:
    """Each run's way from noise to images."""
    return [[(i, said, picture) for i, (said, picture) in enumerate(run.trajectory)] for run in runs]


def add_slider(
    sliders: list[dict[str, Any]], names: list[str], columns: list[list[tuple[float, str, Picture]]], unit: str
) -> dict[str, Any] | None:
    """One slider that moves all runs' pictures; each shows its last one that is not later than where the slider is."""
    places = sorted({place for column in columns for place, _, _ in column})
    if not places:
        return None
    slider: dict[str, Any] = {"id": f"slider-{len(sliders)}", "unit": unit, "last": len(places) - 1, "columns": []}
    for name, column in zip(names, columns, strict=True):
        if not column:
            continue
        at = [max((i for i, (p, _, _) in enumerate(column) if p <= place), default=0) for place in places]
        frames = [{"label": label, **asdict(picture)} for _, label, picture in column]
        slider["columns"].append({"name": name, "at": at, "frames": frames})
    sliders.append(slider)
    return slider
