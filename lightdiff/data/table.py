"""A list of images as a table, a column an array: names, splits, labels, and what each file was like when it was read.

Kept by a training (vae/images.safetensors) and by latents (whose index adds the place of each), to tell later what has
been changed, added or removed. Half a million images load in a fraction of a second, as no row becomes an object.
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from lightdiff import checkpoint
from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.data.files import ImageFile
from lightdiff.data.layouts import Split
from lightdiff.errors import Damaged, UserError
from lightdiff.run_folder import open_regular

SPLITS: tuple[Split, ...] = get_args(Split)
HASH_BYTES = 16
READERS = 8  # threads that read files to compare their contents
MAX_TIME = 2**63 - 1
CHUNK = 1 << 17  # bytes read at a time
Fingerprint = tuple[int, int, bytes]  # of a file: size, time of change, hash of its contents


def _checked(kind: type, dimensions: int, column: NDArray[Any]) -> NDArray[Any]:
    if column.dtype != kind or column.ndim != dimensions:
        raise ValueError(f"{column.dtype} in {column.ndim} dimensions, where {kind.__name__} in {dimensions} belongs")
    return column


Numbers = Annotated[NDArray[np.int64], AfterValidator(partial(_checked, np.int64, 1)), Field(exclude=True)]
Counts = Annotated[NDArray[np.int32], AfterValidator(partial(_checked, np.int32, 1)), Field(exclude=True)]
Codes = Annotated[NDArray[np.int32], AfterValidator(partial(_checked, np.int32, 2)), Field(exclude=True)]
Bytes = Annotated[NDArray[np.uint8], AfterValidator(partial(_checked, np.uint8, 1)), Field(exclude=True)]
Hashes = Annotated[NDArray[np.uint8], AfterValidator(partial(_checked, np.uint8, 2)), Field(exclude=True)]
Mask = NDArray[np.bool_]


class ImageTable(BaseModel):
    """The images of a list, in its order, n of them."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    STAGE: ClassVar = "images"

    text: Bytes  # all names in UTF-8, one after the other
    ends: Numbers  # where each of them ends, (n,)
    roots: Counts  # the number of its --data source, (n,)
    splits: Bytes  # of SPLITS, (n,)
    labels: dict[str, list[str]]  # the values of each label
    codes: Codes  # for each label, the number of each image's value, (l, n); -1: none
    sizes: Numbers  # in bytes, (n,); -1: there was no such file
    mtimes: Numbers  # when the file was changed last, in nanoseconds, (n,)
    hashes: Hashes  # of the files' contents, (n, HASH_BYTES); zeros: not known

    @classmethod
    def of(cls, files: Sequence[ImageFile], **more: Any) -> Self:
        """The table of these images; nothing is known of their files yet. `more` are the fields of a subclass."""
        n, names = len(files), [file.path.encode("utf-8", "surrogateescape") for file in files]
        labels = {name: list[str]() for name in sorted({name for file in files for name in file.labels})}
        codes = np.empty((len(labels), n), np.int32)
        for row, name in zip(codes, labels, strict=True):
            labels[name] = sorted({file.labels[name] for file in files if name in file.labels})
            number = {value: i for i, value in enumerate(labels[name])}
            row[:] = [number.get(file.labels.get(name, ""), -1) for file in files]
        return cls(
            text=np.frombuffer(bytearray().join(names), np.uint8),
            ends=np.cumsum(np.fromiter(map(len, names), np.int64, n)),
            roots=np.fromiter((file.root for file in files), np.int32, n),
            splits=np.fromiter((SPLITS.index(file.split) for file in files), np.uint8, n),
            labels=labels,
            codes=codes,
            sizes=np.full(n, -1),
            mtimes=np.zeros(n, np.int64),
            hashes=np.zeros((n, HASH_BYTES), np.uint8),
            **more,
        )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        n, ends, known = len(self), self.ends, [len(values) for values in self.labels.values()]
        rows = [len(c) for c in (self.roots, self.splits, self.sizes, self.mtimes, self.hashes)]
        if (
            not n
            or {*rows, self.codes.shape[1]} != {n}
            or (self.hashes.shape[1], len(self.codes)) != (HASH_BYTES, len(known))
            or ends[0] <= 0
            or (ends[1:] <= ends[:-1]).any()
            or ends[-1] != len(self.text)
            or (self.roots < 0).any()
            or (self.splits >= len(SPLITS)).any()
            or (self.codes < -1).any()
            or (self.codes >= np.array(known, np.int64)[:, None]).any()
        ):
            raise ValueError("its columns do not fit together")
        return self

    def __len__(self) -> int:
        return len(self.ends)

    # --- files ----------------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, path: Path) -> Self:
        """The table in a file.

        Raises:
            UserError: If there is none, or it is damaged.
        """
        saved = Checkpoint(path, cls.STAGE)
        try:
            columns = {name: saved.tensor(name).numpy().copy() for name in saved.names()}
            return cls.model_validate({**saved.metadata.extra, **columns})
        except ValidationError as error:  # whole, as its digest is right
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            what = first["msg"].removeprefix("Value error, ")
            raise Damaged(f"{path} is damaged: {where}{': ' * bool(where)}{what}"[:300]) from None
        except TypeError as error:  # of tensors that NumPy does not know
            raise Damaged(f"{path} is damaged: {error}") from None

    def write(self, path: Path) -> None:
        """Replace the table in a file."""
        columns = {name: getattr(self, name) for name, field in type(self).model_fields.items() if field.exclude}
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        checkpoint.save(path, tensors, Metadata(stage=self.STAGE, extra=self.model_dump(mode="json")))

    # --- rows -----------------------------------------------------------------------------------------------------

    def name(self, position: int) -> str:
        """An image's path below its source."""
        return next(self.keys([position]))[1]

    def keys(self, positions: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Source and name of these images."""
        at = np.fromiter(positions, np.int64)
        starts, text = np.where(at > 0, self.ends[at - 1], 0).tolist(), self.text.data
        for root, start, end in zip(self.roots[at].tolist(), starts, self.ends[at].tolist(), strict=True):
            yield root, str(text[start:end], "utf-8", "surrogateescape")

    def list_digest(self) -> str:
        """A digest of the list: names, sources and splits."""
        columns = (self.text, self.ends, self.roots, self.splits)
        return hashlib.sha256(b"".join(column.tobytes() for column in columns)).hexdigest()

    def of_split(self, split: Split) -> Mask:
        """Which images belong to a split, (n,)."""
        return np.equal(self.splits, SPLITS.index(split))

    def label_values(self, images: Mask | slice = slice(None)) -> dict[str, tuple[str, ...]]:
        """Each label's name with the sorted values that it takes among these images."""
        taken = {
            name: tuple(sorted(values[i] for i in np.unique(codes[images]) if i >= 0))
            for (name, values), codes in zip(self.labels.items(), self.codes, strict=True)
        }
        return {name: values for name, values in taken.items() if values}

    # --- what has changed -----------------------------------------------------------------------------------------

    def look(self, folders: Sequence[Path]) -> None:
        """Find out size and time of change of each image's file."""
        found = (fingerprint(folders[root], name) for root, name in self.keys(range(len(self))))
        numbers = np.fromiter((number for size, mtime, _ in found for number in (size, mtime)), np.int64, 2 * len(self))
        self.sizes, self.mtimes = numbers.reshape(-1, 2).T.copy()

    def compare(self, older: "ImageTable", folders: Sequence[Path], contents: bool) -> "Comparison":
        """What has become of the images of an older table.

        A file is another one when its size is. Where only the time of change differs, as after copying, its contents
        decide if the older table has their hashes (`contents`); if not, it counts as the same.
        """
        if self.list_digest() == older.list_digest():
            before = np.arange(len(self))
        else:
            names = {key: i for i, key in enumerate(older.keys(range(len(older))))}
            known = {_composed(key): i for key, i in names.items() if not key[1].isascii()} | names
            now = self.keys(range(len(self)))
            before = np.fromiter((known.get(key, known.get(_composed(key), -1)) for key in now), np.int64, len(self))
        changed = (before >= 0) & (self.sizes != older.sizes[before])
        if contents:
            touched = np.flatnonzero((before >= 0) & ~changed & (self.mtimes != older.mtimes[before]))
            files = self.keys(touched.tolist())
            with ThreadPoolExecutor(READERS) as pool:
                found = pool.map(lambda file: fingerprint(folders[file[0]], file[1], contents=True)[2], files)
                self.hashes[touched] = np.frombuffer(b"".join(found), np.uint8).reshape(-1, HASH_BYTES)
            same = (self.hashes == older.hashes[before]).all(1) & self.hashes.any(1)
            changed[touched] = ~same[touched]
        gone = np.setdiff1d(np.arange(len(older)), before)
        return Comparison(before, changed, gone, older)


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
