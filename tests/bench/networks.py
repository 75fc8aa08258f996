"""lightdiff with further U-Nets, for rows of the recipe: `python -m tests.bench.networks COMMAND ...`.

They differ from the default by one choice each: `convnext` by its block, `diffusers` by what its skip connections join,
`x0` by what the network predicts where its loss is the velocity's, `paired` by the noise that each latent is mixed
with. A settings file of `tests/bench/unets` chooses one.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightdiff.architectures import UNetArchitecture
from lightdiff.models.layers import Downsample, PixelNorm, Time, Upsample, at_least_float32
from lightdiff.models.unet import UNet, UNetBlock
from lightdiff.settings import UNetSettings
from lightdiff.shapes import Float
from lightdiff.stages.train_unet import UNetTask
from lightdiff.training.loop import Tensors

EXPANSION = 4  # of a ConvNeXt block's width between its two linear maps
KERNEL = 7
LEVELS = 1000  # of the default's noise schedule


class ConvNeXtSettings(UNetSettings):
    """Settings of the U-Net of ConvNeXt blocks."""

    NETWORK: ClassVar = "tests.bench.networks:ConvNeXtUNet"

    architecture: Literal["convnext"] = "convnext"  # type: ignore[assignment]


class DiffusersSettings(UNetSettings):
    """Settings of the U-Net in diffusers' layout."""

    NETWORK: ClassVar = "tests.bench.networks:DiffusersUNet"

    architecture: Literal["diffusers"] = "diffusers"  # type: ignore[assignment]


class X0Settings(UNetSettings):
    """Settings of the U-Net that predicts x0."""

    NETWORK: ClassVar = "tests.bench.networks:X0UNet"

    architecture: Literal["x0"] = "x0"  # type: ignore[assignment]


class PairedSettings(UNetSettings):
    """Settings of the default's U-Net, trained with noise that is paired with the latents of its batch."""

    architecture: Literal["paired"] = "paired"  # type: ignore[assignment]


class Depthwise(nn.Module):
    """A 7 x 7 convolution of each channel by itself; no nn.Conv2d, so that AdamW trains it, and not Muon."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        like = nn.Conv2d(channels, channels, KERNEL, padding=KERNEL // 2, groups=channels)
        self.weight, self.bias = like.weight, like.bias

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Filter each channel."""
        filtered: Tensor = F.conv2d(x, self.weight, self.bias, padding=KERNEL // 2, groups=x.shape[1])
        return filtered


class ResponseNorm(nn.Module):
    """Global response normalisation (Woo et al. 2023, arXiv:2301.00808, Eq. 1 to 3); the identity at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Scale each channel by its share of the image's response."""
        norm = torch.linalg.vector_norm(x.float(), dim=(2, 3), keepdim=True)  # (b, c, 1, 1)
        share = norm / (norm.mean(dim=1, keepdim=True) + 1e-6)
        gamma, beta = self.gamma[:, None, None], self.beta[:, None, None]
        return x * (1 + gamma * share).to(x.dtype) + beta.to(x.dtype)


class ConvNeXtBlock(nn.Module):
    """ConvNeXt V2's block, conditioned on the time embedding by adaLN-zero (Peebles & Xie 2023, arXiv:2212.09748)."""

    checkpointable = True

    def __init__(self, in_channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__()
        wide = EXPANSION * out_channels
        self.depthwise = Depthwise(in_channels)
        self.norm = PixelNorm(in_channels)
        self.expand = nn.Conv2d(in_channels, wide, 1)
        self.response = ResponseNorm(wide)
        self.project = nn.Conv2d(wide, out_channels, 1)
        self.time = nn.Linear(time_dim, 2 * in_channels + out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.sizes = [in_channels, in_channels, out_channels]
        nn.init.zeros_(self.time.weight)
        nn.init.zeros_(self.time.bias)

    def forward(self, x: Float[Tensor, "b c h w"], time: Time) -> Float[Tensor, "b out h w"]:
        """Map x and the time embedding."""
        scale, shift, gate = self.time(F.silu(time))[:, :, None, None].split(self.sizes, dim=1)
        h = self.depthwise(x.contiguous(memory_format=torch.channels_last))  # in it, all this takes a quarter less time
        h = self.norm(h) * (1 + scale) + shift  # (b, c, h, w)
        h = self.response(F.gelu(self.expand(h)))  # (b, EXPANSION * out, h, w)
        return torch.add(self.skip(x), gate * self.project(h).contiguous())


class ConvNeXtUNet(UNet):
    """lightdiff's U-Net with ConvNeXt blocks in the place of residual blocks."""

    def __init__(self, settings: UNetSettings, latent_channels: int, num_classes: int = 0) -> None:
        super().__init__(settings, latent_channels, num_classes)
        for module in [m for m in self.modules() if isinstance(m, UNetBlock)]:
            widths = module.block.conv1.in_channels, module.block.conv1.out_channels
            module.block = ConvNeXtBlock(*widths, settings.time_dim)  # type: ignore[assignment]


class DiffusersUNet(UNet):
    """lightdiff's blocks joined as in diffusers' UNet2DModel.

    The stem's and each halving's output are kept for the way up, too, which has one block more a level; the last level
    is not halved; a level has one width both ways.
    """

    def __init__(self, settings: UNetSettings, latent_channels: int, num_classes: int = 0) -> None:
        super().__init__(settings, latent_channels, num_classes)
        s, attended, last = settings, settings.attend_levels or (), len(settings.channels) - 2
        kept = [s.channels[0]]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, (a, b) in enumerate(pairwise(s.channels)):
            blocks = [UNetBlock(i, o, s, level in attended) for i, o in pairwise([a] + [b] * s.blocks)]
            self.down.append(nn.ModuleList([*blocks, nn.Identity() if level == last else Downsample(b)]))
            kept += [b] * (s.blocks + (level < last))
        width = s.channels[-1]
        for level in reversed(range(last + 1)):
            b, blocks = s.channels[level + 1], []
            for _ in range(s.blocks + 1):
                blocks.append(UNetBlock(width + kept.pop(), b, s, level in attended))
                width = b
            self.up.append(nn.ModuleList([*blocks, Upsample(b, b) if level else nn.Identity()]))
        for name, parameter in self.named_parameters():
            if s.zero_init and name.split(".")[-2] in ("conv2", "proj"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Predict, in float32, without classes."""
        time = self.time(t)
        h = self.stem(x)
        kept = [h]
        for level, (*blocks, halve) in enumerate(self.down):
            for block in blocks:
                h = block(h, time)
                kept.append(h)
            if level < len(self.down) - 1:
                h = halve(h)
                kept.append(h)
        h = self.mid2(self.mid1(h, time), time)
        for *blocks, double in self.up:
            for block in blocks:
                h = block(torch.cat([h, kept.pop()], dim=1), time)
            h = double(h)
        return at_least_float32(self.out(F.silu(self.norm(h))))


class X0UNet(UNet):
    """Predicts x0; says the velocity (x_t - x0) / sigma, whose loss is then one of x0 weighted by 1 / sigma^2.

    Of rectified flow with 1,000 levels; sigma is at least 0.05, as in JiT (Li & He 2025, arXiv:2511.13720).
    """

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Predict the velocity, in float32."""
        sigma = ((t.float() + 1) / LEVELS).clamp(min=0.05)[:, None, None, None]
        return (x - super().forward(x, t, label)) / sigma


def paired(prepare: Callable[[UNetTask, Any, torch.Generator], Tensors]) -> Callable[..., Tensors]:
    """Prepare a batch as before, then give each latent the noise that makes all distances least, where that is asked.

    Minibatch optimal transport: Tong et al. 2024, arXiv:2302.00482, algorithm 4; Pooladian et al. 2023.
    """

    def prepare_and_pair(task: UNetTask, batch: Any, rng: torch.Generator) -> Tensors:
        drawn = prepare(task, batch, rng)
        if isinstance(task.settings.model, PairedSettings):
            from scipy.optimize import linear_sum_assignment

            distances = torch.cdist(drawn["x0"].flatten(1), drawn["eps"].flatten(1)).square()
            drawn["eps"] = drawn["eps"][torch.from_numpy(linear_sum_assignment(distances.numpy())[1])]
        return drawn

    return prepare_and_pair


KINDS = {"convnext": ConvNeXtSettings, "diffusers": DiffusersSettings, "x0": X0Settings, "paired": PairedSettings}


def register() -> None:
    """Let settings choose them."""
    kinds: Any = UNetArchitecture.ARCHITECTURES
    kinds |= {name: f"{__name__}:{settings.__name__}" for name, settings in KINDS.items()}
    UNetTask.prepare = paired(UNetTask.prepare)  # type: ignore[method-assign]


if __name__ == "__main__":
    from lightdiff.cli import main
    from tests.bench import networks  # not __main__, whose classes would be others than those that settings name

    networks.register()
    main()
