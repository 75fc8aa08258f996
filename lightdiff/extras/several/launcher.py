"""`--nproc-per-node N` runs the same command N times on this machine, under torch's elastic agent.

The agent runs in a thread, so that signals reach this process's own handlers instead of the agent's, which would end
everything without saving. They are passed on to the workers; a worker leaves its report in a folder, and this process
prints it once. Imports torch only to launch.
"""

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from lightdiff.errors import RunError, Stopped
from lightdiff.extras.several.worker import LAUNCHER, WorkerReport
from lightdiff.runtime import WORKER_FOLDER
from lightdiff.settings import StageSettings


def launch(settings: StageSettings, arguments: list[str]) -> None:
    """Run this command in several processes, and wait for them.

    Raises:
        Stopped: If the run was asked to stop.
        RunError: If a process failed or died, with which and why.
    """
    Launch(Path(tempfile.mkdtemp(prefix="lightdiff-")), settings, arguments).run()


class Launch:
    """The processes of one run, and what passes between them and this one."""

    def __init__(self, folder: Path, settings: StageSettings, arguments: list[str]) -> None:
        """Prepare to launch; nothing is started."""
        self.folder, self.settings, self.job, self.arguments = folder, settings, settings.job, arguments
        self.stop = 0  # the signal that asked to stop
        self.reached: set[int] = set()  # the pids of workers that it has been passed on to
        self.failure: Exception | None = None

    def run(self) -> None:
        """Start the processes, pass signals on until they end, and report how they ended."""
        from lightdiff.runtime.processes import usable_cores
        from lightdiff.runtime.stage import STARTED, signal_handler

        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // self.job.nproc_per_node)))
        os.environ["LIGHTDIFF_STARTED"] = str(STARTED)
        os.environ |= {WORKER_FOLDER: str(self.folder), LAUNCHER: str(os.getpid())}
        agent = threading.Thread(target=self._agent, daemon=True)
        with signal_handler(self._on_signal):
            try:
                agent.start()
                while agent.is_alive():
                    agent.join(0.05)
                    if self.stop:
                        late = self._workers() - self.reached  # those that register late, too
                        self.reached |= late
                        tell(late, signal.SIGTERM)
                self._conclude()
            finally:  # while signals that come again are still heard
                del os.environ[WORKER_FOLDER], os.environ[LAUNCHER]
                shutil.rmtree(self.folder, ignore_errors=True)

    def _agent(self) -> None:
        try:
            self._launch()
        except Exception as error:
            self.failure = error

    def _launch(self) -> None:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.launcher.api import LaunchConfig, launch_agent

        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what matters is reported here
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
        own = ["-P"] * (os.getcwd() not in sys.path)  # -m alone would import modules from the current folder
        launch_agent(config, sys.executable, [*own, "-m", "lightdiff", *self.arguments])

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask all workers to save and stop; a second Ctrl-C ends them at once. SIGUSR1 is passed on as it is."""
        if number == getattr(signal, "SIGUSR1", None):
            tell(self._workers(), number)
        elif not self.stop:
            self.stop = number
        elif number == signal.SIGINT:
            for pid in self._workers():
                with suppress(OSError):
                    if sys.platform == "win32":
                        os.kill(pid, signal.SIGTERM)
                    else:
                        os.killpg(pid, signal.SIGKILL)  # each leads a group, of its loader workers
            shutil.rmtree(self.folder, ignore_errors=True)
            os._exit(128 + number)

    def _workers(self) -> set[int]:
        return {int(path.read_text()) for path in self.folder.glob("pid-*")}

    def _conclude(self) -> None:
        """Report how it ended: in a worker's own words where there are any, the lowest rank's first."""
        from lightdiff.runtime.resume import untouched

        reports = [WorkerReport(**json.loads(path.read_text())) for path in self.folder.glob("report-*.json")]
        reports.sort(key=lambda report: (report.lost_contact, report.rank))
        own = [report for report in reports if not report.lost_contact and not report.stopped]
        if self.failure is None and not reports:
            return  # all is done, even if a signal came in its last moment
        if self.stop and not own:
            message = next((r.message for r in reports if r.stopped), untouched(self.settings))
            raise Stopped(message, 128 + self.stop)
        if self.failure is None:
            raise Stopped(reports[0].message, reports[0].exit_code)
        dead = deaths(self.failure, {report.rank for report in reports})
        if own:
            error = RunError(f"process {own[0].rank}: {own[0].message}" if own[0].rank else own[0].message)
            error.exit_code = own[0].exit_code
            raise error
        if dead:
            raise RunError(f"{dead}; the others were ended; {untouched(self.settings)}")
        raise RunError(reports[0].message if reports else f"the processes could not be run: {self.failure}")


def tell(pids: set[int], number: int) -> None:
    """Send a signal to processes, as far as they are still there."""
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, number)


def deaths(failure: Any, reported: set[int]) -> str:
    """Which processes ended without a report, and how."""
    found = []
    for number, process in sorted(getattr(failure, "failures", {}).items()):
        if number not in reported and process.exitcode != -signal.SIGTERM:  # as the agent ends those that are left
            how = f"was ended by {process.signal_name()}" if process.exitcode < 0 else f"ended with {process.exitcode}"
            found.append(f"process {number} (pid {process.pid}) {how}")
    return ", ".join(found)
