"""What every stage runs on: processes, devices, signals, progress.

Here, what is set up before anything else: which process of a run this is, and streams that outlive their readers.
"""

import errno
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightdiff.on_demand import on_demand

WORKER_FOLDER = "LIGHTDIFF_LAUNCH"  # variable that `--nproc-per-node` sets for its workers: where they leave reports
LAUNCHED = ({"RANK", "WORLD_SIZE"}, {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"})  # variables of torch, and of srun


@dataclass(frozen=True)
class DistEnv:
    """What a launcher has put into the environment about this process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = "localhost"
    port: str = "29500"  # as it was given: a lone process needs none

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "DistEnv":
        """By torch's variables, else by those of a Slurm step, else a single process.

        A Slurm batch script itself has SLURM_NTASKS, but only what srun starts has SLURM_STEP_NUM_TASKS.
        """
        if not any(names <= env.keys() for names in LAUNCHED):
            return cls()
        found: DistEnv = on_demand("several.worker:read_environment")(env)
        return found


def rank() -> int:
    """This process's number in its run, 0 where it is alone."""
    return DistEnv.from_env(os.environ).rank


def restarted() -> bool:
    """Whether torch's elastic agent has started this process again after one has died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


# --- streams ---------------------------------------------------------------------------------------------------------


class Lasting:
    """A stream that outlives its reader: once nobody reads any more, what is written to it goes nowhere."""

    def __init__(self, stream: Any, gone: Callable[[OSError], bool]) -> None:
        """Wrap a stream; `gone` tells of an error whether nobody reads any more."""
        self._stream, self._gone = stream, gone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, as far as somebody reads."""
        return self._as_long_as_read(self._stream.write, text)

    def flush(self) -> None:
        """Hand on what is written, as far as somebody reads."""
        self._as_long_as_read(self._stream.flush)

    def _as_long_as_read(self, do: Callable[..., int | None], *given: str) -> int:
        """Once nobody reads, let this and all else that writes there, such as libraries in C++, write to nowhere."""
        try:
            return do(*given) or 0
        except OSError as error:
            if not self._gone(error):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            return 0


def outlive_readers() -> None:
    """Let no message end a run: where nobody reads, or the log's disk is full, it goes on silently.

    Results that cannot be written are another thing: there, only a reader that is gone is passed over.
    """
    for number in (0, 1, 2):  # a closed one would be the number of the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    out, messages = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    sys.stdout = Lasting(out, lambda error: error.errno == errno.EPIPE or (error.errno == errno.EIO and out.isatty()))
    sys.stderr = Lasting(messages, lambda error: True)
