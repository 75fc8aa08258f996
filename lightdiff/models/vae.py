"""The VAE: images in [-1, 1] <-> latents (Kingma & Welling 2013, arXiv:1312.6114)."""

from collections.abc import Callable
from itertools import pairwise
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightdiff.models.layers import (
    Attention,
    Downsample,
    Norm,
    PixelNorm,
    ResBlock,
    Upsample,
    at_least_float32,
    group_norm,
    level_plan,
)
from lightdiff.settings import VAEArchitecture, VAESettings
from lightdiff.shapes import Float

NORMS: dict[str, Norm] = {"pixel": PixelNorm, "group": group_norm}
OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": lambda x: torch.sigmoid(x) * 2 - 1,
    "none": lambda x: x,
}


class Posterior(NamedTuple):
    """The encoder's answer: a normal distribution for each latent element."""

    mu: Float[Tensor, "b c h w"]
    logvar: Float[Tensor, "b c h w"]

    def sample(self, noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """A draw: z = mu + sigma * noise, sigma = exp(logvar / 2) (Kingma & Welling 2013, Eq. 10)."""
        return self.mu + torch.exp(0.5 * self.logvar) * noise


class LatentTransform(NamedTuple):
    """Makes images or latents smaller, and turns them: a VAE whose latents may be treated as its images are.

    Such latents have less of what diffusion finds hard to learn: EQ-VAE, Kouzelis et al. 2025 (arXiv:2502.09509).
    """

    quarters: int  # of the side that are left, 1 to 4
    turns: int  # by 90 degrees, 0 to 3

    def __call__(self, x: Float[Tensor, "b c h w"], factor: int = 1) -> Float[Tensor, "b c i j"]:
        """The changed latents; or images, with the factor by which they are larger than their latents."""
        if self.quarters < 4:
            size = [factor * max(1, side // factor * self.quarters // 4) for side in x.shape[2:]]
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
        return torch.rot90(x, self.turns, (2, 3)).contiguous()  # strides, too, would make compiled networks new ones


def res_blocks(settings: VAESettings, in_channels: int, out_channels: int, count: int) -> list[nn.Module]:
    """Residual blocks, the first of which changes the width."""
    return [ResBlock(a, b, NORMS[settings.norm]) for a, b in pairwise([in_channels] + [out_channels] * count)]


def middle(settings: VAESettings, channels: int) -> list[nn.Module]:
    """Residual blocks and, if chosen, attention at the latent's size."""
    blocks = res_blocks(settings, channels, channels, settings.mid_blocks)
    if settings.attention:
        blocks.insert(1, Attention(channels, heads=1, norm=NORMS[settings.norm]))
    return blocks


class Encoder(nn.Module):
    """Images -> mu and logvar of their latents."""

    def __init__(self, settings: VAESettings) -> None:
        """Build it from resolved settings (`VAESettings.resolved`)."""
        super().__init__()
        s, (stem, *_, last) = settings, settings.encoder_channels
        layers: list[nn.Module] = [nn.Conv2d(3, stem, 3, padding=1)]  # (b, stem, h, w)
        for a, b, count in level_plan(s.encoder_channels, s.encoder_blocks):
            layers += [*res_blocks(s, a, b, count), Downsample(b)]  # (b, channels[i], h/2, w/2)
        self.body = nn.Sequential(*layers, *middle(s, last), NORMS[s.norm](last), nn.SiLU())
        self.mu, self.logvar = (nn.Conv2d(last, s.latent_channels, 1) for _ in range(2))
        self.bounds = (s.logvar_min, s.logvar_max)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Posterior:
        """Encode images in [-1, 1]; the answer is float32 and its logvar lies within the bounds."""
        h = self.body(x)  # (b, channels[-1], h/f, w/f)
        mu, logvar = at_least_float32(self.mu(h)), at_least_float32(self.logvar(h))  # (b, c, h/f, w/f)
        return Posterior(mu, soft_bound(logvar, *self.bounds))


class Decoder(nn.Module):
    """Latents -> images."""

    def __init__(self, settings: VAESettings) -> None:
        """Build it from resolved settings (`VAESettings.resolved`)."""
        super().__init__()
        s, (first, *_, last) = settings, settings.decoder_channels
        layers: list[nn.Module] = [nn.Conv2d(s.latent_channels, first, 1), *middle(s, first)]  # (b, first, h/f, w/f)
        for a, b, count in level_plan(s.decoder_channels, s.decoder_blocks):
            layers += [Upsample(a, b), *res_blocks(s, b, b, count)]  # (b, channels[i], 2h, 2w)
        self.body = nn.Sequential(*layers, NORMS[s.norm](last), nn.SiLU(), nn.Conv2d(last, 3, 3, padding=1))
        self.output = s.output

    def forward(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 m n"]:
        """Decode latents to images in [-1, 1] (a sigmoid's [0, 1] is stretched; `none` may overshoot)."""
        return OUTPUTS[self.output](at_least_float32(self.body(z)))  # (b, 3, f*h, f*w)


class VAE(nn.Module):
    """Encoder and decoder, of whichever architecture."""

    def __init__(
        self,
        settings: VAEArchitecture,
        encoder: Callable[[Any], nn.Module] = Encoder,
        decoder: Callable[[Any], nn.Module] = Decoder,
    ) -> None:
        """Build both from resolved settings (`VAESettings.resolved`)."""
        super().__init__()
        self.encoder = encoder(settings)
        self.decoder = decoder(settings)

    def forward(
        self, x: Float[Tensor, "b 3 h w"], noise: Float[Tensor, "b l m n"], change: LatentTransform | None = None
    ) -> tuple[Float[Tensor, "b 3 i j"], Posterior]:
        """Reconstruct x through a latent drawn with this noise, which may be changed before it is decoded."""
        posterior: Posterior = self.encoder(x)
        z = posterior.sample(noise)
        return self.decoder(change(z) if change else z), posterior


def build_vae(settings: VAEArchitecture) -> VAE:
    """The VAE of resolved settings, whichever architecture they are of."""
    vae: VAE = resolve_name(settings.NETWORK)(settings)
    return vae


def soft_bound(x: Tensor, low: float, high: float) -> Tensor:
    """Push x smoothly into (low, high): the identity well inside, and, unlike a clamp, a gradient beyond the bounds."""
    return low + F.softplus(high - F.softplus(high - x) - low)
