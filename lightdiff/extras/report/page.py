"""The collected contents -> one HTML page that works offline, with its own style and scripts inside."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightdiff import __version__
from lightdiff.extras.baselines import baselines_of
from lightdiff.extras.latent_facts import EDGES
from lightdiff.extras.report.collect import Curve, RunFacts, Training
from lightdiff.extras.report.measure import Picture
from lightdiff.extras.report.numbers import (
    MEANINGS,
    STAGES,
    cards,
    differences,
    format_number,
    metrics_table,
    runs_table,
    time_table,
)

Chart = dict[str, Any]
HERE = Path(__file__).parent
MARK = "<!-- a report of lightdiff -->"
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


def render(runs: Sequence[RunFacts], live: str = "") -> str:
    """The page, as HTML; a live one, of this state, asks its server for news."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    several = len(runs) > 1
    names = unique([run.name for run in runs])
    charts: list[Chart] = []
    sliders: list[dict[str, Any]] = []
    context = {
        "mark": MARK,
        "version": __version__,
        "title": " and ".join(names) if several else names[0],
        "several": several,
        "live": live,
        "names": names,
        "runs": runs,
        "stages": STAGES,
        "format_number": format_number,
        "metrics": metrics_table(runs),
        "meanings": MEANINGS,
        "cards": [cards(run) for run in runs],
        "differences": differences(runs) if several else [],
        "runs_table": runs_table(runs, names) if several else {},
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
        "script": "".join((HERE / name).read_text(encoding="utf-8") for name in ("charts.js", "page.js")),
        "scaling": [describe_scaling(run) for run in runs],
    }
    context["data"] = {"charts": charts, "sliders": sliders, "live": live}
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(context)


def unique(names: list[str]) -> list[str]:
    """The names, numbered where two runs have the same one."""
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


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
    charts: list[Chart],
    runs: Sequence[RunFacts],
    names: list[str],
    stage: str,
    wanted: list[tuple[str, dict[str, str], bool]],
) -> list[Chart]:
    """Charts of a stage's curves; those without data are left out."""
    added = []
    for title, curves, log in wanted:
        series, known = list[dict[str, Any]](), list[dict[str, Any]]()
        for number, run in enumerate(runs):
            training: Training | None = getattr(run, stage)
            baselines = baselines_of(training.metadata) if training else {}
            for style, (key, name) in enumerate(curves.items()):
                if training and key in training.curves:
                    label = f"{names[number]}: {name}" if len(runs) > 1 else name
                    series.append(line(label, training.curves[key], number, style, len(runs) > 1))
                    if key in baselines:
                        known.append({"y": baselines[key], "colour": -1 if len(runs) > 1 else style, "name": name})
        if series:
            log = log and all(v > 0 for s in series for v in s["y"] if v is not None)
            same = [some for i, some in enumerate(known) if some not in known[:i]]  # runs of one schedule
            added.append(new_chart(charts, f"{STAGES[stage]}: {title}", "step", series, log, stage, same))
    return added


def line(label: str, curve: Curve, run: int, style: int, several: bool) -> dict[str, Any]:
    """A line: its colour marks the curve; in comparisons the colour marks the run, and dashes the curve."""
    finite = [v if math.isfinite(v) else None for v in curve.values]
    colour, dash = (run, style) if several else (style, 0)
    return {"name": label, "x": curve.steps, "minutes": curve.minutes, "y": finite, "colour": colour, "dash": dash}


def new_chart(
    charts: list[Chart],
    title: str,
    x: str,
    series: list[dict[str, Any]],
    log: bool,
    group: str,
    baselines: Sequence[dict[str, Any]] = (),
) -> Chart:
    """Add a chart to the list. The charts of a group show the same place together."""
    number = len(charts)
    chart = {"id": f"chart-{number}", "title": title, "x": x, "log": log, "group": group, "series": series}
    charts.append(chart | {"baselines": list(baselines)})
    return charts[-1]


def add_histograms(charts: list[Chart], runs: Sequence[RunFacts], names: list[str]) -> list[Chart]:
    """Histograms of the scaled latents, channel by channel, beside the standard normal density."""
    centres = [(a + b) / 2 for a, b in pairwise(EDGES)]
    normal = [math.exp(-m * m / 2) / math.sqrt(2 * math.pi) for m in centres]
    added = []
    for number, run in enumerate(runs):
        if run.latents is None:
            continue
        series = [
            {"name": f"channel {c}", "x": centres, "minutes": [], "y": channel.histogram, "colour": c, "dash": 0}
            for c, channel in enumerate(run.latents.channels)
        ]
        series.append({"name": "standard normal", "x": centres, "minutes": [], "y": normal, "colour": -1, "dash": 1})
        suffix = f" of {names[number]}" if len(runs) > 1 else ""
        added.append(new_chart(charts, f"Scaled latents{suffix}, density", "value", series, False, "latents"))
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
