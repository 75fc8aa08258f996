"""Image files -> square uint8 tensors.

Training, encoding and validation share one framing: the shorter side is resized, the centre is cut out. Training alone
then varies it a little, by a number that depends on (seed, epoch, index) and on nothing else.
"""

import math
import os
import random
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from PIL import ExifTags, Image, ImageColor, UnidentifiedImageError
from torch import Tensor

from lightdiff.errors import LightdiffError, UserError

# Tried by content, whatever the suffix says. No others: some of Pillow's readers start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Colour = tuple[int, int, int]


# --- one file -----------------------------------------------------------------------------------------------------


class BadImage(Exception):
    """A file that is no readable image; the message says why, without the file's name."""


def colour(background: str) -> Colour:
    """Red, green and blue of a colour's name or #rrggbb."""
    try:
        red, green, blue = ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise UserError(f"--background: {background!r} is no colour; try white, grey or #ff8800") from error
    return red, green, blue


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """The open, not yet decoded image; whatever is wrong with the file, then or inside the block, is a `BadImage`."""
    try:
        if not os.path.getsize(path):
            raise BadImage("the file is empty")
        with _quiet, open(path, "rb") as stream, Image.open(stream, formats=FORMATS) as image:
            yield image
    except (BadImage, LightdiffError, MemoryError):
        raise
    # Damaged bytes make Pillow's readers raise almost anything: SyntaxError, KeyError, struct.error, ...
    except Exception as error:
        raise BadImage(_reason(error, path)) from error


def load_image(path: str | Path, background: str = "white", at_least: int = 0) -> Image.Image:
    """The file as an upright RGB image: first frame, transparent pixels on the background.

    Raises:
        BadImage: The file is missing, damaged or no image.

    Args:
        path: The file.
        background: A colour's name or #rrggbb.
        at_least: A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is much faster, as long as its shorter
            side keeps this many pixels; 0: full size.
    """
    behind = colour(background)
    with opened(path) as image:
        if at_least:
            image.draft(None, (at_least, at_least))
        return to_rgb(image, behind)


def to_rgb(image: Image.Image, behind: Colour) -> Image.Image:
    """The decoded image, upright, in RGB, transparent pixels on the colour."""
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, behind)
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # before the EXIF data, which may follow the pixels
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data is no reason to give up the pixels
        return image
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits a pixel, as L or, with a transparent value, as LA.

    Integers run from 0 to 65535. Floats have no agreed range: 1, 255 or 65535, whichever holds the largest value.
    """
    values = np.asarray(image).astype(np.float32)
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= 65535:  # false for NaN, too
        raise BadImage(f"pixel values from {low:g} to {high:g}; 0 to 65535 can be read")
    white = next(w for w in (1, 255, 65535) if high <= w) if image.mode == "F" else 65535
    grey = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _reason(error: Exception, path: str | Path) -> str:
    """What is wrong, on one line and without the folder, so that a report may be shown to others."""
    if isinstance(error, UnidentifiedImageError):
        return "no image, or too damaged to be recognised"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more pixels than Pillow's limit of {Image.MAX_IMAGE_PIXELS} (MAX_IMAGE_PIXELS)"
    text = " ".join(str(error).replace(str(path), os.path.basename(path)).split())
    return text or type(error).__name__


class _Quiet:
    """Turns Pillow's warnings off while any thread reads an image, and makes its warning of too many pixels an error.

    `warnings.catch_warnings` alone restores the wrong filters when threads leave in another order than they entered.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._saved = threading.Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._saved.__exit__(None, None, None)


_quiet = _Quiet()


# --- framing ------------------------------------------------------------------------------------------------------


def frame(image: Image.Image, resolution: int) -> UInt8[Tensor, "3 r r"]:
    """The centre square of an RGB image: shorter side resized to `resolution`, the rest cut off."""
    side = min(image.size)
    return _square(image, (image.width - side) // 2, (image.height - side) // 2, side, resolution)


def random_frame(
    image: Image.Image, resolution: int, smallest: float, flip: bool, rng: random.Random
) -> UInt8[Tensor, "3 r r"]:
    """A random square within the centre square, its side at least `smallest` of it; mirrored half of the time.

    Cut from the original and resized once: nothing is enlarged that was reduced before.
    """
    whole = min(image.size)
    side = rng.randint(math.ceil(whole * smallest), whole)
    left = (image.width - whole) // 2 + rng.randint(0, whole - side)
    top = (image.height - whole) // 2 + rng.randint(0, whole - side)
    x = _square(image, left, top, side, resolution)
    return x.flip(2) if flip and rng.random() < 0.5 else x


def _square(image: Image.Image, left: int, top: int, side: int, resolution: int) -> UInt8[Tensor, "3 r r"]:
    """Cut out a square and resize it as Pillow does, bicubic with antialiasing; torch does that four times as fast."""
    square = np.array(image.crop((left, top, left + side, top + side)))
    x = torch.from_numpy(square).permute(2, 0, 1)[None]
    return F.interpolate(x, (resolution, resolution), mode="bicubic", antialias=True)[0].contiguous()


def to_float(x: UInt8[Tensor, "..."]) -> Float32[Tensor, "..."]:
    """Bytes 0 to 255 as numbers in [-1, 1]."""
    return x.float().div_(127.5).sub_(1)


def to_uint8(x: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """Numbers in [-1, 1] as the nearest bytes; what lies outside is clamped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
