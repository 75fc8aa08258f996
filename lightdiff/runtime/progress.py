"""Progress of a running stage: messages, metrics.jsonl, the live display and trackers that are told of it.

Everything here goes to stderr or to files; stdout is kept for results.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

from lightdiff.errors import printable
from lightdiff.on_demand import on_demand
from lightdiff.run_folder import append_text, atomic_write_text, open_own, open_regular, writing

PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal
Row = dict[str, float]  # a line of metrics.jsonl
NO_TREND = {"step", "images_seen", "skipped", "images_per_s", "memory_mb", "time", "lr", "kl_sum", "val_kl_sum"}


class SafeConsole(Console):
    """Where all messages go: no character of a name or a document acts on the terminal, and no line or cell is cut."""

    def __init__(self, stderr: bool = False, markup: bool = False) -> None:
        super().__init__(stderr=stderr, markup=markup, highlight=False, emoji=False)  # a path may hold [b] or :b:
        if not self.width:  # COLUMNS=0, as where the terminal's size is not known, would cut off everything
            self.width = 80
        self.soft_wrap = not self.is_terminal  # no line is broken where there is no terminal

    def render_str(self, text: str, **how: Any) -> Text:
        """Text of one line, with control characters escaped before it is measured."""
        return super().render_str(printable(text), **how)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Segments of anything else, such as a `Text`; there, line ends are meant."""
        for text, style, control in super().render(renderable, options):
            shown = text if control else "\n".join(map(printable, text.split("\n")))
            yield Segment(shown, style, control)

    def status(self, status: RenderableType, **how: Any) -> Status:
        """A line that shows what is being done; a name in it is no markup."""
        return super().status(Text(printable(status)) if isinstance(status, str) else status, **how)


console = SafeConsole(stderr=True)


class LogHandler(logging.Handler):
    """Shows what a module below this one logs, such as a download, as a line on the console."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one message."""
        console.print(record.getMessage(), soft_wrap=True)


logger = logging.getLogger("lightdiff")
logger.addHandler(LogHandler())
logger.setLevel(logging.INFO)


class Reporter:
    """Shows progress and writes metrics.jsonl; a context manager."""

    def __init__(
        self,
        title: str,
        total: int,
        start: int = 0,
        metrics: Path | None = None,
        settings: Mapping[str, Any] | None = None,
        track: Sequence[str] = (),
    ) -> None:
        """Report on `total` steps of something, of which `start` are done; lines beyond `start` are cut off.

        Args:
            title: What is running.
            total: Steps in all.
            start: Steps done before.
            metrics: The metrics.jsonl to write, if this process writes one; TensorBoard's files lie beside it.
            settings: Settings by which a tracker's table of runs can be sorted.
            track: Trackers beside TensorBoard.

        Raises:
            UserError: If the library of one of them is missing.
        """
        if track:
            on_demand("trackers:check_installed")(track)
        self._track = ("tensorboard", *track)
        self.title, self.total, self._metrics = title, total, metrics
        self._printed, self._settings = time.monotonic(), settings or {}
        shown = console.is_terminal and not console.quiet
        self._start, past = start, cut_metrics(metrics, start) if metrics is not None and metrics.is_file() else []
        self._display: Any = (
            on_demand("display:open_display")(console, title, total, start, self._settings, past) if shown else None
        )

    @cached_property
    def _trackers(self) -> Any:
        """Where numbers and pictures go from the first line of metrics on, which takes seconds to be opened."""
        assert self._metrics is not None
        return on_demand("trackers:Trackers")(self._track, self._metrics.parent, self._start, self._settings, self.note)

    def __enter__(self) -> "Reporter":
        if self._display:
            self._display.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._display:
            self._display.live.stop()
        if "_trackers" in self.__dict__:
            self._trackers.tell(lambda tracker: tracker.close())

    def advance(
        self, done: int, losses: Mapping[str, float] | None = None, speed: Mapping[str, float] | None = None
    ) -> None:
        """Show how far the work is; without a terminal, where there are numbers, in a line every ten seconds.

        On a terminal, losses are shown as they are recorded.
        """
        now = time.monotonic()
        if self._display:
            self._display.done = done
            self._display.now |= speed or {}
        elif losses is not None and (now - self._printed > PLAIN_EVERY or done == self.total):
            self._printed = now
            words = "  ".join(
                f"{name} {number(value)}" for name, value in {**trending(losses), **(speed or {})}.items()
            )
            console.print(f"{self.title} {done}/{self.total}  {words}", soft_wrap=True)

    def note(self, *lines: str) -> None:
        """Print lines above the display."""
        (self._display or console).print(*lines, sep="\n")

    def record(self, values: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl, where this process writes one; `step` is among the values."""
        if self._display:
            self._display.remember(trending(values))
        if self._metrics is None:
            return
        append_text(self._metrics, json.dumps(dict(values)) + "\n")
        step = int(values["step"])
        self._trackers.tell(lambda tracker: tracker.record(values, step))

    def flush(self) -> None:
        """Put all lines of metrics.jsonl on the disk, as a checkpoint follows that relies on them."""
        if self._metrics is not None and self._metrics.exists():
            with writing(self._metrics), open(self._metrics, "a", opener=open_own) as file:
                os.fsync(file.fileno())

    def saved(self, path: Path) -> None:
        """Show where the last checkpoint is."""
        if self._display:
            self._display.files["last checkpoint"] = path

    def picture(self, path: Path, step: int) -> None:
        """Show where the last picture is, and the picture in trackers."""
        if self._display:
            self._display.files["last picture"] = path
        if self._metrics is not None:
            self._trackers.tell(lambda tracker: tracker.picture(path, step))


# --- metrics.jsonl -----------------------------------------------------------------------------------------------


def trending(row: Mapping[str, float]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl that are worth a trend: those of the network, not of the machine."""
    return {name: value for name, value in row.items() if name not in NO_TREND}


def read_metrics(path: Path) -> list[Row]:
    """The lines of a metrics.jsonl, in their order, without what is no number of a float's size.

    Half a line, of a process that was killed, is left out.
    """
    if not path.is_file():
        return []
    with open_regular(path) as file:
        lines = file.read().decode("utf-8", "replace").splitlines()
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 1 << 53:
            rows.append({name: value for name, value in row.items() if is_number(value)})
    return rows


def is_number(value: Any) -> bool:
    """Whether a value of a document is a number that a float can hold; NaN and infinities are."""
    return isinstance(value, float) or (type(value) is int and abs(value) < sys.float_info.max)


def cut_metrics(path: Path, last_step: int) -> list[Row]:
    """Drop lines of steps after `last_step`, which a resumed run will write again, and return the others."""
    rows = [row for row in read_metrics(path) if row["step"] <= last_step]
    if path.is_file():
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def number(value: float) -> str:
    """A number in few characters."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def print_note(text: str) -> None:
    """Print what is no error but good to know."""
    console.print(f"note: {text}", soft_wrap=True)


def shape_words(shape: Sequence[int]) -> str:
    """A shape in words: "4 x 16 x 16"."""
    return " x ".join(map(str, shape))
