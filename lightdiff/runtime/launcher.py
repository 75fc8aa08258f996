"""Several processes on one machine: `--nproc-per-node N` runs the same command N times, under torch's elastic agent.

The agent runs in a thread, so that signals reach this process's own handlers instead of the agent's, which would end
everything without saving. They are passed on to the workers; what a worker has to say it leaves in a folder, and this
process says it once. Imports torch only to launch.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lightdiff.errors import LightdiffError, LostContact, RunError, Stopped
from lightdiff.runtime import WORKER_FOLDER
from lightdiff.runtime.dist_env import DistEnv
from lightdiff.settings import JobSettings

FATAL = 2  # a mistake of the user's: starting again would not help


# --- in a worker --------------------------------------------------------------------------------------------------


def is_worker() -> bool:
    """Whether this process was started by `launch`."""
    return WORKER_FOLDER in os.environ


def rank() -> int:
    """This process's number among those of the run, 0 where it is alone."""
    return DistEnv.of(os.environ).rank


def register_worker() -> None:
    """Leave this worker's pid, so that signals can be passed on to it."""
    if not is_worker():
        return
    folder = Path(os.environ[WORKER_FOLDER])
    for said in folder.glob("said-*.json"):
        if json.loads(said.read_text())["exit_code"] == FATAL:
            sys.exit(FATAL)
    (folder / f"said-{rank()}.json").unlink(missing_ok=True)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to save
    write(folder / f"pid-{rank()}", str(os.getpid()))


def tell(error: LightdiffError) -> bool:
    """Leave what a worker has to say for the launching process; False if this is no worker."""
    if not is_worker():
        return False
    word = WorkerReport(rank(), str(error), error.exit_code, isinstance(error, Stopped), isinstance(error, LostContact))
    write(Path(os.environ[WORKER_FOLDER]) / f"said-{rank()}.json", json.dumps(vars(word)))
    return True


def write(path: Path, text: str) -> None:
    """Write a small file at once."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@dataclass(frozen=True)
class WorkerReport:
    """What a worker said at its end."""

    rank: int
    message: str
    exit_code: int
    stopped: bool
    lost_contact: bool


# --- in the process that launches ---------------------------------------------------------------------------------


def launch(job: JobSettings, arguments: list[str]) -> None:
    """Run this command in several processes, and wait for them.

    Raises:
        Stopped: If the run was asked to stop.
        RunError: If a process failed or died, with which and why.
    """
    with tempfile.TemporaryDirectory(prefix="lightdiff-") as folder:
        Launch(Path(folder), job, arguments).run()


class Launch:
    """The processes of one run, and what they are told and tell."""

    def __init__(self, folder: Path, job: JobSettings, arguments: list[str]) -> None:
        """Prepare to launch; nothing is started."""
        self.folder, self.job, self.arguments = folder, job, arguments
        self.stop = 0  # the signal that asked for it
        self.told: set[int] = set()  # the pids that the wish to stop has reached
        self.failure: Exception | None = None

    def run(self) -> None:
        """Start the processes, pass signals on until they end, and say how they ended."""
        from lightdiff.runtime.device import usable_cores
        from lightdiff.runtime.signals import SAVE, STARTED, Handlers

        threads = str(max(1, usable_cores() // self.job.nproc_per_node))
        os.environ.setdefault("OMP_NUM_THREADS", threads)
        os.environ["LIGHTDIFF_STARTED"] = str(STARTED)
        os.environ[WORKER_FOLDER] = str(self.folder)
        agent = threading.Thread(target=self._agent, daemon=True)
        try:
            with Handlers({signal.SIGINT: self._ask, signal.SIGTERM: self._ask, SAVE: self._pass_on}):
                agent.start()
                while agent.is_alive():
                    agent.join(0.05)
                    self._forward()
        finally:
            del os.environ[WORKER_FOLDER]
        self._conclude()

    def _agent(self) -> None:
        try:
            self._launch()
        except Exception as error:
            self.failure = error

    def _launch(self) -> None:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.launcher.api import LaunchConfig, launch_agent

        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what is worth saying is said here
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self.job.nproc_per_node,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=self.job.max_restarts,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=str(self.folder)),
        )
        launch_agent(config, sys.executable, ["-m", "lightdiff", *self.arguments])

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """Ask all workers to save and stop; asked again, end them at once."""
        if self.stop:
            for pid in self._workers():
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)  # each leads a group, of its loader workers
            shutil.rmtree(self.folder, ignore_errors=True)
            os._exit(128 + number)
        self.stop = number

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        for pid in self._workers():
            with contextlib.suppress(OSError):
                os.kill(pid, number)

    def _workers(self) -> set[int]:
        return {int(path.read_text()) for path in self.folder.glob("pid-*")}

    def _forward(self) -> None:
        """Ask each worker once to stop, if that is wished, also one that only now reports for duty."""
        for pid in self._workers() - self.told if self.stop else ():
            self.told.add(pid)
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)

    def _conclude(self) -> None:
        """Say how it ended: in the workers' own words where there are any, the lowest rank's first."""
        words = sorted(
            (WorkerReport(**json.loads(p.read_text())) for p in self.folder.glob("said-*.json")), key=_weight
        )
        own = [word for word in words if not word.lost_contact and not word.stopped]
        if self.failure is None and not words:
            return  # all is done, even if a signal came in its last moment
        if self.stop and not own:
            message = next((w.message for w in words if w.stopped), "stopped; what was saved before is untouched")
            raise Stopped(message, 128 + self.stop)
        if self.failure is None:
            raise Stopped(words[0].message, words[0].exit_code)
        dead = deaths(self.failure, {word.rank for word in words})
        if own:
            error = RunError(f"process {own[0].rank}: {own[0].message}" if own[0].rank else own[0].message)
            error.exit_code = own[0].exit_code
            raise error
        if dead:
            raise RunError(
                f"{dead}; the others were ended. What was saved is untouched: the same command goes on from there"
            )
        raise RunError(words[0].message if words else f"the processes could not be run: {self.failure}")


def _weight(word: WorkerReport) -> tuple[bool, int]:
    return word.lost_contact, word.rank


def deaths(failure: Any, spoke: set[int]) -> str:
    """Which processes ended without a word, and how."""
    found = []
    for number, process in sorted(getattr(failure, "failures", {}).items()):
        if number not in spoke and process.exitcode != -signal.SIGTERM:  # as the agent ends those that are left
            how = f"was ended by {process.signal_name()}" if process.exitcode < 0 else f"ended with {process.exitcode}"
            found.append(f"process {number} (pid {process.pid}) {how}")
    return ", ".join(found)
