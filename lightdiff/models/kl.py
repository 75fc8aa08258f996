"""The autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), as diffusers' AutoencoderKL lays it out.

Names and shapes of all tensors are those of diffusers, except that `quant_conv` belongs to the encoder here and
`post_quant_conv` to the decoder. Stable Diffusion 1 to 3, SDXL and FLUX.1 differ in the settings alone.
"""

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from lightdiff.models.layers import GroupNorm, at_least_float32, attend
from lightdiff.models.vae import VAE, Posterior
from lightdiff.settings import VAEArchitecture, Width, parse_numbers
from lightdiff.shapes import Float

Channels = Annotated[tuple[Width, ...], Field(min_length=1, max_length=10), BeforeValidator(parse_numbers)]
LOGVAR_BOUNDS = (-30.0, 20.0)
EPS = 1e-6


class KLVAESettings(VAEArchitecture):
    """AutoencoderKL: each level but the last halves the image; attention in the middle."""

    NETWORK: ClassVar = "lightdiff.models.kl:KLVAE"

    architecture: Literal["kl"] = Field("kl", description="architecture that these settings are of")
    channels: Channels = Field((128, 256, 512, 512), description="width of each level, from the image inwards")
    blocks: int = Field(2, ge=1, le=64, description="residual blocks a level going down; going up, one more")
    groups: int = Field(32, ge=1, le=1 << 14, description="groups of each GroupNorm; they must divide all widths")
    mid_attention: bool = Field(True, description="self-attention in the middle of encoder and decoder")
    quant_conv: bool = Field(True, description="a 1 x 1 convolution behind the encoder; FLUX.1 and SD 3 have none")
    post_quant_conv: bool = Field(True, description="a 1 x 1 convolution before the decoder")

    @model_validator(mode="after")
    def _groups_divide(self) -> "KLVAESettings":
        if odd := [width for width in self.channels if width % self.groups]:
            raise ValueError(f"groups: {self.groups} groups do not divide the width {odd[0]}")
        return self

    @property
    def factor(self) -> int:
        """How many times smaller than the image a latent is, along each side."""
        return int(2 ** (len(self.channels) - 1))


class KLResBlock(nn.Module):
    """Pre-activation residual block."""

    checkpointable = True

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out h w"]:
        """Map a feature map to one of the block's width."""
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return torch.add(x if self.conv_shortcut is None else self.conv_shortcut(x), h)


class KLAttention(nn.Module):
    """Self-attention over all positions, with one head, added to its input."""

    checkpointable = True

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Let every position take from all others."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (b, 1, h*w, c)
        mixed = self.to_out[0](attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)))
        return torch.add(x, mixed[:, 0].transpose(1, 2).reshape(x.shape))


class KLDownsample(nn.Module):
    """Halve the size with a strided convolution, padded below and on the right alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c i j"]:
        """Halve the size of x."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class KLUpsample(nn.Module):
    """Double the size: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 2*h 2*w"]:
        """Double the size of x."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class KLLevel(nn.Module):
    """Residual blocks, the first of which changes the width; then, on all levels but the last, a resampling."""

    def __init__(self, in_channels: int, out_channels: int, count: int, groups: int, **resample: nn.Module) -> None:
        """Build it; `resample` has the layer that halves or doubles by the name that it has in diffusers."""
        super().__init__()
        widths = [in_channels, *[out_channels] * (count - 1)]
        self.resnets = nn.ModuleList(KLResBlock(width, out_channels, groups) for width in widths)
        for name, layer in resample.items():
            self.add_module(name, nn.ModuleList([layer]))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out i j"]:
        """Apply all."""
        for layers in self.children():
            for layer in layers:  # type: ignore[attr-defined]
                x = layer(x)
        return x


class KLMiddle(nn.Module):
    """Two residual blocks around attention."""

    def __init__(self, settings: KLVAESettings) -> None:
        super().__init__()
        width, groups = settings.channels[-1], settings.groups
        self.resnets = nn.ModuleList(KLResBlock(width, width, groups) for _ in range(2))
        if settings.mid_attention:
            self.attentions = nn.ModuleList([KLAttention(width, groups)])
        self.attends = settings.mid_attention

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Apply all."""
        x = self.resnets[0](x)
        out: Tensor = self.resnets[1](self.attentions[0](x) if self.attends else x)
        return out


class KLEncoder(nn.Module):
    """Images -> mu and logvar of their latents."""

    def __init__(self, settings: KLVAESettings) -> None:
        super().__init__()
        s, widths, latent = settings, settings.channels, 2 * settings.latent_channels
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            halve = {"downsamplers": KLDownsample(width)} if level < len(widths) - 1 else {}
            self.down_blocks.append(KLLevel(widths[max(0, level - 1)], width, s.blocks, s.groups, **halve))
        self.mid_block = KLMiddle(s)
        self.conv_norm_out = GroupNorm(s.groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], latent, 3, padding=1)
        self.quant_conv = nn.Conv2d(latent, latent, 1) if s.quant_conv else nn.Identity()

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Posterior:
        """Encode images in [-1, 1]; the answer is float32 and its logvar lies between -30 and 20."""
        h = self.conv_in(x)
        for level in self.down_blocks:
            h = level(h)  # (b, channels[i], h/2, w/2)
        h = self.quant_conv(self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h)))))  # (b, 2c, h/f, w/f)
        mu, logvar = at_least_float32(h).chunk(2, dim=1)
        return Posterior(mu, logvar.clamp(*LOGVAR_BOUNDS))


class KLDecoder(nn.Module):
    """Latents -> images."""

    def __init__(self, settings: KLVAESettings) -> None:
        super().__init__()
        s, widths = settings, settings.channels[::-1]
        latent = s.latent_channels
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if s.post_quant_conv else nn.Identity()
        self.conv_in = nn.Conv2d(latent, widths[0], 3, padding=1)
        self.mid_block = KLMiddle(s)
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            double = {"upsamplers": KLUpsample(width)} if level < len(widths) - 1 else {}
            self.up_blocks.append(KLLevel(widths[max(0, level - 1)], width, s.blocks + 1, s.groups, **double))
        self.conv_norm_out = GroupNorm(s.groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 m n"]:
        """Decode latents to images in [-1, 1], which they may overshoot."""
        h = self.mid_block(self.conv_in(self.post_quant_conv(z)))
        for level in self.up_blocks:
            h = level(h)  # (b, channels[i], 2h, 2w)
        return at_least_float32(self.conv_out(F.silu(self.conv_norm_out(h))))


class KLVAE(VAE):
    """Encoder and decoder of AutoencoderKL."""

    def __init__(self, settings: KLVAESettings) -> None:
        super().__init__(settings, KLEncoder, KLDecoder)
