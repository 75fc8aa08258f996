"""Image files -> uint8 tensors of one size.

Training, encoding and validation share one framing: the largest centred part of the right shape is cut out and
resized. Training alone then varies it a little, by a number that depends on (seed, epoch, index) and on nothing else.
"""

import math
import os
import random
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PpmImagePlugin import PpmImageFile
from torch import Tensor

from lightdiff.data.colours import to_rgb
from lightdiff.data.files import FOLDER, Source
from lightdiff.data.formats import BadImage as BadImage
from lightdiff.errors import LightdiffError
from lightdiff.settings import ImageSettings, Size

DEFAULTS = ImageSettings()
LONGEST = 2**28  # bytes of a JPEG that are searched for scans; a file with holes may claim to have terabytes
MAX_SCANS = 100  # of a JPEG: half a millisecond each for every million pixels
MAX_SLOW_PPM = 4  # megapixels: Pillow reads these at seconds for each
SCAN = re.compile(rb"\xff\xda\0[\x08\x0a\x0c\x0e][\x01-\x04]")  # marker, length, number of components

# Odd metadata and the like. For all threads and for good, as filters that come and go are no matter of one thread.
warnings.filterwarnings("ignore", module=r"PIL\.")


# --- one file -----------------------------------------------------------------------------------------------------


@contextmanager
def opened(
    name: str | Path, settings: ImageSettings = DEFAULTS, folder: Path = Path(), source: Source = FOLDER
) -> Iterator[Image.Image]:
    """The open, not yet decoded image; whatever is wrong with the file, then or inside the block, is a `BadImage`."""
    max_megapixels = settings.max_megapixels
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit, for all threads and for good; it is never lowered
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, int(max_megapixels * 1e6))
    try:
        with source.open(folder, str(name)) as image:
            if (megapixels := image.width * image.height / 1e6) > max_megapixels:
                size = f"{image.width} x {image.height} pixels, {megapixels:.3g} million"
                raise BadImage(f"{size}, are more than --max-megapixels {max_megapixels:g}")
            if isinstance(image, JpegImageFile) and (scans := _count_scans(image)) > MAX_SCANS:
                raise BadImage(f"a JPEG of {scans} scans, made to take long; at most {MAX_SCANS} are read")
            if isinstance(image, PpmImageFile) and image.tile[0][0] != "raw" and megapixels > MAX_SLOW_PPM:
                raise BadImage(
                    "a PPM of values that are no bytes, too large to read in a reasonable time; save it as PNG"
                )
            yield image
    except (BadImage, LightdiffError, MemoryError):
        raise
    # Damaged bytes make Pillow's readers raise almost anything: SyntaxError, KeyError, struct.error, ...
    except Exception as error:
        raise BadImage(_reason(error, os.path.join(folder, name), max_megapixels)) from error


def _count_scans(image: JpegImageFile) -> int:
    """How often decoding a JPEG goes over all its pixels; an ordinary progressive one has ten scans."""
    stream = image.fp
    assert stream is not None  # the image is open
    stream.seek(max(0, stream.tell() - 8 - 2 * image.layers))  # Pillow has read the first scan's header
    head = stream.read(5)
    if SCAN.match(head) and head[4] == image.layers and not image.info.get("progressive"):
        return 1  # of all components at once
    stream.seek(0)
    return len(SCAN.findall(stream.read(LONGEST)))


def load_image(
    name: str | Path,
    settings: ImageSettings = DEFAULTS,
    at_least: int = 0,
    folder: Path = Path(),
    source: Source = FOLDER,
) -> Image.Image:
    """The image as upright sRGB: first frame, transparent pixels on the background.

    Raises:
        BadImage: It is missing, damaged, too large or no image.

    Args:
        name: The file, or the image's name in another source.
        settings: The colour behind transparent pixels, the value of white, the largest image to read.
        at_least: A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is much faster, and a very large image be
            cut to its centre square and reduced, as long as its shorter side keeps this many pixels; 0: full size.
        folder: What the name is relative to.
        source: How it is opened.
    """
    with opened(name, settings, folder, source) as image:
        if at_least:
            image.draft(None, (at_least, at_least))
        return to_rgb(image, settings, at_least)


def _reason(error: Exception, path: str, max_megapixels: float) -> str:
    """What is wrong, on one line and without the folder, so that a report may be shown to others."""
    if isinstance(error, UnidentifiedImageError):
        empty = os.path.isfile(path) and not os.path.getsize(path)
        return "the file is empty" if empty else "no image, or too damaged to be recognised"
    if isinstance(error, Image.DecompressionBombError):
        return f"far more pixels than --max-megapixels {max_megapixels:g} million"
    if "MAX_TEXT" in str(error):
        return "more text or too large a colour profile in it than is read; save it without"
    text = getattr(error, "strerror", None) or " ".join(str(error).replace(path, os.path.basename(path)).split())
    return text or type(error).__name__


# --- framing ------------------------------------------------------------------------------------------------------


def frame(image: Image.Image, resolution: Size | int) -> UInt8[Tensor, "3 h w"]:
    """The centre of an RGB image, as much of it as has the shape of the resolution, resized to it."""
    size = Size.of(resolution)
    width, height = whole_frame(image, size)
    return _cut(image, (image.width - width) // 2, (image.height - height) // 2, width, height, size)


def random_frame(
    image: Image.Image, resolution: Size | int, smallest: float, flip: bool, rng: random.Random
) -> UInt8[Tensor, "3 h w"]:
    """A random part of that centre, its sides at least `smallest` of it; mirrored half of the time.

    Cut from the original and resized once: nothing is enlarged that was reduced before.
    """
    size = Size.of(resolution)
    whole = whole_frame(image, size)
    height = rng.randint(math.ceil(whole[1] * smallest), whole[1])
    width = round(height * whole[0] / whole[1])
    left = (image.width - whole[0]) // 2 + rng.randint(0, whole[0] - width)
    top = (image.height - whole[1]) // 2 + rng.randint(0, whole[1] - height)
    x = _cut(image, left, top, width, height, size)
    return x.flip(2) if flip and rng.random() < 0.5 else x


def whole_frame(image: Image.Image, size: Size) -> tuple[int, int]:
    """Width and height of the largest part of an image that has the shape of `size`."""
    if image.width * size.height >= image.height * size.width:
        return max(1, round(image.height * size.width / size.height)), image.height
    return image.width, max(1, round(image.width * size.height / size.width))


def _cut(image: Image.Image, left: int, top: int, width: int, height: int, size: Size) -> UInt8[Tensor, "3 h w"]:
    """Cut out a part and resize it as Pillow does, bicubic with antialiasing; torch does that four times as fast."""
    part = torch.from_numpy(np.array(image.crop((left, top, left + width, top + height))))  # (height, width, 3)
    x = F.interpolate(part.permute(2, 0, 1)[None], tuple(size), mode="bicubic", antialias=True)
    return x[0].contiguous()


def to_float(x: UInt8[Tensor, "..."]) -> Float32[Tensor, "..."]:
    """Bytes 0 to 255 as numbers in [-1, 1]."""
    return x.float().div_(127.5).sub_(1)


def to_uint8(x: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """Numbers in [-1, 1] as the nearest bytes; what lies outside is clamped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
