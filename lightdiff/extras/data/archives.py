"""Archives of images: zip files and tar files (WebDataset's shards), read in place by random access.

Where each image lies in them is found out once and, for large archives, kept in the run and below ~/.cache, as long as
size and time of change of all of them stay the same. An image is then one `seek` and one `read`.
"""

import glob
import hashlib
import json
import os
import posixpath
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from io import BytesIO
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int32, Int64
from numpy import ndarray as Array
from numpy.typing import NDArray
from PIL import Image

from lightdiff import __version__
from lightdiff.data.files import Source, left_out, read_in_folder, source_of
from lightdiff.data.formats import SUFFIXES, BadImage, open_stream
from lightdiff.data.layouts import CHUNK, TABLES, Labels, Names
from lightdiff.data.table import (
    COLUMN,
    NO_FILE,
    Fingerprint,
    ImageList,
    ImageTable,
    check_ranges,
    content_hash,
)
from lightdiff.errors import LightdiffError, UserError
from lightdiff.extras.data.members import LARGEST, Member, Part, members, read_member
from lightdiff.extras.data.unread import PICTURES, UNREAD_SUFFIXES
from lightdiff.run_folder import atomic_link
from lightdiff.settings import ImageSettings

ARCHIVES = (".zip", ".tar")
LABEL_FILES = (".cls", ".json")  # of WebDataset, beside an image of the same key
LONGEST_LABEL = 1 << 16  # bytes of a file of labels
KEPT_FROM = 10_000  # images of an archive whose index is kept; smaller ones are read again in less than a second
UNPACK = {
    (".tar.gz", ".tgz"): "gunzip",
    (".tar.bz2", ".tbz2", ".tbz"): "bunzip2",
    (".tar.xz", ".txz"): "unxz",
    (".tar.zst", ".tzst"): "unzstd",
}
ENTIRE = (".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")


class Archive(ImageTable):
    """The images of some archives, sorted by name; `roots` counts the archives, fingerprints have no hash."""

    STAGE: ClassVar = "archive"

    parts: list[Part]
    passed_over: dict[str, int]
    tables: dict[str, tuple[int, int, int, int, int]]  # of labels, by name: the archive's number, those of a member
    offsets: Int64[Array, " n"] = COLUMN
    lengths: Int32[Array, " n"] = COLUMN
    crcs: Int32[Array, " n"] = COLUMN  # their 32 bits

    def check(self) -> None:
        """Check that all parts fit together, of an index that came with somebody's run.

        Raises:
            ValueError: If not.
        """
        super().check()
        lengths, parts = {len(self.offsets), len(self.lengths), len(self.crcs)}, range(len(self.parts))
        if lengths != {len(self)} or not {part for part, *_ in self.tables.values()}.issubset(parts):
            raise ValueError("its parts do not fit together")
        check_ranges((self.roots, 0, len(parts)))

    def find(self, name: str) -> int:
        """The position of an image.

        Raises:
            FileNotFoundError: If there is none of that name.
        """
        at = bisect_left(self.names, name)
        if at == len(self) or self.names[at] != name:
            raise FileNotFoundError(f"{name} is not in the archive")
        return at

    def read_image(self, name: str) -> bytes:
        """The bytes of an image's file."""
        at = self.find(name)
        numbers = map(int, (self.offsets[at], self.lengths[at], self.files["size"][at], self.crcs[at]))
        member = Member(name, *numbers)
        return read_member(self.parts[self.roots[at]], member._replace(crc=member.crc & 0xFFFFFFFF))


# --- what a source needs ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Archives:
    """What a source needs. Worker processes get it with the run that it is used for."""

    run: Path | None = None  # the folder that indices are kept in, too

    def open_archive(self, place: Path) -> Archive:
        """The index of what a path names."""
        return open_archive(place, self.run)

    def names(self, place: Path, passed_over: Counter[str]) -> Iterator[str]:
        """The names of all images, sorted; what looks like one and is not read is counted by kind."""
        open_archive.cache_clear()  # they may have been changed since
        archive = self.open_archive(place)
        passed_over.update(archive.passed_over)
        return iter(archive.names)

    def open(self, place: Path, name: str) -> Image.Image:
        """An image, open but not yet decoded."""
        return open_stream(BytesIO(self.open_archive(place).read_image(name)))

    def fingerprint(self, place: Path, name: str, contents: bool = False) -> Fingerprint:
        """What the file of an image is like; its time of change is that of its archive."""
        try:
            archive = self.open_archive(place)
            size, changed, _ = archive.files[archive.find(name)].tolist()
            return size, changed, content_hash(archive.read_image(name) if contents else None)
        except (OSError, BadImage, LightdiffError):
            return NO_FILE

    def read(self, place: Path, path: Path) -> bytes:
        """A table of labels, in the archive (named as if that were a folder) or beside it.

        Raises:
            OSError: There is none.
            UserError: It is damaged.
        """
        if place not in path.parents:
            return read_in_folder(place, path)
        name, archive = path.relative_to(place).as_posix(), self.open_archive(place)
        if name not in archive.tables:
            raise FileNotFoundError(f"{path} does not exist")
        part, *numbers = archive.tables[name]
        try:
            return read_member(archive.parts[part], Member(name, *numbers))
        except BadImage as error:
            raise UserError(f"--data: {path} cannot be read: {error}") from None

    def labels(self, place: Path, names: Names) -> Iterable[Labels] | None:
        """The labels of images, if some have files of labels beside them: NAME.cls, NAME.json."""
        archive = self.open_archive(place)
        return map(archive.labels_of, range(len(archive))) if archive.labels else None


OPENED = Archives()
SOURCE = Source(OPENED.names, OPENED.open, OPENED.fingerprint, OPENED.read, OPENED.labels)


def kept_list(images: ImageSettings, kept: Path | None, search: Callable[[], ImageList]) -> ImageList:
    """The images that `search` finds or, of archives of which none has changed, the list in a file of a run's stage."""
    OPENED.run = kept.parents[1] if kept else None
    if any(source_of(place) is not SOURCE for place in images.data):
        return search()
    parts = [(str(place), state_of(place)) for place in images.data]
    labels = file_state(images.labels) if images.labels and images.labels.is_file() else str(images.labels)
    made_of = hashlib.sha256(repr([__version__, parts, images.val_share, labels]).encode()).hexdigest()
    if kept:
        with suppress(UserError):
            if (table := ImageTable.read(kept)).made_of == made_of:
                return ImageList(table)
    files = search()
    files.table.made_of = made_of
    return files


# --- the index ----------------------------------------------------------------------------------------------------


def files_at(place: Path) -> list[Path]:
    """What a path names: one file, or all that fit a pattern, sorted."""
    return [place] if place.is_file() else [Path(path) for path in sorted(glob.glob(str(place), recursive=True))]


def archives_at(place: Path) -> list[Path]:
    """The archives that a path names: one, or all that fit a pattern such as shards/*.tar, sorted.

    Raises:
        UserError: If there is none, or one of another kind.
    """
    found = files_at(place)
    for path in found:
        name = path.name.lower()
        for suffixes, command in UNPACK.items():
            if name.endswith(suffixes):
                text = "is compressed as a whole, so no image in it can be read without all before it"
                raise UserError(f"--data: {path} {text}: run '{command} {path.name}' and name the .tar file")
        if path.suffix.lower() in ENTIRE:
            raise UserError(f"--data: {path} is of a kind that is not read: unpack it, or pack it as .zip or .tar")
        if path.suffix.lower() not in ARCHIVES or not path.is_file():
            kind = "is a file" if path.is_file() else "is no archive"
            raise UserError(f"--data: {path} {kind}; name the folder that holds the images, or a .zip or .tar file")
    if not found:
        pattern = glob.has_magic(str(place))
        raise UserError(f"--data: no file fits {place}" if pattern else f"--data: {place} does not exist")
    return found


@cache
def open_archive(place: Path, run: Path | None = None) -> Archive:
    """The index of an archive, or of all that fit a pattern, as it was when its names were listed last."""
    return _indexed(place, state_of(place), run)


def state_of(place: Path) -> tuple[Part, ...]:
    """The archives that a path names, as they are now."""
    return tuple(map(file_state, archives_at(place)))


def file_state(path: Path) -> Part:
    """A file's path, size and time of change."""
    found = os.stat(path)
    return str(path), found.st_size, found.st_mtime_ns


@lru_cache(maxsize=16)
def _indexed(place: Path, parts: tuple[Part, ...], run: Path | None) -> Archive:
    """The index, from the run or from what is kept for all runs, or made anew; where it was missing, it is kept."""
    name = f"archive-{place.stem[:40]}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.safetensors"
    homes = [*filter(None, [run]), Path(os.path.expanduser("~"), ".cache", "lightdiff", "archives")]
    missing, known = list[Path](), None
    for path in (home / name for home in homes):
        with suppress(LightdiffError):
            if (archive := Archive.read(path)).parts == list(parts):
                known = path
                break
        missing.append(path)
    else:
        archive = _index(parts)
    for path in missing if len(archive) >= KEPT_FROM else ():
        with suppress(LightdiffError, OSError):  # where none can be written to, it is made again each time
            if known:
                atomic_link(path, known)
            else:
                archive.write(path)
                known = path
    if known and known in missing:
        del archive
        archive = Archive.read(known)  # mapped: processes share it
    return archive


def _index(parts: Sequence[Part]) -> Archive:
    """Find out what lies where.

    Raises:
        UserError: If an archive is damaged, encrypted, or compressed in another way than by deflate.
    """
    skipped, captions, labels = set[tuple[str, str]](), set[tuple[int, str]](), dict[tuple[int, str], Labels]()
    tables, numbers = dict[str, tuple[int, int, int, int, int]](), [array(kind) for kind in "iqiii"]

    def images() -> Iterator[str]:
        for number, part in enumerate(parts):
            for member in members(part):
                name, suffix = member.name, posixpath.splitext(member.name)[1].lower()
                if kept_out := _kept_out(name):
                    skipped.add(kept_out)
                elif suffix in SUFFIXES:
                    length, size = (min(bytes_, LARGEST + 1) for bytes_ in (member.length, member.size))
                    crc = (member.crc & 0xFFFFFFFF ^ 1 << 31) - (1 << 31)  # as a number with a sign
                    for column, value in zip(numbers, (number, member.offset, length, size, crc), strict=True):
                        column.append(value)
                    yield name
                elif posixpath.basename(name) in TABLES:
                    tables[name] = (number, *member[1:])
                elif suffix in LABEL_FILES and member.size <= LONGEST_LABEL:
                    labels.setdefault((number, _key(name)), {}).update(_labels(part, member))
                elif suffix == ".txt":
                    captions.add((number, _key(name)))
                elif suffix in UNREAD_SUFFIXES:
                    skipped.add((suffix, f"{number}/{name}"))

    own = names = Names.of(images())
    columns = [np.frombuffer(column, f"i{column.itemsize}") for column in numbers]  # of each image
    order = _order(names)
    if len(parts) > 1 and _repeat(names, columns[0], order):  # shards that count from 0 each
        stems = [Path(path).stem for path, _, _ in parts]
        names = Names.of(_with_stem(name, stems[number]) for name, number in zip(own, columns[0].tolist(), strict=True))
        order = _order(names)
    last = np.fromiter(chain((a != b for a, b in pairwise(names.at(order))), [True]), bool)  # of those of one name:
    order = order[last[: len(order)]]  # the one that is there after unpacking
    keys = [*zip(columns[0][order].tolist(), map(_key, own.at(order)), strict=True)] if labels or captions else []
    skipped |= {("caption .txt", f"{number}/{key}") for number, key in captions.intersection(keys)}
    del own, last  # each of these is memory for each image
    if not np.array_equal(order, np.arange(len(names))):
        names = Names.of(names.at(order))
        columns = [column[order] for column in columns]
    del order
    roots, offsets, lengths, sizes, crcs = columns
    archive = Archive.of_columns(
        names,
        roots,
        np.zeros(len(names), np.uint8),
        (labels.get(key, {}) for key in keys),
        parts=list(parts),
        passed_over=Counter(kind for kind, _ in skipped if kind),
        tables=tables,
        offsets=offsets,
        lengths=lengths,
        crcs=crcs,
    )
    archive.files["size"] = sizes
    archive.files["mtime"] = np.array([changed for _, _, changed in parts])[roots]
    return archive


def _repeat(names: Names, roots: NDArray[Any], order: NDArray[Any]) -> bool:
    """Whether two archives have an image of one name."""
    pairs = pairwise(zip(names.at(order), roots[order].tolist(), strict=True))
    return any(a == b and one != other for (a, one), (b, other) in pairs)


def _order(names: Names) -> NDArray[np.integer]:
    """The positions of names, sorted by these; of the same, as they are."""
    if all(one <= other for one, other in pairwise(names)):
        return np.arange(len(names), dtype=np.int32)
    lengths = np.diff(names.ends, prepend=0)
    width = int(lengths.max())
    if names.text.max() > 127 or width * len(names) > 4 * len(names.text):  # bytes sort as text, and fit
        return np.array(sorted(range(len(names)), key=[*names].__getitem__))
    table = np.zeros((len(names), width), np.uint8)
    for first in range(0, len(names), CHUNK):
        some = slice(first, first + CHUNK)
        text = names.text[names.ends[first] - lengths[first] : names.ends[some][-1]]
        table[some][np.arange(width) < lengths[some, None]] = text
    return np.argsort(table.view(f"S{width}")[:, 0], kind="stable").astype(np.int32)


def _kept_out(name: str) -> tuple[str, str] | None:
    """What a member, or a folder above it, is counted as that is not looked at, and its path; None if it is."""
    *above, base = name.split("/")
    for depth, folder in enumerate(above, 1):
        if kind := left_out(folder):
            return kind, "/".join(above[:depth])
    if base[0] != ".":
        return None
    return "hidden file" if base.lower().endswith(PICTURES) else "", name


def _with_stem(name: str, stem: str) -> str:
    """An image's name that tells which archive it is in; its folder, which may be a class, stays."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, f"{stem}:{base}")


def _key(name: str) -> str:
    """What WebDataset calls the key: the name up to the first dot of its last part."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _labels(part: Part, member: Member) -> Labels:
    """What a file beside an image says of it: a class, or the plain values of a JSON object."""
    try:
        text = read_member(part, member).decode()
        if member.name.endswith(LABEL_FILES[0]):
            return {"class": text.strip()} if text.strip() else {}
        found = json.loads(text)
    except (BadImage, ValueError, RecursionError):
        return {}
    plain = found.items() if isinstance(found, dict) else ()
    return {name: str(value) for name, value in plain if isinstance(value, (str, int)) and str(value)}
