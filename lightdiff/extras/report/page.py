"""The collected contents -> one HTML page that works offline: plotly for curves, a small script for sliders."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightdiff import __version__
from lightdiff.extras.baselines import baselines_of
from lightdiff.extras.evidence import loss_definition
from lightdiff.extras.latent_facts import EDGES
from lightdiff.extras.report.collect import Curve, RunFacts, Training
from lightdiff.extras.report.measure import Picture
from lightdiff.extras.settings_rows import format_duration

HERE = Path(__file__).parent
MARK = "<!-- a report of lightdiff -->"
STAGES = {"vae": "VAE", "unet": "U-Net"}
CHARTS: dict[str, list[tuple[str, dict[str, str], bool]]] = {  # title, curves with their names, log scale
    "vae": [
        ("Loss", {"loss": "training", "val_loss": "validation"}, True),
        ("Pixel error (MSE)", {"mse": "training", "val_mse": "validation"}, True),
        ("Pixel error (L1)", {"l1": "training", "val_l1": "validation"}, True),
        ("KL divergence, nats per element", {"kl": "training", "val_kl": "validation"}, False),
        ("LPIPS", {"lpips": "training", "val_lpips": "validation"}, False),
        ("PSNR, dB", {"val_psnr": "validation"}, False),
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
    ("Gradient norm", {"grad_norm": "gradient"}, True),
    ("Learning rate", {"lr": "learning rate"}, False),
]
MACHINE = [
    ("Images per second", {"images_per_s": "images per second"}, False),
    ("Memory (GPU, or process on a CPU), MB", {"memory_mb": "memory"}, False),
]
MEASURES = {  # names of a checkpoint's metrics
    "val_loss": "validation loss",
    "val_mse": "pixel error (MSE)",
    "val_l1": "pixel error (L1)",
    "val_kl": "KL, nats per element",
    "val_kl_sum": "KL, nats per image",
    "val_lpips": "LPIPS",
    "val_psnr": "PSNR (dB)",
    "val_loss_band_1": "loss in band 1 (the least noise)",
    "val_loss_band_2": "loss in band 2",
    "val_loss_band_3": "loss in band 3",
    "val_loss_band_4": "loss in band 4 (the most noise)",
}
BETTER = {  # which of two values is better, by words in a measure's name
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
    """The page, as HTML."""
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
            "trajectory": add_slider(sliders, names, trajectories_of(runs), "call"),
        },
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "script": (HERE / "page.js").read_text(encoding="utf-8"),
        "plotly": get_plotlyjs(),
        "scaling": [describe_scaling(run) for run in runs],
    }
    context["data"] = {"charts": charts, "sliders": sliders}
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(context)


def unique(names: list[str]) -> list[str]:
    """The names, numbered where two runs have the same one."""
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


# --- tables -------------------------------------------------------------------------------------------------------


def metrics_table(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """Measures of the runs: a name, a value for each run, and which of them are best."""
    measured: dict[str, dict[int, float]] = {}
    known: dict[str, dict[int, float]] = {}
    for number, run in enumerate(runs):
        for stage, training in run.trainings():
            baselines = baselines_of(training.metadata)
            for name, value in training.metadata.metrics.items():
                measure = f"{STAGES[stage]}: {MEASURES.get(name, name.removeprefix('val_'))}"
                measured.setdefault(measure, {})[number] = value
                if name in baselines:
                    known.setdefault(measure, {})[number] = baselines[name]
        for stage, results in run.evaluation.items():
            for name, value in results.items():
                if isinstance(value, (int, float)) and not name.endswith("+-"):
                    measured.setdefault(f"{STAGES.get(stage, stage)}, evaluated: {name}", {})[number] = value
    return [
        {
            "name": name,
            "values": [format_loss(values.get(i), known.get(name, {}).get(i)) for i in range(len(runs))],
            "best": best(runs, name, values),
        }
        for name, values in measured.items()
    ]


def best(runs: Sequence[RunFacts], name: str, values: dict[int, float]) -> list[int]:
    """The runs with the best value, if values differ and can be compared."""
    choose = next((choose for word, choose in BETTER.items() if word in name), None)
    if choose is None or len(set(values.values())) < 2:
        return []
    if "loss" in name:
        stage = next(stage for stage, title in STAGES.items() if name.startswith(title))
        first, *others = [loss_definition(getattr(runs[i], stage).metadata) for i in values]
        if any(other != first for other in others):
            return []
    wanted = choose(values.values())
    return [number for number, value in values.items() if value == wanted]


def differences(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """The settings that differ between runs: stage, flag, and a value for each run."""
    rows = []
    for stage, title in STAGES.items():
        tables = [{row.flag: row.value for row in t.rows} if (t := getattr(run, stage)) else {} for run in runs]
        flags = [flag for flag in dict.fromkeys(flag for table in tables for flag in table) if flag != "run"]
        for flag in flags:
            if len({table.get(flag, "-") for table in tables if table}) > 1:  # a run without the stage has none
                rows.append({"stage": title, "flag": flag, "values": [table.get(flag, "-") for table in tables]})
    for what in ("shift", "scale"):
        statistics = [run.index.statistics if run.index else None for run in runs]
        values = [", ".join(f"{v:.3g}" for v in getattr(s, what)) if s else "-" for s in statistics]
        if len(set(values)) > 1:
            rows.append({"stage": "latents", "flag": what, "values": values})
    return rows


def time_table(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """Steps, speed, time and memory of each training."""
    rows = []
    for stage, title in STAGES.items():
        if any(getattr(run, stage) for run in runs):
            rows.append({"name": title, "values": [describe_cost(getattr(run, stage)) for run in runs]})
    return rows


def describe_cost(training: Training | None) -> str:
    """A training's steps, speed, time and memory, as text."""
    if training is None:
        return "-"
    speed, memory = training.median_of("images_per_s"), training.curves.get("memory_mb")
    text = f"{training.metadata.step:,} steps, {training.metadata.images_seen:,} images"
    if speed:
        text += f", {speed:.3g} images/s"
    if training.seconds_an_image:
        text += f", about {format_duration(training.metadata.images_seen * training.seconds_an_image)}"
    return text + (f", {max(memory.values) / 1000:.2f} GB" if memory else "")


def format_number(value: float | None) -> str:
    """A number for a table; "-" if there is none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1000 else f"{value:.4g}"


def format_loss(value: float | None, known: float | None) -> str:
    """A number for a table, in parentheses what knowing the noise level alone reaches, where that is known."""
    return format_number(value) + (f" ({format_number(known)})" if known is not None else "")


def describe_scaling(run: RunFacts) -> str:
    """The latents' statistics and their scaling, as text."""
    if run.index is None or run.index.statistics is None:
        return "The latents have not been scaled yet."
    s = run.index.statistics
    kind = "per channel" if len(s.scale) > 1 else "for all channels"
    shift, scale = (", ".join(f"{v:.3f}" for v in values) for values in (s.shift, s.scale))
    return (
        f"Over {run.index.of_split('train').sum():,} training images the latents have mean {s.mean:.3f} and standard "
        f"deviation {s.std:.3f}. The U-Net is trained on (z - shift) * scale with shift {shift} and scale {scale} "
        f"({kind}), so that the signal has the same variance as the noise."
    )


# --- charts and sliders -------------------------------------------------------------------------------------------


def add_charts(
    charts: list[dict[str, Any]],
    runs: Sequence[RunFacts],
    names: list[str],
    stage: str,
    wanted: list[tuple[str, dict[str, str], bool]],
) -> list[dict[str, Any]]:
    """Charts of a stage's curves; those without data are left out."""
    added = []
    for title, curves, log in wanted:
        series = []
        for number, run in enumerate(runs):
            training: Training | None = getattr(run, stage)
            for style, (key, name) in enumerate(curves.items()):
                if training and key in training.curves:
                    label = f"{names[number]}: {name}" if len(runs) > 1 else name
                    series.append(line(label, training.curves[key], number, style, len(runs) > 1))
        if series:
            log = log and all(v > 0 for s in series for v in s["y"] if v is not None)
            added.append(new_chart(charts, f"{STAGES[stage]}: {title}", "optimizer step", series, log))
    return added


def line(label: str, curve: Curve, run: int, style: int, several: bool) -> dict[str, Any]:
    """A line: its colour marks the curve; in comparisons the colour marks the run, and dashes the curve."""
    finite = [v if math.isfinite(v) else None for v in curve.values]
    colour, dash = (run, style) if several else (style, 0)
    return {"name": label, "x": curve.steps, "y": finite, "colour": colour, "dash": dash, "marks": len(finite) < 30}


def new_chart(
    charts: list[dict[str, Any]], title: str, x: str, series: list[dict[str, Any]], log: bool
) -> dict[str, Any]:
    """Add a chart to the list."""
    chart = {"id": f"chart-{len(charts)}", "title": title, "x": x, "log": log, "series": series}
    charts.append(chart)
    return chart


def add_histograms(charts: list[dict[str, Any]], runs: Sequence[RunFacts], names: list[str]) -> list[dict[str, Any]]:
    """Histograms of the scaled latents, channel by channel, beside the standard normal density."""
    centres = [(a + b) / 2 for a, b in pairwise(EDGES)]
    normal = [math.exp(-m * m / 2) / math.sqrt(2 * math.pi) for m in centres]
    added = []
    for number, run in enumerate(runs):
        if run.latents is None:
            continue
        series = [
            {"name": f"channel {c}", "x": centres, "y": channel.histogram, "colour": c, "dash": 0, "marks": False}
            for c, channel in enumerate(run.latents.channels)
        ]
        series.append({"name": "standard normal", "x": centres, "y": normal, "colour": -1, "dash": 1, "marks": False})
        suffix = f" of {names[number]}" if len(runs) > 1 else ""
        added.append(new_chart(charts, f"Scaled latents{suffix}, density", "value", series, False))
    return added


def grids_of(runs: Sequence[RunFacts], stage: str) -> list[list[tuple[float, str, Picture]]]:
    """Each run's picture grids over training steps."""
    return [[(step, f"step {step:,}", p) for step, p in t.grids] if (t := getattr(run, stage)) else [] for run in runs]


def trajectories_of(runs: Sequence[RunFacts]) -> list[list[tuple[float, str, Picture]]]:
    """Each run's sampling trajectory."""
    return [[(i, label, picture) for i, (label, picture) in enumerate(run.trajectory)] for run in runs]


def add_slider(
    sliders: list[dict[str, Any]], names: list[str], columns: list[list[tuple[float, str, Picture]]], unit: str
) -> dict[str, Any] | None:
    """One slider for all runs; at each position a run shows its latest picture up to there."""
    positions = sorted({position for column in columns for position, _, _ in column})
    if not positions:
        return None
    slider: dict[str, Any] = {"id": f"slider-{len(sliders)}", "unit": unit, "last": len(positions) - 1, "columns": []}
    for name, column in zip(names, columns, strict=True):
        if not column:
            continue
        at = [max((i for i, (p, _, _) in enumerate(column) if p <= position), default=0) for position in positions]
        frames = [{"label": label, **asdict(picture)} for _, label, picture in column]
        slider["columns"].append({"name": name, "at": at, "frames": frames})
    sliders.append(slider)
    return slider
