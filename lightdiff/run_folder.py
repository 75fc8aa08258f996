"""Where each stage's files lie below a run folder, and how a later stage finds them (design: one folder a stage)."""

import contextlib
import difflib
import errno
import itertools
import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightdiff.errors import RunError, UserError

INDEX = "index.json"  # of a folder of latents


@dataclass(frozen=True)
class StageFolder:
    """One stage's sub-folder of a run."""

    path: Path

    @property
    def settings(self) -> Path:
        """The settings the stage ran with, all filled in."""
        return self.path / "settings.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, in the order of steps."""
        return self.path / "metrics.jsonl"

    @property
    def images(self) -> Path:
        """Grids drawn at validations."""
        return self.path / "images"

    @property
    def bad_files(self) -> Path:
        """Unreadable images and why."""
        return self.path / "bad-files.txt"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """The newest state; can be resumed."""
        return self.checkpoints / "last.safetensors"

    @property
    def best(self) -> Path:
        """The weights with the lowest validation loss; without optimizer state."""
        return self.checkpoints / "best.safetensors"

    def step(self, step: int) -> Path:
        """The state after a number of optimizer steps; can be resumed."""
        return self.checkpoints / f"step-{step:08d}.safetensors"

    def steps(self) -> list[Path]:
        """All step files, oldest first."""
        return sorted(self.checkpoints.glob("step-*.safetensors"), key=self.step_of)

    @staticmethod
    def step_of(path: Path) -> int:
        """The step in a step file's name; -1 where it is no number."""
        number = path.stem.removeprefix("step-")
        return int(number) if number.isdecimal() else -1

    def resumable(self) -> list[Path]:
        """All states that a run could go on from, `last` first, then the newest."""
        return [path for path in (self.last, *reversed(self.steps())) if path.is_file()]


@dataclass(frozen=True)
class RunFolder:
    """A run: everything that one model came from and made."""

    path: Path

    @property
    def vae(self) -> StageFolder:
        """What train-vae writes."""
        return StageFolder(self.path / "vae")

    @property
    def unet(self) -> StageFolder:
        """What train-unet writes."""
        return StageFolder(self.path / "unet")

    @property
    def latents(self) -> Path:
        """What encode writes, and scale adds its result to."""
        return self.path / "latents"

    @property
    def samples(self) -> Path:
        """What generate writes, a folder a call."""
        return self.path / "samples"


def find_vae(given: Path | None, run: RunFolder) -> Path:
    """The VAE's checkpoint: the one given, or the best of a given run, or of this one."""
    folder = run.vae if given is None else stage_folder(given, "vae")
    return _find(given, [folder.best, folder.last], "--vae", folder.path, "lightdiff train-vae")


def find_unet(given: Path | None, run: RunFolder) -> Path:
    """The U-Net's checkpoint: the one given, or the last of a given run, or of this one."""
    folder = run.unet if given is None else stage_folder(given, "unet")
    return _find(given, [folder.last, folder.best], "--unet", folder.path, "lightdiff train-unet")


def stage_folder(given: Path, stage: str) -> StageFolder:
    """The stage's folder in a run folder, or the one given, if it is one itself."""
    return StageFolder(given if (given / "checkpoints").is_dir() else given / stage)


def find_latents(given: Path | None, run: RunFolder) -> Path:
    """The folder of latents: the one given, or that of a given run, or of this one."""
    places = [run.latents] if given is None else named_latents(given)
    for place in places:
        if (place / INDEX).is_file():
            return place
    check_spelling(places[-1].parent)
    raise UserError(f"{places[-1]} holds no latents: run 'lightdiff encode' first, or point --latents at some")


def named_latents(given: Path) -> list[Path]:
    """Where latents may lie that were named by a folder: in it, or in that run."""
    return [given, RunFolder(given).latents]


def _find(given: Path | None, places: list[Path], flag: str, folder: Path, command: str) -> Path:
    if given is not None and not given.is_dir():
        if not given.exists():
            raise UserError(f"{flag}: {given} does not exist; name a checkpoint file or a run folder")
        return given
    for place in places:
        if place.is_file():
            return place
    check_spelling(folder.parent)
    raise UserError(f"{folder} holds no checkpoint: run '{command}' first, or point {flag} at one")


def check_spelling(run: Path) -> None:
    """Where there is no such run, but some of a similar name, say so instead of what is missing in it.

    Raises:
        UserError: If so.
    """
    beside = [p.name for p in run.parent.iterdir() if p.is_dir()] if run.parent.is_dir() and not run.exists() else []
    if near := difflib.get_close_matches(run.name, beside):
        meant = " or ".join(str(run.parent / name) for name in near)
        raise UserError(f"there is no run folder {run}; did you mean {meant}?")


def ensure_writable(folder: Path) -> None:
    """Make a folder and see that it can be written to, before any long work.

    Raises:
        UserError: If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder} cannot be made: a file of that name is in the way") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written to: check its owner and permissions")


def set_aside(folder: Path) -> Path | None:
    """Rename a folder to NAME.old-1 (or -2, ...), so that a new one can take its place; None if there is none."""
    if not folder.exists():
        return None
    return folder.rename(free_name(folder))


def free_name(path: Path) -> Path:
    """The first of NAME.old-1, NAME.old-2, ... that does not exist."""
    names = (path.with_name(f"{path.name}.old-{n}") for n in itertools.count(1))
    return next(name for name in names if not name.exists())


LOCK = ".lock"
LOCKED_BYTE = 1 << 20  # beyond the words in the file


class Lock:
    """That one process writes to a folder. Taken until the process ends, however it ends.

    The operating system holds it (a POSIX record lock, which no child process inherits: after a kill the next start
    need not wait for loader workers to notice). The file says who has it, for the message, and for file systems that
    keep locks on each host apart.
    """

    def __init__(self, force: bool = False) -> None:
        """Prepare; `force` takes a lock that another host's process has left."""
        self.force = force
        self._held: dict[Path, int] = {}

    def take(self, folder: Path) -> None:
        """Take the folder's lock.

        Raises:
            UserError: If another process has it.
        """
        path = folder / LOCK
        if path in self._held:
            self._release(path)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            host, _, pid = os.read(handle, 1000).decode(errors="replace").strip().rpartition(" ")
            os.lseek(handle, LOCKED_BYTE, os.SEEK_SET)
            locked = try_lock(handle)
            if not locked or os.fstat(handle).st_nlink:
                break
            os.close(handle)  # released, and removed, just after it was opened
        if not locked:
            os.close(handle)
            raise UserError(
                f"{folder} is in use by {f'process {pid} on {host}' if pid else 'another process'}: "
                "wait for it, stop it, or choose another --run"
            )
        if host and host != socket.gethostname() and not self.force:
            os.close(handle)
            raise UserError(
                f"{folder} was locked by process {pid} on {host}, which ended without a word or still runs: "
                "if you are sure that it has ended, give --force-unlock"
            )
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, f"{socket.gethostname()} {os.getpid()}\n".encode())
        self._held[path] = handle

    def release(self) -> None:
        """Give all locks back, as the work is done."""
        for path in list(self._held):
            self._release(path)

    def _release(self, path: Path) -> None:
        handle = self._held.pop(path)
        os.ftruncate(handle, 0)
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()
        os.close(handle)

    def __enter__(self) -> "Lock":
        """Nothing is taken yet."""
        return self

    def __exit__(self, kind: object, error: object, at: object) -> None:
        """Give back what was taken."""
        self.release()


def try_lock(handle: int) -> bool:
    """Lock an open file for this process alone, unless another process has locked it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # from here on; others may still read the file's words
        else:
            import fcntl

            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # from the file's first byte to its end
    except OSError as error:
        # Some network file systems have no locks at all; there, the file's words must do.
        return error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
    return True


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a run folder.

    Raises:
        RunError: If it is damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise RunError(f"{path} cannot be read: not a JSON object")
    return value
