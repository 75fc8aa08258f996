"""One of several processes: which one it is, by the variables of a launcher, how it begins, and how it ends.

Imports no torch.
"""

import atexit
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

from lightdiff.errors import LightdiffError, RunError, Stopped
from lightdiff.runtime import WORKER_FOLDER, DistEnv

LAUNCHER = "LIGHTDIFF_LAUNCHER"  # variable of `--nproc-per-node` for its workers: the pid that started them
ORPHAN_SECONDS = 0.5  # how often a worker checks whether its launcher is still there
FATAL = 2  # a mistake of the user's: starting again would not help


class LostContact(RunError):
    """Another process is gone or does not answer: seldom the cause, so it is told when no other error is known."""


def read_environment(env: Mapping[str, str]) -> DistEnv:
    """By torch's variables, else by those of a Slurm step."""
    if "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    else:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    found = [re.match(r"\d{1,9}", env.get(name, "")) for name in names]
    numbers = [int(match.group()) if match else default for match, default in zip(found, (0, 1, 0, 1), strict=True)]
    address = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "")) or "localhost"
    job = re.match(r"\d{1,18}", env.get("SLURM_JOB_ID", "9500"))
    port = env.get("MASTER_PORT") or str(20000 + (int(job.group()) if job else 0) % 20000)
    rank, world_size, local_rank, local_world_size = numbers
    rank = rank if world_size > 1 else 0  # a number left over from another job
    return DistEnv(rank, world_size, local_rank, local_world_size, address, port)


def first_host(hosts: str) -> str:
    """The first of Slurm's host names: node[07-12,15] -> node07."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?", hosts)
    return (match[1] + (match[2] or "")) if match else ""


def begin() -> None:
    """Prepare one of several processes, before anything else."""
    end_with_parent()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a lost connection is told in one sentence of ours
    if WORKER_FOLDER in os.environ:
        register_worker()


def fail(error: LightdiffError, tell: Callable[[LightdiffError], None]) -> NoReturn:
    """Report an error, to the process that started this one or by `tell`, and exit at once.

    The error may have left the others in the middle of an exchange. To leave their group in order would be to wait for
    them, and threads of gloo that outlive the interpreter abort the process in place of its exit code.
    """
    code = error.exit_code
    if WORKER_FOLDER in os.environ:
        send_report(error)
        code = 0 if isinstance(error, Stopped) else code  # torch's agent takes other codes for a failure
    else:
        tell(error)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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


# --- a worker of --nproc-per-node ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkerReport:
    """How a worker ended."""

    rank: int
    message: str
    exit_code: int
    stopped: bool
    lost_contact: bool


def register_worker() -> None:
    """Leave this worker's pid, so that signals can be passed on to it."""
    folder, rank = Path(os.environ[WORKER_FOLDER]), os.environ["RANK"]
    for report in folder.glob("report-*.json"):
        if json.loads(report.read_text())["exit_code"] == FATAL:
            sys.exit(FATAL)
    (folder / f"report-{rank}.json").unlink(missing_ok=True)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to save
    write(folder / f"pid-{rank}", str(os.getpid()))


def send_report(error: LightdiffError) -> None:
    """Leave an error for the launching process."""
    rank = int(os.environ["RANK"])
    report = WorkerReport(rank, str(error), error.exit_code, isinstance(error, Stopped), isinstance(error, LostContact))
    with suppress(OSError):  # as on a full disk: then the exit code says that something failed
        write(Path(os.environ[WORKER_FOLDER]) / f"report-{rank}.json", json.dumps(vars(report)))


def write(path: Path, text: str) -> None:
    """Write a small file at once."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
