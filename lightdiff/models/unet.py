"""The U-Net that tells signal from noise in a latent (Ronneberger et al. 2015; Ho et al. 2020, appendix B)."""

from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor, nn

from lightdiff.models.layers import (
    Attention,
    Downsample,
    ResBlock,
    TimeEmbedding,
    Upsample,
    at_least_float32,
    group_norm,
    zero_init,
)
from lightdiff.settings import UNetSettings


class Stage(nn.Module):
    """One residual block and, at chosen levels, attention."""

    def __init__(self, in_channels: int, out_channels: int, settings: UNetSettings, attend: bool) -> None:
        """Build (b, in, h, w) -> (b, out, h, w)."""
        super().__init__()
        norm = partial(group_norm, groups=settings.groups, group_width=settings.group_width)
        self.block = ResBlock(in_channels, out_channels, norm, settings.time_dim)
        self.attention = Attention(out_channels, settings.heads, norm) if attend else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Apply block and attention."""
        h: Tensor = self.block(x, time)
        return h if self.attention is None else self.attention(h)


class Level(nn.Module):
    """The stages of one level, and the layer that changes its size."""

    def __init__(self, stages: list[Stage], resize: nn.Module) -> None:
        """Keep both."""
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.resize = resize

    def descend(self, h: Tensor, time: Tensor, kept: list[Tensor]) -> Tensor:
        """Apply the stages, keep what each makes, then halve."""
        for stage in self.stages:
            h = stage(h, time)
            kept.append(h)
        out: Tensor = self.resize(h)
        return out

    def ascend(self, h: Tensor, time: Tensor, kept: list[Tensor]) -> Tensor:
        """Double, then apply the stages, each to what it gets and what was kept last."""
        h = self.resize(h)[:, :, : kept[-1].shape[2], : kept[-1].shape[3]]  # an odd size was halved upwards
        for stage in self.stages:
            h = stage(torch.cat([h, kept.pop()], dim=1), time)
        return h


class UNet(nn.Module):
    """(x_t, t) -> what the objective asks for, of the shape of x_t; (x_t, t, label) where it knows classes.

    Going down, each level has `blocks` residual blocks, whose outputs are kept, and a halving. Going up, it doubles
    and has as many blocks, each of which first takes in what was kept. Upward, level i ends at the width of the
    level below it, so that its widths are those of the way down, read backwards.
    """

    def __init__(self, settings: UNetSettings, latent_channels: int, classes: int = 0) -> None:
        """Build it from resolved settings (`UNetSettings.resolved`), for so many classes; 0: it is told none."""
        super().__init__()
        s, channels = settings, settings.channels
        attended = set(s.attend_levels or ())
        self.factor = s.factor
        self.time = TimeEmbedding(s.time_dim)
        self.label = nn.Embedding(classes + 1, s.time_dim) if classes else None  # the last one: no label
        self.stem = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, (a, b) in enumerate(pairwise(channels)):
            sizes = pairwise([a] + [b] * s.blocks)
            stages = [Stage(i, o, s, level in attended) for i, o in sizes]
            self.down.append(Level(stages, Downsample(b, s.down_kernel)))
        self.mid1 = Stage(channels[-1], channels[-1], s, s.mid_attention)
        self.mid2 = Stage(channels[-1], channels[-1], s, False)
        for level, (b, a) in reversed(list(enumerate(pairwise(channels)))):
            sizes = pairwise([a] + [b] * s.blocks)
            stages = [Stage(i + a, o, s, level in attended) for i, o in sizes]
            self.up.append(Level(stages, Upsample(a, a)))
        self.norm = group_norm(channels[0], s.groups)
        self.out = nn.Conv2d(channels[0], latent_channels, 3, padding=1)
        if s.zero_init:
            self._zero_init()

    def _zero_init(self) -> None:
        """Make every residual branch, and the output, start at zero (Ho et al. 2020's code; Goyal et al. 2017)."""
        zero_init(self.out)
        for module in self.modules():
            if isinstance(module, ResBlock):
                zero_init(module.conv2)
            elif isinstance(module, Attention):
                zero_init(module.proj)

    def forward(
        self, x: Float[Tensor, "b c h w"], t: Real[Tensor, " b"], label: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Predict, in float32.

        Args:
            x: Noised latents; h and w are divisible by `UNetSettings.factor`.
            t: Their levels, 0 to T - 1, which may lie between whole ones.
            label: Their classes, 0 to classes - 1, or `classes` for those of no known class, as all are if not given.
        """
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"latents of {x.shape[2]} x {x.shape[3]} are not divisible by {self.factor}")
        time = self.time(t)
        if self.label is not None:
            label = torch.full_like(t, self.label.num_embeddings - 1, dtype=torch.long) if label is None else label
            time = time + self.label(label)
        h = self.stem(x)
        kept: list[Tensor] = []
        for level in self.down:
            h = level.descend(h, time, kept)  # type: ignore[operator]
        h = self.mid2(self.mid1(h, time), time)
        for level in self.up:
            h = level.ascend(h, time, kept)  # type: ignore[operator]
        out: Tensor = self.out(torch.nn.functional.silu(self.norm(h)))
        return at_least_float32(out)
