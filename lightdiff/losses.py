"""The VAE's loss: reconstruction + beta KL + gamma LPIPS."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightdiff.models.vae import Posterior
from lightdiff.settings import VAELossSettings

Images = Float[Tensor, "b c h w"]


def kl_per_element(posterior: Posterior) -> Float[Tensor, "b c h w"]:
    """KL(N(mu, sigma^2) || N(0, 1)) of each latent element, in nats (Kingma & Welling 2013, appendix B)."""
    mu, logvar = posterior
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


def vae_loss(
    x: Images,
    x_hat: Images,
    posterior: Posterior,
    settings: VAELossSettings,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The loss and its parts, each a mean over the batch.

    `kl` is the mean over latent elements, which is what kl_beta weighs (the convention of the original scripts).
    `kl_sum` is the sum over an image's latent elements, the convention of latent diffusion (Rombach et al. 2022):
    a kl_beta of 1e-3 on 4 x 32 x 32 latents weighs it like 1e-3 / 4096 there, next to a reconstruction error that is
    a mean over pixels here and a sum over them there.

    Args:
        x: Images in [-1, 1].
        x_hat: Their reconstructions in [-1, 1], whatever the output activation.
        posterior: What the encoder said of x.
        settings: Weights and kind of reconstruction error.
        lpips: Perceptual distance (b,) of images in [-1, 1]; needed where lpips_gamma > 0.
    """
    error = F.mse_loss(x_hat, x) if settings.reconstruction == "mse" else F.l1_loss(x_hat, x)
    element = kl_per_element(posterior)
    parts = {settings.reconstruction: error, "kl": element.mean(), "kl_sum": element.sum() / len(x)}
    loss = error + settings.kl_beta * parts["kl"]
    if settings.lpips_gamma > 0:
        assert lpips is not None, "lpips_gamma > 0 needs the LPIPS network"
        parts["lpips"] = lpips(x_hat, x).mean()
        loss = loss + settings.lpips_gamma * parts["lpips"]
    return {"loss": loss, **parts}


def psnr(x: Images, x_hat: Images) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each image in dB; images in [-1, 1], so the peak is 2."""
    error = (x_hat.clamp(-1, 1) - x).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=math.ldexp(1, -40)))
