"""Numbers of a run with their scale: an error, what takes no network, and what the VAE alone leaves."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightdiff.extras.baselines import baselines_of
from lightdiff.extras.distances import CAUTION, SAYS_NOTHING
from lightdiff.extras.evidence import loss_definition
from lightdiff.extras.report.collect import RunFacts, Training
from lightdiff.extras.settings_rows import format_duration

STAGES = {"vae": "VAE", "unet": "U-Net"}
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
PSNR, LOSS = "VAE: PSNR (dB)", "U-Net: validation loss"
DISTANCES = ("FID", "Frechet distance", "KID", "kernel distance")  # of samples, in the order of preference
BY_LEVEL, BY_MEAN = "from the noise level alone", "for their mean image in place of each"
BY_VAE = "for the VAE's reconstructions, which samples cannot beat"
MEANINGS = [f"losses {BY_LEVEL}", f"PSNR {BY_MEAN}", f"distances {BY_VAE}"]
ENOUGH = 10  # held-out images, from which on their mean is shown as the run's


@dataclass(frozen=True)
class Number:
    """A measured value and what it is to be compared with."""

    value: float
    error: float | None = None  # standard error
    beside: float | None = None  # a value to compare it with
    meaning: str = ""  # of that
    refused: str = ""  # why the value says nothing

    def __str__(self) -> str:
        """The value with its error, or a dash if it is refused."""
        return "-" if self.refused else format_measured(self.value, self.error)

    @property
    def scale(self) -> str:
        """What it is to be compared with, or why it is refused."""
        return self.refused or ("" if self.beside is None else f"{format_number(self.beside)} {self.meaning}")


@dataclass(frozen=True)
class Card:
    """One of the numbers at the top of the page."""

    title: str
    value: str
    scale: list[str]


def numbers_of(run: RunFacts) -> dict[str, Number]:
    """All measures of a run by their names."""
    found = {}
    for stage, training in run.trainings():
        baselines = baselines_of(training.metadata)
        for name, value in training.metadata.metrics.items():
            measure = f"{STAGES[stage]}: {MEASURES.get(name, name.removeprefix('val_'))}"
            beside, meaning = baselines.get(name), BY_LEVEL
            if measure == PSNR and run.reconstructions:
                beside, meaning = run.reconstructions.baseline, BY_MEAN
            refused = too_few(run) if measure in (PSNR, LOSS) else ""
            found[measure] = Number(value, error_of(run, measure), beside, meaning, refused)
    for stage, results in run.evaluation.items():
        for name, value in results.items():
            if isinstance(value, (int, float)) and not name.endswith("+-"):
                found[f"{STAGES.get(stage, stage)}, evaluated: {name}"] = evaluated(run, stage, name, value)
    return found


def error_of(run: RunFacts, measure: str) -> float | None:
    """The standard error of a mean over the held-out images; None where it is not known."""
    spreads = {LOSS: run.loss_spread, PSNR: run.reconstructions.spread if run.reconstructions else 0.0}
    count = held_out_count(run)
    return spreads[measure] / math.sqrt(count) if count and spreads.get(measure) else None


def too_few(run: RunFacts) -> str:
    """Why a mean over the held-out images says nothing, where they are too few."""
    count = held_out_count(run)
    return f"{count} images are held out; {ENOUGH} are needed to tell" if count is not None and count < ENOUGH else ""


def held_out_count(run: RunFacts) -> int | None:
    """How many images are held out; None before they are encoded."""
    return len(run.index.positions("val")) if run.index else None


def evaluated(run: RunFacts, stage: str, name: str, value: float) -> Number:
    """A result of `evaluate`: a distance of samples beside that of reconstructions; refused for too few images."""
    results = run.evaluation[stage]
    error, caution = results.get(f"{name} +-"), str(results.get(CAUTION, ""))
    distance = name.startswith(("FID", "rFID")) or "Frechet" in name
    floor = run.evaluation.get("vae", {}).get("rFID" if name == "FID" else f"reconstructions' {name}")
    return Number(
        value,
        error if isinstance(error, float) else None,
        floor if isinstance(floor, float) and stage == "unet" else None,
        BY_VAE,
        caution if distance and SAYS_NOTHING in caution else "",
    )


# --- the top of the page ------------------------------------------------------------------------------------------


def cards(run: RunFacts) -> list[Card]:
    """Three numbers and the time."""
    found, count = numbers_of(run), held_out_count(run)
    images = [f"mean of {count:,} held-out images"] if count else []
    return [
        card("Reconstructions, PSNR", found.get(PSNR), " dB", images),
        card("U-Net, validation loss", found.get(LOSS), "", images),
        samples_card(run, found),
        time_card(run),
    ]


def card(title: str, number: Number | None, unit: str, images: list[str]) -> Card:
    """A number that is a mean over held-out images, if they are enough."""
    if number is None:
        return Card(title, "-", ["not validated yet"])
    if number.refused:
        return Card(title, "-", [number.refused])
    return Card(title, f"{number}{unit}", [*filter(None, [number.scale]), *images])


def samples_card(run: RunFacts, found: Mapping[str, Number]) -> Card:
    """The distance between samples and training images, as `evaluate` measured it."""
    prefix = f"{STAGES['unet']}, evaluated: "
    known = {name.removeprefix(prefix): number for name, number in found.items() if name.startswith(prefix)}
    ranked = [(name, known[name]) for kind in DISTANCES for name in known if name.startswith(kind)]
    if not ranked:
        return Card("Samples", "-", [f"not measured: lightdiff evaluate --run {shlex.quote(str(run.path))}"])
    name, number = next((pair for pair in ranked if not pair[1].refused), ranked[0])
    results = run.evaluation["unet"]
    counts = f"{results.get('samples', '?')} samples, {results.get('training images', '?')} training images"
    return Card(f"Samples, {name}", str(number), [*filter(None, [number.scale]), counts])


def time_card(run: RunFacts) -> Card:
    """How long the trainings took, or have taken so far."""
    seconds, each = 0.0, list[str]()
    for stage, training in run.trainings():
        taken = training.images_seen * training.seconds_an_image
        seconds += taken
        loop = training.metadata.settings.get("loop")
        total = loop.get("steps") if isinstance(loop, dict) else 0
        so_far = f", step {training.step:,} of {total:,}" if isinstance(total, int) and training.step < total else ""
        each.append(f"{STAGES[stage]}: {format_duration(taken) if taken else 'not known yet'}{so_far}")
    return Card("Time of training", format_duration(seconds) if seconds else "-", each)


# --- tables -------------------------------------------------------------------------------------------------------


def metrics_table(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """Measures of the runs: a name, a number for each run (None where it has none), and which of them are best."""
    all_numbers = [numbers_of(run) for run in runs]
    names = dict.fromkeys(name for numbers in all_numbers for name in numbers)
    return [
        {
            "name": name,
            "values": [numbers.get(name) for numbers in all_numbers],
            "best": best(
                runs, name, {i: n[name].value for i, n in enumerate(all_numbers) if name in n and not n[name].refused}
            ),
        }
        for name in names
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


def runs_table(runs: Sequence[RunFacts], names: Sequence[str]) -> dict[str, Any]:
    """A row for each run, to be sorted by any column: the headline's numbers, time, and the settings that differ.

    Each cell is its text and what it is sorted by.
    """
    measures = [row for row in metrics_table(runs) if is_headline(row["name"])]
    settings = differences(runs)
    heads = ["run", *(row["name"] for row in measures), "minutes of training"]
    heads += [f"{row['stage']}: {row['flag']}" for row in settings]
    rows = []
    for i, run in enumerate(runs):
        numbers = [row["values"][i] for row in measures]
        minutes = sum(t.images_seen * t.seconds_an_image for _, t in run.trainings()) / 60
        cells: list[tuple[str, Any]] = [(names[i], names[i])]
        cells += [("-", "") if n is None else (str(n), "" if n.refused else n.value) for n in numbers]
        cells.append((f"{minutes:.1f}" if minutes else "-", minutes or ""))
        rows.append(cells + [(row["values"][i], row["values"][i]) for row in settings])
    return {"heads": heads, "rows": rows}


def is_headline(name: str) -> bool:
    """Whether a measure is worth a column of the runs' table."""
    return name in (PSNR, LOSS) or (name.startswith("U-Net, evaluated") and any(kind in name for kind in DISTANCES))


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
    text = f"{training.step:,} steps, {training.images_seen:,} images"
    if speed:
        text += f", {speed:.3g} images/s"
    if training.seconds_an_image:
        text += f", about {format_duration(training.images_seen * training.seconds_an_image)}"
    return text + (f", {max(memory.values) / 1000:.2f} GB" if memory else "")


def format_measured(value: float, error: float | None) -> str:
    """A number with its standard error, of which two digits are shown."""
    if not error or not math.isfinite(error):
        return format_number(value)
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def format_number(value: float | None) -> str:
    """A number for a table; "-" if there is none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1000 else f"{value:.4g}"
