"""A folder that one process alone writes to, on every kind of file system."""

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from lightdiff.errors import UserError, from_os
from lightdiff.run_folder import (
    ensure_writable,
    open_own,
    open_regular,
    process_runs,
    remove_temporaries,
    start_time,
    writing,
)

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of network file systems: there, the file's words must do
WORDS = 400  # bytes of a lock file that are read


class Owner(NamedTuple):
    """Who has a folder, in the words of its lock file."""

    host: str
    pid: int
    started: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextmanager
def open_stage_dir(folder: Path, force: bool) -> Iterator[Path]:
    """A folder that this process alone writes to, without half-written files; if it stays empty, it goes again.

    The operating system holds the lock until the process ends, however it ends. The file says who has it, for the
    message, and for file systems that keep the locks of each host apart, or have none.

    Raises:
        UserError: If another process has it, or the folder cannot be made.
    """
    here = Owner(socket.gethostname(), os.getpid(), start_time(os.getpid()))
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    ensure_writable(folder)
    file = folder / LOCK
    check_own(file)
    lock = FileLock(file, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise in_use(folder, lock_owner(file) or "another process") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise from_os(error, file) from error
        owner = lock_owner(file)
        if owner and owner.host == here.host and process_runs(owner.pid, owner.started):
            raise in_use(folder, owner) from None
    if (owner := lock_owner(file)) and owner.host != here.host and not force:
        lock.release()
        raise UserError(
            f"{folder} was locked by {owner}, which exited without releasing the lock, or still runs: "
            "if you are sure that it has exited, give --force-unlock"
        )
    try:
        with writing(file), open(file, "w", encoding="utf-8", opener=open_own) as words:
            words.write(" ".join(map(str, here)) + "\n")
        remove_temporaries(folder)
        yield folder
    finally:
        with suppress(OSError):  # Windows removes no open file, and no folder goes that is not empty
            file.unlink()
            for path in made:
                path.rmdir()
        lock.release()


def check_own(file: Path) -> None:
    """Check that a lock file, which will be overwritten, is a file of its own.

    Raises:
        UserError: If it is a link, of either kind, or no regular file.
    """
    if os.path.lexists(file):
        found = file.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise UserError(f"{file} is a link, a pipe or a device, and no lock of lightdiff: remove it")


def in_use(folder: Path, owner: object) -> UserError:
    """That another process has a folder."""
    return UserError(f"{folder} is in use by {owner}: wait for it, stop it, or choose another --run")


def lock_owner(file: Path) -> Owner | None:
    """Who has written a lock file; None for nobody."""
    try:
        with open_regular(file) as stream:
            host, pid, *started = stream.read(WORDS).decode(errors="replace").split()
        return Owner(host, int(pid), *started[:1])
    except (OSError, ValueError):
        return None
