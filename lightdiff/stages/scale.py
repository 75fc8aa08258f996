"""scale: cached latents -> mean, std and the scaling factor 1 / std."""

import math
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.latents import LatentIndex, Statistics, prefetch, read_index
from lightdiff.errors import UserError
from lightdiff.run_folder import INDEX, RunFolder, find_latents
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.progress import console
from lightdiff.runtime.stage import open_stage
from lightdiff.settings import ScaleSettings

CACHED = 1 << 18  # numbers that are taken in at a time


def run(settings: ScaleSettings) -> Path:
    """Compute the statistics, store them in the index, and return its path."""
    with open_stage(settings, "latents", lambda: find_latents(settings.latents, RunFolder(settings.run))) as stage:
        index = read_index(stage.path)
        if not index.complete:
            raise UserError(f"{stage.path}: encoding has not finished: run 'lightdiff encode' again, it continues")
        moments = Moments(index.shape[0])
        paths = stage.processes.strided(index.shard_paths(stage.path))
        for mu, logvar in prefetch(partial(read, path, index) for path in paths):
            moments.add(mu, logvar)
        moments.over(stage.processes)
        if not moments.count:
            raise UserError(f"{stage.path} has no latents in the training split; encode more images")
        index.statistics = statistics(moments, settings)
        stage.processes.run_on_main(lambda: index.write(stage.path))
        show(index, index.statistics, settings)
        return stage.path / INDEX


def read(path: Path, index: LatentIndex) -> tuple[Tensor, Tensor]:
    """Mu and logvar (n, m, c, h, w) of a shard's training images; reading, and verifying digests, takes most time."""
    shard = Checkpoint(path, "latents")
    rows = torch.tensor([index.splits[p] == "t" for p in shard.metadata.extra["positions"]], dtype=torch.bool)
    return shard.tensor("mu")[rows], shard.tensor("logvar")[rows]


class Moments:
    """Sums over latents from which mean and variance follow; constant memory, float64."""

    def __init__(self, channels: int) -> None:
        """Start with nothing."""
        self.count = 0  # latent elements a channel
        self.mu = torch.zeros(channels, dtype=torch.float64)
        self.mu_squared = torch.zeros(channels, dtype=torch.float64)
        self.variance = torch.zeros(channels, dtype=torch.float64)  # of the posteriors

    def add(self, mu: Tensor, logvar: Tensor) -> None:
        """Take in latents (n, m, c, h, w): in pieces that stay in the processor's cache, added up in float64."""
        self.count += mu.numel() // mu.shape[2] if mu.numel() else 0
        rows = max(1, CACHED * mu.shape[0] // max(1, mu.numel()))
        for some_mu, some_logvar in zip(torch.split(mu, rows), torch.split(logvar, rows), strict=True):
            m, v = (x.float().transpose(0, 2).flatten(1) for x in (some_mu, some_logvar))
            self.mu += m.sum(1, dtype=torch.float64)
            self.variance += v.exp().sum(1, dtype=torch.float64)
            self.mu_squared += m.square().sum(1, dtype=torch.float64)

    def over(self, processes: Processes) -> None:
        """Add up what all processes have."""
        numbers = torch.cat([torch.tensor([self.count]).double(), self.mu, self.mu_squared, self.variance])
        processes.all_reduce_sum(numbers)
        self.count = int(numbers[0])
        self.mu, self.mu_squared, self.variance = numbers[1:].chunk(3)


def statistics(moments: Moments, settings: ScaleSettings) -> Statistics:
    """Mean and standard deviation, global and per channel, and the shift and scale that follow from them.

    z = mu + sigma eps is a mixture of normals: its mean is the mean of mu, and its variance the variance of mu plus
    the mean of sigma^2 (law of total variance), so that no random draw is needed.
    """
    posterior = torch.zeros_like(moments.variance) if settings.only_mu else moments.variance
    mean = moments.mu / moments.count
    second = (moments.mu_squared + posterior) / moments.count
    std = (second - mean.square()).clamp(min=0).sqrt()
    whole_mean = float(mean.mean())
    whole_std = math.sqrt(max(0.0, float(second.mean()) - whole_mean**2))
    if settings.scaling_factor:
        shift, scale = [0.0], [settings.scaling_factor]
    elif settings.normalize == "global":
        shift, scale = [0.0], [1 / max(whole_std, 1e-6)]
    else:
        shift, scale = mean.tolist(), (1 / std.clamp(min=1e-6)).tolist()
    return Statistics(
        only_mu=settings.only_mu,
        count=moments.count,
        mean=whole_mean,
        std=whole_std,
        channel_mean=mean.tolist(),
        channel_std=std.tolist(),
        channel_sigma=(moments.variance / moments.count).sqrt().tolist(),
        shift=shift,
        scale=scale,
    )


def show(index: LatentIndex, s: Statistics, settings: ScaleSettings) -> None:
    """Print the statistics as a table that explains itself."""
    what = "mu" if s.only_mu else "z = mu + sigma eps"
    table = Table(title=f"Latents of the training split: {what}, {s.count:,} numbers a channel", title_justify="left")
    for heading in ("channel", "mean", "std", "posterior sigma", "carries", "shift", "scale"):
        table.add_column(heading, justify="left" if heading == "channel" else "right")
    channels = len(s.channel_mean)
    for c in range(channels):
        shift, scale = s.shift[c % len(s.shift)], s.scale[c % len(s.scale)]
        numbers = (s.channel_mean[c], s.channel_std[c], s.channel_sigma[c])
        table.add_row(str(c), *(f"{v:.4f}" for v in numbers), f"{bits(s, c):.2f} bits", f"{shift:.4f}", f"{scale:.4f}")
    table.add_section()
    table.add_row("all", f"{s.mean:.4f}", f"{s.std:.4f}", "", "", "", f"{1 / max(s.std, 1e-6):.4f}")
    console.print(table)
    console.print("The U-Net is trained on x0 = (z - shift) x scale, which should have mean 0 and std 1.")
    if settings.scaling_factor:
        after = s.std * settings.scaling_factor
        console.print(f"The scaling factor {settings.scaling_factor} was set by hand: x0 has a std of {after:.3f}.")
    for warning in warnings(s):
        console.print(f"warning: {warning}", style="yellow")


def bits(s: Statistics, channel: int) -> float:
    """Information a latent element of this channel can carry, if normal: log2(std(mu) / sigma), roughly, in bits."""
    sigma = max(s.channel_sigma[channel], 1e-12)
    spread = s.channel_std[channel] ** 2 + (sigma**2 if s.only_mu else 0.0)
    return max(0.0, 0.5 * math.log2(max(spread, 1e-24) / sigma**2))


def warnings(s: Statistics) -> list[str]:
    """What is odd about these statistics, in plain words."""
    found = []
    for c, (mean, std) in enumerate(zip(s.channel_mean, s.channel_std, strict=True)):
        if not math.isfinite(mean) or not math.isfinite(std):
            found.append(f"channel {c} is not finite: the VAE has diverged; train it again with a lower --lr")
        elif bits(s, c) < 0.05:
            found.append(f"channel {c} carries nothing (std of mu far below sigma): lower --kl-beta, or fewer channels")
        elif std > 20 or std < 0.05:
            found.append(f"channel {c} has a std of {std:.3g}; between 0.2 and 5 is usual: look at --kl-beta")
    return found
