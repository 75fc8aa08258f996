"""What a training tells: a live display, metrics.jsonl, TensorBoard where it is installed.

Everything here goes to stderr or to files; stdout is kept for results.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image
from rich.console import Console
from rich.live import Live

from lightdiff.checkpoint import atomic_write_text
from lightdiff.runtime.display import Display, number

console = Console(stderr=True, highlight=False, markup=False)  # a path may hold brackets
PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal
Row = dict[str, float]  # a line of metrics.jsonl
NO_TREND = {"step", "images_seen", "skipped", "images_per_s", "memory_mb", "time"}


class Reporter:
    """Shows progress and writes metrics.jsonl; a context manager."""

    def __init__(self, title: str, total: int, start: int = 0, metrics: Path | None = None) -> None:
        """Report on `total` steps of something, of which `start` are done; lines beyond `start` are cut off."""
        self.title, self.total = title, total
        self._spoke = time.monotonic()
        self._display = Display(title, total, start)
        self._live = Live(self._display, console=console) if console.is_terminal and not console.quiet else None
        self._metrics = metrics
        self._board: Any = None
        if metrics is not None:
            for row in cut_metrics(metrics, start):
                self._display.remember(trending(row))
            self._board = open_tensorboard(metrics.parent, start)

    def __enter__(self) -> "Reporter":
        """Start the display."""
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop the display."""
        if self._live:
            self._live.stop()
        if self._board is not None:
            self._board.close()

    def advance(
        self, done: int, losses: Mapping[str, float] | None = None, speed: Mapping[str, float] | None = None
    ) -> None:
        """Say how far the work is; where there are numbers and no terminal, in a line every ten seconds and at the end.

        On a terminal, losses are shown as they are recorded.
        """
        self._display.done = done
        self._display.show(speed or {})
        now = time.monotonic()
        if losses is not None and not self._live and (now - self._spoke > PLAIN_EVERY or done == self.total):
            self._spoke = now
            words = "  ".join(f"{name} {number(value)}" for name, value in {**losses, **(speed or {})}.items())
            console.print(f"{self.title} {done}/{self.total}  {words}", soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line above the display."""
        console.print(text, soft_wrap=True)

    def record(self, values: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl, where this process writes one; `step` is among the values."""
        self._display.remember(trending(values))
        if self._metrics is None:
            return
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(values)) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, int(values["step"]))

    def settle(self) -> None:
        """See that all lines of metrics.jsonl are on the disk, as a checkpoint follows that says they are."""
        if self._metrics is not None and self._metrics.exists():
            with self._metrics.open("a") as file:
                os.fsync(file.fileno())

    def saved(self, path: Path) -> None:
        """Tell where the last checkpoint is."""
        self._display.file("last checkpoint", path)

    def picture(self, path: Path, step: int) -> None:
        """Tell where the last picture is, and show it in TensorBoard too."""
        self._display.file("last picture", path)
        if self._board is not None:
            import numpy as np

            self._board.add_image("samples", np.asarray(Image.open(path)), step, dataformats="HWC")

    def settings(self, flat: Mapping[str, Any]) -> None:
        """Tell TensorBoard the settings, so that its table of runs can sort by them."""
        if self._board is None:
            return
        from torch.utils.tensorboard.summary import hparams

        plain = {name: v if isinstance(v, (bool, int, float, str)) else json.dumps(v) for name, v in flat.items()}
        for summary in hparams(plain, {"val_loss": math.nan}):  # type: ignore[no-untyped-call]
            self._board.file_writer.add_summary(summary)


def trending(row: Mapping[str, float]) -> dict[str, float]:
    """What of a line of metrics.jsonl is worth a trend: what is measured of the network, not of the machine."""
    return {name: value for name, value in row.items() if name not in NO_TREND}


def read_metrics(path: Path) -> list[Row]:
    """The lines of a metrics.jsonl, in their order; half a line, of a process that was killed, is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def cut_metrics(path: Path, last_step: int) -> list[Row]:
    """Drop lines of steps after `last_step`, which a resumed run will write again; the others are returned."""
    rows = [row for row in read_metrics(path) if row["step"] <= last_step]
    if path.exists():
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def open_tensorboard(folder: Path, start: int) -> Any:
    """A TensorBoard writer, or None where TensorBoard is not installed."""
    try:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)


def shape_words(shape: Sequence[int]) -> str:
    """A shape in words: "4 x 16 x 16"."""
    return " x ".join(map(str, shape))
