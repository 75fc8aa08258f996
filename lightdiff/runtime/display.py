"""The live display of a running stage: a bar, numbers with their trends, and where the last files lie."""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
TREND = 32  # characters of a trend
REMEMBERED = 1024  # values of each number that a trend may show


class Display:
    """What is known of a running stage, as rich draws it; drawn anew some times a second."""

    def __init__(self, title: str, total: int, start: int = 0) -> None:
        """Show `total` steps of something, of which `start` are done."""
        self.title, self.total, self.start, self.done = title, total, start, start
        self._began = time.monotonic()
        self._now: dict[str, float] = {}
        self._past: dict[str, deque[float]] = {}
        self._files: dict[str, Path] = {}

    def remember(self, values: Mapping[str, float]) -> None:
        """Take in numbers that have a trend."""
        for name, value in values.items():
            self._past.setdefault(name, deque(maxlen=REMEMBERED)).append(value)

    def show(self, values: Mapping[str, float]) -> None:
        """Take in numbers of which only the last matters, such as a speed."""
        self._now |= values

    def file(self, what: str, path: Path) -> None:
        """Tell where the last file of a kind is."""
        self._files[what] = path

    def remaining(self) -> str:
        """The time left, at the speed so far."""
        done = self.done - self.start
        if done <= 0:
            return "-:--:--"
        seconds = (time.monotonic() - self._began) / done * (self.total - self.done)
        return str(timedelta(seconds=round(seconds)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it."""
        bar = Table.grid(padding=(0, 2))
        gone = timedelta(seconds=round(time.monotonic() - self._began))
        speed = "  ".join(f"{name} {number(value)}" for name, value in self._now.items())
        bar.add_row(
            Text(self.title, style="bold"),
            ProgressBar(self.total, self.done, width=24),
            f"{self.done:,}/{self.total:,}",
            f"{gone} gone, {self.remaining()} left",
            speed,
        )
        trends = Table.grid(padding=(0, 2))
        unicode = not options.ascii_only
        for name, values in self._past.items():
            seen = [*values]
            trend = sparkline(seen, TREND) if unicode else ""
            trends.add_row(Text(f"  {name}", style="dim"), Text(number(seen[-1])), Text(trend, style="cyan"))
        files = Table.grid(padding=(0, 2))
        for what, path in self._files.items():
            files.add_row(Text(f"  {what}", style="dim"), Text(str(path), overflow="fold"))
        yield Group(bar, *(table for table in (trends, files) if table.row_count))


def sparkline(values: Sequence[float], width: int) -> str:
    """A trend in one line of at most `width` characters: each the mean of its share of the values, low to high."""
    known = [value for value in values if math.isfinite(value)]
    if len(known) < 2:
        return ""
    count = min(width, len(known))
    edges = [i * len(known) // count for i in range(count + 1)]
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = (
        min(means),
        sorted(means)[math.ceil(0.9 * (count - 1))],
    )  # the steep start of a loss would flatten the rest
    step = (high - low) / (len(BLOCKS) - 1) or 1.0
    return "".join(BLOCKS[min(len(BLOCKS) - 1, round((mean - low) / step))] for mean in means)


def number(value: float) -> str:
    """A number in few characters."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
