"""The live display of a running stage on a terminal: a bar, numbers with their trends, and the last files."""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.text import Text

from lightdiff.errors import printable
from lightdiff.extras.baselines import losses_beside
from lightdiff.runtime.progress import Row, number, trending

UNITS = {"val_psnr": " dB", "kl": " nats", "val_kl": " nats"}
BLOCKS = "▁▂▃▄▅▆▇█"
BAR = 60  # characters of the bar
TREND = 32  # characters of a trend
REMEMBERED = 1024  # values of each number that a trend may show


def open_display(
    console: Console, title: str, total: int, start: int, settings: Mapping[str, Any], past: Sequence[Row]
) -> "Display":
    """The display of a stage that has some rows of metrics already; `live.start()` shows it."""
    display = Display(title, total, start, losses_beside(settings) if settings else {})
    display.live = Live(display, console=console)
    for row in past:
        display.remember(trending(row))
    return display


@dataclass
class Display:
    """A bar, numbers with their trends, and the last files, as rich draws them several times a second."""

    title: str
    total: int  # steps
    start: int = 0  # of them done before
    beside: Row = field(default_factory=dict)  # name of a number -> what is shown beside it
    done: int = field(init=False)
    live: Live = field(init=False)
    now: dict[str, float] = field(
        default_factory=dict
    )  # unit -> number of which only the last matters, such as a speed
    files: dict[str, Path] = field(default_factory=dict)  # the last file of each kind
    _past: dict[str, deque[float]] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.done = self.start

    def remember(self, values: Mapping[str, float]) -> None:
        """Add values to the trends of their names."""
        for name, value in values.items():
            self._past.setdefault(name, deque(maxlen=REMEMBERED)).append(value)

    def print(self, *lines: str, sep: str) -> None:
        """Print lines above the display, which is not redrawn meanwhile: with another height, a row would be left."""
        with getattr(self.live, "_lock", nullcontext()):  # the lock of rich's redrawing thread, which it does not name
            self.live.console.print(*lines, sep=sep)

    def remaining(self) -> str:
        """The time left, at the speed so far."""
        done = self.done - self.start
        if done <= 0:
            return "-:--:--"
        seconds = (time.monotonic() - self._began) / done * (self.total - self.done)
        return str(timedelta(seconds=round(seconds)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        past = {name: [*values] for name, values in [*self._past.items()]}  # copied: training adds to it meanwhile
        elapsed = timedelta(seconds=round(time.monotonic() - self._began))
        parts = [
            Text(self.title, style="bold"),
            Text(f"{self.done:,}/{self.total:,}"),
            Text(f"{elapsed} elapsed, {self.remaining()} left"),
            *(Text(f"{number(value)} {unit}") for unit, value in [*self.now.items()]),
        ]
        yield Text("  ").join(parts)  # broken between words
        yield ProgressBar(self.total, self.done, width=min(BAR, options.max_width))
        yield Segment.line()  # the bar alone does not end its line
        beside = {name: f" ({number(value)})" for name, value in self.beside.items()}
        numbers = {name: number(values[-1]) + UNITS.get(name, beside.get(name, "")) for name, values in past.items()}
        names, widest = (max(map(len, texts), default=0) for texts in (numbers, numbers.values()))
        room = 0 if options.ascii_only else options.max_width - names - widest - 7
        for name, values in past.items():
            trend = Text(sparkline(values, min(TREND, room)) if room > 0 else "", style="cyan")
            label = Text(f"  {name:<{names}}", style="dim")
            best = [Text(f"best {number(min(values))}")] if name == "val_loss" and room > TREND else []
            yield Text("  ").join([label, Text(f"{numbers[name]:<{widest}}"), trend, *best])
        if beside.keys() & past.keys():
            yield Text("  in parentheses: what the noise level alone gives", style="dim")
        for what, path in [*self.files.items()]:
            yield Text.assemble((f"  {what}  ", "dim"), printable(str(path)), overflow="fold")


def sparkline(values: Sequence[float], width: int) -> str:
    """A trend in one line of at most `width` characters: each the mean of its share of the values, low to high."""
    known = [value for value in values if math.isfinite(value)]
    if len(known) < 2:
        return ""
    count = min(width, len(known))
    edges = [i * len(known) // count for i in range(count + 1)]
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(edges)]
    low = min(means)
    high = sorted(means)[math.ceil(0.9 * (count - 1))]  # the steep start of a loss would flatten the rest
    step = (high - low) / (len(BLOCKS) - 1) or 1.0
    return "".join(BLOCKS[min(len(BLOCKS) - 1, round((mean - low) / step))] for mean in means)
