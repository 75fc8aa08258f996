"""show: health, metrics, lineage and settings of a checkpoint or a run; those at their defaults only on request."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.data.index import LatentIndex, read_index
from lightdiff.data.table import SPLITS
from lightdiff.errors import UserError
from lightdiff.extras.baselines import baselines_of
from lightdiff.extras.evidence import unsaved
from lightdiff.extras.health import Finding, examine
from lightdiff.extras.settings_rows import MODELS, Row, format_setting, settings_changes, settings_rows
from lightdiff.extras.tables import print_table
from lightdiff.run_folder import INDEX, RunFolder, StageFolder
from lightdiff.runtime.progress import SafeConsole

STAGE_OF = {"data": "vae", "samples": "unet"}  # the part of --json that lists these findings


def show(path: Path, as_json: bool = False, all_settings: bool = False) -> None:
    """Print what a file or a run folder holds, to stdout.

    Args:
        path: The file or folder.
        as_json: Whether to print it as JSON.
        all_settings: Whether to print settings at their defaults, too.

    Raises:
        UserError: If it holds nothing of lightdiff.
    """
    console = SafeConsole()
    found = list(find_parts(path))
    if not found:
        raise UserError(f"{path} holds no checkpoint and no latents of lightdiff")
    is_run = path.is_dir() and not (path / INDEX).is_file() and not (path / "checkpoints").is_dir()
    findings = examine(path) if is_run else None
    if as_json:
        print(json.dumps(as_objects(found, findings), indent=2))
        return
    if findings is not None:
        print_heading(console, "health")
        print_findings(console, findings)
    for file, part in found:
        print_heading(console, str(file))
        if isinstance(part, LatentIndex):
            print_latents(console, part)
        else:
            print_metadata(console, part, all_settings)


def print_heading(console: SafeConsole, text: str) -> None:
    """Print what comes next, whole."""
    console.print(f"\u2500\u2500 {text}", style="bold", soft_wrap=True)


def find_parts(path: Path) -> Iterator[tuple[Path, Metadata | LatentIndex]]:
    """What a path holds: one checkpoint, a stage's last one, or all stages of a run."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    run = RunFolder(path)
    for file in (path, StageFolder(path).last, run.vae.last):
        if file.is_file():
            yield file, Checkpoint(file).metadata
    for folder, stage in ((StageFolder(path), path.name), (run.vae, "vae")):
        if stage in MODELS and (begun := unsaved(folder, MODELS[stage], stage)):
            yield folder.settings, begun
    for latents in (path, run.latents):
        if (latents / INDEX).is_file():
            yield latents, read_index(latents)
    if run.unet.last.is_file():
        yield run.unet.last, Checkpoint(run.unet.last).metadata
    elif begun := unsaved(run.unet, MODELS["unet"], "unet"):
        yield run.unet.settings, begun


def as_objects(
    found: list[tuple[Path, Metadata | LatentIndex]], findings: list[Finding] | None
) -> list[dict[str, Any]]:
    """Each part as a JSON object, without its lists of images or digests of single tensors.

    Those of a run contain their findings, the first one also those of stages that are missing.
    """
    large = {"labels", "shards", "digests"}
    objects = [{"path": str(file)} | part.model_dump(mode="json", exclude=large) for file, part in found]
    if findings is None:
        return objects
    stages = ["latents" if isinstance(part, LatentIndex) else part.stage for _, part in found]
    for stage, one in zip(stages, objects, strict=True):
        own = [f for f in findings if STAGE_OF.get(f.stage, f.stage) == stage]
        rest = [f for f in findings if STAGE_OF.get(f.stage, f.stage) not in stages] if one is objects[0] else []
        one["findings"] = [finding.model_dump() for finding in own + rest]
    return objects


def print_findings(console: SafeConsole, findings: list[Finding]) -> None:
    """Print the findings about a run, or that there are none."""
    if not findings:
        console.print("nothing unusual found")
    for finding in findings:
        console.print(f"{finding.stage}: {finding.title}", style="bold", soft_wrap=True)
        for name in ("measured", "usual", "advice"):
            console.print(f"  {name + ':':<9} {getattr(finding, name)}", soft_wrap=True)


def print_metadata(console: SafeConsole, metadata: Metadata, all_settings: bool) -> None:
    """Print a checkpoint's metadata."""
    pairs = Table(box=None, show_header=False, pad_edge=False)
    saved = metadata.extra.get("saved", True)
    written = f"written by lightdiff {metadata.lightdiff}" if saved else "not saved yet (of settings and metrics)"
    pairs.add_row("stage", f"{metadata.stage}, {written}")
    pairs.add_row("step", f"{metadata.step:,}  ({metadata.images_seen:,} images seen)")
    known = baselines_of(metadata)
    for name, value in metadata.metrics.items():
        pairs.add_row(
            name, f"{value:.5g}" + (f"  ({known[name]:.4g} from the noise level alone)" if name in known else "")
        )
    for name, digest in metadata.lineage.items():
        pairs.add_row(f"from {name}", digest[:16])
    for step, changes in settings_changes(metadata):
        pairs.add_row(f"changed at step {step}", changes)
    print_table(console, pairs)
    model = MODELS.get(metadata.stage)
    if model is not None:
        print_settings(console, settings_rows(model, metadata.settings), all_settings)


def print_settings(console: SafeConsole, rows: list[Row], all_settings: bool) -> None:
    """Print settings as a table of flags, those that differ from the defaults first."""
    table = Table(box=None, pad_edge=False)
    for heading in ("setting", "value", "default"):
        table.add_column(heading)
    shown = [row for row in rows if row.differs or all_settings]
    for row in shown:
        style = "bold" if row.differs else "dim"
        table.add_row(f"--{row.flag}", row.value, row.default if row.differs else "", style=style)
    print_table(console, table)
    if len(shown) < len(rows):
        console.print(f"{len(rows) - len(shown)} more settings are at their defaults (--all)", style="dim")


def print_latents(console: SafeConsole, index: LatentIndex) -> None:
    """Print a latents' index."""
    pairs = Table(box=None, show_header=False, pad_edge=False)
    pairs.add_row("latents", f"{index.encoded.sum():,} images as {' x '.join(map(str, index.shape))}")
    pairs.add_row("stored as", index.dtype + (", with mirror images" if index.mirrored else ""))
    train, val = (len(index.positions(split)) for split in SPLITS)
    pairs.add_row("split", f"{train:,} for training, {val:,} for validation")
    pairs.add_row("state", "complete" if index.complete else "unfinished: run 'lightdiff encode' again")
    pairs.add_row("from VAE", index.vae_digest[:16])
    if index.statistics is not None:
        pairs.add_row("mean, std", f"{index.statistics.mean:.4f}, {index.statistics.std:.4f}")
        pairs.add_row("shift", format_setting(index.statistics.shift))
        pairs.add_row("scale", format_setting(index.statistics.scale))
    else:
        pairs.add_row("scale", "not computed yet: run 'lightdiff scale'")
    print_table(console, pairs)
