"""Noise schedules: how much signal (alpha) and noise (sigma) a latent holds at each level.

x_t = alpha_t x0 + sigma_t eps. The schedules here preserve variance: alpha^2 = alpha_bar, sigma^2 = 1 - alpha_bar.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightdiff.settings import ScheduleSettings


class Level(NamedTuple):
    """One level of noise: t as the network is told it (0 the least noisy), and the shares of signal and noise."""

    t: int
    alpha: float
    sigma: float


CLEAN = Level(-1, 1.0, 0.0)  # where sampling ends; no entry of any table


def alpha_bar_table(settings: ScheduleSettings) -> Float[Tensor, " T"]:
    """alpha_bar of all levels, (T,), float64, falling: alpha_bar_t = prod_{s <= t} (1 - beta_s).

    linear: Ho et al. 2020 (arXiv:2006.11239), section 4. cosine: Nichol & Dhariwal 2021 (arXiv:2102.09672), Eq. 17,
    with each beta clipped at 0.999 as they advise; the table is the product of the clipped betas, so it ends near
    2e-9 instead of at a rounding error.
    """
    steps = settings.timesteps
    if settings.schedule == "linear":
        betas = torch.linspace(settings.beta_start, settings.beta_end, steps, dtype=torch.float64)
    else:
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        curve = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0)  # float64: a product of 1000 factors


def noised(
    x0: Float[Tensor, "b c h w"], eps: Float[Tensor, "b c h w"], alpha_bar: Float[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """Clean latents noised to the level of each: x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps.

    Ho et al. 2020 (arXiv:2006.11239), Eq. 4.
    """
    alpha_bar = alpha_bar[:, None, None, None]
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps


def sampling_levels(alpha_bar: Float[Tensor, " T"], num_steps: int, min_alpha_bar: float = 0.0) -> list[Level]:
    """The num_steps levels that sampling visits, noisiest first, and CLEAN: num_steps + 1 in all.

    Trailing spacing (Lin et al. 2023, arXiv:2305.08891, Table 2): from the noisiest usable level down in equal
    strides. Levels whose alpha_bar is below `min_alpha_bar` are left out: there x0 = (x_t - sigma eps_hat) / alpha
    multiplies the network's error by 1 / alpha, 20,000-fold at the end of the cosine schedule.

    Raises:
        ValueError: If fewer levels than steps are left.
    """
    usable = int((alpha_bar >= min_alpha_bar).sum())  # the table falls, so these are the first ones
    if not 1 <= num_steps <= usable:
        raise ValueError(f"{num_steps} steps asked for, but the schedule has {usable} usable levels")
    steps = [round(usable - i * usable / num_steps) - 1 for i in range(num_steps)]
    bars = [(t, float(alpha_bar[t])) for t in steps]
    return [*(Level(t, math.sqrt(bar), math.sqrt(1 - bar)) for t, bar in bars), CLEAN]
