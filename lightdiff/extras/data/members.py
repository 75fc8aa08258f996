"""What lies where in a zip or tar file, and the bytes of a file in it: one `seek` and one `read`."""

import os
import posixpath
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from contextlib import suppress
from io import BufferedReader
from typing import NamedTuple

import numpy as np

from lightdiff.data.formats import BadImage
from lightdiff.errors import UserError
from lightdiff.run_folder import open_regular

LARGEST = 1 << 30  # bytes of one member, unpacked
METHODS = {9: "deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ", 98: "PPMd"}  # of a zip's members
# What is read of a zip file (APPNOTE 6.3.10, section 4.3), after signatures. Of a member's header: method, lengths of
# name and extra field.
LOCAL = struct.Struct("<4s4xH16xHH")
# Of its entry in the directory: flags, method, CRC-32, lengths packed and unpacked, of name, extra field and comment,
# and where its header is.
ENTRY = struct.Struct("<4s4xHH4xLLLHHH8xL")
# Of the end, and that of large files: number of this disk, length of the directory, and where it is.
END = struct.Struct("<4sH6xLL2x")
END64 = struct.Struct("<4s12xL20xQQ")
LOCATOR_SIZE = 20  # bytes between END64 and END
LARGE = 0xFFFFFFFF  # stands for a number that needs 64 bits, and is in the extra field
Part = tuple[str, int, int]  # an archive: path, size and time of change


class Member(NamedTuple):
    """A file in an archive: where its bytes (in a zip, its header) begin, how many they are there, and unpacked."""

    name: str
    offset: int
    length: int
    size: int
    crc: int = -1  # CRC-32; a tar has none


def members(part: Part) -> Iterator[Member]:
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
    except (tarfile.TarError, EOFError, OSError, ValueError, struct.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--data: {path} is damaged, or no archive of that kind: {reason}") from error


def _is_zip(path: str) -> bool:
    return path.lower().endswith(".zip")


def _in_zip(file: BufferedReader) -> Iterator[Member]:
    """Its directory is read an entry at a time: `zipfile` makes an object of 700 bytes of each, and keeps them all."""
    size = file.seek(0, os.SEEK_END)
    first = file.seek(max(0, size - END64.size - LOCATOR_SIZE - END.size - 0xFFFF))  # with the longest comment
    tail = file.read()
    if (at := tail.rfind(b"PK\5\6", 0, len(tail) - END.size + 4)) < 0:
        raise ValueError("the directory at its end is missing")
    _, disk, left, offset = END.unpack_from(tail, at)
    if (at64 := at - LOCATOR_SIZE - END64.size) >= 0 and tail[at64 : at64 + 4] == b"PK\6\6":
        at, (_, disk, left, offset) = at64, END64.unpack_from(tail, at64)
    if disk:
        raise UserError("is the last part of several: join them, as 'zip -s 0' does")
    start = file.seek(max(0, first + at - left))
    before, spans = start - offset, array("q")  # before: bytes of a program, where an archive unpacks itself
    while left > 0:
        entry = ENTRY.unpack(file.read(ENTRY.size).ljust(ENTRY.size))
        signature, flags, method, crc, packed, unpacked, name_size, extra_size, comment_size, offset = entry
        name = file.read(name_size).decode("utf-8" if flags & 0x800 else "cp437").partition("\0")[0]
        extra = file.read(extra_size + comment_size)[:extra_size]
        left -= ENTRY.size + name_size + extra_size + comment_size
        if LARGE in (packed, unpacked, offset):
            unpacked, packed, offset = _of_64_bits(extra, unpacked, packed, offset)
        offset += before
        if signature != b"PK\1\2" or not 0 <= offset <= offset + packed <= start - LOCAL.size:
            raise ValueError("its directory does not fit")
        if name.endswith("/"):
            continue
        if flags & 1:
            raise UserError(f"is encrypted ({name}): unpack it and name the folder")
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            how = METHODS.get(method, f"method {method}")
            raise UserError(f"is compressed by {how} ({name}): unpack it, or pack it again without compression")
        spans.extend((offset, offset + LOCAL.size + packed))
        yield Member(name, offset, packed, unpacked, crc)
    begins, ends = np.frombuffer(spans, np.int64).reshape(-1, 2).T
    if (begins[1:] < ends[:-1]).any():  # not in the order in which they were written, or of a bomb
        begins, ends = np.sort(begins), np.sort(ends)
    if (begins[1:] < ends[:-1]).any():  # of a bomb, thousands of members are the same bytes
        raise UserError("is damaged or made to do harm: files in it lie within one another")


def _of_64_bits(extra: bytes, *numbers: int) -> list[int]:
    """The numbers of an entry, those of 64 bits from its extra field, where they stand in this order."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            large = iter(struct.unpack_from(f"<{length // 8}q", extra, 4))
            return [next(large, n) if n == LARGE else n for n in numbers]
        extra = extra[4 + length :]
    return [*numbers]


def _in_tar(file: BufferedReader) -> Iterator[Member]:
    size = os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=file, mode="r:", errorlevel=0) as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # which would keep all of them
            if member.isfile() and not member.issparse():
                if not 0 <= member.size <= size - member.offset_data:
                    raise ValueError(f"it ends within {member.name}")
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
    if not 0 <= min(member.size, member.length) <= max(member.size, member.length) <= LARGEST:
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
