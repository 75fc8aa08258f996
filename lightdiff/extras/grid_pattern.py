"""A pattern that a decoder adds to every image, repeated at each position of the latent: a checkerboard, for instance.

It comes from transposed convolutions whose kernels cover some pixels otherwise than others (Odena et al. 2016,
doi:10.23915/distill.00003). Resizing and then convolving, as the default decoder does, turns constant latents into
constant images, borders aside.
"""

import math

import torch
from jaxtyping import Float64
from torch import Tensor

PATTERN = "pattern at the latent's grid (grey levels)"  # in results of `evaluate`
NEAREST = 3  # positions of a latent along a side, below which the pattern's frequencies are each other's neighbours


class GridPattern:
    """The pattern of a decoder, from the errors of many reconstructions."""

    def __init__(self, height: int, width: int) -> None:
        """Begin with none."""
        self.sums = torch.zeros(2, 3, height, width, dtype=torch.float64)  # of errors, and of their squares

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """Add a batch of images in [-1, 1] and of reconstructions, (b, 3, h, w)."""
        error = 127.5 * (x_hat.clamp(-1, 1) - x).double()
        self.sums += torch.stack([error.sum(0), error.square().sum(0)]).cpu()

    def measures(self, count: int, factor: int) -> dict[str, float]:
        """Its strength over `count` images, and what chance alone would put at its frequencies."""
        mean, square = self.sums / count
        places = mean[0].numel() * count
        chance = math.sqrt(max(0, factor**2 - 1) * float((square - mean.square()).mean()) / places)
        return {PATTERN: grid_pattern(mean, factor), f"{PATTERN} +-": chance}


def grid_pattern(mean_error: Float64[Tensor, "c h w"], factor: int) -> float:
    """Root mean square of the part of an error that repeats every `factor` pixels, in the error's unit.

    Of its spectrum, only multiples of 1 / factor count, and there only the energy beyond that of the strongest of the
    eight neighbouring frequencies: borders, edges and noise have about as much beside these frequencies as at them.

    Args:
        mean_error: x_hat - x, averaged over images, as what depends on the image is not the decoder's own.
        factor: Pixels a side of a position of the latent.
    """
    *_, height, width = mean_error.shape
    if factor < 2 or min(height, width) < NEAREST * factor:
        return 0.0
    power = (torch.fft.fft2(mean_error) / (height * width)).abs().square()
    steps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    around = torch.stack([power.roll(step, (1, 2)) for step in steps]).amax(0)
    found = (power - around).clamp(min=0)[:, :: height // factor, :: width // factor].clone()
    found[:, 0, 0] = 0  # an error of all pixels alike is no pattern
    return float(found.sum((1, 2)).mean().sqrt())
