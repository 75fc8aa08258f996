"""show: a checkpoint's or a run's settings (what differs from the defaults first), lineage, metrics, and its health."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.data.latents import LatentIndex, read_index
from lightdiff.errors import UserError
from lightdiff.extras.health import Finding, examine
from lightdiff.extras.settings_rows import MODELS, Row, settings_rows, words
from lightdiff.run_folder import INDEX, RunFolder, StageFolder
from lightdiff.runtime.resume import flag_of

PART_OF = {"data": "vae", "samples": "unet"}  # whose findings stand with another stage's in --json


def show(place: Path, as_json: bool = False) -> None:
    """Print what a file or a run folder holds, to stdout.

    Raises:
        UserError: If it holds nothing of lightdiff.
    """
    console = Console(highlight=False, markup=False)
    found = list(parts(place))
    if not found:
        raise UserError(f"{place} holds no checkpoint and no latents of lightdiff")
    is_run = place.is_dir() and not (place / INDEX).is_file() and not (place / "checkpoints").is_dir()
    findings = examine(place) if is_run else None
    if as_json:
        console.print_json(json.dumps(as_objects(found, findings)))
        return
    for path, what in found:
        console.rule(str(path), align="left")
        if isinstance(what, LatentIndex):
            show_latents(console, what)
        else:
            show_metadata(console, what)
    if findings is not None:
        console.rule("health", align="left")
        show_findings(console, findings)


def parts(place: Path) -> Iterator[tuple[Path, Metadata | LatentIndex]]:
    """What there is at a path: one checkpoint, that of a stage, or the stages of a run."""
    if place.is_file():
        yield place, Checkpoint(place).metadata
        return
    if not place.exists():
        raise UserError(f"{place} does not exist")
    run, own = RunFolder(place), StageFolder(place).last
    if own.is_file():
        yield own, Checkpoint(own).metadata
    if run.vae.last.is_file():
        yield run.vae.last, Checkpoint(run.vae.last).metadata
    for latents in (place, run.latents):
        if (latents / INDEX).is_file():
            yield latents, read_index(latents)
    if run.unet.last.is_file():
        yield run.unet.last, Checkpoint(run.unet.last).metadata


def about(what: Metadata | LatentIndex) -> dict[str, Any]:
    """The same as a JSON object; the list of images and digests of single tensors are left out."""
    leave_out = {"files", "splits", "labels"} if isinstance(what, LatentIndex) else {"digests"}
    return what.model_dump(mode="json", exclude=leave_out)


def as_objects(
    found: list[tuple[Path, Metadata | LatentIndex]], findings: list[Finding] | None
) -> list[dict[str, Any]]:
    """Each part as a JSON object; those of a run with what was found about them, the first one also with the rest."""
    objects = [{"path": str(path)} | about(what) for path, what in found]
    if findings is None:
        return objects
    stages = ["latents" if isinstance(what, LatentIndex) else what.stage for _, what in found]
    for stage, one in zip(stages, objects, strict=True):
        own = [f for f in findings if PART_OF.get(f.stage, f.stage) == stage]
        rest = [f for f in findings if PART_OF.get(f.stage, f.stage) not in stages] if one is objects[0] else []
        one["findings"] = [finding.model_dump() for finding in own + rest]
    return objects


def show_findings(console: Console, findings: list[Finding]) -> None:
    """Print what is unusual about a run, or that nothing is."""
    if not findings:
        console.print("nothing unusual found")
    for finding in findings:
        console.print(f"{finding.stage}: {finding.title}", style="bold", soft_wrap=True)
        for name in ("measured", "usual", "advice"):
            console.print(f"  {name + ':':<9} {getattr(finding, name)}", soft_wrap=True)


def show_metadata(console: Console, metadata: Metadata) -> None:
    """Print a checkpoint's metadata."""
    pairs = Table(box=None, show_header=False, pad_edge=False)
    pairs.add_row("stage", f"{metadata.stage}, written by lightdiff {metadata.lightdiff}")
    pairs.add_row("step", f"{metadata.step:,}  ({metadata.images_seen:,} images seen)")
    for name, value in metadata.metrics.items():
        pairs.add_row(name, f"{value:.5g}")
    for name, digest in metadata.lineage.items():
        pairs.add_row(f"from {name}", digest[:16])
    for change in metadata.extra.get("history", []):
        named = {flag_of(name) if "." in name else name: pair for name, pair in change["changed"].items()}
        said = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in named.items())
        pairs.add_row(f"changed at step {change['step']}", said)
    console.print(pairs)
    model = MODELS.get(metadata.stage)
    if model is not None:
        show_settings(console, settings_rows(model, metadata.settings))


def show_settings(console: Console, rows: list[Row]) -> None:
    """Print settings as flags: first what differs from the defaults, then the rest."""
    table = Table(box=None, pad_edge=False)
    for heading in ("setting", "value", "default"):
        table.add_column(heading)
    for row in rows:
        style = "bold" if row.differs else "dim"
        table.add_row(f"--{row.flag}", row.value, row.default if row.differs else "", style=style)
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
