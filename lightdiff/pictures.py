"""Pictures on the disk: grids, animations, single images with what they say of themselves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lightdiff.data.images import to_float, to_uint8
from lightdiff.pipeline import TrajectoryStep
from lightdiff.run_folder import atomic_write

GRID_IMAGES = 64
WIDEST = 12  # images in a row
FRAME_MS = 60  # of an animation
LAST_MS = 1500  # that an animation rests at its end
STRIP = 10  # columns of a strip
GAP = 2  # pixels between the images of a grid


def grid(x: Float[torch.Tensor, "n 3 h w"], columns: int) -> Image.Image:
    """Images in [-1, 1] as one picture, row by row."""
    n, _, h, w = x.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = torch.full((3, rows * (h + GAP) - GAP, columns * (w + GAP) - GAP), 255, dtype=torch.uint8)
    for i, image in enumerate(to_uint8(x.cpu())):
        top, left = (i // columns) * (h + GAP), (i % columns) * (w + GAP)
        sheet[:, top : top + h, left : left + w] = image
    return Image.fromarray(sheet.permute(1, 2, 0).numpy())


def save_grid(path: Path, x: Float[torch.Tensor, "n 3 h w"], columns: int) -> None:
    """Save images in [-1, 1] as one picture, row by row."""
    save_png(path, grid(x, columns))


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
    """A picture from a file that is closed again: a process may not have many open."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def save_animation(path: Path, frames: Sequence[Image.Image], last_ms: int = FRAME_MS) -> None:
    """Save pictures as one that moves, for ever; the last one stays so many milliseconds."""
    first, *others = frames
    durations = [FRAME_MS] * len(others) + [last_ms]
    atomic_write(
        path,
        lambda temporary: first.save(
            temporary, format="WEBP", save_all=True, append_images=others, duration=durations, loop=0, lossless=True
        ),
    )


def save_walk(path: Path, images: Sequence[Path]) -> None:
    """Save pictures as one that moves from the first to the last and back."""
    save_animation(path, [opened(p) for p in [*images, *images[-2:0:-1]]])


def save_trajectory(folder: Path, prefix: str, moments: Sequence[TrajectoryStep]) -> None:
    """Save how images come out of noise: trajectory.webp, which moves, and trajectory.png, some moments side by side.

    Both show x_t above the estimate of x0.
    """
    count = len(moments[0].x0)
    frames = [grid(torch.cat([moment.x_t, moment.x0]), count) for moment in moments]
    save_animation(folder / f"{prefix}trajectory.webp", frames, LAST_MS)
    columns = min(STRIP, len(moments))
    some = [moments[round(i * (len(moments) - 1) / max(1, columns - 1))] for i in range(columns)]
    rows = [getattr(moment, what)[i] for i in range(count) for what in ("x_t", "x0") for moment in some]
    save_grid(folder / f"{prefix}trajectory.png", torch.stack(rows), columns)


def save_png(path: Path, image: Image.Image | UInt8[torch.Tensor, "3 h w"], info: PngInfo | None = None) -> None:
    """Publish one image as a PNG, with its text chunks."""
    shown = image if isinstance(image, Image.Image) else Image.fromarray(image.permute(1, 2, 0).numpy())
    atomic_write(path, lambda temporary: shown.save(temporary, format="PNG", pnginfo=info))
