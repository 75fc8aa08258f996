"""Samplers: from noise to a clean latent, along a sequence of levels that ends at CLEAN.

A sampler sees a denoiser, (x_t, level) -> (x0_hat, eps_hat), and alpha and sigma of each level; what the network
predicts and how noise was scheduled does not matter to it. Along the probability flow,
d x = x0_hat d alpha + eps_hat d sigma.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor

from lightdiff.diffusion.objectives import Denoise, Latents
from lightdiff.diffusion.schedules import Level
from lightdiff.settings import SamplerName

Levels = Sequence[Level]
StepNoise = Callable[[int], Latents]
"""Number of a step -> fresh standard normal noise of the latents' shape; called only where it is used."""
Sampler = Callable[..., Latents]
"""(denoise, levels, x at levels[0], step_noise) -> clean latents; those of `WITH_ETA` in settings.py take eta, too."""


def posterior_std(here: Level, there: Level) -> float:
    """Standard deviation of x at the cleaner level, given x here and x0 (Ho et al. 2020, Eq. 7).

    Written for any alpha and sigma as in Kingma et al. 2021 (arXiv:2107.00630), Eq. 25.
    """
    added = here.sigma**2 - (here.alpha / there.alpha * there.sigma) ** 2  # variance that noising adds on the way here
    return there.sigma / here.sigma * math.sqrt(max(0.0, added))


def ddim(
    denoise: Denoise, levels: Levels, x: Latents, step_noise: StepNoise | None = None, eta: float = 0.0
) -> Latents:
    """Song et al. 2021 (arXiv:2010.02502), Eq. 12, with the variance of Eq. 16. One call a step.

    eta 0 is deterministic: Euler's method along the probability flow, as rectified flow is usually sampled. eta 1 is
    ancestral sampling: a draw from q(x_there | x_here, x0_hat), Ho et al. 2020 (arXiv:2006.11239), Eq. 6 and 7. The
    last step lands on the x0 that the network predicts.
    """
    for step, (here, there) in enumerate(pairwise(levels)):
        x0, eps = denoise(x, here)
        fresh = eta * posterior_std(here, there)
        x = there.alpha * x0 + math.sqrt(max(0.0, there.sigma**2 - fresh**2)) * eps
        if fresh > 0:
            assert step_noise is not None, "eta > 0 needs noise for each step"
            x = x + fresh * step_noise(step)
    return x


def euler_step(x: Latents, x0: Latents, eps: Latents, here: Level, there: Level) -> Latents:
    """A straight step of the probability flow, with x0_hat and eps_hat held constant."""
    return x + (there.alpha - here.alpha) * x0 + (there.sigma - here.sigma) * eps


def heun(denoise: Denoise, levels: Levels, x: Latents, step_noise: StepNoise | None = None) -> Latents:
    """Heun's method, of second order: Euler's step, then the mean of both ends (Karras et al. 2022, Algorithm 1).

    Two calls a step, one for the last, which lands on the x0 that the network predicts.
    """
    for here, there in pairwise(levels):
        x0, eps = denoise(x, here)
        end = euler_step(x, x0, eps, here, there)
        if there.sigma > 0:
            x0_end, eps_end = denoise(end, there)
            end = euler_step(x, (x0 + x0_end) / 2, (eps + eps_end) / 2, here, there)
        x = end
    return x


def dpmpp_2m(denoise: Denoise, levels: Levels, x: Latents, step_noise: StepNoise | None = None) -> Latents:
    """DPM-Solver++(2M), of second order: Lu et al. 2022 (arXiv:2211.01095), Algorithm 2.

    x0 is extrapolated from the last two predictions, linearly in log(alpha / sigma). One call a step; the first step,
    and the last, which lands on the x0 that the network predicts, do without.
    """
    before: tuple[Tensor, float] | None = None  # the last x0, and the width of the step that followed it
    for here, there in pairwise(levels):
        x0, _ = denoise(x, here)
        width = log_snr(there) - log_snr(here)
        guess = x0
        if before is not None and there.sigma > 0:
            guess = x0 + width / (2 * before[1]) * (x0 - before[0])
        before = (x0, width)
        x = there.sigma / here.sigma * x + (there.alpha - here.alpha * there.sigma / here.sigma) * guess
    return x


def log_snr(level: Level) -> float:
    """log(alpha / sigma), from -inf for noise alone to inf for what is clean."""
    if level.alpha == 0 or level.sigma == 0:
        return -math.inf if level.alpha == 0 else math.inf
    return math.log(level.alpha / level.sigma)


SAMPLERS: dict[SamplerName, Sampler] = {
    "ddim": ddim,
    "ddpm": partial(ddim, eta=1.0),
    "dpm++2m": dpmpp_2m,
    "heun": heun,
    "euler": partial(ddim, eta=0.0),
}
