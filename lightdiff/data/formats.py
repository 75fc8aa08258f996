"""Which image formats are read, by which suffixes they are listed, and how a file of them is opened."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import BinaryIO

from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError, features

from lightdiff.on_demand import on_demand
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
        image = on_demand("data.unread:open_other")(stream)
    if image.format in ("TIFF", "PPM"):
        on_demand("data.unread:check_kind")(image)
    return image
