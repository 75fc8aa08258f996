"""What the names of a source's images say: the layout, the classes, and whether to look closer. Opens no image."""

import posixpath
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt8
from numpy import ndarray as Array
from numpy.typing import NDArray

from lightdiff.on_demand import on_demand

Split = Literal["train", "val"]
Layout = Literal["FairFace", "StyleGAN", "class folders", "plain"]
Labels = dict[str, str]
Read = Callable[[Path], bytes]
Mask = NDArray[np.bool_]
Positions = Sequence[int] | NDArray[np.integer]

# Tables of labels that come with data sets: FairFace's, and StyleGAN's.
TABLES = ("fairface_label_train.csv", "fairface_label_val.csv", "dataset.json")
# Of a file's name: the suffix, the last part, as in 1_small.jpg, and the first, as in small_1.jpg
SUFFIX = re.compile(r"(?<=[^/\n])\.[^./\n]*$", re.MULTILINE)
LAST = re.compile(r"[-_@ ]([^-_@ /.\n]+)(?=\.\w+$)", re.MULTILINE)
FIRST = re.compile(r"(?:^|(?<=/))([^-_@ /.\n]+)[-_@ ](?=[^/\n]*$)", re.MULTILINE)
PARTED = b"-_@ "  # one of which is beside every part
MAX_VARIANTS = 6  # more folders than a photograph has sizes are classes
SPLIT = re.compile("train|val|test", re.IGNORECASE)
CHUNK = 1 << 14  # names that are Python's texts at a time


@dataclass(eq=False)
class Names:
    """Names of images, n of them, as one text in UTF-8 and where each ends: 30 bytes for one that takes Python 80."""

    text: UInt8[Array, " bytes"]
    ends: Int64[Array, " n"]

    @classmethod
    def of(cls, names: Iterable[str], in_order: bool = False) -> "Names":
        """These names; sorted by code point if so wanted, for which they become Python's texts only if they are not."""
        text, ends, last, ordered = bytearray(), array("q"), "", True
        for name in names:
            text += name.encode("utf-8", "surrogateescape")
            ends.append(len(text))
            ordered, last = ordered and last <= name, name
        found = cls(np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64))
        return cls.of(sorted(found)) if in_order and not ordered else found

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, position: int) -> str:
        at = range(len(self))[position]
        start = int(self.ends[at - 1]) if at else 0
        return str(self.text.data[start : int(self.ends[at])], "utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return self.at(range(len(self)))

    def at(self, positions: Positions) -> Iterator[str]:
        """The names at these positions."""
        text = self.text.data
        for first in range(0, len(positions), CHUNK):
            at = np.asarray(positions[first : first + CHUNK])
            ends = zip(np.where(at > 0, self.ends[at - 1], 0).tolist(), self.ends[at].tolist(), strict=True)
            yield from [str(text[start:end], "utf-8", "surrogateescape") for start, end in ends]

    def where(self, chosen: Mask) -> "Names":
        """Those that are chosen, (n,)."""
        return self if chosen.all() else Names.of(self.at(np.flatnonzero(chosen)))

    @cached_property
    def homes(self) -> tuple[list[str], NDArray[np.int32]]:
        """The folders that hold images, and the number of each image's among them, (n,)."""
        numbers = dict[str, int]()
        of = np.fromiter((numbers.setdefault(name.rpartition("/")[0], len(numbers)) for name in self), np.int32)
        return list(numbers), of


def common_folder(names: Names) -> str:
    """The folder, with a "/" at its end, that holds all images; empty if that is the source itself."""
    common = posixpath.commonpath([posixpath.dirname(name) for name in (names[0], names[-1])])
    return f"{common}/" if common else ""


def folders_of(names: Names) -> list[tuple[str, ...]]:
    """For each of `names.homes`, its folders below the one that holds all, split folders (train, val, test) aside."""
    if has_split_folders(names):
        return [place.folders for place in on_demand("data.splits:places")(names)]
    start = len(common_folder(names))
    return [tuple(filter(None, home[start:].split("/"))) for home in names.homes[0]]


def has_split_folders(names: Names) -> bool:
    """Whether a folder's name speaks of training, validation or testing; that of a class may, too."""
    return any(map(SPLIT.search, names.homes[0]))


def layout(names: Names, tables: Sequence[Path] = ()) -> Layout:
    """What the images of a source look like: a data set with its own `tables`, one folder a class, or neither."""
    if tables:
        return "StyleGAN" if tables[0].name == TABLES[-1] else "FairFace"
    # Folders such as 00000 and 01000 number the images; they say nothing about them.
    return "plain" if all(re.fullmatch("[0-9]{5}", name) for name in set(classes(names))) else "class folders"


def classes(names: Names) -> list[str]:
    """The class of the images in each of `names.homes`: its first folder where these differ, split folders aside.

    Empty if any image has none.
    """
    if "" in names.homes[0]:
        return []
    folders = folders_of(names)
    for depth in range(min(map(len, folders))):
        if len(kinds := {parts[depth] for parts in folders}) > 1:
            of = {kind: unicodedata.normalize("NFC", kind) for kind in kinds}
            return [of[parts[depth]] for parts in folders]
    return []


def data_set_tables(folder: Path, names: Names, read: Read) -> dict[Path, bytes]:
    """The `TABLES` beside all images or above, nearest first: in --data or, FairFace's, beside it.

    `read` reads a table, or raises an OSError.
    """
    place = folder / common_folder(names)
    found = dict[Path, bytes]()
    for above in (place, *place.parents[: len(place.parts) - len(folder.parts) + 1]):
        for table in TABLES:
            with suppress(OSError):
                found[above / table] = read(above / table)
    return found


def may_hold_copies(names: Names) -> bool:
    """Whether images can be copies of one another by their names, which differ in a folder, a suffix or one part.

    A part is the first or last of several, as in small_1.jpg. Where there are many, numbers count images.
    """
    if (names.text == ord("\n")).any() or _repeats(stem.rpartition("/")[2] for stem in _stems(names)):
        return True
    for pattern in (LAST, FIRST) if any((names.text == byte).any() for byte in PARTED) else ():
        count, kinds, numbers = 0, set[str](), True
        for parts in map(pattern.findall, _texts(names)):
            count, numbers = count + len(parts), numbers and all(map(str.isdigit, parts))
            kinds |= set(parts if len(kinds) <= MAX_VARIANTS else ())
        one = len(kinds) == 1 and count == len(names)  # as in IMG_0001.jpg
        if kinds and not one and (len(kinds) <= MAX_VARIANTS or not numbers):
            pairs = zip(_stems(names), _stems(names, pattern), strict=True)
            if _repeats(text for pair in pairs for text in dict.fromkeys(pair)):
                return True
    return False


def _texts(names: Names) -> Iterator[str]:
    """The names, some thousands at a time, a line each."""
    return ("\n".join(names.at(range(i, min(i + CHUNK, len(names))))) for i in range(0, len(names), CHUNK))


def _stems(names: Names, without: re.Pattern[str] | None = None) -> Iterator[str]:
    """The names without their suffixes and, if so wanted, without a part."""
    for text in _texts(names):
        yield from SUFFIX.sub("", without.sub("", text) if without else text).split("\n")


def _repeats(texts: Iterable[str]) -> bool:
    """Whether two texts are the same or, by a rare chance, have the same hash."""
    hashes = np.sort(np.fromiter(map(hash, texts), np.int64))
    return bool((hashes[1:] == hashes[:-1]).any())


def _of_classes(names: Names) -> Iterator[Labels]:
    """The label of each image; those of a class share it."""
    labels = [{"class": value} for value in classes(names)]
    return (labels[home] for home in names.homes[1])


# The labels of each image, by layout; those of other layouts come from their tables.
LABELS: dict[Layout, Callable[[Names], Iterable[Labels]]] = {
    "class folders": _of_classes,
    "plain": lambda names: [{}] * len(names),
}
