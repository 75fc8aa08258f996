"""The VAE: images in [-1, 1] <-> latents (Kingma & Welling 2013, arXiv:1312.6114)."""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightdiff.models.layers import (
    Attention,
    Downsample,
    Norm,
    PixelNorm,
    PlainBlock,
    ResBlock,
    Upsample,
    at_least_float32,
    group_norm,
)
from lightdiff.settings import VAESettings


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
        return torch.rot90(x, self.turns, (2, 3))


def norm_of(settings: VAESettings) -> Norm:
    """The normalisation layers of these settings."""
    return PixelNorm if settings.norm == "pixel" else partial(group_norm, groups=settings.groups)


def level_blocks(settings: VAESettings, in_channels: int, out_channels: int, count: int) -> list[nn.Module]:
    """`count` blocks of the chosen kind, the first one changing the width."""
    kind = ResBlock if settings.block == "residual" else PlainBlock
    widths = [in_channels] + [out_channels] * count
    return [kind(a, b, norm_of(settings)) for a, b in pairwise(widths)]


def middle(settings: VAESettings, channels: int) -> list[nn.Module]:
    """Residual blocks and, if chosen, attention at the latent's size."""
    norm = norm_of(settings)
    blocks: list[nn.Module] = [ResBlock(channels, channels, norm) for _ in range(settings.mid_blocks)]
    if settings.attention:
        blocks.insert(1, Attention(channels, heads=1, norm=norm))
    return blocks


def norm_act(settings: VAESettings, channels: int) -> list[nn.Module]:
    """What a chain of pre-activation blocks ends with; plain blocks end with it anyway."""
    return [norm_of(settings)(channels), nn.SiLU()] if settings.block == "residual" else []


def blocks_at(counts: tuple[int, ...], level: int) -> int:
    """Blocks of a level; a short list repeats its last number."""
    return counts[min(level, len(counts) - 1)]


class Encoder(nn.Module):
    """Images -> mu and logvar of their latents."""

    def __init__(self, settings: VAESettings) -> None:
        """Build it from resolved settings (`VAESettings.resolved`)."""
        super().__init__()
        s, channels = settings, settings.encoder_channels
        layers: list[nn.Module] = [nn.Conv2d(s.image_channels, channels[0], 3, padding=1)]
        for level, (a, b) in enumerate(pairwise(channels)):
            layers += [*level_blocks(s, a, b, blocks_at(s.encoder_blocks, level)), Downsample(b, s.down_kernel)]
        self.body = nn.Sequential(*layers, *middle(s, channels[-1]), *norm_act(s, channels[-1]))
        self.mu = nn.Conv2d(channels[-1], s.latent_channels, 1)
        self.logvar = nn.Conv2d(channels[-1], s.latent_channels, 1)
        self.bounds = (s.logvar_min, s.logvar_max)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Posterior:
        """Encode images in [-1, 1]; the answer is float32 and its logvar lies within the bounds."""
        h = self.body(x)
        mu, logvar = at_least_float32(self.mu(h)), at_least_float32(self.logvar(h))
        return Posterior(mu, soft_bound(logvar, *self.bounds))


class Decoder(nn.Module):
    """Latents -> images."""

    def __init__(self, settings: VAESettings) -> None:
        """Build it from resolved settings (`VAESettings.resolved`)."""
        super().__init__()
        s, channels = settings, settings.decoder_channels
        layers: list[nn.Module] = [nn.Conv2d(s.latent_channels, channels[0], 1), *middle(s, channels[0])]
        for level, (a, b) in enumerate(pairwise(channels)):
            up = Upsample(a, b) if s.upsample == "nearest" else nn.ConvTranspose2d(a, b, 4, stride=2, padding=1)
            layers += [up, *level_blocks(s, b, b, blocks_at(s.decoder_blocks, level))]
        out = nn.Conv2d(channels[-1], s.image_channels, 3, padding=1)
        self.body = nn.Sequential(*layers, *norm_act(s, channels[-1]), out)
        self.output = s.output

    def forward(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l m n"]:
        """Decode latents to images in [-1, 1] (a sigmoid's [0, 1] is stretched; `none` may overshoot)."""
        x = at_least_float32(self.body(z))
        if self.output == "none":
            return x
        return torch.tanh(x) if self.output == "tanh" else torch.sigmoid(x) * 2 - 1


class VAE(nn.Module):
    """Encoder and decoder."""

    def __init__(self, settings: VAESettings) -> None:
        """Build both from resolved settings (`VAESettings.resolved`)."""
        super().__init__()
        self.encoder = Encoder(settings)
        self.decoder = Decoder(settings)

    def forward(
        self, x: Float[Tensor, "b c h w"], noise: Float[Tensor, "b l m n"], change: LatentTransform | None = None
    ) -> tuple[Float[Tensor, "b c i j"], Posterior]:
        """Reconstruct x through a latent drawn with this noise, which may be changed before it is decoded."""
        posterior: Posterior = self.encoder(x)
        z = posterior.sample(noise)
        return self.decoder(change(z) if change else z), posterior


def soft_bound(x: Tensor, low: float, high: float) -> Tensor:
    """Push x smoothly into (low, high): the identity well inside, and, unlike a clamp, a gradient beyond the bounds."""
    x = high - F.softplus(high - x)
    return low + F.softplus(x - low)
