"""TAESD, the tiny autoencoder (github.com/madebyollin/taesd), as diffusers' AutoencoderTiny lays it out."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lightdiff.models.layers import at_least_float32
from lightdiff.models.vae import VAE, Posterior
from lightdiff.settings import Counts, VAEArchitecture, Width
from lightdiff.shapes import Float

LOGVAR = -30.0  # its latents are no distribution


class TinyVAESettings(VAEArchitecture):
    """TAESD: plain convolutions and ReLU; every level but the finest halves the image."""

    NETWORK: ClassVar = "lightdiff.extras.taesd:TinyVAE"

    architecture: Literal["taesd"] = Field("taesd", description="architecture that these settings are of")
    width: Width = Field(64, description="channels of all layers")
    encoder_blocks: Counts = Field((1, 3, 3, 3), description="blocks of each level, from the image inwards")
    decoder_blocks: Counts = Field((3, 3, 3, 1), description="blocks of each level, from the latent outwards")

    @property
    def factor(self) -> int:
        """How many times smaller than the image a latent is, along each side."""
        return int(2 ** (len(self.encoder_blocks) - 1))


class TinyBlock(nn.Module):
    """Three convolutions, added to their input."""

    checkpointable = True

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Map a feature map to one of the same shape."""
        return torch.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """Images -> mu and a logvar of -30, as there is no posterior."""

    def __init__(self, settings: TinyVAESettings) -> None:
        super().__init__()
        first, *others = settings.encoder_blocks
        layers = [conv(3, settings.width), *blocks(settings.width, first)]
        for count in others:
            layers += [conv(settings.width, settings.width, stride=2, bias=False), *blocks(settings.width, count)]
        self.layers = nn.Sequential(*layers, conv(settings.width, settings.latent_channels))

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Posterior:
        """Encode images in [-1, 1]."""
        mu = at_least_float32(self.layers((x + 1) / 2))
        return Posterior(mu, torch.full_like(mu, LOGVAR))


class TinyDecoder(nn.Module):
    """Latents -> images."""

    def __init__(self, settings: TinyVAESettings) -> None:
        super().__init__()
        *others, last = settings.decoder_blocks
        layers: list[nn.Module] = [conv(settings.latent_channels, settings.width), nn.ReLU()]
        for count in others:
            double = [nn.Upsample(scale_factor=2.0), conv(settings.width, settings.width, bias=False)]
            layers += [*blocks(settings.width, count), *double]
        self.layers = nn.Sequential(*layers, *blocks(settings.width, last), conv(settings.width, 3))

    def forward(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 m n"]:
        """Decode latents to images in [-1, 1], which they may overshoot."""
        return at_least_float32(self.layers(torch.tanh(z / 3) * 3)) * 2 - 1


class TinyVAE(VAE):
    """Encoder and decoder of TAESD."""

    def __init__(self, settings: TinyVAESettings) -> None:
        super().__init__(settings, TinyEncoder, TinyDecoder)


def conv(in_channels: int, out_channels: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A 3 x 3 convolution."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=bias)


def blocks(width: int, count: int) -> list[nn.Module]:
    """Blocks, one after the other."""
    return [TinyBlock(width) for _ in range(count)]
