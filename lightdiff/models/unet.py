"""The U-Net that denoises latents (Ronneberger et al. 2015; Ho et al. 2020, appendix B)."""

from itertools import pairwise
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightdiff.models.layers import (
    Attention,
    Downsample,
    ResBlock,
    Time,
    TimeEmbedding,
    Upsample,
    at_least_float32,
    group_norm,
)
from lightdiff.settings import UNetArchitecture, UNetSettings
from lightdiff.shapes import Float, Int, Real


class UNetBlock(nn.Module):
    """One residual block and, at chosen levels, attention."""

    def __init__(self, in_channels: int, out_channels: int, settings: UNetSettings, attend: bool) -> None:
        super().__init__()
        self.block = ResBlock(in_channels, out_channels, group_norm, settings.time_dim)
        self.attention = Attention(out_channels, settings.heads, group_norm) if attend else None

    def forward(self, x: Float[Tensor, "b c h w"], time: Time) -> Float[Tensor, "b out h w"]:
        """Apply block and attention."""
        h: Tensor = self.block(x, time)
        return h if self.attention is None else self.attention(h)


class UNet(nn.Module):
    """(x_t, t) -> what the objective asks for, of the shape of x_t; (x_t, t, label) where it knows classes.

    Going down, each level has `blocks` residual blocks, whose outputs are kept, and a halving. Going up, it doubles
    and has as many blocks, each of which first takes in what was kept. Upward, level i ends at the width of the
    level below it, so that its widths are those of the way down, read backwards.
    """

    down: Any  # nn.ModuleList of a list for each level: its blocks, and the layer that halves
    up: Any  # the same, coarsest level first, with the layer that doubles

    def __init__(self, settings: UNetSettings, latent_channels: int, num_classes: int = 0) -> None:
        """Build it from resolved settings (`UNetSettings.resolved`); without classes it takes no label."""
        super().__init__()
        s, channels, attended = settings, settings.channels, settings.attend_levels or ()
        levels = list(enumerate(pairwise(channels)))
        self.time = TimeEmbedding(s.time_dim)
        self.label = nn.Embedding(num_classes + 1, s.time_dim) if num_classes else None  # the last one: no label
        self.stem = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, (a, b) in levels:
            blocks = [UNetBlock(i, o, s, level in attended) for i, o in pairwise([a] + [b] * s.blocks)]
            self.down.append(nn.ModuleList([*blocks, Downsample(b)]))
        self.mid1 = UNetBlock(channels[-1], channels[-1], s, s.mid_attention)
        self.mid2 = UNetBlock(channels[-1], channels[-1], s, False)
        for level, (a, b) in reversed(levels):
            blocks = [UNetBlock(i + b, o, s, level in attended) for i, o in pairwise([b] + [a] * s.blocks)]
            self.up.append(nn.ModuleList([*blocks, Upsample(b, b)]))
        self.norm = group_norm(channels[0])
        self.out = nn.Conv2d(channels[0], latent_channels, 3, padding=1)
        for name, parameter in self.named_parameters():
            # Residual branches and the output start at zero (Ho et al. 2020's code; Goyal et al. 2017).
            if s.zero_init and name.split(".")[-2] in ("conv2", "proj", "out"):
                nn.init.zeros_(parameter)

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Real[Tensor, " b"], label: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Predict, in float32.

        Args:
            x: Noised latents.
            t: Their levels, 0 to T - 1, which may lie between whole ones.
            label: Their classes, 0 to num_classes - 1, or `num_classes` for those of no known class, as all are if not
                given.
        """
        time = self.time(t)  # (b, time_dim)
        if self.label is not None:
            label = torch.full_like(t, self.label.num_embeddings - 1, dtype=torch.long) if label is None else label
            time = time + self.label(label)
        h = self.stem(x)  # (b, channels[0], h, w)
        kept: list[Tensor] = []
        for *blocks, halve in self.down:
            for block in blocks:
                h = block(h, time)  # (b, channels[i], ...)
                kept.append(h)
            h = halve(h)  # (b, channels[i], h/2, w/2), rounded up
        h = self.mid2(self.mid1(h, time), time)
        for *blocks, double in self.up:
            h = double(h)[:, :, : kept[-1].shape[2], : kept[-1].shape[3]]  # (b, channels[i], 2h, 2w), or one less each
            for block in blocks:
                h = block(torch.cat([h, kept.pop()], dim=1), time)  # (b, channels[i-1], ...)
        return at_least_float32(self.out(F.silu(self.norm(h))))  # (b, c, h, w)


def build_unet(settings: UNetArchitecture, latent_channels: int, num_classes: int = 0) -> nn.Module:
    """The U-Net of resolved settings, whichever architecture they are of; without classes it takes no label."""
    unet: nn.Module = resolve_name(settings.NETWORK)(settings, latent_channels, num_classes)
    return unet
