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
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from PIL import Image, ImageColor, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from lightdiff.data.files import FOLDER, Source
from lightdiff.data.formats import BadImage as BadImage
from lightdiff.errors import LightdiffError, UserError
from lightdiff.on_demand import on_demand
from lightdiff.settings import ImageSettings, Size

DEFAULTS = ImageSettings()
LONGEST = 2**28  # bytes of a JPEG that are searched for scans; a file with holes may claim to have terabytes
MAX_SCANS = 100  # of a JPEG: half a millisecond each for every million pixels
LARGE = 90e6  # pixels
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # of 8 bits a colour, or fewer
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
            yield image
    except (BadImage, LightdiffError, MemoryError):
        raise
    # Damaged bytes make Pillow's readers raise almost anything: SyntaxError, KeyError, struct.error, ...
    except Exception as error:
        raise BadImage(on_demand("data.unread:reason")(error, os.path.join(folder, name), max_megapixels)) from error


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


def colour(background: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour's name or #rrggbb."""
    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise UserError(f"--background: {background!r} is no colour; try white, grey or #ff8800") from error


def to_rgb(image: Image.Image, settings: ImageSettings, at_least: int = 0) -> Image.Image:
    """The decoded image, upright, in sRGB, transparent pixels on the background.

    A very large one, which takes gigabytes in every copy, is reduced, its shorter side to `at_least` pixels or more;
    for square images, only its centre square is returned.
    """
    sixteen = re.search(";16[BLN]", str(getattr(image, "tile", "")))  # in PNG and TIFF
    image.load()  # before the EXIF data, which may follow the pixels
    with suppress(Exception):  # damaged EXIF data is no reason to give up the pixels
        ImageOps.exif_transpose(image, in_place=True)
    large = image.width * image.height > LARGE
    if sixteen or large or image.mode not in MODES or image.info.get("icc_profile"):
        image = on_demand("data.colours:to_srgb")(image, settings, at_least if large else 0, bool(sixteen))
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, colour(settings.background))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


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
