"""Closed forms and naive loops to compare the library with. Nothing here imports lightdiff."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"  # what the original scripts wrote and computed
needs_golden = pytest.mark.skipif(
    not (GOLDEN / "original_reference.safetensors").is_file(),
    reason=f"the original scripts' results are not in {GOLDEN}",
)


class AnyLevel(NamedTuple):
    """A level of noise by its shares of signal and noise; lightdiff's own Level fits as well."""

    t: int
    alpha: float
    sigma: float


@dataclass(frozen=True)
class GaussianData:
    """Data x0 ~ N(mean, std^2), element by element. std 0 is a point mass.

    x_t = alpha x0 + sigma eps is then normal with mean alpha m and variance alpha^2 s^2 + sigma^2, and the best
    guesses of x0 and eps are linear in x_t (conditional expectation of jointly normal variables).
    """

    mean: float
    std: float

    def variance_at(self, level: AnyLevel) -> float:
        """Var x_t."""
        return level.alpha**2 * self.std**2 + level.sigma**2

    def x0(self, x_t: Tensor, level: AnyLevel) -> Tensor:
        """E[x0 | x_t] = m + Cov(x0, x_t) / Var(x_t) (x_t - alpha m)."""
        gain = level.alpha * self.std**2 / self.variance_at(level)
        return self.mean + gain * (x_t - level.alpha * self.mean)

    def eps(self, x_t: Tensor, level: AnyLevel) -> Tensor:
        """E[eps | x_t] = Cov(eps, x_t) / Var(x_t) (x_t - alpha m)."""
        return level.sigma / self.variance_at(level) * (x_t - level.alpha * self.mean)

    def denoise(self, x_t: Tensor, level: AnyLevel) -> tuple[Tensor, Tensor]:
        """What a perfectly trained network says."""
        return self.x0(x_t, level), self.eps(x_t, level)

    def flow(self, x: Tensor, here: AnyLevel, there: AnyLevel) -> Tensor:
        """The probability flow's exact end point: in one dimension it keeps each point's quantile."""
        ratio = (self.variance_at(there) / self.variance_at(here)) ** 0.5
        return there.alpha * self.mean + ratio * (x - here.alpha * self.mean)

    def ddim_variance(self, levels: Sequence[AnyLevel], eta: float) -> float:
        """Variance that DDIM ends with when it starts from Var x_t at levels[0].

        With the denoiser above a step is x' = a x + const + fresh noise, so that variances follow Var' = a^2 Var + b^2.
        """
        variance = self.variance_at(levels[0])
        for here, there in pairwise(levels):
            fresh_variance = eta**2 * ddpm_variance(here.alpha**2, there.alpha**2)
            kept = (1 - there.alpha**2 - fresh_variance) ** 0.5
            total = self.variance_at(here)
            slope = there.alpha * here.alpha * self.std**2 / total + kept * here.sigma / total
            variance = slope**2 * variance + fresh_variance
        return variance


def ddpm_variance(alpha_bar: float, alpha_bar_next: float) -> float:
    """DDPM's posterior variance beta~ of a step between two levels (Ho et al. 2020, Eq. 7)."""
    beta = 1 - alpha_bar / alpha_bar_next
    return (1 - alpha_bar_next) / (1 - alpha_bar) * beta


def naive_ddim(
    eps_hat: Callable[[np.ndarray, int], np.ndarray],
    alpha_bar: np.ndarray,
    steps: Sequence[int],
    x: np.ndarray,
    eta: float = 0.0,
    noise: Sequence[np.ndarray] = (),
) -> list[np.ndarray]:
    """Every x that DDIM visits, the start first: Song et al. 2021, Eq. 12 and 16, written out in float64."""
    visited = [x]
    for i, t in enumerate(steps):
        now = alpha_bar[t]
        then = alpha_bar[steps[i + 1]] if i + 1 < len(steps) else 1.0
        eps = eps_hat(x, t)
        x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
        fresh = eta * np.sqrt((1 - then) / (1 - now)) * np.sqrt(1 - now / then)
        x = np.sqrt(then) * x0 + np.sqrt(1 - then - fresh**2) * eps
        if eta > 0:
            x = x + fresh * noise[i]
        visited.append(x)
    return visited


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
