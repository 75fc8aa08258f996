"""Pictures on the disk: grids, single images with their text chunks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lightdiff.data.images import to_float, to_uint8
from lightdiff.errors import UserError
from lightdiff.run_folder import atomic_write, open_regular

GRID_IMAGES = 64
WIDEST = 12  # images in a row
GAP = 2  # pixels between the images of a grid
CELL = 64  # pixels of an image in a grid, at least


def grid(x: Float[torch.Tensor, "n 3 h w"], columns: int) -> Image.Image:
    """Images in [-1, 1] as one picture, row by row; small ones are enlarged, each pixel to a square."""
    times = -(-CELL // min(x.shape[2:]))
    images = to_uint8(x.cpu()).repeat_interleave(times, 2).repeat_interleave(times, 3)
    n, _, h, w = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = torch.full((3, rows * (h + GAP) - GAP, columns * (w + GAP) - GAP), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (h + GAP), (i % columns) * (w + GAP)
        sheet[:, top : top + h, left : left + w] = image
    return Image.fromarray(sheet.permute(1, 2, 0).numpy())


def save_grid(path: Path, x: Float[torch.Tensor, "n 3 h w"], columns: int) -> None:
    """Save images in [-1, 1] as one picture, row by row."""
    save_png(path, grid(x, columns))


def save_pairs(path: Path, x: Float[torch.Tensor, "n 3 h w"], x_hat: Float[torch.Tensor, "n 3 h w"], most: int) -> None:
    """Save rows of at most so many images in [-1, 1], each row above one of what became of them."""
    columns = min(most, len(x))
    white = x.new_ones(2, -len(x) % columns, *x.shape[1:])
    both = torch.cat([torch.stack([x, x_hat]), white], 1).view(2, -1, columns, *x.shape[1:])
    save_grid(path, both.transpose(0, 1).flatten(0, 2), columns)


def save_grid_of_files(path: Path, images: Sequence[Path], classes: int = 1) -> None:
    """Save a grid of the first of these pictures; of classes that take turns, each has a row."""
    some = images[:GRID_IMAGES]
    columns = min(8, round(len(some) ** 0.5))
    if 1 < classes <= len(some):
        columns = min(WIDEST, len(some) // classes)
        some = [image for row in range(classes) for image in some[row : classes * columns : classes]]
    shown = torch.stack([to_float(torch.from_numpy(np.array(opened(p)))).permute(2, 0, 1) for p in some])
    save_grid(path, shown, columns)


def opened(path: Path) -> Image.Image:
    """A picture from a file that is closed again: a process may not have many open.

    Raises:
        UserError: If the file is damaged, or no picture.
    """
    try:
        with open_regular(path) as file, Image.open(file) as picture:
            return picture.convert("RGB")
    except Exception:  # Pillow's readers raise almost anything
        raise UserError(f"{path} is no whole picture: remove it") from None


def text_chunks(path: Path) -> dict[str, object]:
    """What a PNG says of itself before its pixels; nothing, if it is no picture."""
    try:
        with open_regular(path) as file, Image.open(file) as picture:
            return {str(name): value for name, value in picture.info.items()}
    except Exception:  # as above
        return {}


def save_png(path: Path, image: Image.Image | UInt8[torch.Tensor, "3 h w"], info: PngInfo | None = None) -> None:
    """Save one image as a PNG, with its text chunks."""
    shown = image if isinstance(image, Image.Image) else Image.fromarray(image.permute(1, 2, 0).numpy())
    atomic_write(path, lambda temporary: shown.save(temporary, format="PNG", pnginfo=info))
