"""What every stage runs on: processes, devices, signals, progress.

Here, what is set up before anything else: which process of a run this is, and streams that outlive their readers.
"""

import errno
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

WORKER_FOLDER = "LIGHTDIFF_LAUNCH"  # variable that `--nproc-per-node` sets for its workers: where they leave reports
LAUNCHER = "LIGHTDIFF_LAUNCHER"  # another one: the pid of the process that started them
ORPHAN_SECONDS = 0.5  # how often a worker checks whether its launcher is still there


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
        if "RANK" in env and "WORLD_SIZE" in env:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        elif "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
            names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        else:
            return cls()
        found = [re.match(r"\d{1,9}", env.get(name, "")) for name in names]
        numbers = [int(match.group()) if match else default for match, default in zip(found, (0, 1, 0, 1), strict=True)]
        address = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "")) or "localhost"
        job = re.match(r"\d{1,18}", env.get("SLURM_JOB_ID", "9500"))
        port = env.get("MASTER_PORT") or str(20000 + (int(job.group()) if job else 0) % 20000)
        rank, world_size, local_rank, local_world_size = numbers
        rank = rank if world_size > 1 else 0  # a number left over from another job
        return cls(rank, world_size, local_rank, local_world_size, address, port)


def first_host(hosts: str) -> str:
    """The first of Slurm's host names: node[07-12,15] -> node07."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?", hosts)
    return (match[1] + (match[2] or "")) if match else ""


def rank() -> int:
    """This process's number in its run, 0 where it is alone."""
    return DistEnv.from_env(os.environ).rank


def restarted() -> bool:
    """Whether torch's elastic agent has started this process again after one has died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def may_restart_elsewhere() -> bool:
    """Whether agents on several machines may start processes again, each counting its own restarts."""
    return os.environ.get("GROUP_WORLD_SIZE", "1") != "1" and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


@cache  # once for each process, as early as it can be
def end_with_parent() -> None:
    """End this process soon after the one that started it, so that no worker outlives its launcher.

    That may be gone already: the launcher of `--nproc-per-node` says who it is.
    """
    parent = int(os.environ.get(LAUNCHER) or os.getppid())

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_SECONDS)
        if folder := os.environ.get(WORKER_FOLDER):
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
