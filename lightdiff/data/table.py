"""A list of images as a table, a column an array: names, splits, labels, and what each file was like when it was read.

Kept by a training (vae/images.safetensors) and by latents (whose index adds the place of each), to tell later what has
been changed, added or removed. Half a million images load in a fraction of a second, as no row becomes an object.
"""

import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, get_args, overload

import numpy as np
import torch
from jaxtyping import Int32, Int64, UInt8
from numpy import ndarray as Array
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lightdiff import checkpoint
from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.data.layouts import Labels, Split
from lightdiff.errors import Damaged, UserError
from lightdiff.run_folder import open_regular

SPLITS: tuple[Split, ...] = get_args(Split)
HASH_BYTES = 16
READERS = 8  # threads that read files to compare their contents
MAX_TIME = 2**63 - 1
CHUNK = 1 << 17  # bytes read at a time
MANY = 1 << 31  # more than an int32 holds
Mask = NDArray[np.bool_]
Fingerprint = tuple[int, int, bytes]  # of a file: size, time of its last change in nanoseconds, hash of its contents
Look = Callable[[str, bool], Fingerprint]  # of an image of a source, by its name; with its hash, if so wanted
COLUMN: Any = Field(exclude=True)  # it is a tensor of the file, no part of its document
FINGERPRINT = np.dtype([("size", "<i8"), ("mtime", "<i8"), ("hash", f"S{HASH_BYTES}")])  # a row of 32 bytes


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image: `path` (with "/") is its name in the `root`-th --data source, a path below a folder."""

    root: int
    path: str
    split: Split
    labels: Labels


class ImageTable(BaseModel):
    """The images of a list, in its order, n of them."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    STAGE: ClassVar = "images"

    text: UInt8[Array, " bytes"] = COLUMN  # all names in UTF-8, one after the other
    ends: Int64[Array, " n"] = COLUMN  # where each of them ends
    roots: Int32[Array, " n"] = COLUMN  # the number of its --data source
    splits: UInt8[Array, " n"] = COLUMN  # of SPLITS
    labels: dict[str, list[str]]  # the values of each label
    made_of: str = ""  # a digest of the archives that it was made of, and how, if there are no folders among them
    codes: Int32[Array, "labels n"] = COLUMN  # for each label, the number of each image's value; -1: none
    fingerprints: UInt8[Array, "n 32"] = COLUMN  # FINGERPRINT of each; size -1: no such file, hash of zeros: not known

    @classmethod
    def of(cls, files: Sequence[ImageFile], **more: Any) -> Self:
        """The table of these images; nothing is known of their files yet. `more` are the fields of a subclass.

        The columns of a list that is a whole table are shared with it.
        """
        if isinstance(files, ImageList):
            columns = files.columns()
            return cls(**columns, fingerprints=np.zeros((len(files), FINGERPRINT.itemsize), np.uint8), **more)
        rows = [(file.root, SPLITS.index(file.split)) for file in files]
        roots, splits = np.array(rows, np.int32).reshape(-1, 2).T.copy()
        return cls.of_columns(
            (f.path for f in files), roots, splits.astype(np.uint8), [f.labels for f in files], **more
        )

    @classmethod
    def of_columns(
        cls,
        names: Iterable[str],
        roots: NDArray[np.int32],
        splits: NDArray[np.uint8],
        labels: Iterable[Labels],
        **more: Any,
    ) -> Self:
        """The table of images with these names, numbers of sources, numbers of splits and labels."""
        n, text, ends = len(roots), bytearray(), np.empty(len(roots), np.int64)
        for i, name in enumerate(names):
            text += name.encode("utf-8", "surrogateescape")
            ends[i] = len(text)
        seen, found = dict[str, dict[str, int]](), dict[str, NDArray[np.int32]]()
        for i, given in enumerate(labels):
            for name, value in given.items():
                if name not in seen:
                    seen[name], found[name] = {}, np.full(n, -1, np.int32)
                found[name][i] = seen[name].setdefault(value, len(seen[name]))
        values, codes = {name: sorted(seen[name]) for name in sorted(seen)}, np.empty((len(seen), n), np.int32)
        for row, name in zip(codes, values, strict=True):
            number = {value: i for i, value in enumerate(values[name])}
            row[:] = np.array([*(number[value] for value in seen[name]), -1], np.int32)[found[name]]
        unknown = np.zeros((n, FINGERPRINT.itemsize), np.uint8)
        columns = {
            "text": np.frombuffer(text, np.uint8),
            "ends": ends,
            "roots": roots,
            "splits": splits,
            "codes": codes,
        }
        return cls(**columns, labels=values, fingerprints=unknown, **more)

    def check(self) -> None:
        """Check that the columns fit together, of a table that somebody else may have written.

        Raises:
            ValueError: If not.
        """
        known = np.array([[len(values)] for values in self.labels.values()], np.int64).reshape(-1, 1)
        lengths = {len(column) for column in (self.roots, self.splits, self.fingerprints, self.codes.T)}
        if not len(self) or lengths != {len(self)} or len(known) != len(self.codes) or self.ends[-1] != len(self.text):
            raise ValueError("its columns do not fit together")
        check_ranges(
            (np.diff(self.ends, prepend=0), 1, len(self.text) + 1),
            (self.roots, 0, MANY),
            (self.splits, 0, len(SPLITS)),
            (self.codes, -1, known),
        )

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def files(self) -> NDArray[Any]:
        """What each image's file was like, (n,) of FINGERPRINT; a view of `fingerprints`."""
        return self.fingerprints.view(FINGERPRINT)[:, 0]

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, path: Path) -> Self:
        """The table in a file.

        Raises:
            UserError: If there is none, or it is damaged.
        """
        saved = Checkpoint(path, cls.STAGE)
        try:
            columns = {name: saved.tensor(name).numpy() for name in saved.names()}  # mapped: processes share them
            if os.name == "nt":  # where a file that is mapped cannot be replaced
                columns = {name: column.copy() for name, column in columns.items()}
            table = cls.model_validate({**saved.metadata.extra, **columns})
            table.check()
        except ValidationError as error:
            first = error.errors()[0]
            raise Damaged(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}"[:300]) from None
        except (ValueError, TypeError) as error:  # TypeError: of tensors that NumPy does not know
            raise Damaged(f"{path} is damaged: {error}") from None
        return table

    def write(self, path: Path) -> None:
        """Replace the table in a file."""
        columns = {name: torch.from_numpy(value) for name, value in self if isinstance(value, np.ndarray)}
        checkpoint.save(path, columns, Metadata(stage=self.STAGE, extra=self.model_dump(mode="json")))

    # --- rows -----------------------------------------------------------------------------------------------------

    def image(self, position: int) -> ImageFile:
        """An image as an object."""
        ((root, name),) = self.keys([position])
        return ImageFile(root, name, SPLITS[self.splits[position]], self.labels_of(position))

    def ending_in(self, suffixes: Sequence[str]) -> Mask:
        """Which names end in one of these, in any letter case, (n,)."""
        found = np.zeros(len(self), np.bool_)
        for suffix in map(str.encode, suffixes):
            long = np.flatnonzero(np.diff(self.ends, prepend=0) >= len(suffix))
            for back, letter in enumerate(reversed(suffix), 1):
                last = self.text[self.ends[long] - back]
                long = long[(last | 32 if 97 <= letter <= 122 else last) == letter]
            found[long] = True
        return found

    def name(self, position: int) -> str:
        """An image's path below its source."""
        return next(self.keys([position]))[1]

    def keys(self, positions: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Source and name of these images."""
        at = np.fromiter(positions, np.int64)
        starts, text = np.where(at > 0, self.ends[at - 1], 0).tolist(), self.text.data
        for root, start, end in zip(self.roots[at].tolist(), starts, self.ends[at].tolist(), strict=True):
            yield root, str(text[start:end], "utf-8", "surrogateescape")

    def labels_of(self, position: int) -> Labels:
        """The labels of an image."""
        of = zip(self.labels.items(), self.codes[:, position].tolist(), strict=True)
        return {name: values[code] for (name, values), code in of if code >= 0}

    def list_digest(self) -> str:
        """A digest of the list: names, sources and splits."""
        columns = (self.text, self.ends, self.roots, self.splits)
        return hashlib.sha256(b"".join(column.tobytes() for column in columns)).hexdigest()

    def of_split(self, split: Split) -> Mask:
        """Which images belong to a split, (n,)."""
        chosen: Mask = self.splits == SPLITS.index(split)
        return chosen

    def label_values(self, images: Mask | slice = slice(None)) -> dict[str, tuple[str, ...]]:
        """Each label's name with the sorted values that it takes among these images."""
        taken = {
            name: tuple(sorted(values[i] for i in np.unique(codes[images]) if i >= 0))
            for (name, values), codes in zip(self.labels.items(), self.codes, strict=True)
        }
        return {name: values for name, values in taken.items() if values}

    # --- what has changed -----------------------------------------------------------------------------------------

    def look(self, lookers: Sequence[Look], same: "ImageTable | None" = None) -> None:
        """Find out size and time of change of each image's file; one of `lookers` for each source.

        A list of archives that was taken over knows them: this one, or the `same` one that this was made of.
        """
        known = same or self
        if known.made_of and known.fingerprints.any():
            self.fingerprints = known.fingerprints.copy()
            return
        found = (lookers[root](name, False) for root, name in self.keys(range(len(self))))
        self.fingerprints = np.fromiter(found, FINGERPRINT, len(self))[:, None].view(np.uint8)

    def compare(self, older: "ImageTable", lookers: Sequence[Look], contents: bool) -> "Comparison":
        """What has become of the images of an older table.

        A file is another one when its size is. Where only the time of change differs, as after copying, its contents
        decide if the older table has their hashes (`contents`); if not, it counts as the same.
        """
        if self.list_digest() == older.list_digest():
            before = np.arange(len(self))
        else:
            names = {key: i for i, key in enumerate(older.keys(range(len(older))))}
            known = {_composed(key): i for key, i in names.items() if not key[1].isascii()} | names
            keys = self.keys(range(len(self)))
            before = np.fromiter((known.get(key, known.get(_composed(key), -1)) for key in keys), np.int64, len(self))
        now, then = self.files, older.files[before]
        changed = (before >= 0) & (now["size"] != then["size"])
        if contents:
            touched = np.flatnonzero((before >= 0) & ~changed & (now["mtime"] != then["mtime"]))
            with ThreadPoolExecutor(READERS) as pool:
                read = pool.map(lambda key: lookers[key[0]](key[1], True), self.keys(touched))
                now["hash"][touched] = [hashed for _, _, hashed in read]
            known = now["hash"] != b""
            changed[touched] = ((now["hash"] != then["hash"]) | ~known)[touched]
        gone = np.setdiff1d(np.arange(len(older)), before)
        return Comparison(before, changed, gone, older)


class ImageList(Sequence[ImageFile]):
    """Images of a table, all or some of them, in their order; one becomes an object when it is asked for."""

    def __init__(self, table: ImageTable, positions: NDArray[np.int32] | None = None) -> None:
        """Keep what is needed; positions in the table, if not all are meant."""
        self.table, self.positions = table, positions

    def __len__(self) -> int:
        return len(self.table if self.positions is None else self.positions)

    @overload
    def __getitem__(self, which: int) -> ImageFile: ...
    @overload
    def __getitem__(self, which: slice) -> "ImageList": ...
    def __getitem__(self, which: int | slice) -> "ImageFile | ImageList":
        if isinstance(which, slice):
            chosen = np.arange(len(self.table), dtype=np.int32) if self.positions is None else self.positions
            return ImageList(self.table, chosen[which])
        at = range(len(self))[which]
        return self.table.image(at if self.positions is None else int(self.positions[at]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def where(self, chosen: Mask) -> "ImageList":
        """Those images of the table that are chosen, (n,), if they are in this list."""
        found = np.flatnonzero(chosen).astype(np.int32)
        return ImageList(self.table, found if self.positions is None else np.intersect1d(found, self.positions))

    def of_split(self, split: Split) -> "ImageList":
        """The images of a split."""
        return self.where(self.table.of_split(split))

    @property
    def roots(self) -> NDArray[np.int32]:
        """The number of each image's source."""
        return self.table.roots if self.positions is None else self.table.roots[self.positions]

    def columns(self) -> dict[str, Any]:
        """The fields of a table of these images, but for what their files are like."""
        table = self.table if self.positions is None else ImageTable.of(list(self))
        return {name: getattr(table, name) for name in ("text", "ends", "roots", "splits", "labels", "codes")}


@dataclass(frozen=True)
class Comparison:
    """What has become of the images of an older table."""

    before: NDArray[np.int64]  # the position of each image there; -1: it is new
    changed: Mask  # whether its file is another one since
    gone: NDArray[np.int64]  # positions there
    older: ImageTable

    @property
    def nothing(self) -> bool:
        """Whether they are the same images."""
        return not (self.changed.any() or len(self.gone) or (self.before < 0).any())

    def __str__(self) -> str:
        return f"{self.changed.sum():,} changed, {(self.before < 0).sum():,} added, {len(self.gone):,} gone"

    def check_loss(self, max_bad: float, where: Path) -> None:
        """Check that hardly any images are gone.

        Raises:
            UserError: If more are than can be unreadable.
        """
        if len(self.gone) > max_bad * len(self.older):
            example = self.older.name(int(self.gone[0]))
            raise UserError(
                f"{len(self.gone):,} of the {len(self.older):,} images behind {where} are gone ({example}), more than "
                f"--max-bad {max_bad:g}: is every disk mounted, and --data right? --allow-missing goes on without them"
            )


def check_ranges(*limits: tuple[NDArray[Any], int, Any]) -> None:
    """Check that columns hold numbers from the first limit to below the second.

    Raises:
        ValueError: If one does not.
    """
    if any(((column < low) | (column >= high)).any() for column, low, high in limits):
        raise ValueError("its columns hold what does not fit together")


def _composed(key: tuple[int, str]) -> tuple[int, str]:
    """The same in one Unicode form: on its way between systems, "é" may become two characters."""
    return (key[0], key[1] if key[1].isascii() else unicodedata.normalize("NFC", key[1]))


def fingerprint(folder: Path, name: str, contents: bool = False) -> Fingerprint:
    """What the file of an image in a source is like: -1, 0 and zeros where there is none.

    The hash is zeros, too, if it is not asked for, and for files that hold many images.
    """
    path, hashed = os.path.join(folder, name), hashlib.blake2b(digest_size=HASH_BYTES)
    try:
        if not contents:
            found = os.stat(path)
        else:
            with open_regular(path) as file:
                found = os.fstat(file.fileno())
                for chunk in iter(partial(file.read, CHUNK), b""):
                    hashed.update(chunk)
    except NotADirectoryError:
        found, contents = os.stat(folder), False
    except (OSError, ValueError):
        return -1, 0, bytes(HASH_BYTES)
    return found.st_size, min(found.st_mtime_ns, MAX_TIME), hashed.digest() if contents else bytes(HASH_BYTES)
