"""What a training tells: a live display, metrics.jsonl, TensorBoard where it is installed, picture grids.

Everything here goes to stderr or to files; stdout is kept for results.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from lightdiff.checkpoint import publish, publish_text
from lightdiff.data.images import to_uint8

console = Console(stderr=True, highlight=False, markup=False)  # a path may hold brackets
PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal


class Reporter:
    """Shows progress and writes metrics.jsonl; a context manager."""

    def __init__(self, title: str, total: int, start: int = 0, metrics: Path | None = None) -> None:
        """Report on `total` steps of something, of which `start` are done; lines beyond `start` are cut off."""
        self.title, self.total = title, total
        self._done = start
        self._spoke = time.monotonic()
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[words]}"),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task(title, total=total, completed=start, words="")
        self._metrics = metrics
        self._board: Any = None
        if metrics is not None:
            cut_metrics(metrics, start)
            self._board = open_tensorboard(metrics.parent, start)

    def __enter__(self) -> "Reporter":
        """Start the display."""
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop the display."""
        self._progress.stop()
        if self._board is not None:
            self._board.close()

    def advance(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """Say how far the work is, with some numbers; without a terminal, every ten seconds and at the end."""
        self._done = done
        if values is not None:
            words = "  ".join(f"{name} {number(value)}" for name, value in values.items())
            self._progress.update(self._task, completed=done, words=words)
            now = time.monotonic()
            if not self._live and (now - self._spoke > PLAIN_EVERY or done == self.total):
                self._spoke = now
                console.print(f"{self.title} {done}/{self.total}  {words}", soft_wrap=True)
        else:
            self._progress.update(self._task, completed=done)

    def note(self, text: str) -> None:
        """Print a line above the display."""
        console.print(text, soft_wrap=True)

    def record(self, values: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl, where this process writes one; `step` is among the values."""
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

    def picture(self, path: Path, step: int) -> None:
        """Show a saved picture in TensorBoard too."""
        if self._board is not None:
            import numpy as np

            self._board.add_image("samples", np.asarray(Image.open(path)), step, dataformats="HWC")


def number(value: float) -> str:
    """A number in few characters."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def cut_metrics(path: Path, last_step: int) -> None:
    """Drop lines of steps after `last_step`, which a resumed run will write again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):  # half a line, from a process that was killed
            continue
        if step <= last_step:
            kept.append(line + "\n")
    publish_text(path, "".join(kept))


def open_tensorboard(folder: Path, start: int) -> Any:
    """A TensorBoard writer, or None where TensorBoard is not installed."""
    try:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)


def save_grid(path: Path, x: Tensor, columns: int, gap: int = 2) -> None:
    """Save images (n, 3, h, w) in [-1, 1] as one picture, row by row."""
    n, _, h, w = x.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = torch.full((3, rows * (h + gap) - gap, columns * (w + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(to_uint8(x.cpu())):
        top, left = (i // columns) * (h + gap), (i % columns) * (w + gap)
        sheet[:, top : top + h, left : left + w] = image
    image = Image.fromarray(sheet.permute(1, 2, 0).numpy())
    publish(path, lambda temporary: image.save(temporary, format="PNG"))
