"""Wishes from outside: Ctrl-C, SIGTERM, SIGUSR1, and `--max-time`."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from lightdiff.errors import Stopped

if TYPE_CHECKING:  # it imports torch, and signals are to be heeded before that
    from lightdiff.runtime.processes import Processes

STARTED = float(os.environ.get("LIGHTDIFF_STARTED", time.time()))  # when the run did, about; the launcher knows better
OUT_OF_TIME = 75  # EX_TEMPFAIL, "try again later": a job script resubmits on it
SAVE = getattr(signal, "SIGUSR1", None)  # Windows has none


class TimeLimit:
    """`--max-time`: whether what comes next would end too late, judged by the longest that it has taken."""

    def __init__(self, minutes: float, reserve: float = 0.0) -> None:
        """Allow the process so many minutes (0: no limit), the last `reserve` seconds of which are kept free."""
        self.minutes, self.reserve = minutes, reserve
        self._longest, self._last = 0.0, time.monotonic()

    def spent(self) -> bool:
        """Whether to stop here. Called once a step; twice the longest time between two calls is kept free."""
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now
        return self.minutes > 0 and time.time() - STARTED + 2 * self._longest + self.reserve > 60 * self.minutes

    def conclude(self, unfinished: bool, ranks: "Processes", how: str = "") -> None:
        """Wait for all processes, as long as it takes, and stop if any of them has not finished its share.

        Raises:
            Stopped: In all of them, with the exit code by which job scripts know to start again.
        """
        if any(ranks.all_reduce_max(int(unfinished), patient=True)):
            raise Stopped(f"--max-time {self.minutes:g} minutes: what is done is saved; {AGAIN}{how}", OUT_OF_TIME)


AGAIN = "run the same command again to go on"


@dataclass(frozen=True)
class Request:
    """What all processes have agreed to do after this step."""

    exit_code: int  # to stop with; 0: go on
    save: bool


class SignalMonitor:
    """Signals and the time limit as a wish that the loop reads between steps; a second Ctrl-C leaves at once."""

    def __init__(self, ranks: "Processes", limit: TimeLimit) -> None:
        """Speak for all processes of a run."""
        self.ranks, self.limit = ranks, limit
        self._signal = 0
        self._save = False
        self._handlers: Handlers = Handlers({signal.SIGINT: self._stop, signal.SIGTERM: self._stop, SAVE: self._keep})

    def __enter__(self) -> "SignalMonitor":
        """Listen."""
        self._handlers.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Put the old handlers back."""
        self._handlers.__exit__(kind, error, at)

    def poll(self) -> Request:
        """What to do after this step, the same in every process though a signal may have reached only one."""
        code = 128 + self._signal if self._signal else OUT_OF_TIME if self.limit.spent() else 0
        save, self._save = self._save, False
        code, saving = self.ranks.all_reduce_max(code, int(save))
        return Request(code, bool(saving))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number  # SIGTERM may come twice: a cluster sends it to each process, and so does a launcher

    def _keep(self, number: int, frame: FrameType | None) -> None:
        self._save = True


class Handlers:
    """Signal handlers for the time of a `with`, where this is the main thread, the only one that may set them."""

    def __init__(self, handlers: dict[Any, Callable[[int, FrameType | None], None] | Any]) -> None:
        """Keep them; a signal that this system lacks is None."""
        self._wanted = {number: handler for number, handler in handlers.items() if number is not None}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        """Set them."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, handler) for number, handler in self._wanted.items()}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Put the old ones back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def stop_at_once() -> Handlers:
    """For work that can be left anywhere: SIGTERM raises `Stopped`; SIGUSR1, with nothing to save, does nothing."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise Stopped(f"stopped; what was saved is untouched, {AGAIN}", 128 + number)

    return Handlers({signal.SIGTERM: leave, SAVE: signal.SIG_IGN})
