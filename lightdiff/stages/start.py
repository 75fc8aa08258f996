"""How stages start: in a folder of their own, fresh, from another's weights, or where they were stopped."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightdiff.checkpoint import (
    Checkpoint,
    Metadata,
    atomic_link,
    atomic_write_text,
    check_own,
    load_weights,
    remove_temporaries,
)
from lightdiff.errors import Damaged, UserError
from lightdiff.run_folder import LOCK, Lock, StageFolder, ensure_writable, free_name, set_aside
from lightdiff.runtime.device import as_begun, pick_compile, pick_precision
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.progress import console
from lightdiff.settings import StageSettings, TrainUNetSettings, TrainVAESettings, flat, with_changes
from lightdiff.training.loop import Task

S = TypeVar("S", TrainVAESettings, TrainUNetSettings)
FREE = ("loop", "run", "init_from", "latents", "images.data", "images.max_bad")  # may change on resuming
FIXED = ("loop.seed", "loop.precision", "loop.ema_decay")  # but not these of them


def resumed(
    folder: StageFolder, stage: str, settings: S, lock: Lock, ranks: Processes, build: Callable[[S], nn.Module]
) -> Checkpoint | None:
    """The state to go on from, if the run has been started before and is not to begin anew.

    One process makes the folder, takes the lock and chooses the file; all open it. `build` makes a network of settings.

    Raises:
        UserError: If another process writes there, or there is a state but none that is whole.
    """
    mine: Checkpoint | None = None  # of the first process, read once already

    def choose() -> Path | None:
        nonlocal mine
        enter(folder.path, lock, settings.restart)
        ensure_writable(folder.checkpoints)
        remove_temporaries(folder.checkpoints)
        mine = step_file(folder, settings.from_step, stage) if settings.from_step else newest(folder, stage, whole=True)
        return mine.path if mine else None

    path = ranks.run_on_main(choose)
    ranks.check_same("run folder", path is None or path.is_file())  # else a machine without it would begin at step 0
    saved = mine or (Checkpoint(path, stage) if path else None)
    if saved:
        own = saved.settings(type(settings))
        check_own(lambda: build(own), saved, "model.")
    return saved


def newest(folder: StageFolder, stage: str, whole: bool) -> Checkpoint | None:
    """The newest state that can be resumed and is not damaged; None if there is none at all.

    With `whole` its tensors are read too, and damaged ones that it stands in for are told; else only documents are.

    Raises:
        Damaged: If there are some, but all are damaged.
    """
    problems: list[Damaged] = []
    for path in folder.resumable():
        try:
            found = Checkpoint(path, stage)
            if whole:
                found.verify()
        except Damaged as error:
            problems.append(error)
        else:
            for problem in problems if whole else ():
                console.print(f"{problem}; {path.name} is taken instead", style="yellow")
            return found
    if problems:
        raise Damaged(f"{problems[0]}; there is no whole state to go on from: --restart begins anew")
    return None


def step_file(folder: StageFolder, step: int, stage: str) -> Checkpoint:
    """The state after a number of steps.

    Raises:
        UserError: If there is no such file, or it is damaged.
    """
    path = folder.step(step)
    if not path.is_file():
        there = ", ".join(str(folder.step_of(p)) for p in folder.steps()) or "none"
        raise UserError(f"--from-step {step}: {folder.checkpoints} has no such step file; there are: {there}")
    return Checkpoint(path, stage).verify()


def go_back(folder: StageFolder, saved: Checkpoint) -> None:
    """Make a step file the newest state, and keep aside what was saved after it."""
    step = saved.metadata.step
    newer = [path for path in folder.steps() if folder.step_of(path) > step]
    newer += [path for path in (folder.last, folder.best) if path.is_file() and Checkpoint(path).metadata.step > step]
    if folder.best in newer:
        saved.metadata.extra.pop("best", None)  # the best of then has been replaced since: begin to look anew
    if newer:
        aside = free_name(folder.checkpoints / f"after-step-{step}")
        aside.mkdir()
        for path in newer:
            path.rename(aside / path.name)
        console.print(f"what was saved after step {step} is now in {aside}")
    atomic_link(folder.last, saved.path)


def decided(settings: S, saved: Checkpoint | None, device: torch.device, ranks: Processes, total: int) -> S:
    """The settings with every `auto` of the loop resolved: as the run has had it so far, else by trying."""
    asked = settings.loop
    before = saved.settings(type(settings)).loop if saved else asked
    precision, compiling = as_begun(asked.precision, before.precision), as_begun(asked.compile, before.compile)
    precision, compiling = ranks.run_on_main(
        lambda: (pick_precision(precision, device), pick_compile(compiling, device, total))
    )
    return with_changes(settings, loop=with_changes(settings.loop, precision=precision, compile=compiling))


def machine(device: torch.device, ranks: Processes) -> str:
    """What computes, in words."""
    return device.type if ranks.world_size == 1 else f"{ranks.world_size} processes on {device.type}"


def enter(folder: Path, lock: Lock, restart: bool = False) -> None:
    """Make a stage's folder, lock it, and clear it: of half-written files, or of everything, which is kept aside."""
    ensure_writable(folder)
    lock.take(folder)
    if restart and any(path.name != LOCK for path in folder.iterdir()):
        aside = set_aside(folder)
        console.print(f"what was in {folder} is now in {aside}")
        ensure_writable(folder)
        lock.take(folder)
    remove_temporaries(folder)


def begin(
    task: Task,
    settings: TrainVAESettings | TrainUNetSettings,
    folder: StageFolder,
    metadata: Metadata,
    saved: Checkpoint | None,
    total: int,
) -> bool:
    """Prepare a run to start, from another's weights if asked to, or to go on; False if it has all its steps.

    Raises:
        UserError: If the settings are not those of the run that is to go on, or the weights do not fit.
    """
    if saved:
        changed = check_same(saved, settings)
        data, before = metadata.lineage.get("data"), saved.metadata.lineage.get("data")
        if data != before and "images.data" in changed:
            _, now = changed["images.data"]
            raise UserError(
                f"--data: {', '.join(now)} holds other images than {folder.path} was trained on: choose another --run, "
                "or leave --data out"
            )
        if data != before:  # files were added or removed
            console.print("note: the list of images is not the one this run began with")
            changed["list of images"] = (before, data)
        metadata.extra = history(saved, changed)
        if saved.metadata.step >= total:
            step = saved.metadata.step
            there = f"has its {total}" if step == total else f"is past {total}: it has {step}"
            console.print(f"{folder.path} {there} steps already; give more --steps to train on")
            return False
        if settings.from_step:  # not before all else has been found to be right
            task.ranks.run_on_main(lambda: go_back(folder, saved))
        console.print(f"going on from step {saved.metadata.step} of {total}")
    elif settings.init_from:
        source = initial_weights(settings.init_from, task.stage)
        load_weights(task.model, source, source.weights_prefix())
    task.ranks.run_on_main(lambda: atomic_write_text(folder.settings, json.dumps(settings.to_save(), indent=2) + "\n"))
    return True


def check_same(saved: Checkpoint, settings: StageSettings) -> dict[str, tuple[Any, Any]]:
    """What differs from a saved run's settings and may: {"loop.lr": (old, new), ...}.

    Raises:
        UserError: If something differs that shapes the weights or the data.
    """
    old, new = flat(saved.metadata.settings), flat(settings.to_save())
    changed = {name: (old[name], value) for name, value in new.items() if name in old and old[name] != value}
    for name, (before, now) in changed.items():
        if name in FIXED or not {name, name.split(".")[0]} & set(FREE):
            flag = flag_of(name)
            held = f"without {flag} {now}" if before in ("", None) else f"with {flag} {before}, not {now}"
            raise UserError(
                f"{saved.path.parent.parent} holds a run {held}: choose another --run, or leave that setting as it was"
            )
    return changed


def flag_of(name: str) -> str:
    """A setting's name as the user types it."""
    group, _, field = name.rpartition(".")
    return "--" + (f"{group}.{field}" if group == "model" else field).rstrip("_").replace("_", "-")


def initial_weights(path: Path, stage: str) -> Checkpoint:
    """The checkpoint named by --init-from: a file, or a run folder whose newest it is."""
    if path.is_dir():
        path = StageFolder(path / stage).last
    return Checkpoint(path, stage)


def history(saved: Checkpoint, changed: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """A resumed run's facts: those saved, and what has been changed at which step."""
    facts = dict(saved.metadata.extra)
    if changed:
        entry = {"step": saved.metadata.step, "changed": {name: list(pair) for name, pair in changed.items()}}
        facts["history"] = [*facts.get("history", []), entry]
    return facts
