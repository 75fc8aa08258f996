"""What a sample of the images says before a run: which value is white, and which sizes they have."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from statistics import median
from typing import TypeVar

import numpy as np
from PIL import Image

from lightdiff.data.files import source_of
from lightdiff.data.images import BadImage, opened
from lightdiff.data.table import ImageFile, ImageList
from lightdiff.on_demand import on_demand
from lightdiff.settings import ImageSettings

Tell = Callable[[str], object]
SAMPLE = 256  # images whose headers are read
T = TypeVar("T")
DEEP = ((b".tif", b"tiff", b".pgm", b".pnm"), (b".png",))  # suffixes of formats with 16 bits; most PNGs have 8
FEW = 0.05  # share of images, enlarged or large, that needs no word
LARGE, LARGE_SIDE = 4, 512  # times the resolution, and pixels a side, from which decoding whole images takes long
REDUCED = ("JPEG", "MPO")  # formats that are decoded at about the size needed


def with_whites(images: ImageSettings, files: ImageList, tell: Tell) -> ImageSettings:
    """The settings with the value of white in 16-bit and float images, found once for all of them and told."""
    deep = list[tuple[ImageFile, str]]()
    for suffixes in DEEP:
        some = evenly(files.where(np.isin(files.table.endings, suffixes)), SAMPLE)
        deep += [pair for pair in look_at(some, images, lambda image: image.mode) if pair[1][0] in "IF"]
    found: ImageSettings = on_demand("data.colours:find_whites")(images, deep, tell) if deep else images
    return found


def scale_of(size: tuple[int, int], images: ImageSettings) -> float:
    """How many times as large as needed an image of this width and height is; below 1, it is enlarged."""
    return min(size[0] / images.resolution.width, size[1] / images.resolution.height)


def note_sizes(images: ImageSettings, files: Sequence[ImageFile], tell: Tell) -> None:
    """Tell how many images are smaller than the resolution, or slow to decode, if they are more than a few."""
    looked = [what for _, what in look_at(evenly(files, SAMPLE), images, lambda image: (image.size, image.format))]
    wanted, whole = images.resolution, max(LARGE_SIDE / min(images.resolution), LARGE)
    small = sum(scale_of(size, images) < 1 for size, _ in looked) / max(1, len(looked))
    large = sum(scale_of(size, images) >= whole and kind not in REDUCED for size, kind in looked) / max(1, len(looked))
    of = f"of {len(looked)} images looked at are"
    if small > FEW:
        middle = f"(median shorter side: {median(min(size) for size, _ in looked):g} pixels)"
        tell(f"{small:.0%} {of} smaller than --resolution {wanted} and will be enlarged {middle}")
    if large > FEW:
        slow = f"{large:.0%} {of} no JPEGs and large for --resolution {wanted}: a core decodes about 40 PNGs"
        resize = f"magick mogrify -path COPIES -resize {2 * wanted.width}x{2 * wanted.height}^ *.png"
        tell(f"{slow} of 1024 pixels a second; copies resized once load faster, as by '{resize}'")


def evenly(files: Sequence[ImageFile], count: int) -> Sequence[ImageFile]:
    """At most `count` of the files, evenly spaced from the first to the last."""
    return files if len(files) <= count else [files[i * (len(files) - 1) // (count - 1)] for i in range(count)]


def look_at(
    files: Sequence[ImageFile], images: ImageSettings, look: Callable[[Image.Image], T]
) -> list[tuple[ImageFile, T]]:
    """The readable files with what `look` says of each, open and not yet decoded."""
    sources, found = [source_of(folder) for folder in images.data], list[tuple[ImageFile, T]]()
    for file in files:
        with suppress(BadImage), opened(file.path, images, images.data[file.root], sources[file.root]) as image:
            found.append((file, look(image)))
    return found
