"""Samplers: from noise to a clean latent, along a sequence of levels that ends at CLEAN."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from lightdiff.diffusion.objectives import Denoise
from lightdiff.diffusion.schedules import Level

StepNoise = Callable[[int], Tensor]
"""Number of a step -> fresh standard normal noise of the latents' shape; asked for only where eta > 0."""


def ddim(
    denoise: Denoise,
    levels: Sequence[Level],
    x: Float[Tensor, "b c h w"],
    eta: float = 0.0,
    step_noise: StepNoise | None = None,
) -> Float[Tensor, "b c h w"]:
    """Clean latents from x at levels[0], with exactly len(levels) - 1 calls of `denoise`.

    Song et al. 2021 (arXiv:2010.02502), Eq. 12, with the variance of Eq. 16: eta 0 is deterministic, eta 1 is
    ancestral sampling as in DDPM. The last step lands on the x0 that the network predicts.
    """
    for step, (here, there) in enumerate(pairwise(levels)):
        x0, eps = denoise(x, here)
        fresh = eta * (there.sigma / here.sigma) * math.sqrt(max(0.0, 1 - (here.alpha / there.alpha) ** 2))
        x = there.alpha * x0 + math.sqrt(max(0.0, there.sigma**2 - fresh**2)) * eps
        if fresh > 0:
            assert step_noise is not None, "eta > 0 needs noise for each step"
            x = x + fresh * step_noise(step)
    return x
