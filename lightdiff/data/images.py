"""Image files -> square uint8 tensors.

Training, encoding and validation share one framing: the shorter side is resized, the centre is cut out. Training alone
then varies it a little, by a number that depends on (seed, epoch, index) and on nothing else.
"""

import math
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor

from lightdiff.data.files import FOLDER, Source
from lightdiff.errors import LightdiffError, UserError

Colour = tuple[int, int, int]

# Odd metadata and the like. For all threads and for good, as filters that come and go are no matter of one thread.
warnings.filterwarnings("ignore", module=r"PIL\.")


# --- one file -----------------------------------------------------------------------------------------------------


class BadImage(Exception):
    """A file that is no readable image; the message says why, without the file's name."""


def colour(background: str) -> Colour:
    """Red, green and blue of a colour's name or #rrggbb."""
    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise UserError(f"--background: {background!r} is no colour; try white, grey or #ff8800") from error


@contextmanager
def opened(name: str | Path, folder: Path = Path(), source: Source = FOLDER) -> Iterator[Image.Image]:
    """The open, not yet decoded image; whatever is wrong with the file, then or inside the block, is a `BadImage`."""
    try:
        with source.open(folder, str(name)) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError
            yield image
    except (BadImage, LightdiffError, MemoryError):
        raise
    # Damaged bytes make Pillow's readers raise almost anything: SyntaxError, KeyError, struct.error, ...
    except Exception as error:
        raise BadImage(_reason(error, os.path.join(folder, name))) from error


def load_image(
    name: str | Path, background: str = "white", at_least: int = 0, folder: Path = Path(), source: Source = FOLDER
) -> Image.Image:
    """The image as upright RGB: first frame, transparent pixels on the background.

    Raises:
        BadImage: It is missing, damaged or no image.

    Args:
        name: The file, or the image's name in another source.
        background: A colour's name or #rrggbb.
        at_least: A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is much faster, as long as its shorter
            side keeps this many pixels; 0: full size.
        folder: What the name is relative to.
        source: How it is opened.
    """
    with opened(name, folder, source) as image:
        if at_least:
            image.draft(None, (at_least, at_least))
        return to_rgb(image, colour(background))


def to_rgb(image: Image.Image, background: Colour) -> Image.Image:
    """The decoded image, upright, in RGB, transparent pixels on the background."""
    image.load()  # before the EXIF data, which may follow the pixels
    with suppress(Exception):  # damaged EXIF data is no reason to give up the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


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
    if isinstance(transparent := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray((values != transparent).astype(np.uint8) * 255))
    return grey


def _reason(error: Exception, path: str) -> str:
    """What is wrong, on one line and without the folder, so that a report may be shown to others."""
    if isinstance(error, UnidentifiedImageError):
        empty = os.path.isfile(path) and not os.path.getsize(path)
        return "the file is empty" if empty else "no image, or too damaged to be recognised"
    if isinstance(error, Image.DecompressionBombError):
        return f"more pixels than Pillow's limit of {Image.MAX_IMAGE_PIXELS} (MAX_IMAGE_PIXELS)"
    text = getattr(error, "strerror", None) or " ".join(str(error).replace(path, os.path.basename(path)).split())
    return text or type(error).__name__


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
    left, top = ((length - whole) // 2 + rng.randint(0, whole - side) for length in image.size)
    x = _square(image, left, top, side, resolution)
    return x.flip(2) if flip and rng.random() < 0.5 else x


def _square(image: Image.Image, left: int, top: int, side: int, resolution: int) -> UInt8[Tensor, "3 r r"]:
    """Cut out a square and resize it as Pillow does, bicubic with antialiasing; torch does that four times as fast."""
    square = torch.from_numpy(np.array(image.crop((left, top, left + side, top + side))))  # (side, side, 3)
    x = F.interpolate(square.permute(2, 0, 1)[None], (resolution, resolution), mode="bicubic", antialias=True)
    return x[0].contiguous()


def to_float(x: UInt8[Tensor, "..."]) -> Float32[Tensor, "..."]:
    """Bytes 0 to 255 as numbers in [-1, 1]."""
    return x.float().div_(127.5).sub_(1)


def to_uint8(x: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """Numbers in [-1, 1] as the nearest bytes; what lies outside is clamped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
