"""How both trainings start: fresh, from another's weights, or where they were stopped."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lightdiff.checkpoint import Checkpoint, Document, publish_text, remove_temporaries
from lightdiff.data.files import ImageFile
from lightdiff.errors import UserError
from lightdiff.run_folder import StageFolder, claim, set_aside
from lightdiff.settings import TrainUNetSettings, TrainVAESettings
from lightdiff.training.loop import Task, load_weights
from lightdiff.training.progress import console

FREE = ("loop", "run", "init_from", "restart", "latents", "images.data", "images.max_bad")  # may change on resuming
FIXED = ("loop.seed", "loop.precision", "loop.ema_decay")  # but not these of them


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"loop.lr": 0.1, ...}."""
    rows: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows |= flat(value, f"{prefix}{name}.")
        else:
            rows[prefix + name] = value
    return rows


def resumed(folder: StageFolder, stage: str, restart: bool) -> Checkpoint | None:
    """The state to go on from, if the run has been started before and is not to begin anew."""
    if restart:
        begin_anew(folder.path)
    claim(folder.checkpoints)
    remove_temporaries(folder.checkpoints)
    return Checkpoint(folder.last, stage) if folder.last.is_file() else None


def begin_anew(folder: Path) -> None:
    """Set aside what a stage has made so far."""
    aside = set_aside(folder)
    if aside is not None:
        console.print(f"what was in {folder} is now in {aside}")


def begin(
    task: Task,
    settings: TrainVAESettings | TrainUNetSettings,
    folder: StageFolder,
    document: Document,
    saved: Checkpoint | None,
    total: int,
) -> bool:
    """Prepare a run to start, from another's weights if asked to, or to go on; False if it has all its steps.

    Raises:
        UserError: If the settings are not those of the run that is to go on, or the weights do not fit.
    """
    if saved:
        document.facts = history(saved, check_same(saved, settings))
        if saved.document.step >= total:
            console.print(f"{folder.path} has its {total} steps already; give more --steps to train on")
            return False
        console.print(f"going on from step {saved.document.step} of {total}")
    elif settings.init_from:
        source = initial_weights(settings.init_from, task.stage)
        load_weights(task.model, source, source.weights())
    publish_text(folder.settings, json.dumps(settings.model_dump(mode="json"), indent=2) + "\n")
    return True


def check_same(saved: Checkpoint, settings: BaseModel) -> dict[str, tuple[Any, Any]]:
    """What differs from a saved run's settings and may: {"loop.lr": (old, new), ...}.

    Raises:
        UserError: If something differs that shapes the weights or the data.
    """
    old, new = flat(saved.document.settings), flat(settings.model_dump(mode="json"))
    changed = {name: (old[name], value) for name, value in new.items() if name in old and old[name] != value}
    for name, (before, now) in changed.items():
        if name in FIXED or not {name, name.split(".")[0]} & set(FREE):
            raise UserError(
                f"{saved.path.parent.parent} holds a run with {flag_of(name)} {before}, not {now}: "
                "choose another --run, or leave that setting as it was"
            )
    return changed


def flag_of(name: str) -> str:
    """A setting's name as the user types it."""
    group, _, field = name.rpartition(".")
    return "--" + (f"{group}.{field}" if group == "model" else field).replace("_", "-")


def initial_weights(path: Path, stage: str) -> Checkpoint:
    """The checkpoint named by --init-from: a file, or a run folder whose newest it is."""
    if path.is_dir():
        path = StageFolder(path / stage).last
    return Checkpoint(path, stage)


def history(saved: Checkpoint, changed: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """A resumed run's facts: those saved, and what has been changed at which step."""
    facts = dict(saved.document.facts)
    if changed:
        entry = {"step": saved.document.step, "changed": {name: list(pair) for name, pair in changed.items()}}
        facts["history"] = [*facts.get("history", []), entry]
    return facts


def data_digest(files: Sequence[ImageFile]) -> str:
    """A digest of the list of images: names, labels and split, not pixels."""
    text = json.dumps([(f.root, f.path, f.split, f.labels) for f in files])
    return hashlib.sha256(text.encode()).hexdigest()
