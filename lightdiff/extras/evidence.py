"""What a run's files say of it, read as far as they can be: missing and damaged ones are left out."""

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.data.latents import LatentIndex, read_index
from lightdiff.extras.latent_facts import LatentFacts, latent_facts
from lightdiff.pipeline import latents_behind, vae_digest
from lightdiff.run_folder import RunFolder, StageFolder, find_latents, read_json
from lightdiff.runtime.progress import Row, read_metrics
from lightdiff.settings import TrainUNetSettings, TrainVAESettings

T = TypeVar("T")
NETWORK = "network"  # in results of `evaluate`: the digest of the snapshot that they are of
MOST_BYTES = 200_000_000  # that are read in search of duplicates


@dataclass
class Evidence:
    """What there is of a run, each part None or empty where it is missing or damaged."""

    vae: TrainVAESettings | None = None
    vae_metrics: Row = field(default_factory=dict)
    index: LatentIndex | None = None
    facts: LatentFacts | None = None
    vae_digest: str = ""
    own_latents: bool = False  # whether they lie in this run
    unet: TrainUNetSettings | None = None
    unet_rows: list[Row] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)  # of samples

    @property
    def same_vae(self) -> bool:
        """Whether the latents came from this VAE."""
        return self.index is not None and self.vae_digest == self.index.vae_digest


def gather(run: RunFolder) -> Evidence:
    """Read what there is."""
    found = Evidence()
    unet = opened("unet", [run.unet.last, run.unet.best, *reversed(run.unet.steps())])
    if unet:
        found.unet = tried(lambda: unet.settings(TrainUNetSettings))
        found.unet_rows = rows_of(run.unet)
    behind = tried(lambda: latents_behind(unet, run)) if unet else None  # they may be another run's
    latents = behind or tried(lambda: find_latents(None, run))
    if latents:
        found.own_latents = latents.absolute() == run.latents.absolute()
        found.index = tried(lambda: read_index(latents))
        found.facts = tried(lambda: latent_facts(latents))
    copy = [latents / "vae.safetensors"] if latents else []
    vae = opened("vae", [run.vae.best, run.vae.last, *reversed(run.vae.steps()), *copy])  # encode takes the best
    if vae:
        found.vae = tried(lambda: vae.settings(TrainVAESettings))
        found.vae_metrics = metrics_of(vae.metadata, rows_of(run.vae))
        found.vae_digest = vae_digest(vae)
    found.evaluation = (tried(lambda: evaluated(run)) or {}).get("unet", {})
    return found


def evaluated(run: RunFolder) -> dict[str, dict[str, Any]]:
    """What `evaluate` found of the run's snapshots as they are; results of others, that are gone, are left out.

    Raises:
        RunError: If the file is damaged.
    """
    path = run.path / "evaluation" / "metrics.json"
    parts = read_json(path) if path.is_file() else {}
    known = {}
    for stage, folder, others in (("vae", run.vae, [run.latents / "vae.safetensors"]), ("unet", run.unet, [])):
        files = [folder.last, folder.best, *folder.steps(), *others]
        snapshots = [tried(partial(Checkpoint, file, stage)) for file in files]
        known[stage] = {snapshot.metadata.digest for snapshot in snapshots if snapshot}
    return {
        stage: part
        for stage, part in parts.items()
        if isinstance(part, dict) and part.get(NETWORK) in known.get(stage, ())
    }


def question(metadata: Metadata) -> object:
    """What a training's loss is about: losses of different questions cannot be compared."""
    asked = {"vae": ("loss",), "unet": ("target", "noise", "latent")}[metadata.stage]
    return [metadata.settings.get(part) for part in asked], metadata.lineage.get("latents")


def trained_on(index: LatentIndex) -> list[int]:
    """Positions of the images trained on."""
    bad = set(index.bad)
    return [position for position, split in enumerate(index.splits) if split == "t" and position not in bad]


def tried(read: Callable[[], T]) -> T | None:
    """What is read, or None whatever is the matter with it: it may be missing, cut off or garbled in any way."""
    try:
        return read()
    except Exception:
        return None


def opened(stage: str, paths: list[Path]) -> Checkpoint | None:
    """The first of these that is a whole checkpoint of the stage."""
    for path in paths:
        found = tried(partial(Checkpoint, path, stage))
        if found:
            return found
    return None


def rows_of(folder: StageFolder) -> list[Row]:
    """The lines of a stage's metrics.jsonl, by step; what is no finite number is left out."""
    rows = tried(lambda: read_metrics(folder.metrics)) or []
    numbers = [{n: v for n, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)} for row in rows]
    return sorted(numbers, key=lambda row: row["step"])


def metrics_of(metadata: Metadata, rows: list[Row]) -> Row:
    """kl, mse (where there is one) and psnr of a VAE: of validation, or of the last training step without any."""
    metrics = {name.removeprefix("val_"): value for name, value in metadata.metrics.items()}
    if not metrics and rows:
        metrics = dict(rows[-1])
    if "mse" in metrics and "psnr" not in metrics:
        metrics["psnr"] = 10 * math.log10(4 / max(metrics["mse"], 1e-12))
    return metrics


def same_content(paths: list[str]) -> Iterator[list[str]]:
    """Groups of files with the same bytes. Only those that share their size with another are read."""
    sizes: dict[int, list[str]] = defaultdict(list)
    for path in paths:
        sizes[os.stat(path).st_size].append(path)
    alike = {size: group for size, group in sizes.items() if len(group) > 1}
    if sum(size * len(group) for size, group in alike.items()) > MOST_BYTES:
        return
    for group in alike.values():
        same: dict[bytes, list[str]] = defaultdict(list)
        for path in group:
            same[hashlib.sha256(Path(path).read_bytes()).digest()].append(path)
        yield from (found for found in same.values() if len(found) > 1)
