"""Resuming a training: the newest whole snapshot, the same settings as it was started with."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lightdiff.checkpoint import Checkpoint, load_weights
from lightdiff.errors import Damaged, UserError
from lightdiff.on_demand import on_demand
from lightdiff.run_folder import StageFolder
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.progress import console
from lightdiff.settings import StageSettings, TrainUNetSettings, TrainVAESettings

Changes = dict[str, tuple[Any, Any]]  # of flat settings: {"loop.lr": (old, new), ...}
RESUME_MAY_CHANGE = (
    "loop",
    "run",
    "preset",
    "init_from",
    "latents",
    "images.data",
    "images.max_bad",
    "images.max_megapixels",
)
RESUME_MAY_DECIDE = ("images.integer_white", "images.float_white")  # as long as they were 0
LINEAGE_MAY_CHANGE = {"data": "list of images", "labels": "labels of images"}
RESUME_MUST_MATCH = ("loop.seed", "loop.precision", "loop.ema_decay", "loop.optimizer")  # of those
AGAIN = "run the same command again to resume"


def find_saved(folder: StageFolder, name: str, step: int, processes: Processes) -> Checkpoint:
    """The state to resume from, chosen and verified by the main process: of a step, or the newest for step 0.

    Raises:
        UserError: If there is none that is whole.
    """
    find = partial(on_demand("set_aside:step_file"), step=step) if step else newest
    path = processes.run_on_main(lambda: find(folder, name).path)
    processes.check_same("run folder", path.is_file())  # a machine without it would start afresh
    return Checkpoint(path, name)


def newest(folder: StageFolder, name: str, whole: bool = True) -> Checkpoint:
    """The newest state that can be resumed and is not damaged, of a stage that has some.

    With `whole` its tensors are read too, and a note names damaged ones that it stands in for; else only metadata is.

    Raises:
        Damaged: If all are damaged.
    """
    problems: list[Damaged] = []
    for path in folder.resumable():
        try:
            found = Checkpoint(path, name)
            if whole:
                found.verify()
        except Damaged as error:
            problems.append(error)
        else:
            for problem in problems if whole else ():
                console.print(f"{problem}; {path.name} is used instead", style="yellow", soft_wrap=True)
            return found
    raise Damaged(f"{problems[0]}; there is no whole state to resume from: --restart starts over")


def compare_lineage(folder: Path, before: Mapping[str, str], now: Mapping[str, str]) -> Changes:
    """What a run is trained on that differs from what it was started with, and may.

    Raises:
        UserError: If it was trained on something else.
    """
    for name in reversed(list(now)):
        if now[name] != before.get(name) and name not in LINEAGE_MAY_CHANGE:
            raise UserError(
                f"{folder} was trained on {name} {before.get(name, '')[:8]}, but now there is {now[name][:8]}: "
                "choose another --run, or --restart"
            )
    both = before.keys() & now.keys()
    return {what: (before[n], now[n]) for n, what in LINEAGE_MAY_CHANGE.items() if n in both and before[n] != now[n]}


def compare(started_with: Mapping[str, Any], now: Mapping[str, Any], folder: Path, advice: str) -> Changes:
    """What differs from the flat settings that work was started with, and may: {"loop.lr": (old, new), ...}.

    Raises:
        UserError: If something differs that shapes the result.
    """
    changed = {
        name: (started_with[name], value)
        for name, value in now.items()
        if name in started_with and started_with[name] != value
    }
    for name, (old, new) in changed.items():
        if name in RESUME_MAY_DECIDE and not old:
            continue
        if name in RESUME_MUST_MATCH or not {name, name.split(".")[0]} & set(RESUME_MAY_CHANGE):
            raise on_demand("wrong_settings:other_setting")(folder, name, old, new, advice)
    return changed


def load_initial_weights(model: nn.Module, path: Path, name: str) -> None:
    """Load the weights of --init-from, a checkpoint file or the newest of a run folder, averaged if they are there."""
    source = Checkpoint(StageFolder(path / name).last if path.is_dir() else path, name)
    load_weights(model, source, source.weights_prefix())


def history(saved: Checkpoint, changed: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """A resumed run's extra metadata: as saved, and which settings have changed at which step."""
    extra = dict(saved.metadata.extra)
    if changed:
        entry = {"step": saved.metadata.step, "changed": {name: list(pair) for name, pair in changed.items()}}
        extra["history"] = [*extra.get("history", []), entry]
    return extra


def untouched(settings: StageSettings, again: str = AGAIN) -> str:
    """What a run that ends early leaves, and how to go on; a training that has not saved yet leaves nothing."""
    name = {TrainVAESettings: "vae", TrainUNetSettings: "unet"}.get(type(settings), "")
    if name and not StageFolder(settings.run / name).resumable():
        return "nothing was saved yet: the same command starts from the beginning"
    return f"what was saved is untouched: {again}"
