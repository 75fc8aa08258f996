"""What both networks share: residual block, self-attention, up- and downsampling, time embedding."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightdiff.shapes import Float, Real

Norm = Callable[[int], nn.Module]  # width -> its normalisation layer
Time = Float[Tensor, "b t"]  # the time embedding


class GroupNorm(nn.GroupNorm):
    """GroupNorm (Wu & He 2018, arXiv:1803.08494) in its input's dtype, where CUDA's autocast makes bf16 float32."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalise each group of channels."""
        return super().forward(x).to(x.dtype)


def group_norm(channels: int, groups: int = 32) -> nn.GroupNorm:
    """GroupNorm with fewer groups where they do not divide the width: any can be built."""
    return GroupNorm(math.gcd(channels, groups), channels)


class PixelNorm(nn.LayerNorm):
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450) over the channels of each pixel, as in ConvNeXt (Liu et al. 2022).

    GroupNorm's statistics run over the whole feature map, and a decoder learns to steer them with a spike of huge
    values somewhere in it: in the image, a black or coloured droplet (Karras et al. 2020, arXiv:1912.04958, section
    2). Here, no pixel has a say in another's scale.
    """

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalise each pixel."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).to(x.dtype)


class ResBlock(nn.Module):
    """Pre-activation residual block: norm, SiLU, conv, twice, added to its input.

    With `time_dim` the second norm is scaled and shifted by the time embedding: h = norm(h) (1 + scale) + shift
    (Dhariwal & Nichol 2021, arXiv:2105.05233, Eq. 1, "adaptive group normalisation").
    """

    checkpointable = True

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, time_dim: int = 0) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_channels) if time_dim else None
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"], time: Time | None = None) -> Float[Tensor, "b out h w"]:
        """Map x, and the time embedding if the block is conditioned on it."""
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))  # (b, out, h, w)
        if self.time is not None:
            assert time is not None, "a conditioned block needs the time embedding"
            scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, dim=1)  # each (b, out, 1, 1)
            h = h * (1 + scale) + shift
        return torch.add(self.conv2(F.silu(h)), self.skip(x))


def attend(
    q: Float[Tensor, "b n l c"], k: Float[Tensor, "b n l c"], v: Float[Tensor, "b n l c"]
) -> Float[Tensor, "b n l c"]:
    """softmax(q k^T / sqrt(c)) v of each head (Vaswani et al. 2017, Eq. 1), by torch's fused kernels.

    On a CPU in float32, whatever autocast says: there, their backward pass takes bf16 for 64 tokens three times as
    long, for 16 eight times.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        mixed = F.scaled_dot_product_attention(at_least_float32(q), at_least_float32(k), at_least_float32(v))
    return mixed.to(v.dtype)


class Attention(nn.Module):
    """Self-attention over all positions of a feature map, added to its input."""

    checkpointable = True

    def __init__(self, channels: int, heads: int, norm: Norm) -> None:
        """Build it with `heads` heads, which must divide `channels`."""
        super().__init__()
        self.heads = heads
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Let every position take from all others."""
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (b, h*w, c)
        qkv = self.qkv(tokens).view(b, h * w, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (b, heads, h*w, c/heads)
        mixed = attend(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return torch.add(x, self.proj(mixed).transpose(1, 2).reshape(b, c, h, w))


class Downsample(nn.Conv2d):
    """Halve height and width, an odd one rounding up, with a strided 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """Double height and width: nearest neighbour, then a 3 x 3 convolution.

    Unlike a strided transposed convolution, every output pixel sees the same number of weights, so no
    checkerboard can appear (Odena et al. 2016, "Deconvolution and Checkerboard Artifacts").
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out 2*h 2*w"]:
        """Double the size of x."""
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class TimeEmbedding(nn.Module):
    """A level's number as a vector: sines and cosines, then two linear layers (Ho et al. 2020, appendix B).

    Frequencies fall geometrically from 1 to 1e-4 radians a level.
    """

    freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        steps = max(1, dim // 2 - 1)  # no torch.logspace: on the meta device, it imports sympy, half a second
        freq = torch.tensor([10 ** (-4 * i / steps) for i in range(dim // 2)], dtype=torch.float32)
        self.register_buffer("freq", freq, persistent=False)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)

    def forward(self, t: Real[Tensor, " b"]) -> Float[Tensor, "b dim"]:
        """Embed levels, 0 to T - 1."""
        angles = t[:, None].float() * self.freq  # float32 even under autocast: bf16 cannot tell 998 from 999
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (b, dim)
        out: Tensor = self.linear2(F.silu(self.linear1(waves)))
        return out


def at_least_float32(x: Tensor) -> Tensor:
    """What a network answers, which autocast may have made bf16: float32, or float64 if it computes in that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def level_plan(channels: tuple[int, ...], counts: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """What each level leads from and to, and its number of blocks; a short list of counts repeats its last number."""
    return [(a, b, counts[min(level, len(counts) - 1)]) for level, (a, b) in enumerate(pairwise(channels))]
