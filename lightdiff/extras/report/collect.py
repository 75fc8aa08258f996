"""The contents of a report: settings, lineage, curves, pictures saved during training, and new measurements."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.data.index import LatentIndex, read_index
from lightdiff.errors import LightdiffError, UserError
from lightdiff.extras.evidence import (
    first_readable,
    latents_behind,
    read_evaluation,
    rows_of,
    seconds_an_image,
    unsaved,
)
from lightdiff.extras.health import Finding, examine
from lightdiff.extras.latent_facts import LatentFacts, latent_facts
from lightdiff.extras.report.measure import (
    Picture,
    Reconstructions,
    encode_file,
    loss_spread,
    nearest,
    reconstructions,
    samples,
    samples_by_class,
    trajectory_pictures,
)
from lightdiff.extras.settings_rows import MODELS, settings_changes, settings_rows
from lightdiff.extras.settings_rows import Row as SettingsRow
from lightdiff.pipeline import Pipeline
from lightdiff.run_folder import INDEX, RunFolder, StageFolder
from lightdiff.runtime.progress import Row

MAX_FRAMES = 24  # of a slider over training steps
MAX_POINTS = 1500  # of a curve
PAUSE = 20  # times the median time between two lines of metrics


@dataclass(frozen=True)
class Curve:
    """A metric over optimizer steps."""

    steps: list[int]
    values: list[float]
    minutes: list[float] = field(default_factory=list)  # of training until then; empty where it is not known


@dataclass(frozen=True)
class Training:
    """The results of one of the two trainings."""

    metadata: Metadata
    parameters: int
    rows: list[SettingsRow]
    curves: dict[str, Curve]
    grids: list[tuple[int, Picture]]  # step, picture
    seconds_an_image: float = 0.0  # 0 where it is not known

    @property
    def step(self) -> int:
        """The last step that anything is known of."""
        return max([self.metadata.step, *(curve.steps[-1] for curve in self.curves.values())])

    @property
    def images_seen(self) -> int:
        """The images of all steps up to there."""
        seen = self.curves.get("images_seen")
        return max(self.metadata.images_seen, int(seen.values[-1]) if seen else 0)

    @property
    def lineage(self) -> dict[str, str]:
        """What the training is based on: names with shortened digests."""
        return {name: digest[:12] for name, digest in self.metadata.lineage.items()}

    @property
    def history(self) -> list[str]:
        """Changes of settings during the training."""
        return [f"from step {step}: {changes}" for step, changes in settings_changes(self.metadata)]

    def median_of(self, name: str) -> float | None:
        """The median of a curve; None if there is no such curve."""
        return median(self.curves[name].values) if name in self.curves else None


@dataclass(eq=False)  # the page looks for a run among several, and arrays do not compare to one truth value
class RunFacts:
    """Everything that the page shows about one run. What does not exist is None; `missing` gives the reasons."""

    path: Path
    vae: Training | None = None
    unet: Training | None = None
    index: LatentIndex | None = None
    latents: LatentFacts | None = None
    findings: list[Finding] = field(default_factory=list)
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    reconstructions: Reconstructions | None = None
    loss_spread: float = 0.0  # of the U-Net's loss over images; 0 where it is not known
    trajectory: list[tuple[str, Picture]] = field(default_factory=list)
    nearest: tuple[Picture, str] | None = None
    samples: Picture | None = None
    by_class: list[tuple[str, Picture]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return self.path.resolve().name

    @property
    def strips(self) -> list[tuple[str, Picture]]:
        """What the page begins with: samples and reconstructions, drawn for it, or else by the trainings."""
        samples, pairs = self.samples, self.reconstructions.first if self.reconstructions else None
        if samples is None and self.unet and self.unet.grids:
            samples = self.unet.grids[-1][1]
        if pairs is None and self.vae and self.vae.grids:
            pairs = self.vae.grids[-1][1]
        return [(name, picture) for name, picture in (("Samples", samples), ("Reconstructions", pairs)) if picture]

    def trainings(self) -> Iterator[tuple[str, Training]]:
        """The trainings that exist, with their stage."""
        for stage, training in (("vae", self.vae), ("unet", self.unet)):
            if training is not None:
                yield stage, training


def collect(path: Path, device: torch.device | None) -> RunFacts:
    """Read a run, and measure it where a device is given. What is missing or damaged is left out, with the reason.

    Raises:
        UserError: If the folder holds nothing of lightdiff.
    """
    run, found = RunFolder(path), RunFacts(path)
    if not path.is_dir():
        raise UserError(f"{path} is no run folder")
    for stage, folder in (("vae", run.vae), ("unet", run.unet)):
        with record_failure(found, stage):
            setattr(found, stage, read_training(stage, folder))
    latents: Path | None = run.latents
    with record_failure(found, "latents"):
        if unet := first_readable("unet", [run.unet.last]):
            latents = latents_behind(unet, run)
        if latents and (latents / INDEX).is_file():
            found.index = read_index(latents)
            found.latents = latent_facts(latents)
    if not (found.vae or found.unet or found.index or found.missing):
        raise UserError(f"{path} holds no training and no latents of lightdiff")
    found.findings = examine(path)
    with record_failure(found, "evaluation"):
        found.evaluation = read_evaluation(run)
        if not found.evaluation and (path / "evaluation" / "metrics.json").is_file():
            raise UserError("the results of evaluate belong to other networks than these: run lightdiff evaluate again")
    if device:
        measure(found, run, latents, device)
    return found


def measure(found: RunFacts, run: RunFolder, latents: Path | None, device: torch.device) -> None:
    """Add what the networks draw to the facts of a run."""
    if found.vae:
        with record_failure(found, "reconstructions"):
            found.reconstructions = reconstructions(run.vae, device)
    if found.unet:
        with record_failure(found, "samples"):
            pipeline = Pipeline.load(run.path, device="cuda" if device.type == "cuda" else "cpu")
            found.samples = samples(pipeline)
            found.by_class = samples_by_class(pipeline)
            found.trajectory = trajectory_pictures(pipeline)
            if found.index and latents:
                found.nearest = nearest(pipeline, latents)
                if len(found.index.positions("val")) > 1:
                    found.loss_spread = loss_spread(pipeline, latents)


@contextmanager
def record_failure(found: RunFacts, part: str) -> Iterator[None]:
    """Record an error under this name instead of ending the report; running out of memory counts as one."""
    try:
        yield
    except (LightdiffError, OSError, ValueError, RuntimeError) as error:
        found.missing[part] = str(error)


def read_training(stage: str, folder: StageFolder) -> Training | None:
    """The results of a training, from its last checkpoint, or its settings before it has saved, and metrics.jsonl."""
    saved = Checkpoint(folder.last, stage) if folder.last.is_file() else None
    metadata = saved.metadata if saved else unsaved(folder, MODELS[stage], stage)
    if metadata is None:
        return None
    return Training(
        metadata,
        sum(map(math.prod, saved.shapes("model.").values())) if saved else 0,
        settings_rows(MODELS[stage], saved.settings(MODELS[stage]).to_save() if saved else metadata.settings),
        read_curves(folder),
        read_grids(folder, stage),
        seconds_an_image(rows_of(folder)),
    )


def read_curves(folder: StageFolder) -> dict[str, Curve]:
    """The columns of metrics.jsonl, long ones thinned out."""
    columns: dict[str, Curve] = {}
    rows = rows_of(folder)
    minutes = minutes_of(rows)
    for i, row in enumerate(rows):
        for name, value in row.items():
            if name not in ("step", "time"):
                curve = columns.setdefault(name, Curve([], []))
                curve.steps.append(int(row["step"]))
                curve.values.append(float(value))
                curve.minutes.extend(minutes[i : i + 1])
    return {name: thin_out(curve) for name, curve in columns.items()}


def minutes_of(rows: list[Row]) -> list[float]:
    """Minutes of training up to each line, from its first on; empty where a line tells no time.

    What passed between two lines counts as at most PAUSE times the median of that, as a training may have been stopped.
    """
    times = [row["time"] for row in rows if "time" in row]
    if len(times) < max(2, len(rows)):
        return []
    passed = [max(0.0, b - a) for a, b in pairwise(times)]
    longest = PAUSE * median(passed)
    minutes = [seconds / 60 for seconds in accumulate((min(some, longest) for some in passed), initial=0.0)]
    return minutes if math.isfinite(minutes[-1]) else []


def thin_out(curve: Curve) -> Curve:
    """At most MAX_POINTS points of a curve: means over intervals of equal length."""
    count = len(curve.steps)
    if count <= MAX_POINTS:
        return curve
    edges = [i * count // MAX_POINTS for i in range(MAX_POINTS + 1)]
    spans = list(pairwise(edges))
    last = [b - 1 for _, b in spans]
    values = [sum(curve.values[a:b]) / (b - a) for a, b in spans]
    return Curve([curve.steps[i] for i in last], values, [curve.minutes[i] for i in last] if curve.minutes else [])


def read_grids(folder: StageFolder, stage: str) -> list[tuple[int, Picture]]:
    """Pictures saved at validation, at most MAX_FRAMES of them, the first and the last included."""
    steps = sorted((StageFolder.step_of(path), path) for path in folder.images.glob("step-*.png"))
    if len(steps) > MAX_FRAMES:
        steps = [steps[round(i * (len(steps) - 1) / (MAX_FRAMES - 1))] for i in range(MAX_FRAMES)]
    what = "Originals above their reconstructions" if stage == "vae" else "Samples from the same noise"
    return [(step, encode_file(path, path.stat().st_mtime_ns, f"{what}, at step {step:,}")) for step, path in steps]
