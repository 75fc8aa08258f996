"""The original scripts' two networks, exactly, with the names that their tensors have there."""

import math
from collections import OrderedDict
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from lightdiff.models.layers import GroupNorm, Time, at_least_float32, group_norm, level_plan
from lightdiff.models.vae import OUTPUTS, VAE, Posterior, soft_bound
from lightdiff.settings import Counts, UNetArchitecture, VAEArchitecture, Width, parse_numbers
from lightdiff.shapes import Float, Int, Real

Channels = Annotated[tuple[Width, ...], Field(min_length=2, max_length=10), BeforeValidator(parse_numbers)]
LOGVAR_BOUNDS = (-30.0, 20.0)


def named(**layers: nn.Module) -> nn.Sequential:
    """Layers, one after the other, by their names."""
    return nn.Sequential(OrderedDict(layers))


# --- VAE ----------------------------------------------------------------------------------------------------------


class OriginalVAESettings(VAEArchitecture):
    """The original scripts' VAE: convolution, GroupNorm, SiLU; halved and doubled by strided convolutions."""

    NETWORK: ClassVar = "lightdiff.models.original:OriginalVAE"

    architecture: Literal["original"] = Field("original", description="architecture that these settings are of")
    encoder_channels: Channels = Field((64, 128, 256, 512), description="encoder widths: stem, then each level")
    decoder_channels: Channels = Field((512, 256, 128, 64), description="decoder widths from the latent outwards")
    encoder_blocks: Counts = Field((3, 4, 4), description="blocks a level; a short list repeats its last number")
    decoder_blocks: Counts = Field((3, 4, 4), description="blocks a level; a short list repeats its last number")
    output: Literal["tanh", "sigmoid", "none"] = Field("tanh", description="output activation")

    @model_validator(mode="after")
    def _consistent(self) -> "OriginalVAESettings":
        encoder, decoder = len(self.encoder_channels), len(self.decoder_channels)
        if encoder != decoder:
            raise ValueError(f"{encoder} encoder_channels but {decoder} decoder_channels; both need the same count")
        return self

    @property
    def factor(self) -> int:
        """How many times smaller than the image a latent is, along each side."""
        return int(2 ** (len(self.encoder_channels) - 1))


class ConvBlock(nn.Module):
    """Convolution, GroupNorm, SiLU, several times, the first one changing the width."""

    checkpointable = True

    def __init__(self, in_channels: int, out_channels: int, count: int) -> None:
        super().__init__()
        self.block = nn.Sequential()
        for a, b in pairwise([in_channels] + [out_channels] * count):
            self.block.extend([nn.Conv2d(a, b, 3, padding=1), group_norm(b, 8), nn.SiLU()])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out h w"]:
        """Apply all."""
        out: Tensor = self.block(x)
        return out


class OriginalEncoder(nn.Module):
    """Images -> mu and logvar of their latents."""

    def __init__(self, settings: OriginalVAESettings) -> None:
        super().__init__()
        channels = settings.encoder_channels
        self.img_to_feat = nn.Conv2d(3, channels[0], 3, padding=1)
        self.encoder_layers = nn.Sequential()
        for a, b, count in level_plan(channels, settings.encoder_blocks):
            blocks = ConvBlock(a, b, count)  # before the layer that halves: a seed gives each its initial weights
            self.encoder_layers.append(named(conv=blocks, downsample=nn.Conv2d(b, b, 4, stride=2, padding=1)))
        heads = {name: nn.Conv2d(channels[-1], settings.latent_channels, 1) for name in ("mu", "logvar")}
        self.feat_to_latent = nn.ModuleDict(heads)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Posterior:
        """Encode images in [-1, 1]; the answer is float32 and its logvar lies between -30 and 20."""
        h = self.encoder_layers(self.img_to_feat(x))  # (b, channels[-1], h/f, w/f)
        mu, logvar = (at_least_float32(self.feat_to_latent[name](h)) for name in ("mu", "logvar"))
        return Posterior(mu, soft_bound(logvar, *LOGVAR_BOUNDS))


class OriginalDecoder(nn.Module):
    """Latents -> images."""

    def __init__(self, settings: OriginalVAESettings) -> None:
        super().__init__()
        channels = settings.decoder_channels
        self.latent_to_feat = nn.ModuleDict({"proj": nn.Conv2d(settings.latent_channels, channels[0], 1)})
        self.decoder_layers = nn.Sequential()
        for a, b, count in level_plan(channels, settings.decoder_blocks):
            double = nn.ConvTranspose2d(a, b, 4, stride=2, padding=1)
            self.decoder_layers.append(named(upsample=double, conv=ConvBlock(b, b, count)))
        self.feat_to_img = nn.Conv2d(channels[-1], 3, 3, padding=1)
        self.output = settings.output

    def forward(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 m n"]:
        """Decode latents to images in [-1, 1] (a sigmoid's [0, 1] is stretched; `none` may overshoot)."""
        h = self.decoder_layers(self.latent_to_feat["proj"](z))  # (b, channels[-1], f*h, f*w)
        return OUTPUTS[self.output](at_least_float32(self.feat_to_img(h)))


class OriginalVAE(VAE):
    """Encoder and decoder of the original scripts."""

    def __init__(self, settings: OriginalVAESettings) -> None:
        super().__init__(settings, OriginalEncoder, OriginalDecoder)


# --- U-Net --------------------------------------------------------------------------------------------------------


class OriginalUNetSettings(UNetArchitecture):
    """The original scripts' U-Net: no attention but in the middle, nothing that starts at zero."""

    NETWORK: ClassVar = "lightdiff.models.original:OriginalUNet"

    architecture: Literal["original"] = Field("original", description="architecture that these settings are of")
    channels: Channels = Field((128, 256, 512, 1024), description="widths: stem, then each level")
    blocks: int = Field(3, ge=1, le=64, description="residual blocks a level, going down and going up")
    time_dim: int = Field(512, ge=4, le=1 << 14, multiple_of=2, description="width of the time embedding")

    @model_validator(mode="after")
    def _heads_divide(self) -> "OriginalUNetSettings":
        if self.channels[-1] % HEADS:
            raise ValueError(f"channels: the {HEADS} heads of attention do not divide the last width")
        return self

    @property
    def factor(self) -> int:
        """What a latent's sides must be divisible by."""
        return int(2 ** (len(self.channels) - 1))


HEADS = 4


def block_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of groups of 4 channels, or of fewer where 4 does not divide the width."""
    return GroupNorm(channels // math.gcd(channels, 4), channels)


class OriginalResBlock(nn.Module):
    """Pre-activation residual block, its second norm scaled and shifted by the time embedding."""

    checkpointable = True

    def __init__(self, in_channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__()
        self.norm1 = block_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = block_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.time_proj = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * out_channels))

    def forward(self, x: Float[Tensor, "b c h w"], time: Time) -> Float[Tensor, "b out h w"]:
        """Map a feature map to one of the block's width."""
        scale, shift = self.time_proj(time)[:, :, None, None].chunk(2, dim=1)  # each (b, out, 1, 1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return torch.add(self.conv2(F.silu(h)), self.skip(x))


class OriginalAttention(nn.Module):
    """Self-attention over all positions, added to its input."""

    checkpointable = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = block_norm(channels)
        self.attention = nn.MultiheadAttention(channels, HEADS, batch_first=True)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Let every position take from all others."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (b, h*w, c)
        mixed: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return x + mixed.transpose(1, 2).reshape(x.shape)


class Waves(nn.Module):
    """A level's number as sines and cosines of frequencies from 1 to 1e-4 radians a level."""

    freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("freq", torch.logspace(0, -4, dim // 2, dtype=torch.float64).float())

    def forward(self, t: Real[Tensor, " b"]) -> Time:
        """Map levels to (b, dim)."""
        angles = t[:, None].float() * self.freq
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class OriginalUNet(nn.Module):
    """(x_t, t) -> what the objective asks for, of the shape of x_t; (x_t, t, label) where it knows classes."""

    def __init__(self, settings: OriginalUNetSettings, latent_channels: int, num_classes: int = 0) -> None:
        super().__init__()
        channels, dim, blocks = settings.channels, settings.time_dim, settings.blocks
        self.factor = settings.factor
        self.time_embedding = nn.Sequential(Waves(dim), nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        self.label = nn.Embedding(num_classes + 1, dim) if num_classes else None  # the scripts know no classes
        self.latent_to_unet_input = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for a, b in pairwise(channels):
            self.down.extend(OriginalResBlock(i, o, dim) for i, o in pairwise([a] + [b] * blocks))
            self.down.append(named(conv=nn.Conv2d(b, b, 4, stride=2, padding=1)))
        self.mid_block1 = OriginalResBlock(channels[-1], channels[-1], dim)
        self.mid_attn = OriginalAttention(channels[-1])
        self.mid_block2 = OriginalResBlock(channels[-1], channels[-1], dim)
        for b, a in pairwise(channels[::-1]):
            self.up.append(named(upsample=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(b, b, 3, padding=1)))
            self.up.extend(OriginalResBlock(i + b, o, dim) for i, o in pairwise([b] + [a] * blocks))
        self.final_norm = group_norm(channels[0])
        self.final_conv = nn.Conv2d(channels[0], latent_channels, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Real[Tensor, " b"], label: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Predict, in float32; arguments as those of `lightdiff.models.unet.UNet`, h and w divisible by the factor."""
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"latents of {x.shape[2]} x {x.shape[3]} are not divisible by {self.factor}")
        time = self.time_embedding(t)  # (b, time_dim)
        if self.label is not None:
            label = torch.full_like(t, self.label.num_embeddings - 1, dtype=torch.long) if label is None else label
            time = time + self.label(label)
        h = self.latent_to_unet_input(x)  # (b, channels[0], h, w)
        kept: list[Tensor] = []
        for layer in self.down:
            if isinstance(layer, OriginalResBlock):
                h = layer(h, time)  # (b, channels[i], ...)
                kept.append(h)
            else:
                h = layer(h)  # (b, channels[i], h/2, w/2)
        h = self.mid_block2(self.mid_attn(self.mid_block1(h, time)), time)
        for layer in self.up:
            if isinstance(layer, OriginalResBlock):
                h = layer(torch.cat([h, kept.pop()], dim=1), time)  # (b, channels[i-1], ...)
            else:
                h = layer(h)  # (b, channels[i], 2h, 2w)
        return at_least_float32(self.final_conv(F.silu(self.final_norm(h))))  # (b, c, h, w)
