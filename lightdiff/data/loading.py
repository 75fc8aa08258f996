"""Images in batches: the data set and its loader."""

import math
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.queues import Queue
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from lightdiff.data.files import ImageFile, source_of
from lightdiff.data.images import BadImage, colour, frame, load_image, random_frame
from lightdiff.data.order import key
from lightdiff.data.table import Fingerprint
from lightdiff.errors import RunError
from lightdiff.settings import ImageSettings

OnBad = Callable[[list[tuple[int, str]]], None]
WORKERS_NEED = (
    "worker processes need memory, room in /dev/shm, open files (ulimit -n) and a short TMPDIR; "
    "--workers 0 does without them"
)


# --- data set -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """One image."""

    x: UInt8[Tensor, "3 h w"] | None
    index: int  # of the image in x, which is another than asked for when that one is bad
    bad: list[tuple[int, str]]  # index and reason
    fingerprint: Fingerprint | None = None  # of its file, before it was read


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """The readable images of a batch; `bad` lists the others, with their reasons."""

    x: UInt8[Tensor, "b 3 h w"]
    index: Int64[Tensor, " b"]
    bad: list[tuple[int, str]]
    missing: int  # images asked for that are not in x
    fingerprints: list[Fingerprint] = field(default_factory=list)  # of those in x, if asked for

    def pin_memory(self) -> "ImageBatch":
        """The same batch in pinned memory; a loader asks for it."""
        return replace(self, x=self.x.pin_memory(), index=self.index.pin_memory())


class ImageDataset(Dataset[Item]):
    """Framed images by (epoch, index). Training takes its variation from the epoch; all else ignores it."""

    def __init__(
        self, files: Sequence[ImageFile], settings: ImageSettings, seed: int, train: bool, fingerprints: bool = False
    ) -> None:
        """Keep what is needed; no image is opened.

        Args:
            files: What the indices count.
            settings: What each file's `root` counts, resolution, background, random crop and flip.
            seed: Of the crops and flips.
            train: Whether to crop and flip at random, and whether the next readable image stands in for an unreadable
                one; if not, none does.
            fingerprints: Whether to tell what each file was like just before it was read (without `train` only).
        """
        colour(settings.background)  # a wrong name is found before any worker starts
        self.files, self.settings, self.seed = files, settings, seed
        self.train, self.fingerprints = train, fingerprints
        self.sources = [source_of(folder) for folder in settings.data]
        # The same for all uses, as it touches the pixels: twice the size needed, and enough for the smallest crop.
        self.at_least = math.ceil(max(settings.resolution) * max(2, 1 / settings.random_crop))
        # The search for a stand-in ends somewhere: with far more bad files than max_bad allows, the run has to stop.
        self.tries = min(len(files), 100 + int(2 * settings.max_bad * len(files))) if train else 1

    def __len__(self) -> int:
        """How many images there are, unreadable ones included."""
        return len(self.files)

    def path(self, index: int) -> str:
        """Where an image lies on this machine."""
        return os.path.join(self.settings.data[self.files[index].root], self.files[index].path)

    def __getitem__(self, position: tuple[int, int]) -> Item:
        """The image, or the next readable one, or none where `tries` images in a row are bad."""
        (epoch, asked), s, bad = position, self.settings, list[tuple[int, str]]()
        for index in ((asked + i) % len(self.files) for i in range(self.tries)):
            file = self.files[index]
            where = folder, source = s.data[file.root], self.sources[file.root]
            found = source.fingerprint(folder, file.path, True) if self.fingerprints else None
            try:
                image = load_image(file.path, s, self.at_least, *where)
            except BadImage as error:
                bad.append((index, str(error)))
                continue
            if not self.train:
                return Item(frame(image, s.resolution), index, bad, found)
            rng = random.Random(key(self.seed, "augment", epoch, asked))
            return Item(random_frame(image, s.resolution, s.random_crop, s.flip, rng), index, bad)
        return Item(None, asked, bad)

    def collate(self, items: Sequence[Item]) -> ImageBatch:
        """The items as one batch, without those that have no image."""
        found = [item.x for item in items if item.x is not None]
        x = torch.stack(found) if found else torch.empty(0, 3, *self.settings.resolution, dtype=torch.uint8)
        index = torch.tensor([item.index for item in items if item.x is not None], dtype=torch.int64)
        bad, prints = [entry for item in items for entry in item.bad], [item.fingerprint for item in items]
        return ImageBatch(x, index, bad, len(items) - len(found), [found for found in prints if found])


# --- batches ------------------------------------------------------------------------------------------------------


def load_batches(
    dataset: ImageDataset,
    order: Iterable[list[tuple[int, int]]],
    workers: int,
    on_bad: OnBad | None = None,
    pin: bool = False,
) -> Iterator[ImageBatch]:
    """Batches in the order given, loaded by `workers` processes or, with 0, by this one.

    Args:
        dataset: The images.
        order: The (epoch, index) of each image of each batch. It may be endless: it is read two batches a worker ahead.
        workers: Processes that load images.
        on_bad: Called with the unreadable files of a batch, such as `BadFiles.add`, before it is handed out.
        pin: Whether to copy batches to pinned memory, for a GPU.

    Raises:
        RunError: There are too many bad files, none to stand in for one of them, or a worker died.
    """
    # By default a loader draws a seed from torch's global generator.
    own: dict[str, Any] = {"worker_init_fn": _start_worker, "generator": torch.Generator(), "pin_memory": pin}
    loader = DataLoader(dataset, batch_sampler=order, num_workers=workers, collate_fn=dataset.collate, **own)
    try:
        for batch in _iterate(loader):
            if batch.bad and on_bad:
                on_bad(batch.bad)
            if batch.missing and dataset.train:
                (index, reason), others = batch.bad[0], dataset.tries - 1
                raise RunError(f"{dataset.path(index)} cannot be read ({reason}), nor can the {others} images after it")
            yield batch
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]  # of an error in a worker, its traceback comes before
        reason = re.sub("^(Original )?[A-Za-z]*Error: ", "", last)
        raise RunError(f"loading images failed: {reason} ({WORKERS_NEED})") from error


def _iterate(loader: DataLoader[Any]) -> Iterator[ImageBatch]:
    """The loader's batches, without its handler of SIGCHLD.

    It would raise an error wherever the main process is when a worker dies, perhaps in the middle of saving. The loader
    finds out by itself, some seconds after the next batch is due.
    """
    if not loader.num_workers or sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return batches


def _start_worker(_: int) -> None:
    """Leave stopping to the main process, which finishes its step when a signal is sent to all processes."""
    torch.set_num_threads(1)
    Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        main = multiprocessing.parent_process()  # which a fork server is not
        for number in (signal.SIGUSR1, signal.SIGXCPU):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_on_sigterm_of, args=(main.pid if main else os.getppid(),), daemon=True).start()


def _send_error(queue: "Queue[Any]", error: Exception, item: tuple[int, Any]) -> None:
    """Send why a batch could not be sent, or the main process would wait for it for ever: Python drops it."""
    queue.put((item[0], ExceptionWrapper((RuntimeError, error, None))))  # type: ignore[no-untyped-call]


def _end_on_sigterm_of(parent: int) -> None:
    """End this worker when the main process, and nobody else, sends SIGTERM: Python's way to end daemons at exit."""
    while sys.platform == "linux" and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
