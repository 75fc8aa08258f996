"""What both networks share: residual block, self-attention, up- and downsampling, time embedding."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
"""Width -> its normalisation layer."""


def group_norm(channels: int, groups: int, group_width: int = 0) -> nn.GroupNorm:
    """GroupNorm (Wu & He 2018, arXiv:1803.08494) of `groups` groups, or of groups of `group_width` channels.

    Where the width is not divisible, the common divisor is taken instead, so any width can be built.
    """
    count = channels // math.gcd(channels, group_width) if group_width else math.gcd(channels, groups)
    return nn.GroupNorm(count, channels)


class PixelNorm(nn.LayerNorm):
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450) over the channels of each pixel, as in ConvNeXt (Liu et al. 2022).

    GroupNorm's statistics run over the whole feature map, and a decoder learns to steer them with a spike of huge
    values somewhere in it: in the image, a black or coloured droplet (Karras et al. 2020, arXiv:1912.04958, section
    2). Here, no pixel has a say in another's scale.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, c, h, w) to (b, c, h, w)."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).to(x.dtype)


class ResBlock(nn.Module):
    """Pre-activation residual block: norm, SiLU, conv, twice, added to its input.

    With `time_dim` the second norm is scaled and shifted by the time embedding: h = norm(h) (1 + scale) + shift
    (Dhariwal & Nichol 2021, arXiv:2105.05233, Eq. 1, "adaptive group normalisation").
    """

    checkpointable = True

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, time_dim: int = 0) -> None:
        """Build a block (b, in_channels, h, w) -> (b, out_channels, h, w); `time_dim` 0 means no conditioning."""
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_channels) if time_dim else None
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Map (b, in, h, w), and time (b, time_dim) if the block is conditioned, to (b, out, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h)
        if self.time is not None:
            assert time is not None, "a conditioned block needs the time embedding"
            scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        out: Tensor = self.conv2(F.silu(h)) + self.skip(x)
        return out


class Attention(nn.Module):
    """Self-attention over all positions of a feature map, added to its input (Vaswani et al. 2017, Eq. 1)."""

    checkpointable = True

    def __init__(self, channels: int, heads: int, norm: Norm) -> None:
        """Build it with `heads` heads, which must divide `channels`."""
        super().__init__()
        self.heads = heads
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, c, h, w) to (b, c, h, w)."""
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (b, h*w, c)
        qkv = self.qkv(tokens).view(b, h * w, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (b, heads, h*w, c/heads)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        out: Tensor = x + self.proj(mixed).transpose(1, 2).reshape(b, c, h, w)
        return out


class PlainBlock(nn.Sequential):
    """Convolution, GroupNorm, SiLU: the building block of the original scripts."""

    checkpointable = True

    def __init__(self, in_channels: int, out_channels: int, norm: Norm) -> None:
        """Build (b, in, h, w) -> (b, out, h, w)."""
        super().__init__(nn.Conv2d(in_channels, out_channels, 3, padding=1), norm(out_channels), nn.SiLU())


class Downsample(nn.Conv2d):
    """Halve height and width with a strided convolution, 4 x 4 (original) or 3 x 3; both pad by one."""

    def __init__(self, channels: int, kernel: int = 3) -> None:
        """Build (b, c, h, w) -> (b, c, h/2, w/2)."""
        super().__init__(channels, channels, kernel, stride=2, padding=1)


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution.

    Unlike a strided transposed convolution, every output pixel sees the same number of weights, so no
    checkerboard can appear (Odena et al. 2016, "Deconvolution and Checkerboard Artifacts").
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Build (b, in, h, w) -> (b, out, 2h, 2w)."""
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Double the size of x."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class TimeEmbedding(nn.Module):
    """A level's number as a vector: sines and cosines, then two linear layers (Ho et al. 2020, appendix B)."""

    freq: Tensor

    def __init__(self, dim: int) -> None:
        """Build (b,) -> (b, dim); frequencies fall geometrically from 1 to 1e-4 radians a level."""
        super().__init__()
        freq = torch.logspace(0, -4, dim // 2, dtype=torch.float64).float()
        self.register_buffer("freq", freq, persistent=False)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        """Map levels (b,), 0 to T - 1, to (b, dim)."""
        angles = t[:, None].float() * self.freq  # float32 even under autocast: bf16 cannot tell 998 from 999
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        out: Tensor = self.linear2(F.silu(self.linear1(waves)))
        return out


def at_least_float32(x: Tensor) -> Tensor:
    """What a network answers, which autocast may have made bf16: float32, or float64 if it computes in that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def zero_init(module: nn.Module) -> None:
    """Set a module's weights and bias to zero, so that the branch it ends adds nothing at first."""
    for parameter in module.parameters(recurse=False):
        nn.init.zeros_(parameter)
