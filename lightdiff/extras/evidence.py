"""What a run's files hold, read as far as possible: missing and damaged ones are left out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import Tensor

from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.data.files import ImageFile
from lightdiff.data.index import LatentIndex, read_index
from lightdiff.data.loading import ImageDataset
from lightdiff.errors import UserError
from lightdiff.extras.latent_facts import LatentFacts, latent_facts
from lightdiff.pipeline import latents_candidates, vae_digest
from lightdiff.run_folder import INDEX, VAE_COPY, RunFolder, StageFolder, find_latents, read_json
from lightdiff.runtime.progress import Row, is_number, read_metrics
from lightdiff.settings import ImageSettings, StageSettings, TrainUNetSettings, TrainVAESettings

T = TypeVar("T")
COPIES_SHARE = "share of samples nearer"  # in results of `evaluate`: the beginning of the name of that measure
NETWORK = "network"  # in results of `evaluate`: the digest of the checkpoint they belong to


@dataclass
class Evidence:
    """What a run holds, each part None or empty where it is missing or damaged."""

    vae: TrainVAESettings | None = None
    vae_rows: list[Row] = field(default_factory=list)
    vae_metrics: Row = field(default_factory=dict)
    index: LatentIndex | None = None
    facts: LatentFacts | None = None
    vae_digest: str = ""
    own_latents: bool = False  # whether they lie in this run
    unet: TrainUNetSettings | None = None
    unet_rows: list[Row] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)  # of samples
    vae_evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def same_vae(self) -> bool:
        """Whether the latents came from this VAE."""
        return self.index is not None and self.vae_digest == self.index.vae_digest


def gather(run: RunFolder) -> Evidence:
    """Read everything that can be read."""
    found = Evidence()
    unet = first_readable("unet", [run.unet.last, run.unet.best, *reversed(run.unet.steps())])
    if unet:
        found.unet = try_read(lambda: unet.settings(TrainUNetSettings))
        found.unet_rows = rows_of(run.unet)
    behind = try_read(lambda: latents_behind(unet, run)) if unet else None  # they may lie in another run
    latents = behind or try_read(lambda: find_latents(None, run))
    if latents:
        found.own_latents = latents.absolute() == run.latents.absolute()
        found.index = try_read(lambda: read_index(latents))
        found.facts = try_read(lambda: latent_facts(latents))
    copy = [latents / VAE_COPY] if latents else []
    vae = first_readable(
        "vae", [run.vae.best, run.vae.last, *reversed(run.vae.steps()), *copy]
    )  # encode takes the best
    if vae:
        found.vae = try_read(lambda: vae.settings(TrainVAESettings))
        found.vae_rows = rows_of(run.vae)
        found.vae_metrics = metrics_of(vae.metadata, found.vae_rows)
        found.vae_digest = vae_digest(vae)
    results = try_read(lambda: read_evaluation(run)) or {}
    found.evaluation, found.vae_evaluation = results.get("unet", {}), results.get("vae", {})
    return found


def latents_behind(unet: Checkpoint, run: RunFolder) -> Path | None:
    """The folder of latents that a U-Net was trained on, where it still is; else others of its run, or of this one."""
    found = [home for home in latents_candidates(unet, run) if (home / INDEX).is_file()]
    homes = list({home.absolute(): home for home in found}.values())
    if len(homes) > 1:  # one without rivals is not looked into: it may be damaged
        wanted = unet.metadata.lineage.get("latents")
        return next((home for home in homes if read_index(home).digest == wanted), homes[0])
    return homes[0] if homes else None


def read_evaluation(run: RunFolder) -> dict[str, dict[str, Any]]:
    """Results of `evaluate` for the run's present checkpoints; those of checkpoints that are gone are left out.

    Raises:
        RunError: If the file is damaged.
    """
    path = run.path / "evaluation" / "metrics.json"
    parts = read_json(path) if path.is_file() else {}
    known = {}
    for stage, folder, others in (("vae", run.vae, [run.latents / VAE_COPY]), ("unet", run.unet, [])):
        files = [folder.last, folder.best, *folder.steps(), *others]
        checkpoints = [try_read(partial(Checkpoint, file, stage)) for file in files]
        known[stage] = {saved.metadata.digest for saved in checkpoints if saved}
    return {
        stage: {name: value for name, value in part.items() if is_result(value)}
        for stage, part in parts.items()
        if isinstance(part, dict) and str(part.get(NETWORK)) in known.get(stage, ())
    }


def is_result(value: Any) -> bool:
    """Whether a value is what `evaluate` writes: a finite number, some of them, or a text."""
    if isinstance(value, list):
        return all(not isinstance(one, list) and is_result(one) for one in value)
    return isinstance(value, str) or (is_number(value) and math.isfinite(value))


def loss_definition(metadata: Metadata) -> object:
    """What defines a training's loss: only losses with equal definitions can be compared."""
    parts = {"vae": ("loss",), "unet": ("target", "noise", "latent")}[metadata.stage]
    return [metadata.settings.get(part) for part in parts], metadata.lineage.get("latents")


def try_read(read: Callable[[], T]) -> T | None:
    """What is read, or None on any error: a file may be missing, truncated or corrupted in any way."""
    try:
        return read()
    except Exception:
        return None


def first_readable(stage: str, paths: list[Path]) -> Checkpoint | None:
    """The first of these files that is an intact checkpoint of the stage."""
    for path in paths:
        found = try_read(partial(Checkpoint, path, stage))
        if found:
            return found
    return None


def rows_of(folder: StageFolder) -> list[Row]:
    """The lines of a stage's metrics.jsonl, sorted by step; values that are not finite numbers are left out."""
    rows = try_read(lambda: read_metrics(folder.metrics)) or []
    numbers = [{n: v for n, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)} for row in rows]
    return sorted(numbers, key=lambda row: row["step"])


def seconds_an_image(rows: Sequence[Row]) -> float:
    """How long a training took for each image, with validations and saves, by its lines of metrics; 0 if unknown.

    Times up to a line count by their median, and those after a validation by theirs: a pause between two starts, which
    is in one of them, does not count.
    """
    taken: dict[bool, list[float]] = {False: [], True: []}  # by whether the line before is of a validation
    timed = [row for row in rows if {"time", "images_seen"} <= row.keys()]
    for before, row in pairwise(timed):
        taken["val_loss" in before].append(row["time"] - before["time"])
    seconds = sum(len(some) * median(some) for some in taken.values() if some)
    images = timed[-1]["images_seen"] - timed[0]["images_seen"] if timed else 0.0
    if images <= 0:
        images, seconds = next((row["images_per_s"] for row in rows if "images_per_s" in row), 0.0), 1.0
    return seconds / images if images > 0 and 0 < seconds < math.inf else 0.0


def unsaved(folder: StageFolder, model: type[StageSettings], stage: str) -> Metadata | None:
    """What a training that has not saved yet says of itself; None where there is none, or it has saved.

    Raises:
        UserError: If its settings are damaged, or of another version.
    """
    if folder.resumable() or not folder.settings.is_file():
        return None
    try:
        settings = model.model_validate(read_json(folder.settings)).to_save()
    except ValidationError as error:
        raise UserError(f"{folder.settings} holds no settings of {stage}: {error.errors()[0]['msg']}") from None
    rows = rows_of(folder)
    last = rows[-1] if rows else {}
    metrics = {name: value for row in rows for name, value in row.items() if name.startswith("val_")}
    done = {name: int(min(max(0, last.get(name, 0)), 1 << 53)) for name in ("step", "images_seen")}
    return Metadata(stage=stage, settings=settings, metrics=metrics, extra={"saved": False}, **done)


def metrics_of(metadata: Metadata, rows: list[Row]) -> Row:
    """kl, mse (if measured) and psnr of a VAE: of validation, or of the last training step if there was none."""
    metrics = {name.removeprefix("val_"): value for name, value in metadata.metrics.items()}
    if not metrics and rows:
        metrics = dict(rows[-1])
    if "mse" in metrics and "psnr" not in metrics:
        metrics["psnr"] = 10 * math.log10(4 / max(metrics["mse"], 1e-12))
    return metrics


def held_out(files: Sequence[ImageFile]) -> Sequence[ImageFile]:
    """The images held out for validation, or all images if none are."""
    return [file for file in files if file.split == "val"] or files


def load_images(files: Sequence[ImageFile], images: ImageSettings) -> list[Tensor]:
    """Those of the images that can be read, framed as for validation, uint8 (3, h, w) each."""
    dataset = ImageDataset(files, images, seed=0, train=False)
    return [x for i in range(len(files)) if (x := dataset[0, i].x) is not None]
