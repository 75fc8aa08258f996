"""Images drawn for tests, and data sets of them."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightdiff.data.files import ImageFile, find_images
from lightdiff.data.loading import ImageDataset
from lightdiff.data.table import ImageList
from lightdiff.settings import ImageSettings


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth colourful image, so that JPEG keeps it well."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(image).astype(np.int64)


def scan(*what: Any, **how: Any) -> ImageList:
    """The images that `find_images` finds."""
    return find_images(*what, **how).files


def listed(names: list[str]) -> list[ImageFile]:
    return [ImageFile(0, name, "train", {}) for name in names]


def dataset(folder: Path, names: list[str], train: bool = True, **settings: Any) -> ImageDataset:
    return ImageDataset(listed(names), ImageSettings(data=(folder,), resolution=16, **settings), seed=3, train=train)
