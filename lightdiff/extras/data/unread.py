"""Files that are not read, or only with the help of a package: what they are called, and what to do about them."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile

from lightdiff.data import formats
from lightdiff.data.files import SOURCES, SYSTEM_NAMES
from lightdiff.data.formats import SUFFIXES, BadImage
from lightdiff.errors import UserError
from lightdiff.run_folder import open_regular

# Other suffixes of pictures: such files are counted where images are listed, and not read.
UNREAD_SUFFIXES = frozenset(
    (
        ".heic .heif .hif .avif .avci .jxl .jp2 .j2k .j2c .jpc .jpf .jpx .jpm .jxr .wdp .hdp .psd .psb .xcf .kra .ora "
        ".svg .svgz .ai .eps .tga .icb .vda .pcx .dds .exr .hdr .qoi .ico .icns .cur .apng .mng .flif .bpg .sgi .rgb "
        ".ras .xpm .xbm .pfm .dcm .fits .fts .dng .raw .arw .srf .sr2 .cr2 .cr3 .crw .nef .nrw .orf .raf .rw2 .rwl "
        ".pef .ptx .srw .x3f .3fr .fff .erf .dcr .kdc .mef .mos .mrw .iiq"
    ).split()
)
# How a file begins -> the picture format it is of. Raw formats stand before TIFF, which some are variants of.
BEGINNINGS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8[79]a",
    "WebP": rb"RIFF....WEBP",
    "BMP": rb"BM....\0\0\0\0",
    "PPM": rb"P[1-6]\s",
    "AVIF": rb"....ftyp(avi[fs]|mif1.{4}(....)*?avif)",
    "HEIC": rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "PSD": rb"8BPS",
    "camera raw": rb"II\*\0....CR|II[UR][\0OS]|MMOR|FUJIFILMCCD-RAW|....ftypcrx|\0MRM",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "OpenEXR": rb"v/1\x01",
    "SVG": rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*|<!--.*?-->\s*|<!DOCTYPE svg[^>]*>\s*)*<svg",
}
# The same of what is no picture but comes under the name of one.
IMPOSTORS = {
    "a web page": rb"(?i)\s*<(!doctype html|html|head|body)",
    "a Git LFS pointer (git lfs pull fetches the image)": rb"version https://git-lfs",
    "a video": rb"....ftyp(qt|mp4|isom|M4V)",
    "a PDF document": rb"%PDF",
    "a ZIP archive": rb"PK\x03\x04",
    "a macOS metadata file": rb"\0\x05\x16\x07",
}
INSTALL = {"HEIC": "python -m pip install 'lightdiff[heic]'", "AVIF": "python -m pip install --upgrade pillow"}
HEAD = 512  # bytes to look at
PICTURES = (*SUFFIXES, *UNREAD_SUFFIXES)
KINDS = 8  # of what was passed over, that a note names
MISSES = 200  # files of an unknown suffix that are no pictures, after which no more of that suffix are opened
MAX_SLOW_PPM = 4_000_000  # pixels: Pillow reads these at seconds for each million


def picture_format(head: bytes, beginnings: Mapping[str, bytes] = BEGINNINGS) -> str:
    """The picture format of a file that begins so, read or not; empty for what is no picture."""
    return next((name for name, pattern in beginnings.items() if re.match(pattern, head, re.DOTALL)), "")


def how_to_read(name: str) -> str:
    """What to do about pictures of a format; empty where they are read."""
    if name in INSTALL:
        return "" if {"AVIF": formats.HAS_AVIF, "HEIC": formats.HAS_HEIC}[name] else INSTALL[name]
    return "" if name.upper() in formats.FORMATS else "convert them to JPEG or PNG"


# --- in folders ---------------------------------------------------------------------------------------------------


def kinds_of(folder: str, names: Iterable[str], images: Iterable[str], misses: Counter[str]) -> Iterator[str]:
    """What those of a folder's files are counted as that are none of its `images`, but captions of them, or look so.

    Files whose suffix says nothing are opened, until as many of one suffix as `MISSES` were no pictures; `misses`
    counts them.
    """
    captions = {f"{os.path.splitext(name)[0]}.txt" for name in images}
    for name in sorted({*names}.difference(images)):
        suffix = os.path.splitext(name)[1].lower()
        if name in captions:
            yield "caption .txt"
        elif name[0] == ".":
            if name.lower().endswith(PICTURES):
                yield "hidden file"
        elif name.lower() in SYSTEM_NAMES or suffix in UNREAD_SUFFIXES:
            yield suffix if suffix in UNREAD_SUFFIXES else name
        elif misses[suffix] < MISSES:
            with suppress(OSError), open_regular(os.path.join(folder, name)) as file:
                if found := picture_format(file.read(HEAD)):
                    yield f"{found} named {suffix}" if suffix else f"{found} without a suffix"
                    continue
            misses[suffix] += 1


def passed_over_note(passed_over: Mapping[str, int]) -> str:
    """What was passed over, pictures before folders, most of it first, and how to have it read."""
    kinds = sorted(passed_over.items(), key=lambda pair: ("folder" in pair[0], -pair[1], pair[0]))[:KINDS]
    more = f" and {len(passed_over) - KINDS} other kinds" if len(passed_over) > KINDS else ""
    names = [name for name in INSTALL if any(name[:3] in kind.upper() for kind in passed_over)]
    hint = "".join(f"; to read {name}: {how}" for name in names if (how := how_to_read(name)))
    return f"passed over: {', '.join(f'{kind} ({count:,})' for kind, count in kinds)}{more}{hint}"


def no_image(folder: Path, passed_over: Mapping[str, int]) -> UserError:
    """That a source holds no image, with what it holds instead."""
    there = f"; {passed_over_note(passed_over)}" if passed_over else ""
    held = [suffix for suffix in SOURCES if any(folder.glob(f"*{suffix}"))]
    there += f"; for the archives in it: --data '{folder}/*{held[0]}'" if held else ""
    return UserError(f"--data: {folder} holds no image (no file ends in {', '.join(sorted(SUFFIXES))}){there}")


# --- single files -------------------------------------------------------------------------------------------------


def open_other(stream: BinaryIO) -> Image.Image:
    """A file that is of no format which Pillow reads by itself, but perhaps of one that it reads with a package.

    Raises:
        BadImage: It is not; with what it is.
        UnidentifiedImageError: It is nothing known.
    """
    stream.seek(0)
    head = stream.read(HEAD)
    name = picture_format(head)
    if name == "HEIC" and formats.HAS_HEIC:
        import pillow_heif  # takes a while, and most folders hold none

        pillow_heif.register_heif_opener()
        return Image.open(stream, formats=("HEIF",))
    if advice := how_to_read(name) if name else "":
        raise BadImage(f"{name}, which is not read: {advice}")
    if impostor := picture_format(head, IMPOSTORS):
        raise BadImage(f"no image, but {impostor}")
    if name:
        raise BadImage(f"{name}, but of a kind that is not read, or too damaged")
    return Image.open(stream, formats=formats.FORMATS)  # which says so


def check_kind(image: Image.Image) -> None:
    """Check that a TIFF or PPM file is of a kind that is read.

    Raises:
        BadImage: It is camera raw, or would take minutes.
    """
    # A DNG (50706: DNGVersion), or a thumbnail (254: NewSubfileType) of others (330) in it.
    if isinstance(image, TiffImageFile) and (
        50706 in image.tag_v2 or (image.tag_v2.get(254) == 1 and 330 in image.tag_v2)
    ):
        raise BadImage(f"camera raw, which is not read: {how_to_read('camera raw')}")
    if isinstance(image, PpmImageFile) and image.tile[0][0] != "raw" and image.width * image.height > MAX_SLOW_PPM:
        raise BadImage("a PPM of values that are no bytes, too large to read in a reasonable time; save it as PNG")


def reason(error: Exception, path: str, max_megapixels: float) -> str:
    """Why an image cannot be read, on one line and without the folder, so that a report may be shown to others."""
    if isinstance(error, UnidentifiedImageError):
        empty = os.path.isfile(path) and not os.path.getsize(path)
        return "the file is empty" if empty else "no image, or too damaged to be recognised"
    if isinstance(error, Image.DecompressionBombError):
        return f"far more pixels than --max-megapixels {max_megapixels:g} million"
    if "MAX_TEXT" in str(error):
        return "more text or too large a colour profile in it than is read; save it without"
    text = getattr(error, "strerror", None) or " ".join(str(error).replace(path, os.path.basename(path)).split())
    return text or type(error).__name__
