"""Resuming a training: the newest whole snapshot, the same settings as it was begun with, going back to a step."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightdiff.checkpoint import Checkpoint, load_weights
from lightdiff.errors import Damaged, UserError
from lightdiff.run_folder import (
    StageFolder,
    atomic_link,
    free_name,
    set_aside,
)
from lightdiff.runtime.progress import console

if TYPE_CHECKING:
    from lightdiff.runtime.stage import Stage

Changes = dict[str, tuple[Any, Any]]  # of flat settings: {"loop.lr": (old, new), ...}
RESUME_MAY_CHANGE = ("loop", "run", "init_from", "latents", "images.data", "images.max_bad")
RESUME_MUST_MATCH = ("loop.seed", "loop.precision", "loop.ema_decay")  # of those


def newest(folder: StageFolder, name: str, whole: bool = True) -> Checkpoint | None:
    """The newest state that can be resumed and is not damaged; None if there is none at all.

    With `whole` its tensors are read too, and a note names damaged ones that it stands in for; else only metadata is.

    Raises:
        Damaged: If there are some, but all are damaged.
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
                console.print(f"{problem}; {path.name} is used instead", style="yellow")
            return found
    if problems:
        raise Damaged(f"{problems[0]}; there is no whole state to resume from: --restart starts over")
    return None


def step_file(folder: StageFolder, step: int, name: str) -> Checkpoint:
    """The state after a number of steps.

    Raises:
        UserError: If there is no such file, or it is damaged.
    """
    path = folder.step(step)
    if not path.is_file():
        available = ", ".join(str(folder.step_of(p)) for p in folder.steps()) or "none"
        raise UserError(f"--from-step {step}: {folder.checkpoints} has no such step file; there are: {available}")
    return Checkpoint(path, name).verify()


def start_over(folder: Path) -> None:
    """Rename what a folder holds, and make it anew."""
    if aside := set_aside(folder):
        console.print(f"the contents of {folder} are now in {aside}")


def prepare(stage: "Stage[Any]", saved: Checkpoint) -> bool:
    """Prepare to resume from a snapshot; False if the run has all its steps.

    Raises:
        UserError: If settings or data are not those of the run to resume.
    """
    changed = stage.check_begun(stage.settings.to_save())
    changed |= check_lineage(stage, saved, "images.data" in changed)
    stage.metadata.extra = history(saved, changed)
    step, total = saved.metadata.step, stage.total_steps
    if step >= total:
        there = f"has its {total}" if step == total else f"is past {total}: it has {step}"
        console.print(f"{stage.path} {there} steps already; give more --steps to train on")
        return False
    if stage.settings.from_step:  # not before everything else has been checked
        stage.processes.run_on_main(lambda: go_back(stage.folder, saved))
    stage.processes.run_on_main(stage.write_settings)
    console.print(f"resuming from step {step} of {total}")
    return True


def check_lineage(stage: "Stage[Any]", saved: Checkpoint, other_data: bool) -> Changes:
    """The change of the list of images since the run began, if there is one; it may only grow or shrink.

    Raises:
        UserError: If the run was trained on something else.
    """
    now, before = stage.metadata.lineage, saved.metadata.lineage
    if now == before:
        return {}
    if now.keys() != {"data"}:
        name = next(name for name in reversed(now) if now[name] != before.get(name))
        raise UserError(
            f"{stage.path} was trained on {name} {before.get(name, '')[:8]}, but now there is {now[name][:8]}: "
            "choose another --run, or --restart"
        )
    if other_data:
        folders = ", ".join(map(str, stage.settings.images.data))
        raise UserError(
            f"--data: {folders} holds other images than {stage.path} was trained on: choose another --run, "
            "or leave --data out"
        )
    console.print("note: the list of images is not the one this run began with")
    return {"list of images": (before.get("data"), now["data"])}


def compare(begun: Mapping[str, Any], now: Mapping[str, Any], folder: Path, advice: str) -> Changes:
    """What differs from the flat settings that work was begun with, and may: {"loop.lr": (old, new), ...}.

    Raises:
        UserError: If something differs that shapes the result.
    """
    changed = {name: (begun[name], value) for name, value in now.items() if name in begun and begun[name] != value}
    for name, (old, new) in changed.items():
        if name in RESUME_MUST_MATCH or not {name, name.split(".")[0]} & set(RESUME_MAY_CHANGE):
            if name.startswith("latent."):
                raise UserError(f"{folder} was trained on other latents ({name}): choose another --run, or --restart")
            flag = flag_of(name) if name != "command" else "lightdiff"
            what = f"without {flag} {new}" if old in ("", None) else f"with {flag} {old}, not {new}"
            raise UserError(f"{folder} was begun {what}: {advice}")
    return changed


def flag_of(name: str) -> str:
    """A setting's name as the user types it."""
    group, _, field = name.rpartition(".")
    return "--" + (f"{group}.{field}" if group == "model" else field).rstrip("_").replace("_", "-")


def go_back(folder: StageFolder, saved: Checkpoint) -> None:
    """Make a step file the newest state, and set aside what was saved after it."""
    step = saved.metadata.step
    newer = [path for path in folder.steps() if folder.step_of(path) > step]
    newer += [path for path in (folder.last, folder.best) if path.is_file() and Checkpoint(path).metadata.step > step]
    if folder.best in newer:
        saved.metadata.extra.pop("best", None)  # the best of then has been replaced since: the search starts again
    if newer:
        aside = free_name(folder.checkpoints / f"after-step-{step}")
        aside.mkdir()
        for path in newer:
            path.rename(aside / path.name)
        console.print(f"what was saved after step {step} is now in {aside}")
    atomic_link(folder.last, saved.path)


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
