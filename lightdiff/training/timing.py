"""Where the time of a training goes, and what memory it takes."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
DATA, VALIDATION, SAVING = "waiting for data", "validation and pictures", "saving"
FIRST = "first step (with loading and compiling)"


class Stopwatch:
    """Seconds of a training by what they went into: parts that are measured, and steps, which are the rest.

    These are the host's: it waits for a GPU at each log, and not within steps.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds = dict.fromkeys((DATA, VALIDATION, SAVING, FIRST), 0.0)

    @contextmanager
    def measure(self, part: str, applies: bool = True) -> Iterator[None]:
        """Add the time that is spent inside to this part, if that applies."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += applies * (time.perf_counter() - began)

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches, the time until each comes measured: the first as part of the first step."""
        while True:
            with self.measure(DATA if self.seconds[FIRST] else FIRST):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def speed(self, images: int, batch_size: int) -> float:
        """Images a second of steps and the data that they wait for; without the first, unless it is the only one."""
        if images == batch_size:
            return images / self.seconds[FIRST]
        apart = sum(self.seconds.values()) - self.seconds[DATA]
        return (images - batch_size) / (time.perf_counter() - self._began - apart)

    def shares(self) -> str:
        """Where the time went, in percent; parts of less than half a percent are left out."""
        whole = time.perf_counter() - self._began
        parts = {"steps": whole - sum(self.seconds.values())} | self.seconds
        shown = [f"{name} {seconds / whole:.0%}" for name, seconds in parts.items() if round(100 * seconds / whole)]
        return f"where the time went: {', '.join(shown)}"


def memory_in_use(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
