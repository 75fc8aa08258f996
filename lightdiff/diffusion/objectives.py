"""What the network predicts, how its error is weighted, and the way back to (x0, eps).

Every objective is a linear combination of the clean latent and the noise, target = a x0 + b eps. Together with
x_t = alpha x0 + sigma eps these are two equations for two unknowns, and one formula inverts them all.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightdiff.diffusion.schedules import Level
from lightdiff.settings import LossWeight, Objective

Latents = Float[Tensor, "b c h w"]
Share = TypeVar("Share", float, Tensor)  # of signal or noise: of all latents, or of each, (b, 1, 1, 1)
Network = Callable[..., Tensor]
"""(x_t, t) or (x_t, t, label) -> prediction."""
Denoise = Callable[[Tensor, Level], tuple[Tensor, Tensor]]
"""(x_t, level) -> (x0_hat, eps_hat): all that a sampler sees of a network."""


def target_coefficients(objective: Objective, alpha: Share, sigma: Share) -> tuple[Share | float, Share | float]:
    """The objective's a and b at a level.

    eps: Ho et al. 2020 (arXiv:2006.11239), Eq. 14. x0: the same paper, section 3.2. v = alpha eps - sigma x0: Salimans
    & Ho 2022 (arXiv:2202.00512), appendix D. flow = eps - x0: the velocity of rectified flow, Liu et al. 2022
    (arXiv:2209.03003), Eq. 1, in the direction of Esser et al. 2024 (arXiv:2403.03206).
    """
    if objective == "v":
        return -sigma, alpha
    return {"eps": (0.0, 1.0), "x0": (1.0, 0.0), "flow": (-1.0, 1.0)}[objective]


def target(objective: Objective, x0: Latents, eps: Latents, alpha: Share, sigma: Share) -> Latents:
    """What the network is to predict."""
    a, b = target_coefficients(objective, alpha, sigma)
    return a * x0 + b * eps


def x0_and_eps(
    objective: Objective, x_t: Latents, prediction: Latents, alpha: Share, sigma: Share
) -> tuple[Latents, Latents]:
    """The clean latent and the noise that a prediction stands for: x_t = alpha x0 + sigma eps holds exactly."""
    a, b = target_coefficients(objective, alpha, sigma)
    determinant = alpha * b - sigma * a
    return (b * x_t - sigma * prediction) / determinant, (alpha * prediction - a * x_t) / determinant


def eps_from_x0(x_t: Latents, x0: Latents, level: Level) -> Latents:
    """The noise in x_t, if x0 is its clean latent."""
    return (x_t - level.alpha * x0) / level.sigma


def loss_weight(
    kind: LossWeight, gamma: float, objective: Objective, alpha: Tensor, sigma: Tensor
) -> Float[Tensor, "b 1 1 1"]:
    """The weight of each squared error.

    min-snr: Hang et al. 2023 (arXiv:2303.09556), section 3.4: the error of x0 is weighted by min(SNR, gamma), with
    SNR = alpha^2 / sigma^2, whatever is predicted. As x_t is given, the error of a prediction is the error of x0 times
    (alpha b - sigma a) / sigma; for eps this is min(SNR, gamma) / SNR, for v min(SNR, gamma) / (SNR + 1).
    """
    if kind == "none":
        return torch.ones_like(alpha)
    a, b = target_coefficients(objective, alpha, sigma)
    determinant = alpha * b - sigma * a
    return (alpha / sigma).square().clamp(max=gamma) * (sigma / determinant).square()


class Guidance(NamedTuple):
    """Which classes to draw, and how far to go beyond a prediction, away from a worse one."""

    label: Int[Tensor, " b"] | None  # None: of a network without classes, or of any class
    no_label: int  # the label of label dropout, which stands for no class
    weight: float = 1.0
    first: float = 0.0  # levels t at which it is applied, both included
    last: float = float("inf")
    weak: Network | None = None  # a worse network; None: the worse prediction is the same network's, without the class


def denoiser(
    network: Network, objective: Objective = "eps", clamp: float = 0.0, guidance: Guidance | None = None
) -> Denoise:
    """Wrap a network for a sampler; one call of it is one call of the network.

    With `clamp`, x0_hat is limited to [-clamp, clamp] and eps_hat re-derived, so that the two still add up to x_t. With
    `guidance`, the prediction is better + (weight - 1) (better - worse). Classifier-free guidance, Ho & Salimans 2022
    (arXiv:2207.12598), Eq. 6: better and worse are with and without the class, in one call with twice the batch.
    Autoguidance, Karras et al. 2024 (arXiv:2406.02507), Eq. 3: worse is that of a network trained less, or a smaller
    one, with the same class. Outside of its levels, the prediction is the better one alone (Kynkäänniemi et al. 2024,
    arXiv:2404.07724).
    """

    def predict(x_t: Tensor, level: Level) -> Tensor:
        t = torch.full((len(x_t),), level.t, device=x_t.device, dtype=torch.float32)
        if guidance is None:
            return network(x_t, t)
        label, weak = guidance.label, guidance.weak
        known = () if label is None else (label,)
        if guidance.weight == 1 or not guidance.first <= level.t <= guidance.last:
            return network(x_t, t, *known)
        if weak is not None:
            worse, better = weak(x_t, t, *known), network(x_t, t, *known)
        else:
            assert label is not None, "without a class, guidance needs a worse network"
            labels = torch.cat([label, torch.full_like(label, guidance.no_label)])  # (2b,)
            better, worse = network(torch.cat([x_t, x_t]), torch.cat([t, t]), labels).chunk(2)
        return better + (guidance.weight - 1) * (better - worse)

    def denoise(x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        x0, eps = x0_and_eps(objective, x_t, predict(x_t, level), level.alpha, level.sigma)
        if clamp:
            x0 = x0.clamp(-clamp, clamp)
            eps = eps_from_x0(x_t, x0, level)
        return x0, eps

    return denoise
