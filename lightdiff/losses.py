"""The VAE's loss: reconstruction + beta KL + gamma LPIPS, and whatever else is in the table TERMS."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightdiff.models.vae import Posterior
from lightdiff.settings import VAELossSettings

Images = Float[Tensor, "b c h w"]
LossFn = Callable[[Images, Images, Posterior], Tensor]  # x, x_hat, posterior -> a mean over the batch
Fetch = Callable[[Callable[[], Path]], Path]


def kl_per_element(posterior: Posterior) -> Float[Tensor, "b c h w"]:
    """KL(N(mu, sigma^2) || N(0, 1)) of each latent element, in nats (Kingma & Welling 2013, appendix B)."""
    return 0.5 * (posterior.mu.square() + posterior.logvar.exp() - 1 - posterior.logvar)


class MeanDistance(nn.Module):
    """The mean of a distance between images and their reconstructions."""

    def __init__(self, distance: nn.Module) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, x: Images, x_hat: Images, posterior: Posterior) -> Float[Tensor, ""]:
        """Measure a batch."""
        mean: Tensor = self.distance(x_hat, x).mean()
        return mean


def lpips(settings: VAELossSettings, device: torch.device, fetch: Fetch) -> LossFn:
    """LPIPS, whose weights are found, or downloaded, first.

    Raises:
        UserError: If its weights cannot be found or fetched.
    """
    from lightdiff.models.lpips import PerceptualLoss, find_weights  # imports torchvision: 1.5 s

    weights = fetch(lambda: find_weights(settings.lpips_net, settings.lpips_weights))
    return MeanDistance(PerceptualLoss(settings.lpips_net, weights)).to(device)


class Term(NamedTuple):
    """A term that is added to reconstruction and KL where it has a weight."""

    weight: str  # its field in VAELossSettings; with 0 the term is neither made nor computed
    make: Callable[[VAELossSettings, torch.device, Fetch], LossFn]


TERMS: dict[str, Term] = {
    "lpips": Term("lpips_gamma", lpips),
}


class VAELoss:
    """The VAE's loss, (x, x_hat, posterior) -> {"loss": ..., and each of its parts}."""

    def __init__(
        self, settings: VAELossSettings, device: torch.device | None = None, fetch: Fetch = lambda find: find()
    ) -> None:
        """Make every term that has a weight.

        Args:
            settings: Weights and kind of reconstruction error.
            device: Where images will be; on the CPU if not given.
            fetch: Finds a file of weights, where several processes need it in the right order.

        Raises:
            UserError: If a term's weights cannot be found or fetched.
        """
        self.settings, device = settings, device or torch.device("cpu")
        self.terms = {n: t.make(settings, device, fetch) for n, t in TERMS.items() if getattr(settings, t.weight)}

    @property
    def networks(self) -> list[nn.Module]:
        """The terms that are networks."""
        return [term for term in self.terms.values() if isinstance(term, nn.Module)]

    def __call__(self, x: Images, x_hat: Images, posterior: Posterior) -> dict[str, Tensor]:
        """The weighted sum and its parts, each a mean over the batch.

        `kl` is the mean over latent elements, which kl_beta is the weight of (the convention of the original scripts).
        `kl_sum` is the sum over an image's latent elements, the convention of latent diffusion (Rombach et al. 2022):
        there, the reconstruction error is a sum, too, so a kl_beta of 1e-3 for 3 x 256 x 256 images and 4 x 32 x 32
        latents is one of 1e-3 * 196,608 / 4,096 = 0.048.

        Args:
            x: Images in [-1, 1].
            x_hat: Their reconstructions in [-1, 1], whatever the output activation.
            posterior: The encoder's output for x.
        """
        error = F.mse_loss(x_hat, x) if self.settings.reconstruction == "mse" else F.l1_loss(x_hat, x)
        element = kl_per_element(posterior)
        parts = {self.settings.reconstruction: error, "kl": element.mean(), "kl_sum": element.sum() / len(x)}
        loss = error + self.settings.kl_beta * parts["kl"]
        for name, term in self.terms.items():
            parts[name] = term(x, x_hat, posterior)
            loss = loss + getattr(self.settings, TERMS[name].weight) * parts[name]
        return {"loss": loss, **parts}


def psnr(x: Images, x_hat: Images) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each image in dB; images in [-1, 1], so the peak is 2."""
    error = (x_hat.clamp(-1, 1) - x).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=math.ldexp(1, -40)))
