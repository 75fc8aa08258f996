"""Images in batches: the data set, its loader, and what to do about files that cannot be read."""

import math
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightdiff.data.files import ImageFile, full_paths
from lightdiff.data.images import BadImage, colour, frame, load_image, random_frame
from lightdiff.data.order import key
from lightdiff.errors import RunError
from lightdiff.settings import ImageSettings

OnBad = Callable[[list[tuple[int, str]]], None]


# --- data set -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """One image."""

    x: UInt8[Tensor, "3 r r"] | None
    index: int  # of the image in x, which is another than asked for when that one is bad
    bad: list[tuple[int, str]]  # index and reason


@dataclass(frozen=True, slots=True)
class Batch:
    """The readable images of a batch; `bad` lists the others, with their reasons."""

    x: UInt8[Tensor, "b 3 r r"]
    index: Int64[Tensor, " b"]
    bad: list[tuple[int, str]]
    missing: int  # images asked for that are not in x

    def pin_memory(self) -> "Batch":
        """The same batch in pinned memory; a loader asks for it."""
        return replace(self, x=self.x.pin_memory(), index=self.index.pin_memory())


class ImageDataset(Dataset[Item]):
    """Framed images by (epoch, index). Where training takes its variation from; the rest ignores the epoch."""

    def __init__(
        self,
        files: Sequence[ImageFile],
        folders: Sequence[Path],
        settings: ImageSettings,
        seed: int,
        train: bool,
        replace: bool | None = None,
    ) -> None:
        """Keep what is needed; no file is opened.

        Args:
            files: What the indices count.
            folders: What each file's `root` counts.
            settings: Resolution, background, random crop and flip.
            seed: Of the crops and flips.
            train: Whether to crop and flip at random.
            replace: Whether the next readable image stands in for an unreadable one, or none does; default: `train`.
        """
        colour(settings.background)  # a wrong name is found before any worker starts
        self.paths = full_paths(files, folders)
        self.settings, self.seed, self.train = settings, seed, train
        self.replace = train if replace is None else replace
        # The same for all uses, as it touches the pixels: twice the size needed, and enough for the smallest crop.
        self.at_least = math.ceil(settings.resolution * max(2, 1 / settings.random_crop))
        # The search for a stand-in ends somewhere: with far more bad files than max_bad allows, the run has to stop.
        self.tries = min(len(files), 100 + int(2 * settings.max_bad * len(files))) if self.replace else 1

    def __len__(self) -> int:
        """How many files there are, unreadable ones included."""
        return len(self.paths)

    def __getitem__(self, place: tuple[int, int]) -> Item:
        """The image, or the next readable one, or none where `tries` images in a row are bad."""
        epoch, asked = place
        bad: list[tuple[int, str]] = []
        for index in ((asked + i) % len(self) for i in range(self.tries)):
            try:
                image = load_image(self.paths[index], self.settings.background, self.at_least)
            except BadImage as error:
                bad.append((index, str(error)))
            else:
                return Item(self._framed(image, epoch, asked), index, bad)
        return Item(None, asked, bad)

    def _framed(self, image: Image.Image, epoch: int, index: int) -> UInt8[Tensor, "3 r r"]:
        settings = self.settings
        if not self.train:
            return frame(image, settings.resolution)
        rng = random.Random(key(self.seed, "augment", epoch, index))
        return random_frame(image, settings.resolution, settings.random_crop, settings.flip, rng)


def collate(items: Sequence[Item], resolution: int) -> Batch:
    """The items as one batch, without those that have no image."""
    found = [(item.x, item.index) for item in items if item.x is not None]
    x = torch.stack([x for x, _ in found]) if found else torch.empty(0, 3, resolution, resolution, dtype=torch.uint8)
    index = torch.tensor([index for _, index in found], dtype=torch.int64)
    return Batch(x, index, [entry for item in items for entry in item.bad], len(items) - len(found))


# --- unreadable files ---------------------------------------------------------------------------------------------


class BadFiles:
    """The unreadable files of a run: listed in a report, one "path<TAB>reason" a line, and counted.

    The report is the memory. A resumed run goes on with it, and so do other processes and other data sets of the same
    run: no file is listed or counted twice.
    """

    def __init__(self, report: Path, names: Sequence[str], total: int, max_bad: float) -> None:
        """Go on with the report if there is one.

        Args:
            report: The file; written when there is something to say.
            names: The name of each index.
            total: Images of the run, of which a share may be bad.
            max_bad: That share.
        """
        self.report, self.total, self.max_bad = report, total, max_bad
        self._names = names
        self._seen: set[int] = set()
        self._listed = self._read()

    @property
    def count(self) -> int:
        """How many files are listed."""
        return len(self._listed)

    def add(self, bad: Sequence[tuple[int, str]]) -> None:
        """List those that are new. A `RunError` says when there are more than the tolerated share."""
        new = {index: reason for index, reason in bad if index not in self._seen}
        if not new:
            return
        self._seen.update(new)
        self._listed = self._read()  # again, for what other processes have found
        lines = {_on_one_line(self._names[index]): _on_one_line(reason) for index, reason in new.items()}
        lines = {name: reason for name, reason in lines.items() if name not in self._listed}
        self.report.parent.mkdir(parents=True, exist_ok=True)
        with self.report.open("a", encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
            stream.write("".join(f"{name}\t{reason}\n" for name, reason in lines.items()))
        self._listed.update(lines)
        # 0.29 * 100 is a little less than 29.
        if self.count > self.max_bad * self.total + 1e-6:
            raise RunError(self._too_many())

    def _read(self) -> dict[str, str]:
        if not self.report.exists():
            return {}
        text = self.report.read_text(encoding="utf-8", errors="surrogateescape")
        pairs = (line.partition("\t") for line in text.split("\n") if line)
        return {name: reason for name, _, reason in pairs}

    def _too_many(self) -> str:
        share = f"{self.count / max(self.total, 1):.2%}"
        first = [f"  {name}: {reason}" for name, reason in list(self._listed.items())[:3]]
        return "\n".join(
            [
                f"{self.count} of {self.total} images ({share}) cannot be read, more than --max-bad {self.max_bad:g}:",
                *first,
                f"All of them are listed in {self.report}. Repair or remove them and delete that list, "
                "or raise --max-bad.",
            ]
        )


def _on_one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


# --- batches ------------------------------------------------------------------------------------------------------


class Batches:
    """Batches in the order given, loaded by `workers` processes or, with 0, by this one.

    Iterating again starts again, with the same processes. `order` may be endless: it is read two batches a worker
    ahead.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        order: Iterable[list[tuple[int, int]]],
        workers: int,
        on_bad: OnBad | None = None,
        pin: bool = False,
    ) -> None:
        """Start nothing yet.

        Args:
            dataset: The images.
            order: The (epoch, index) of each image of each batch.
            workers: Processes that load images.
            on_bad: Called with the unreadable files of a batch, such as `BadFiles.add`, before it is handed out.
            pin: Whether to copy batches to pinned memory, for a GPU.
        """
        self._dataset, self._on_bad = dataset, on_bad
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=partial(collate, resolution=dataset.settings.resolution),
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
            prefetch_factor=2 if workers else None,
            pin_memory=pin,
            # Its own generator: by default a loader draws a seed from torch's global one.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:
        """Every batch, after its unreadable files have been told.

        Raises:
            RunError: There are too many bad files, none to stand in for one of them, or a worker died.
        """
        for batch in self._loaded():
            if self._on_bad and batch.bad:
                self._on_bad(batch.bad)
            if self._dataset.replace and batch.missing:
                index, reason = batch.bad[0]
                name, others = self._dataset.paths[index], self._dataset.tries - 1
                raise RunError(f"{name} cannot be read ({reason}), nor can the {others} images after it")
            yield batch

    def _loaded(self) -> Iterator[Batch]:
        try:
            with _no_sudden_errors():
                loaded = iter(self._loader)
            yield from loaded
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise RunError(f"loading images failed: {reason} (fewer --workers need less memory)") from error


def batches(
    dataset: ImageDataset,
    order: Iterable[list[tuple[int, int]]],
    workers: int,
    on_bad: OnBad | None = None,
    pin: bool = False,
) -> Iterator[Batch]:
    """One pass over `Batches`, for an order that is used once."""
    return iter(Batches(dataset, order, workers, on_bad, pin))


@contextmanager
def _no_sudden_errors() -> Iterator[None]:
    """Undoes what starting a loader does to SIGCHLD: an error raised wherever the main process is when a worker dies.

    That might be in the middle of saving. The loader finds out by itself, some seconds after the next batch is due.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _start_worker(_: int) -> None:
    """Leave stopping to the main process, which finishes its step when a signal is sent to all processes."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = multiprocessing.parent_process()  # which a fork server is not
    if sys.platform == "linux":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by, args=(main.pid if main else os.getppid(),), daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    """End this worker when the main process, and nobody else, sends SIGTERM: Python's way to end daemons at exit."""
    while sys.platform == "linux" and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
