"""Where each stage's files lie below a run folder, how a later stage finds them, and how they are written."""

import errno
import itertools
import json
import os
import secrets
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from lightdiff.errors import RunError, UserError, from_os
from lightdiff.on_demand import on_demand

TEMPORARY = ".tmp"
NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)  # Windows has neither


INDEX = "index.safetensors"  # of a folder of latents
VAE_COPY = "vae.safetensors"  # in it: the VAE that made them


class StageFolder:
    """One stage's sub-folder of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "settings.json"  # the settings the stage ran with, all filled in
        self.metrics = path / "metrics.jsonl"  # one JSON object a line, in the order of steps
        self.images = path / "images"  # grids drawn at validations
        self.bad_files = path / "bad-files.txt"  # unreadable images and why
        self.image_list = path / "images.safetensors"  # the images that a VAE is trained on, and what their files were
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.safetensors"  # the newest state; can be resumed
        self.best = self.checkpoints / "best.safetensors"  # lowest validation loss; without optimizer state
        self.early = self.checkpoints / "early.safetensors"  # a U-Net's after a tenth of its steps, to guide away from

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
        """All states that a run could resume from, `last` first, then the newest."""
        return [path for path in (self.last, *reversed(self.steps())) if path.is_file()]


class RunFolder:
    """A run: everything that one model came from and made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.vae = StageFolder(path / "vae")  # what train-vae writes
        self.unet = StageFolder(path / "unet")  # what train-unet writes
        self.latents = path / "latents"  # what encode writes, and scale adds its result to
        self.samples = path / "samples"  # what generate writes, a folder a call


def find_vae(given: Path | None, run: RunFolder) -> Path:
    """The VAE's checkpoint: the one given, or the best of a given run, or of this one."""
    folder = run.vae if given is None else stage_folder(given, "vae")
    return _find(given, [folder.best, folder.last], "--vae", folder.path, "lightdiff train-vae")


def find_unet(given: Path | None, run: RunFolder, flag: str = "--unet") -> Path:
    """The U-Net's checkpoint: the one given (by this flag), or the last of a given run, or of this one."""
    folder = run.unet if given is None else stage_folder(given, "unet")
    return _find(given, [folder.last, folder.best], flag, folder.path, "lightdiff train-unet")


def stage_folder(given: Path, stage: str) -> StageFolder:
    """The stage's folder in a run folder, or the one given, if it is one itself."""
    return StageFolder(given if (given / "checkpoints").is_dir() else given / stage)


def find_latents(given: Path | None, run: RunFolder) -> Path:
    """The folder of latents: the one given, or that of a given run, or of this one."""
    places = [run.latents] if given is None else named_latents(given)
    for place in places:
        if (place / INDEX).is_file():
            return place
    on_demand("wrong_settings:check_spelling")(places[-1].parent)
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
    on_demand("wrong_settings:check_spelling")(folder.parent)
    raise UserError(f"{folder} holds no checkpoint: run '{command}' first, or point {flag} at one")


# --- writing ------------------------------------------------------------------------------------------------------


def ensure_writable(folder: Path) -> None:
    """Make a folder and check that it can be written to, before any long work.

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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of a failure which file could not be written.

    Raises:
        NoRoom: If the disk is full.
        RunError: If it fails in another way.
    """
    try:
        yield
    except OSError as error:
        raise from_os(error, path) from error


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then put it in place of `path` at once and durably.

    Raises:
        RunError: If it cannot be written; `path` is then as it was before.
    """
    maker = f"~{socket.gethostname()}~{os.getpid()}~{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}{maker}{TEMPORARY}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode  # by the umask; safetensors' save_file sets 0600
            write(temporary)
            if temporary.stat().st_nlink == 1:  # a link's mode belongs to its source, which is durable already
                os.chmod(temporary, stat.S_IMODE(mode))
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):  # it is still there where renaming one link of a file onto another does nothing
            temporary.unlink()


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a text file at once and durably."""
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def atomic_link(path: Path, source: Path) -> None:
    """Make `path` the same file as `source`, by a hard link where the disk has them, at once and durably."""

    def link(temporary: Path) -> None:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            temporary.write_bytes(source.read_bytes())

    atomic_write(path, link)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system can (Windows cannot open folders)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def append_text(path: Path, text: str) -> None:
    """Add to a text file, or begin it; a link in its place is not followed.

    Raises:
        RunError: If it cannot be written.
    """
    with writing(path), open(path, "a", encoding="utf-8", errors="surrogateescape", newline="\n", opener=open_own) as f:
        f.write(text)


def open_own(path: str, flags: int) -> int:
    """An opener of files that a stage keeps writing to: those may be no links, pipes or devices."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(errno.EINVAL, "a link, a pipe or a device is in its place: remove it", path)
    return os.open(path, flags | NO_WAIT | getattr(os, "O_NOFOLLOW", 0), 0o666)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder, and below it, that this process alone writes to."""
    for stale in temporaries(folder):
        stale.unlink(missing_ok=True)


def remove_abandoned(run: RunFolder) -> None:
    """Remove what killed processes left half-written anywhere in a run; what others are writing just now stays."""
    owned = (run.vae.path, run.unet.path, run.latents, run.samples, run.path / "evaluation")
    for path in itertools.chain(run.path.glob(f".*{TEMPORARY}"), *map(temporaries, owned)):
        on_demand("abandoned:remove_unless_written")(path)


def temporaries(folder: Path) -> Iterator[Path]:
    """The temporary files in a folder and below it."""
    for home, _, names in os.walk(folder):
        yield from (Path(home, name) for name in names if name.startswith(".") and name.endswith(TEMPORARY))


def process_runs(pid: int, started: str = "") -> bool:
    """Whether a process of this machine runs, and is the one that started then (`start_time`), if that is known."""
    if os.name != "posix":
        return True  # there, signal 0 would be Ctrl-C
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # another user's
    return not started or start_time(pid) in ("", started)


def start_time(pid: int) -> str:
    """When a process started, in Linux's own count, as numbers of processes come again; empty if it cannot be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


# --- reading ------------------------------------------------------------------------------------------------------


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """A regular file, open for reading in bytes; links are followed.

    Raises:
        OSError: It cannot be opened, or is something else: a device may hold more than any memory, a named pipe keeps
            its readers waiting.
    """
    return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    handle = os.open(path, flags | NO_WAIT)
    kind = os.fstat(handle).st_mode
    if stat.S_ISREG(kind) or stat.S_ISDIR(kind):  # of a folder, `open` itself says so
        return handle
    os.close(handle)
    raise OSError(errno.EINVAL, "a named pipe or a device, not a regular file", path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a run folder.

    Raises:
        RunError: If it is damaged.
    """
    try:
        with open_regular(path) as file:
            value = json.loads(file.read())
    except (ValueError, OSError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise RunError(f"{path} cannot be read: not a JSON object")
    return value
