"""Archives of images: zip files and tar files (WebDataset's shards), read in place by random access.

Where each image lies in them is found out once and, for large archives, kept below ~/.cache/lightdiff/archives, as long
as size and time of change of all of them stay the same. An image is then one `seek` and one `read`.
"""

import glob
import hashlib
import json
import os
import posixpath
import struct
import tarfile
import zipfile
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Int64
from numpy import ndarray as Array
from PIL import Image

from lightdiff import __version__
from lightdiff.data.files import Source, left_out, read_in_folder, source_of
from lightdiff.data.formats import SUFFIXES, BadImage, open_stream
from lightdiff.data.layouts import TABLES, Labels
from lightdiff.data.table import COLUMN, NO_FILE, Fingerprint, ImageFile, ImageList, ImageTable, content_hash
from lightdiff.errors import LightdiffError, UserError
from lightdiff.extras.data.unread import PICTURES, UNREAD_SUFFIXES
from lightdiff.run_folder import open_regular
from lightdiff.settings import ImageSettings

ARCHIVES = (".zip", ".tar")
LABEL_FILES = (".cls", ".json")  # of WebDataset, beside an image of the same key
LARGEST = 1 << 30  # bytes of one member, unpacked
LONGEST_LABEL = 1 << 16  # bytes of a file of labels
KEPT_FROM = 10_000  # images of an archive whose index is kept; smaller ones are read again in less than a second
UNPACK = {
    (".tar.gz", ".tgz"): "gunzip",
    (".tar.bz2", ".tbz2", ".tbz"): "bunzip2",
    (".tar.xz", ".txz"): "unxz",
    (".tar.zst", ".tzst"): "unzstd",
}
ENTIRE = (".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")
METHODS = {9: "deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ", 98: "PPMd"}  # of a zip's members
LOCAL = struct.Struct("<4s4xH16xHH")  # of a zip member's own header: signature, method, lengths of name and extra field
Part = tuple[str, int, int]  # an archive: path, size and time of change


class Member(NamedTuple):
    """A file in an archive: where its bytes (in a zip, its header) begin, how many they are there, and unpacked."""

    name: str
    offset: int
    length: int
    size: int
    crc: int = -1  # CRC-32; a tar has none


class Archive(ImageTable):
    """The images of some archives, sorted by name; `roots` counts the archives, fingerprints have no hash."""

    STAGE: ClassVar = "archive"

    parts: list[Part]
    passed_over: dict[str, int]
    tables: dict[str, tuple[int, ...]]  # of labels, by name: the archive's number, then those of a member
    offsets: Int64[Array, " n"] = COLUMN
    lengths: Int64[Array, " n"] = COLUMN
    crcs: Int64[Array, " n"] = COLUMN

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
        numbers = (self.offsets[at], self.lengths[at], self.files["size"][at], self.crcs[at])
        return read_member(self.parts[self.roots[at]], Member(name, *map(int, numbers)))


# --- what a source needs ------------------------------------------------------------------------------------------


def names_in_archive(place: Path, passed_over: Counter[str]) -> Iterator[str]:
    """The names of all images, sorted; what looks like one and is not read is counted by kind."""
    open_archive.cache_clear()  # they may have been changed since
    archive = open_archive(place)
    passed_over.update(archive.passed_over)
    return iter(archive.names)


def open_in_archive(place: Path, name: str) -> Image.Image:
    """An image, open but not yet decoded."""
    return open_stream(BytesIO(open_archive(place).read_image(name)))


def look_in_archive(place: Path, name: str, contents: bool = False) -> Fingerprint:
    """What the file of an image is like; its time of change is that of its archive."""
    try:
        archive = open_archive(place)
        size, changed, _ = archive.files[archive.find(name)].tolist()
        return size, changed, content_hash(archive.read_image(name) if contents else None)
    except (OSError, BadImage, LightdiffError):
        return NO_FILE


def read_beside_images(place: Path, path: Path) -> bytes:
    """A table of labels, in the archive (named as if that were a folder) or beside it.

    Raises:
        OSError: There is none.
    """
    if place not in path.parents:
        return read_in_folder(place, path)
    name, archive = path.relative_to(place).as_posix(), open_archive(place)
    if name not in archive.tables:
        raise FileNotFoundError(f"{path} does not exist")
    part, *numbers = archive.tables[name]
    return read_member(archive.parts[part], Member(name, *numbers))


def labels_in_archive(place: Path) -> Iterable[Labels] | None:
    """The labels of images, if some have files of labels beside them: NAME.cls, NAME.json."""
    archive = open_archive(place)
    return map(archive.labels_of, range(len(archive))) if archive.labels else None


SOURCE = Source(names_in_archive, open_in_archive, look_in_archive, read_beside_images, labels_in_archive)


def kept_list(images: ImageSettings, kept: Path | None, search: Callable[[], ImageList]) -> ImageList:
    """The images that `search` finds or, of archives of which none has changed, the list in a file."""
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
def open_archive(place: Path) -> Archive:
    """The index of an archive, or of all that fit a pattern, as it was when its names were listed last."""
    return _indexed(place, state_of(place))


def state_of(place: Path) -> tuple[Part, ...]:
    """The archives that a path names, as they are now."""
    return tuple(map(file_state, archives_at(place)))


def file_state(path: Path) -> Part:
    """A file's path, size and time of change."""
    found = os.stat(path)
    return str(path), found.st_size, found.st_mtime_ns


@lru_cache(maxsize=16)
def _indexed(place: Path, parts: tuple[Part, ...]) -> Archive:
    """The index, from where it is kept, or made anew."""
    kept = _kept(place)
    with suppress(LightdiffError):
        archive = Archive.read(kept)
        if archive.parts == list(parts):
            return archive
    archive = _index(parts)
    if len(archive) >= KEPT_FROM:
        with suppress(LightdiffError, OSError):  # where there is no home to write to, it is made again each time
            archive.write(kept)
    return archive


def _kept(place: Path) -> Path:
    name = hashlib.sha256(os.fsencode(place)).hexdigest()[:16]
    return Path(os.path.expanduser("~"), ".cache", "lightdiff", "archives", f"{place.stem[:40]}-{name}.safetensors")


def _index(parts: Sequence[Part]) -> Archive:
    """Find out what lies where.

    Raises:
        UserError: If an archive is damaged, encrypted, or compressed in another way than by deflate.
    """
    skipped, tables, captions = set[tuple[str, str]](), dict[str, tuple[int, ...]](), set[tuple[int, str]]()
    found: list[tuple[int, Member, Labels]] = []
    for number, part in enumerate(parts):
        images, labels = dict[str, Member](), dict[str, Labels]()
        for member in _members(part):
            name, suffix = member.name, posixpath.splitext(member.name)[1].lower()
            if kept_out := _kept_out(name):
                skipped.add(kept_out)
            elif suffix in SUFFIXES:
                images[name] = member  # of two of one name, the later one, as when unpacked
            elif posixpath.basename(name) in TABLES:
                tables[name] = (number, *member[1:])
            elif suffix in LABEL_FILES and member.size <= LONGEST_LABEL:
                labels.setdefault(_key(name), {}).update(_labels(part, member))
            elif suffix == ".txt":
                captions.add((number, _key(name)))
            elif suffix in UNREAD_SUFFIXES:
                skipped.add((suffix, f"{number}/{name}"))
        found += [(number, member, labels.get(_key(name), {})) for name, member in images.items()]
        skipped |= {("caption .txt", f"{n}/{key}") for n, key in captions & {(number, _key(name)) for name in images}}
    if len({member.name for _, member, _ in found}) < len(found):  # shards that count from 0 each
        found = [(n, m._replace(name=_with_stem(m.name, Path(parts[n][0]).stem)), of) for n, m, of in found]
    found.sort(key=lambda row: row[1].name)
    columns = np.array([member[1:] for _, member, _ in found], np.int64).reshape(-1, 4).T.copy()
    archive = Archive.of(
        [ImageFile(number, member.name, "train", of) for number, member, of in found],
        parts=list(parts),
        passed_over=Counter(kind for kind, _ in skipped if kind),
        tables=tables,
        **dict(zip(("offsets", "lengths", "crcs"), columns[[0, 1, 3]], strict=True)),
    )
    archive.files["size"] = columns[2]
    archive.files["mtime"] = np.array([changed for _, _, changed in parts])[archive.roots]
    return archive


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


# --- members ------------------------------------------------------------------------------------------------------


def _members(part: Part) -> Iterator[Member]:
    """The regular files of an archive, by names that count from its top.

    Raises:
        UserError: If it cannot be read.
    """
    path = part[0]
    try:
        with open_regular(path) as file:
            for member in (_in_zip if _is_zip(path) else _in_tar)(file):
                name = posixpath.normpath(member.name).lstrip("/")
                if ".." not in name.split("/"):
                    yield member._replace(name=name)
    except UserError as error:
        raise UserError(f"--data: {path} {error}") from None
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        EOFError,
        OSError,
        ValueError,
        NotImplementedError,
        struct.error,
    ) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--data: {path} is damaged, or no archive of that kind: {reason}") from error


def _is_zip(path: str) -> bool:
    return path.lower().endswith(".zip")


def _in_zip(file: BufferedReader) -> Iterator[Member]:
    with zipfile.ZipFile(file) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
    end = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        # Of a bomb, thousands of members are the same bytes
        if member.header_offset < end:
            raise UserError(f"is damaged or made to do harm: {member.filename} lies within the file before it")
        end = member.header_offset + LOCAL.size + member.compress_size
    for member in members:
        if member.flag_bits & 1:
            raise UserError(f"is encrypted ({member.filename}): unpack it and name the folder")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            how = METHODS.get(member.compress_type, f"method {member.compress_type}")
            raise UserError(
                f"is compressed by {how} ({member.filename}): unpack it, or pack it again without compression"
            )
        yield Member(member.filename, member.header_offset, member.compress_size, member.file_size, member.CRC)


def _in_tar(file: BufferedReader) -> Iterator[Member]:
    with tarfile.open(fileobj=file, mode="r:", errorlevel=0) as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # which would keep all of them
            if member.isfile() and not member.issparse():
                yield Member(member.name, member.offset_data, member.size, member.size)
        file.seek(archive.offset)  # where it has found no further header
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise UserError(f"is damaged: at byte {archive.offset:,} there is neither a file nor its end")


def read_member(part: Part, member: Member) -> bytes:
    """The bytes of a file in an archive, unpacked.

    Raises:
        BadImage: If they are damaged or too many, or the archive has changed.
    """
    path, size, changed = part
    if max(member.size, member.length) > LARGEST:
        raise BadImage(f"more than {LARGEST:,} bytes in an archive: unpack it")
    with open_regular(path) as file:
        found = os.fstat(file.fileno())
        if (found.st_size, found.st_mtime_ns) != (size, changed):
            raise BadImage("its archive has been changed since its list was made")
        file.seek(member.offset)
        if not _is_zip(path):
            return file.read(member.length)
        signature, method, name, extra = LOCAL.unpack(file.read(LOCAL.size).ljust(LOCAL.size))
        file.seek(name + extra, os.SEEK_CUR)
        data = file.read(member.length)
    if method == zipfile.ZIP_DEFLATED:
        with suppress(zlib.error):
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
    if signature != b"PK\3\4" or len(data) != member.size or zlib.crc32(data) != member.crc:
        raise BadImage("damaged: its bytes are not those that the archive's directory tells of")
    return data
