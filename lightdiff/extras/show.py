"""show: a checkpoint's or a run's settings (what differs from the defaults first), lineage and metrics."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from lightdiff.checkpoint import Checkpoint, Document
from lightdiff.data.latents import LatentIndex, read_index
from lightdiff.errors import UserError
from lightdiff.options import default_of, flag, leaves
from lightdiff.run_folder import RunFolder
from lightdiff.settings import TrainUNetSettings, TrainVAESettings

MODELS: dict[str, type[BaseModel]] = {"vae": TrainVAESettings, "unet": TrainUNetSettings}


def show(place: Path, as_json: bool = False) -> None:
    """Print what a file or a run folder holds, to stdout.

    Raises:
        UserError: If it holds nothing of lightdiff.
    """
    console = Console(highlight=False, markup=False)
    found = list(parts(place))
    if not found:
        raise UserError(f"{place} holds no checkpoint and no latents of lightdiff")
    if as_json:
        console.print_json(json.dumps([{"path": str(path)} | about(what) for path, what in found]))
        return
    for path, what in found:
        console.rule(str(path), align="left")
        if isinstance(what, LatentIndex):
            show_latents(console, what)
        else:
            show_document(console, what)


def parts(place: Path) -> Iterator[tuple[Path, Document | LatentIndex]]:
    """What there is at a path: one checkpoint, or the stages of a run."""
    if place.is_file():
        yield place, Checkpoint(place).document
        return
    if not place.exists():
        raise UserError(f"{place} does not exist")
    run = RunFolder(place)
    if run.vae.last.is_file():
        yield run.vae.last, Checkpoint(run.vae.last).document
    for latents in (place, run.latents):
        if (latents / "index.json").is_file():
            yield latents, read_index(latents)
    if run.unet.last.is_file():
        yield run.unet.last, Checkpoint(run.unet.last).document


def about(what: Document | LatentIndex) -> dict[str, Any]:
    """The same as a JSON object; the list of images and digests of single tensors are left out."""
    leave_out = {"files", "splits", "labels"} if isinstance(what, LatentIndex) else {"digests"}
    return what.model_dump(mode="json", exclude=leave_out)


def show_document(console: Console, document: Document) -> None:
    """Print a checkpoint's document."""
    pairs = Table(box=None, show_header=False, pad_edge=False)
    pairs.add_row("stage", f"{document.stage}, written by lightdiff {document.lightdiff}")
    pairs.add_row("step", f"{document.step:,}  ({document.images_seen:,} images seen)")
    for name, value in document.metrics.items():
        pairs.add_row(name, f"{value:.5g}")
    for name, digest in document.lineage.items():
        pairs.add_row(f"from {name}", digest[:16])
    for change in document.facts.get("history", []):
        words = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in change["changed"].items())
        pairs.add_row(f"changed at step {change['step']}", words)
    console.print(pairs)
    model = MODELS.get(document.stage)
    if model is not None:
        show_settings(console, model, document.settings)


def show_settings(console: Console, model: type[BaseModel], settings: dict[str, Any]) -> None:
    """Print settings as flags: first what differs from the defaults, then the rest."""
    rows = []
    for path, _ in leaves(model):
        value: Any = settings
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        default = json.loads(json.dumps(default_of(model, path), default=str))
        rows.append((value != default, f"--{flag(path)}", words(value), words(default)))
    table = Table(box=None, pad_edge=False)
    for heading in ("setting", "value", "default"):
        table.add_column(heading)
    for differs, name, value, default in sorted(rows, key=lambda row: not row[0]):
        style = "bold" if differs else "dim"
        table.add_row(name, value, default if differs else "", style=style)
    console.print(table)


def show_latents(console: Console, index: LatentIndex) -> None:
    """Print what an index of latents says."""
    pairs = Table(box=None, show_header=False, pad_edge=False)
    pairs.add_row("latents", f"{len(index.files) - len(index.bad):,} images as {' x '.join(map(str, index.shape))}")
    pairs.add_row("stored as", index.dtype + (", with mirror images" if index.mirrored else ""))
    pairs.add_row("split", f"{index.splits.count('t'):,} for training, {index.splits.count('v'):,} for validation")
    pairs.add_row("state", "complete" if index.complete else "unfinished: run 'lightdiff encode' again")
    pairs.add_row("from VAE", index.vae_digest[:16])
    if index.statistics is not None:
        pairs.add_row("mean, std", f"{index.statistics.mean:.4f}, {index.statistics.std:.4f}")
        pairs.add_row("shift", words(index.statistics.shift))
        pairs.add_row("scale", words(index.statistics.scale))
    else:
        pairs.add_row("scale", "not computed yet: run 'lightdiff scale'")
    console.print(pairs)


def words(value: Any) -> str:
    """A setting's value as one types it."""
    if value is None or value == []:
        return "-"
    if isinstance(value, list):
        return ",".join(words(v) for v in value)
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
