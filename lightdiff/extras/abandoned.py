"""Files that killed processes have left half-written where others may be writing, too."""

import re
import socket
import time
from contextlib import suppress
from pathlib import Path

from lightdiff.run_folder import process_runs

MAKER = re.compile(r"~([^~]*)~(\d+)~[0-9a-f]+\.tmp$")  # in a temporary file's name: host and process
ABANDONED = 24 * 3600  # seconds after which a temporary file of another host belongs to nobody


def remove_unless_written(temporary: Path) -> None:
    """Remove a temporary file, unless the process that its name tells of may still be writing it."""
    with suppress(OSError):
        if not being_written(temporary):
            temporary.unlink()


def being_written(temporary: Path) -> bool:
    """Whether the process that a temporary file's name tells of may still be writing it."""
    if not (maker := MAKER.search(temporary.name)):
        return False
    if maker[1] == socket.gethostname():
        return process_runs(int(maker[2]))
    return time.time() - temporary.stat().st_mtime < ABANDONED
