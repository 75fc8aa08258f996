"""What the network predicts, and the way back to (x0, eps). So far: the noise, eps."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lightdiff.diffusion.schedules import Level

Latents = Float[Tensor, "b c h w"]
Denoise = Callable[[Tensor, Level], tuple[Tensor, Tensor]]
"""(x_t, level) -> (x0_hat, eps_hat): all that a sampler sees of a network."""


def x0_from_eps(x_t: Latents, eps: Latents, level: Level) -> Latents:
    """The clean latent that x_t is, if eps is its noise (Ho et al. 2020, arXiv:2006.11239, Eq. 4 solved for x0)."""
    return (x_t - level.sigma * eps) / level.alpha


def eps_from_x0(x_t: Latents, x0: Latents, level: Level) -> Latents:
    """The noise in x_t, if x0 is its clean latent."""
    return (x_t - level.alpha * x0) / level.sigma


def denoiser(network: Callable[[Tensor, Tensor], Tensor], clamp: float = 0.0) -> Denoise:
    """Wrap a network (x_t, t) -> eps_hat for a sampler; one call of it is one call of the network.

    With `clamp`, x0_hat is limited to [-clamp, clamp] and eps_hat re-derived, so that the two still add up to x_t.
    """

    def denoise(x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        t = torch.full((len(x_t),), level.t, device=x_t.device)
        eps = network(x_t, t)
        x0 = x0_from_eps(x_t, eps, level)
        if clamp:
            x0 = x0.clamp(-clamp, clamp)
            eps = eps_from_x0(x_t, x0, level)
        return x0, eps

    return denoise
