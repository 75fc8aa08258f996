"""Snapshots of a training on the disk: `last`, step files, `best`. They are written while training goes on."""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from lightdiff import checkpoint
from lightdiff.checkpoint import Checkpoint, Count, Metadata
from lightdiff.errors import Damaged, RunError
from lightdiff.run_folder import StageFolder, atomic_link
from lightdiff.runtime.progress import print_note
from lightdiff.settings import LoopSettings

Tensors = dict[str, Tensor]


class Progress(BaseModel):
    """What a snapshot says of its training beside its step."""

    best: float = math.inf  # the lowest validation loss so far
    skipped: Count = 0  # steps without an update
    unvalidated: dict[str, float] = {}  # the numbers of a step that was saved before it could be validated

    @classmethod
    def of(cls, saved: Checkpoint) -> "Progress":
        """Read it.

        Raises:
            Damaged: If it makes no sense.
        """
        try:
            return cls.model_validate(saved.metadata.extra)
        except ValidationError as error:
            wrong = error.errors()[0]
            raise Damaged(f"{saved.path} is damaged: {wrong['loc'][0]}: {wrong['msg']}") from None


class SnapshotWriter:
    """Writes one snapshot at a time, in a thread; a context manager that waits for it at the end.

    What is written is a copy in the host's memory, which stays for the next one: as many bytes as a snapshot has.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.longest = 0.0  # seconds that one took to be written
        self.on_written: Callable[[], None] = lambda: None  # called in that thread
        self._pool = ThreadPoolExecutor(1, initializer=partial(torch.cuda.set_device, device) if self._on_gpu else None)
        self._writing: Future[None] | None = None
        self._copies: Tensors = {}

    def prepare(self, tensors: Tensors) -> "Future[None]":
        """Let the thread find memory for copies of tensors like these: if it is new, that takes longer than copying."""
        return self._pool.submit(self._prepare, tensors)

    def _prepare(self, tensors: Tensors) -> None:
        for name in tensors.keys() - self._copies.keys():
            empty = torch.empty(tensors[name].shape, dtype=tensors[name].dtype)
            self._copies[name] = empty.pin_memory() if self._on_gpu else empty.zero_()

    def start(self, tensors: Tensors, write: Callable[[Tensors], None]) -> None:
        """Copy tensors, and return while `write` is called with the copies. The last snapshot was waited for."""
        assert self._writing is None
        self.prepare(tensors).result()
        for name, tensor in tensors.items():
            self._copies[name].copy_(tensor, non_blocking=self._on_gpu)
        if self._on_gpu:
            torch.cuda.synchronize()  # once for all copies
        self._writing = self._pool.submit(self._write, write, {name: self._copies[name] for name in tensors})

    def _write(self, write: Callable[[Tensors], None], copies: Tensors) -> None:
        began = time.monotonic()
        write(copies)
        self.on_written()
        self.longest = max(self.longest, time.monotonic() - began)

    @property
    def failed(self) -> bool:
        """Whether the last snapshot could not be written; `wait` raises what went wrong."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Return when the last snapshot is written.

        Raises:
            RunError: If it could not be; what was saved before is untouched.
        """
        if self._writing is not None:
            wait([self._writing])
            writing, self._writing = self._writing, None
            writing.result()

    def __enter__(self) -> "SnapshotWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.wait()
        except RunError as failure:
            if error is None:
                raise
            print_note(str(failure))  # beside what else has ended the training


def write_snapshots(
    folder: StageFolder, metadata: Metadata, loop: LoopSettings, keep_step: bool, also: Sequence[Path], tensors: Tensors
) -> None:
    """Write `last`, and, where wanted, a step file, and files of the weights alone.

    Args:
        folder: Where they lie.
        metadata: What they say of the run.
        loop: How many step files stay.
        keep_step: Whether to write a step file.
        also: Files of the weights alone to write, such as `best`.
        tensors: The state, from which training can be resumed.
    """
    digests: dict[str, str] = {}
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")}
    for path in also:
        digests = checkpoint.save(path, weights, metadata, digests).digests
    newest = folder.step(metadata.step) if keep_step else folder.last
    checkpoint.save(newest, tensors, metadata, digests)
    if keep_step:
        atomic_link(folder.last, newest)
        for path in folder.steps()[: -loop.keep]:
            if not (loop.keep_every and folder.step_of(path) % loop.keep_every == 0):
                path.unlink()
