"""Decoded pixels of any kind -> 8-bit sRGB: embedded profiles, 16 bits, floats, very large images."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

from lightdiff.data.formats import BadImage
from lightdiff.data.survey import evenly, look_at
from lightdiff.data.table import ImageFile
from lightdiff.settings import ImageSettings, Size, with_changes

SPACES = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK", "Lab ": "LAB"}  # a profile's colour space -> Pillow's mode
GREY = ("1", "L", "LA")
SRGB = ImageCms.createProfile("sRGB")
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
# Relative colorimetric with black-point compensation, as picture editors do: only then is every kind of sRGB profile
# the identity.
INTENT, FLAGS = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
LEVELS = np.arange(0, 256, 51, dtype=np.uint8)
PROBE = np.stack(np.meshgrid(LEVELS, LEVELS, LEVELS), axis=-1).reshape(1, -1, 3)
ROUNDING = 2  # of 255
WHITES = (1, 255, 1023, 4095, 16383, 65535)  # of 8, 10, 12, 14 and 16 bits; floats also end at 1
LOOKED_AT = 2**20  # pixels
DECODED = 32  # images of which white is decided
NAMES = {"integer": "16-bit", "float": "float"}
REDUCIBLE = ("L", "RGB", "RGBA", "CMYK", "F")


def to_srgb(image: Image.Image, settings: ImageSettings, at_least: int, sixteen: bool) -> Image.Image:
    """The decoded, upright image as 8-bit sRGB, in mode RGB or, where it has transparent pixels, RGBA.

    Args:
        image: Of any mode, with or without a colour profile.
        settings: The values of white, and the shape that is wanted.
        at_least: How many pixels its shorter side may be reduced to; 0: it is not.
        sixteen: Whether each colour had 16 bits in its file.
    """
    negative = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    image = _reduced(image, at_least, settings.resolution)
    profile, transparent = image.info.get("icc_profile"), image.has_transparency_data
    if kind_of(image.mode):
        image = _eight_bits(image, settings, negative)
    elif image.mode == "La":
        image = image.convert("LA")
    elif sixteen and highest_value(image.convert("RGB") if image.mode in ("LA", "RGBA") else image) < 16:
        # Of the 16 bits of a colour, Pillow keeps the upper 8
        raise BadImage("colours of 12 bits or fewer in 16 would be nearly black; convert them to 8 bits")
    if not transparent:
        return _to_srgb(image, profile)
    rgba = image.convert("RGBA")
    srgb = _to_srgb(image if image.mode in GREY else rgba, profile)
    srgb.putalpha(rgba.getchannel("A"))
    return srgb


def _reduced(image: Image.Image, at_least: int, size: Size) -> Image.Image:
    """The image, or its centre square, reduced, where that is asked for and no colour stands for transparency."""
    if not at_least or image.mode not in REDUCIBLE or "transparency" in image.info:
        return image
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    square = (left, top, left + side, top + side) if size.height == size.width else None
    return image.reduce(max(1, side // at_least), square)


# --- profiles -----------------------------------------------------------------------------------------------------


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image in RGB, its colours as an embedded profile means them."""
    own = "L" if image.mode in GREY else image.mode if image.mode in ("CMYK", "LAB") else "RGB"
    mode, transform = _transform(LAB if own == "LAB" else profile or b"")
    if transform is None or not (mode == own or (mode == "RGB" and own == "L")):
        return image.convert("RGB")
    return transform.apply(image.convert(mode))


@lru_cache(maxsize=16)  # a folder's images have few profiles
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Pillow's mode of a profile's colours, and how they become sRGB; None where they are, or it is damaged."""
    with suppress(Exception):  # a damaged profile is no reason to give up the pixels
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        mode = SPACES[source.profile.xcolor_space]
        transform = ImageCms.buildTransform(source, SRGB, mode, "RGB", INTENT, FLAGS)
        if (
            mode != "RGB"
            or np.abs(np.asarray(transform.apply(Image.fromarray(PROBE))) - PROBE.astype(int)).max() > ROUNDING
        ):
            return mode, transform
    return "", None


# --- 16 bits and floats -------------------------------------------------------------------------------------------


def kind_of(mode: str) -> str:
    """`integer` or `float`, if the pixels of an image of this mode are grey values of 16 or 32 bits."""
    return "float" if mode == "F" else "integer" if mode.startswith("I") else ""


def find_whites(
    images: ImageSettings, deep: Sequence[tuple[ImageFile, str]], tell: Callable[[str], object]
) -> ImageSettings:
    """The settings with each value of white that is not given, as `deep` images, given with their modes, suggest."""
    for kind, name in NAMES.items():
        some = evenly([file for file, mode in deep if kind_of(mode) == kind], DECODED)
        if some and not getattr(images, f"{kind}_white"):
            if highest := [value for _, value in look_at(some, images, highest_value)]:
                white = choose_white(kind, highest)
                images = with_changes(images, **{f"{kind}_white": white})
                why = f"as the values of {len(highest)} of them suggest; --{kind}-white changes that"
                tell(f"white is {white:g} in {name} images, {why}")
    return images


def highest_value(image: Image.Image) -> float:
    """The value that a thousandth of a grey image's pixels exceed: neither hot pixels nor a highlight decide."""
    return _quantiles(np.asarray(image))[2]


def choose_white(kind: str, highest: Sequence[float]) -> float:
    """The value of white in images whose highest values are these. Floats may exceed it a little, after sharpening."""
    top = max(highest)
    if kind == "integer":
        return next((white for white in WHITES[1:] if top <= white), WHITES[-1])
    return next((white for white in WHITES if top <= white * (16 if white == 1 else 1.05)), WHITES[-1])


def _eight_bits(image: Image.Image, settings: ImageSettings, negative: bool) -> Image.Image:
    """A grey image of 16 or 32 bits a pixel, as L or, with a transparent value, as LA; what exceeds white is white.

    In a negative, 0 is white. Of 8 bits and fewer, Pillow inverts them itself.
    """
    values, kind = np.asarray(image).astype(np.float32, copy=False), kind_of(image.mode)
    low, middle, high = _quantiles(values)
    default = choose_white(kind, [high]) if kind == "float" else WHITES[-1]
    white = getattr(settings, f"{kind}_white") or default
    found = f"pixel values from {values.min():g} to {values.max():g}"
    lowest = -0.1 * white if kind == "float" else 0  # sharpening overshoots below black, too
    if not lowest <= low <= high <= 1.05 * max(white, WHITES[-1]):  # false for NaN, too
        raise BadImage(f"{found}; 0 to {max(white, WHITES[-1]):g} can be read")
    if middle > white or 0 < high < white / 200:
        raise BadImage(f"{found}, but white is {white:g} (--{kind}-white)")
    scaled = values.clip(0, white)
    scaled *= np.float32(255 / white)
    grey = Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8))
    grey = ImageOps.invert(grey) if negative else grey
    if isinstance(transparent := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray((values != transparent).astype(np.uint8) * 255))
    return grey


def _quantiles(values: NDArray[Any]) -> list[float]:
    """The value that a thousandth of the pixels lie below, the median, and the value that a thousandth exceed."""
    some = values.reshape(-1)[:: max(1, values.size // LOOKED_AT)]
    return [float(value) for value in np.quantile(some, (0.001, 0.5, 0.999))]
