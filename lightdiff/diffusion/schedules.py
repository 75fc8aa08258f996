"""Noise schedules: how much signal (alpha) and noise (sigma) a latent holds at each level.

x_t = alpha_t x0 + sigma_t eps. Most schedules preserve variance: alpha^2 = alpha_bar, sigma^2 = 1 - alpha_bar. That of
rectified flow draws straight lines instead: alpha = 1 - sigma.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightdiff.settings import LevelSettings, ScheduleSettings, Spacing

KARRAS_RHO = 7.0


class Level(NamedTuple):
    """One level of noise: t as the network is given it (0 the least noisy), and the shares of signal and noise."""

    t: float
    alpha: float
    sigma: float


CLEAN = Level(-1, 1.0, 0.0)  # where sampling ends; no entry of any table


@dataclass(frozen=True)
class Schedule:
    """alpha and sigma of levels 0 to T - 1: alpha falls, sigma rises."""

    alpha: Float[Tensor, " T"]
    sigma: Float[Tensor, " T"]

    @classmethod
    def of(cls, settings: ScheduleSettings) -> "Schedule":
        """The schedule of these settings, in float64.

        flow: Liu et al. 2022 (arXiv:2209.03003), Eq. 1, and Esser et al. 2024 (arXiv:2403.03206), Eq. 13: level t has
        sigma (t + 1) / T, so that the last one is noise alone.
        """
        if settings.schedule == "flow":
            sigma = torch.arange(1, settings.timesteps + 1, dtype=torch.float64) / settings.timesteps
            return cls(1 - sigma, sigma)
        alpha_bar = alpha_bar_table(settings)
        return cls(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    def __len__(self) -> int:
        return len(self.alpha)

    def to(self, device: torch.device) -> "Schedule":
        """The same in float32 on a device."""
        return Schedule(self.alpha.float().to(device), self.sigma.float().to(device))

    def at(self, t: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
        """Signal and noise of some levels, ready to be multiplied with latents."""
        return self.alpha[t][:, None, None, None], self.sigma[t][:, None, None, None]

    def q_sample(
        self, x0: Float[Tensor, "b c h w"], eps: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """Noise clean latents to the level of each: x_t = alpha_t x0 + sigma_t eps.

        Ho et al. 2020 (arXiv:2006.11239), Eq. 4, where alpha = sqrt(alpha_bar).
        """
        alpha, sigma = self.at(t)
        return alpha * x0 + sigma * eps

    def signal(self) -> Float[Tensor, " T"]:
        """The signal's share of the variance of x_t, which alpha_bar is where variance is preserved."""
        return self.alpha.square() / (self.alpha.square() + self.sigma.square())


def alpha_bar_table(settings: ScheduleSettings) -> Float[Tensor, " T"]:
    """alpha_bar of all levels, (T,), float64, falling: alpha_bar_t = prod_{s <= t} (1 - beta_s).

    linear: Ho et al. 2020 (arXiv:2006.11239), section 4. scaled-linear: the same of sqrt(beta), as in the code of
    Rombach et al. 2022 (arXiv:2112.10752). cosine: Nichol & Dhariwal 2021 (arXiv:2102.09672), Eq. 17, with each beta
    clipped at 0.999 as they advise; the table is the product of the clipped betas, so it ends near 2e-9 instead of at a
    rounding error. With zero_terminal_snr, sqrt(alpha_bar) is shifted and stretched to end at 0 (Lin et al. 2023,
    arXiv:2305.08891, Algorithm 1).
    """
    s, steps = settings, settings.timesteps
    if s.schedule == "linear":
        betas = torch.linspace(s.beta_start, s.beta_end, steps, dtype=torch.float64)
    elif s.schedule == "scaled-linear":
        betas = torch.linspace(s.beta_start**0.5, s.beta_end**0.5, steps, dtype=torch.float64).square()
    elif s.schedule == "cosine":
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        curve = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    else:  # auto, which is resolved before; flow, which has no alpha_bar; or one that nobody has written yet
        raise ValueError(f"no table of alpha_bar is known for schedule {s.schedule}")
    alpha_bar = torch.cumprod(1 - betas, dim=0)  # float64: a product of 1000 factors
    if s.zero_terminal_snr:
        alpha = alpha_bar.sqrt()
        alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])).square()
    return alpha_bar


def random_levels(u: Float[Tensor, " b"], settings: LevelSettings, timesteps: int) -> Int[Tensor, " b"]:
    """Levels to train at, of uniform numbers u in [0, 1): their quantiles in the chosen density.

    logit-normal: Esser et al. 2024 (arXiv:2403.03206), Eq. 19: t / T = sigmoid(mean + std * normal). Stratified, each
    of the b numbers comes from its own b-th of [0, 1) (Kingma et al. 2021, arXiv:2107.00630, appendix I.1).
    """
    if settings.stratified:
        u = (torch.arange(len(u), device=u.device) + u) / len(u)
    if settings.density == "logit-normal":
        normal = math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-6, 1 - 1e-6))
        u = torch.sigmoid(settings.density_mean + settings.density_std * normal)
    return (u * timesteps).long().clamp(max=timesteps - 1)


def sampling_levels(
    schedule: Schedule, num_steps: int, min_alpha_bar: float = 0.0, spacing: Spacing = "trailing", strength: float = 1.0
) -> list[Level]:
    """The num_steps levels that sampling visits, noisiest first, and CLEAN: num_steps + 1 in all.

    Args:
        schedule: The schedule that the network was trained with.
        num_steps: How many levels.
        min_alpha_bar: Levels with a smaller share of signal are left out. Where the network predicts eps,
            x0 = (x_t - sigma eps_hat) / alpha multiplies its error by 1 / alpha, 20,000-fold at the end of the cosine
            schedule.
        spacing: trailing: in equal strides that begin with the noisiest (Lin et al. 2023, arXiv:2305.08891, Table 2).
            uniform: in equal strides from the noisiest to the least noisy one. quadratic: the same of sqrt(t), with
            more levels where there is little noise (Song et al. 2021, arXiv:2010.02502, appendix D.2). karras: sigma /
            alpha falls as in Karras et al. 2022 (arXiv:2206.00364), Eq. 5, between whole levels, too.
        strength: Share of the levels, in (0, 1], above which nothing is visited: where noise is added to an image
            instead of beginning with noise alone.

    Raises:
        ValueError: If fewer levels than steps are left.
    """
    # Signal falls, so the usable levels are the first ones
    usable = min(int((schedule.signal() >= min_alpha_bar).sum()), max(1, round(strength * len(schedule))))
    if spacing == "karras":
        usable = min(usable, int((schedule.alpha > 0).sum()))
    if not 1 <= num_steps <= usable:
        raise ValueError(f"{num_steps} steps asked for, but the schedule has {usable} usable levels")
    shares = np.linspace(1, 0, num_steps) if num_steps > 1 else np.ones(1)
    if spacing == "karras":
        ratio = (schedule.sigma / schedule.alpha)[:usable].numpy()
        low, high = ratio[0] ** (1 / KARRAS_RHO), ratio[-1] ** (1 / KARRAS_RHO)
        times = np.interp(np.log((low + shares * (high - low)) ** KARRAS_RHO), np.log(ratio), np.arange(usable))
        return [*(between(schedule, float(t)) for t in times), CLEAN]
    if spacing == "trailing":
        steps = [round(usable - i * usable / num_steps) - 1 for i in range(num_steps)]
    else:
        steps = [round((share**2 if spacing == "quadratic" else share) * (usable - 1)) for share in shares]
        for i in range(num_steps - 2, -1, -1):  # where they lie closer than one level, they move apart
            steps[i] = max(steps[i], steps[i + 1] + 1)
    return [*(Level(t, float(schedule.alpha[t]), float(schedule.sigma[t])) for t in steps), CLEAN]


def between(schedule: Schedule, t: float) -> Level:
    """The level at a time between two whole ones: log(sigma / alpha) is linear there, and so is the norm of both."""
    below = min(int(t), len(schedule) - 2)
    fraction = t - below
    (a0, a1), (s0, s1) = schedule.alpha[below : below + 2].tolist(), schedule.sigma[below : below + 2].tolist()
    norm = math.hypot(a0, s0) ** (1 - fraction) * math.hypot(a1, s1) ** fraction
    ratio = (s0 / a0) ** (1 - fraction) * (s1 / a1) ** fraction if fraction else s0 / a0
    alpha = norm / math.hypot(1, ratio)
    return Level(t, alpha, ratio * alpha)
