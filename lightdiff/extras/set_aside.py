"""`--restart` and `--from-step`: what a folder holds, or what is newer than a step, is moved aside, never removed."""

import itertools
from collections.abc import Iterable
from pathlib import Path

from lightdiff.checkpoint import Checkpoint
from lightdiff.errors import Damaged, UserError
from lightdiff.run_folder import StageFolder, atomic_link
from lightdiff.runtime.progress import console


def free_name(path: Path) -> Path:
    """The first of NAME.old-1, NAME.old-2, ... that does not exist."""
    names = (path.with_name(f"{path.name}.old-{n}") for n in itertools.count(1))
    return next(name for name in names if not name.exists())


def set_aside(folder: Path) -> Path | None:
    """Move what a folder holds, but for hidden files, to NAME.old-1 (or -2, ...); None if it holds nothing."""
    held = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return move_aside(held, folder) if held else None


def move_aside(paths: Iterable[Path], name: Path) -> Path:
    """Move files and folders into a new folder, NAME.old-1 (or -2, ...), and return it."""
    aside = free_name(name)
    aside.mkdir()
    for path in paths:
        path.rename(aside / path.name)
    return aside


def start_over(folder: Path) -> None:
    """Move what a folder holds aside, and say where it is now."""
    if aside := set_aside(folder):
        console.print(f"the contents of {folder} are now in {aside}", soft_wrap=True)


def step_file(folder: StageFolder, name: str, step: int) -> Checkpoint:
    """The state after a number of steps.

    Raises:
        UserError: If there is no such file, or it is damaged.
    """
    path = folder.step(step)
    if not path.is_file():
        available = ", ".join(str(folder.step_of(p)) for p in folder.steps()) or "none"
        raise UserError(f"--from-step {step}: {folder.checkpoints} has no such step file; there are: {available}")
    return Checkpoint(path, name).verify()


def set_newer_aside(folder: StageFolder, saved: Checkpoint, going_back: bool) -> None:
    """Make a step file the newest state, and set aside what was saved after it.

    If that was cut off once `last` was replaced, the next start, which finds a folder of this name, completes it.
    """
    step = saved.metadata.step
    name = folder.checkpoints / f"after-step-{step}"
    if going_back and any(is_newer(path, step) for path in (*folder.steps(), folder.last, folder.best, folder.early)):
        aside = free_name(name)
        aside.mkdir()
        if is_newer(folder.last, step):
            atomic_link(aside / folder.last.name, folder.last)
        console.print(f"what was saved after step {step} is now in {aside}", soft_wrap=True)
    asides = sorted(name.parent.glob(f"{name.name}.old-*"), key=lambda path: path.stat().st_mtime_ns)
    if going_back:
        atomic_link(folder.last, saved.path)
    for path in (*folder.steps(), folder.best, folder.early) if asides else ():
        if is_newer(path, step) and not (asides[-1] / path.name).exists():  # else it is half of a later save
            path.rename(asides[-1] / path.name)


def is_newer(path: Path, step: int) -> bool:
    """Whether a snapshot is of a later step; one that cannot be read is set aside with those."""
    try:
        return path.is_file() and Checkpoint(path).metadata.step > step
    except Damaged:
        return True
