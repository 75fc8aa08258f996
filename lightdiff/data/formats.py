"""Which image formats are read, by which suffixes they are listed, and what other files are called."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import BinaryIO

from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TiffImageFile

from lightdiff.run_folder import open_regular

HAS_AVIF = "avif" in features.modules and bool(features.check("avif"))  # since Pillow 11.3
HAS_HEIC = find_spec("pillow_heif") is not None  # the extra of that name
# Tried by content, whatever the suffix says. No others: some of Pillow's readers start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", *["AVIF"] * HAS_AVIF)
SUFFIXES = tuple(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .tif .tiff .ppm .pgm .pbm .pnm .gif".split()
    + [".avif"] * HAS_AVIF
    + [".heic", ".heif", ".hif"] * HAS_HEIC
)
TiffImagePlugin.READ_LIBTIFF = True  # Pillow's own reader, of uncompressed files, makes noise of planes of 16 bits
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # editors embed megabytes of history, and profiles
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
INSTALL = {"AVIF": "python -m pip install --upgrade pillow", "HEIC": "python -m pip install 'lightdiff[heic]'"}
HEAD = 512  # bytes to look at


def picture_format(head: bytes, beginnings: Mapping[str, bytes] = BEGINNINGS) -> str:
    """The picture format of a file that begins so, read or not; empty for what is no picture."""
    return next((name for name, pattern in beginnings.items() if re.match(pattern, head, re.DOTALL)), "")


def how_to_read(name: str) -> str:
    """What to do about pictures of a format; empty where they are read."""
    if name in INSTALL:
        return "" if {"AVIF": HAS_AVIF, "HEIC": HAS_HEIC}[name] else INSTALL[name]
    return "" if name.upper() in FORMATS else "convert them to JPEG or PNG"


class BadImage(Exception):
    """A file that is no readable image; the message says why, without the file's name."""


@contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """An image file, open but not yet decoded.

    Raises:
        BadImage: It is of a format that is not read.
        UnidentifiedImageError: It is no image, or too damaged.
    """
    with open_regular(path) as stream, open_stream(stream) as image:
        yield image


def open_stream(stream: BinaryIO) -> Image.Image:
    """The image in the bytes of a file; raises what `open_image` does."""
    try:
        image = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:
        stream.seek(0)
        image = Image.open(stream, formats=_others(stream.read(HEAD)))
    # A DNG (50706: DNGVersion), or a thumbnail (254: NewSubfileType) of others (330) in it.
    if isinstance(image, TiffImageFile) and (
        50706 in image.tag_v2 or (image.tag_v2.get(254) == 1 and 330 in image.tag_v2)
    ):
        raise BadImage(f"camera raw, which is not read: {how_to_read('camera raw')}")
    return image


def _others(head: bytes) -> tuple[str, ...]:
    """The formats that Pillow reads with the help of another package, if the file is of one of them."""
    name = picture_format(head)
    if name == "HEIC" and HAS_HEIC:
        import pillow_heif  # takes a while, and most folders hold none

        pillow_heif.register_heif_opener()
        return ("HEIF",)
    if advice := how_to_read(name) if name else "":
        raise BadImage(f"{name}, which is not read: {advice}")
    if impostor := picture_format(head, IMPOSTORS):
        raise BadImage(f"no image, but {impostor}")
    if name:
        raise BadImage(f"{name}, but of a kind that is not read, or too damaged")
    return FORMATS
