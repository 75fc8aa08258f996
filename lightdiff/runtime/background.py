"""Work in another thread, so that the device need not wait for disks."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch


class Background:
    """Threads that write while the device computes; when a `with` ends, all is written."""

    def __init__(self, threads: int = 1) -> None:
        """Let at most four pieces of work a thread wait, so that memory stays small."""
        # With helpers of torch's, these threads would take the cores from the network.
        self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        self._waiting: deque[Future[None]] = deque()
        self._most = 4 * threads

    def __enter__(self) -> "Background":
        """Be ready."""
        return self

    def do(self, work: Callable[[], None]) -> None:
        """Hand in some work; what earlier work raised is raised here."""
        while self._waiting and (len(self._waiting) >= self._most or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(work))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Wait until all is done; after an error, for what has been begun."""
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
        if error is None:
            for future in self._waiting:
                future.result()
