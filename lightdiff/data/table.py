"""A list of images as a table, a column an array: names, splits, labels, and what each file was like when it was read.

Kept by a training (vae/images.safetensors) and by latents (whose index adds the place of each), to tell later what has
been changed, added or removed. Half a million images load in a fraction of a second, as no row becomes an object.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BufferedReader, BytesIO
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
from lightdiff.data.layouts import Labels, Mask, Names, Positions, Split
from lightdiff.errors import Damaged
from lightdiff.run_folder import open_regular

SPLITS: tuple[Split, ...] = get_args(Split)
HASH_BYTES = 16
MAX_TIME = 2**63 - 1
MANY = 1 << 31  # more than an int32 holds
Fingerprint = tuple[int, int, bytes]  # of a file: size, time of its last change in nanoseconds, hash of its contents
NO_FILE: Fingerprint = (-1, 0, bytes(HASH_BYTES))
Fingerprinter = Callable[[str, bool], Fingerprint]  # of an image of a source, by its name; with its hash, if so wanted
LISTED = ("text", "ends", "roots", "splits", "labels", "codes")  # fields of a table that its list is made of
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
    fingerprints: UInt8[Array, "n 32"] = COLUMN  # FINGERPRINT of each; NO_FILE: there is none; hash of zeros: not known

    @classmethod
    def of(cls, files: Sequence[ImageFile], **more: Any) -> Self:
        """The table of these images; nothing is known of their files yet. `more` are the fields of a subclass.

        The columns of a list that is a whole table are shared with it.
        """
        if isinstance(files, ImageList) and files.positions is None:
            columns = {name: getattr(files.table, name) for name in LISTED}
            return cls(**columns, fingerprints=np.zeros((len(files), FINGERPRINT.itemsize), np.uint8), **more)
        rows = [(file.root, SPLITS.index(file.split)) for file in files]
        roots, splits = np.array(rows, np.int32).reshape(-1, 2).T.copy()
        names = Names.of(file.path for file in files)
        return cls.of_columns(names, roots, splits.astype(np.uint8), [file.labels for file in files], **more)

    @classmethod
    def of_columns(
        cls,
        names: Names,
        roots: NDArray[np.int32],
        splits: NDArray[np.uint8],
        labels: Iterable[Labels],
        **more: Any,
    ) -> Self:
        """The table of images with these names, numbers of sources, numbers of splits and labels."""
        n, seen, found = len(names), dict[str, dict[str, int]](), dict[str, NDArray[np.int32]]()
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
        columns = {"text": names.text, "ends": names.ends, "roots": roots, "splits": splits, "codes": codes}
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
        split, labels = SPLITS[self.splits[position]], self.labels_of(position)
        return ImageFile(int(self.roots[position]), self.name(position), split, labels)

    @property
    def endings(self) -> NDArray[np.bytes_]:
        """The last four letters of each name, in lower case, (n,)."""
        last = np.stack([self.text[np.maximum(self.ends - back, 0)] for back in (4, 3, 2, 1)], 1)
        return (last | 32).view("S4")[:, 0]

    @property
    def names(self) -> Names:
        """The images' paths below their sources."""
        return Names(self.text, self.ends)

    def name(self, position: int) -> str:
        """An image's path below its source."""
        return self.names[position]

    def keys(self, positions: Positions) -> Iterator[tuple[int, str]]:
        """Source and name of these images."""
        return zip(map(int, map(self.roots.__getitem__, positions)), self.names.at(positions), strict=True)

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

    def take_fingerprints(self, fingerprinters: Sequence[Fingerprinter], same: "ImageTable | None" = None) -> None:
        """Find out size and time of change of each image's file; one of `fingerprinters` for each source.

        A list of archives that was taken over knows them: this one, or the `same` one that this was made of.
        """
        known = same or self
        if known.made_of and known.fingerprints.any():
            self.fingerprints = known.fingerprints.copy()
            return
        found = (fingerprinters[root](name, False) for root, name in self.keys(range(len(self))))
        self.fingerprints = np.fromiter(found, FINGERPRINT, len(self))[:, None].view(np.uint8)


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


def check_ranges(*limits: tuple[NDArray[Any], int, Any]) -> None:
    """Check that columns hold numbers from the first limit to below the second.

    Raises:
        ValueError: If one does not.
    """
    if any(((column < low) | (column >= high)).any() for column, low, high in limits):
        raise ValueError("its columns hold what does not fit together")


def content_hash(contents: bytes | BufferedReader | None) -> bytes:
    """A hash of what a file holds; zeros if it is not wanted."""
    if contents is None:
        return bytes(HASH_BYTES)
    stream = BytesIO(contents) if isinstance(contents, bytes) else contents
    return hashlib.file_digest(stream, partial(hashlib.blake2b, digest_size=HASH_BYTES)).digest()


def fingerprint(folder: Path, name: str, contents: bool = False) -> Fingerprint:
    """What the file of an image in a source is like.

    The hash is zeros if it is not asked for, and for files that hold many images.
    """
    path = os.path.join(folder, name)
    try:
        if not contents:
            found, hashed = os.stat(path), content_hash(None)
        else:
            with open_regular(path) as file:
                found, hashed = os.fstat(file.fileno()), content_hash(file)
    except NotADirectoryError:
        found, hashed = os.stat(folder), content_hash(None)
    except (OSError, ValueError):
        return NO_FILE
    return found.st_size, min(found.st_mtime_ns, MAX_TIME), hashed
