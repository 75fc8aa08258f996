"""What there is to tell of a run: settings, lineage, curves, pictures made while training, and what is measured now."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.data.latents import LatentIndex, read_index
from lightdiff.errors import LightdiffError, UserError
from lightdiff.extras.evidence import evaluated, opened, rows_of
from lightdiff.extras.health import Finding, examine
from lightdiff.extras.latent_facts import LatentFacts, latent_facts
from lightdiff.extras.report.measure import Picture, encoded, nearest, reconstructions, trajectory_pictures
from lightdiff.extras.settings_rows import MODELS, Row, settings_rows
from lightdiff.pipeline import Pipeline, latents_behind
from lightdiff.run_folder import INDEX, RunFolder, StageFolder

MOST_FRAMES = 24  # of a slider through time
MOST_POINTS = 1500  # of a curve


@dataclass(frozen=True)
class Curve:
    """A number over optimizer steps."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Training:
    """What one of the two trainings left behind."""

    metadata: Metadata
    parameters: int
    rows: list[Row]
    curves: dict[str, Curve]
    grids: list[tuple[int, Picture]]  # step, picture

    @property
    def lineage(self) -> dict[str, str]:
        """What it came from, by the beginnings of digests."""
        return {name: digest[:12] for name, digest in self.metadata.lineage.items()}

    @property
    def history(self) -> list[str]:
        """What was changed on the way, in words."""
        changes = self.metadata.extra.get("history", [])
        return [
            f"from step {c['step']}: "
            + ", ".join(f"{name} {old} -> {new}" for name, (old, new) in c["changed"].items())
            for c in changes
        ]

    def middle(self, name: str) -> float | None:
        """The median of a curve."""
        return median(self.curves[name].values) if name in self.curves else None


@dataclass
class RunFacts:
    """All that the page tells of one run. What is not there yet is None; `missing` says why."""

    path: Path
    vae: Training | None = None
    unet: Training | None = None
    index: LatentIndex | None = None
    latents: LatentFacts | None = None
    findings: list[Finding] = field(default_factory=list)
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    reconstructions: Picture | None = None
    trajectory: list[tuple[str, Picture]] = field(default_factory=list)
    nearest: tuple[Picture, str] | None = None
    samples: Picture | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.path.resolve().name

    def trainings(self) -> Iterator[tuple[str, Training]]:
        """Those there are."""
        for stage, training in (("vae", self.vae), ("unet", self.unet)):
            if training is not None:
                yield stage, training


def collect(path: Path, device: torch.device) -> RunFacts:
    """Look at a run. What is missing or damaged is left out, with the reason in `missing`.

    Raises:
        UserError: If there is nothing at all.
    """
    run, found = RunFolder(path), RunFacts(path)
    if not path.is_dir():
        raise UserError(f"{path} is no run folder")
    for stage, folder in (("vae", run.vae), ("unet", run.unet)):
        if folder.last.is_file():
            with noting(found, stage):
                setattr(found, stage, training(stage, folder))
    latents: Path | None = run.latents
    with noting(found, "latents"):
        if unet := opened("unet", [run.unet.last]):
            latents = latents_behind(unet, run)
        if latents and (latents / INDEX).is_file():
            found.index = read_index(latents)
            found.latents = latent_facts(latents)
    if not (found.vae or found.unet or found.index or found.missing):
        raise UserError(f"{path} holds no training and no latents of lightdiff")
    found.findings = examine(path)
    with noting(found, "evaluation"):
        found.evaluation = evaluated(run)
        if not found.evaluation and (path / "evaluation" / "metrics.json").is_file():
            raise UserError("what was evaluated is of other networks than these: lightdiff evaluate measures these")
    if found.vae:
        with noting(found, "reconstructions"):
            found.reconstructions = reconstructions(run.vae, device)
    if found.unet:
        with noting(found, "trajectory"):
            pipeline = Pipeline.load(path, device="cuda" if device.type == "cuda" else "cpu")
            found.trajectory = trajectory_pictures(pipeline)
            if found.index and latents:
                found.nearest = nearest(pipeline, latents)
    with noting(found, "samples"):
        grids = sorted(run.samples.glob("*/*grid.png"), key=lambda p: p.stat().st_mtime)
        if grids:
            found.samples = encoded(grids[-1], f"New images, from {grids[-1].parent.name}")
    return found


@contextmanager
def noting(found: RunFacts, part: str) -> Iterator[None]:
    """What goes wrong in here is noted under this name instead of ending the report; memory may run out, too."""
    try:
        yield
    except (LightdiffError, OSError, ValueError, RuntimeError) as error:
        found.missing[part] = str(error)


def training(stage: str, folder: StageFolder) -> Training:
    """What a training left behind."""
    saved = Checkpoint(folder.last, stage)
    return Training(
        saved.metadata,
        sum(map(math.prod, saved.shapes("model.").values())),
        settings_rows(MODELS[stage], saved.settings(MODELS[stage]).to_save()),
        curves_of(folder),
        grids(folder, stage),
    )


def curves_of(folder: StageFolder) -> dict[str, Curve]:
    """The columns of metrics.jsonl, thinned out where they are long."""
    columns: dict[str, Curve] = {}
    for row in rows_of(folder):
        for name, value in row.items():
            if name != "step":
                curve = columns.setdefault(name, Curve([], []))
                curve.steps.append(int(row["step"]))
                curve.values.append(float(value))
    return {name: thinned(curve) for name, curve in columns.items()}


def thinned(curve: Curve) -> Curve:
    """At most MOST_POINTS of a curve: means over stretches of equal length."""
    count = len(curve.steps)
    if count <= MOST_POINTS:
        return curve
    edges = [i * count // MOST_POINTS for i in range(MOST_POINTS + 1)]
    spans = list(pairwise(edges))
    return Curve([curve.steps[b - 1] for _, b in spans], [sum(curve.values[a:b]) / (b - a) for a, b in spans])


def grids(folder: StageFolder, stage: str) -> list[tuple[int, Picture]]:
    """Pictures made at validations, at most MOST_FRAMES of them, the first and the last included."""
    steps = sorted((StageFolder.step_of(path), path) for path in folder.images.glob("step-*.png"))
    if len(steps) > MOST_FRAMES:
        steps = [steps[round(i * (len(steps) - 1) / (MOST_FRAMES - 1))] for i in range(MOST_FRAMES)]
    what = "Originals above their reconstructions" if stage == "vae" else "Samples of the same noise"
    return [(step, encoded(path, f"{what}, at step {step:,}")) for step, path in steps]
