"""scale: cached latents -> mean, std and the scaling factor 1 / std."""

import math
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.index import LatentIndex, Statistics, open_shard, read_index, read_logvar, repairable
from lightdiff.data.latents import prefetch
from lightdiff.data.table import SPLITS
from lightdiff.errors import RunError, UserError
from lightdiff.on_demand import on_demand
from lightdiff.run_folder import INDEX, VAE_COPY, RunFolder, find_latents
from lightdiff.runtime.progress import console
from lightdiff.runtime.stage import open_stage
from lightdiff.settings import ScaleSettings

CHUNK = 1 << 18  # numbers added at a time, so that they stay in the processor's cache
DEAD_BITS = 0.05  # per latent element: a channel with less carries no information


def run(settings: ScaleSettings) -> Path:
    """Compute the statistics of the training latents, store them in the index, and return its path."""
    with open_stage(settings, "latents", lambda: find_latents(settings.latents, RunFolder(settings.run))) as stage:
        index = read_index(stage.path, finished=True)
        moments = LatentMoments(index.shape[0])
        if not (index.logvar or settings.only_mu):
            advice = "'lightdiff encode --logvar --restart' stores it, or leave --no-only-mu out"
            raise UserError(f"--no-only-mu draws from the posterior, but {stage.path} has no logvar: {advice}")
        shards = stage.processes.strided(list(index.by_shard().items()))
        for mu, logvar in prefetch(partial(read_train_latents, stage.path, index, *shard) for shard in shards):
            moments.add(mu, logvar)
        stage.processes.all_reduce_sum(moments.sums)
        if not moments.count:
            raise UserError(f"{stage.path} has no latents in the training split; encode more images")
        if not moments.sums.isfinite().all():
            advice = "the VAE has diverged, train it again"
            raise RunError(f"{stage.path}: latents are not finite, or too large to be scaled: {advice}")
        index.statistics = statistics(moments, settings).model_copy(update={"latents": index.digest})
        stage.processes.run_on_main(lambda: index.write(stage.path / INDEX))
        print_statistics(index.statistics, settings)
        vae = stage.path / VAE_COPY
        if vae.is_file() and (imported := Checkpoint(vae, "vae").metadata.extra.get("imported")):
            on_demand("import_vae:compare_factors")(index.statistics, imported)
        return stage.path / INDEX


@repairable()
def read_train_latents(
    folder: Path, index: LatentIndex, number: int, planned: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Mu and logvar (n, m, c, h, w) of a shard's training images; most of the time goes into verifying digests."""
    shard = open_shard(folder, index, number, planned)
    chosen = planned[(index.row[planned] >= 0) & (index.splits[planned] == SPLITS.index("train"))]
    rows = torch.from_numpy(index.row[chosen]).long()
    return shard.tensor("mu")[rows], read_logvar(shard)[rows]


class LatentMoments:
    """Sums of mu, mu^2 and sigma^2 per channel, in float64 and constant memory; all statistics follow."""

    SUMS: ClassVar = 4

    def __init__(self, *shape: int) -> None:
        self.sums = torch.zeros(self.SUMS, *shape, dtype=torch.float64)
        self.mu, self.mu_squared, self.variance, self.counts = self.sums[:4].unbind()  # views

    @property
    def count(self) -> int:
        """Latent elements in each sum."""
        return int(self.counts.flatten()[0])

    def add(self, mu: Tensor, logvar: Tensor) -> None:
        """Add latents (n, m, c, h, w), where m counts an image and its mirror image."""
        rows = max(1, CHUNK * mu.shape[0] // max(1, mu.numel()))
        for chunk in zip(torch.split(mu, rows), torch.split(logvar, rows), strict=True):
            m, v = (self.rows(x.float()) for x in chunk)
            sums = [x.sum(1, dtype=torch.float64) for x in (m, m.square(), v.exp())]
            self.sums[:3] += torch.stack(sums).view_as(self.sums[:3])
            self.counts += m.shape[1]

    def rows(self, x: Tensor) -> Tensor:
        """What is summed to one number each: all of a channel, (n, m, c, h, w) -> (c, elements)."""
        return x.transpose(0, 2).flatten(1)


def statistics(moments: LatentMoments, settings: ScaleSettings) -> Statistics:
    """Mean and standard deviation, global and per channel, and the shift and scale that follow from them.

    z = mu + sigma eps is a mixture of normal distributions: its mean is the mean of mu, its variance the variance of mu
    plus the mean of sigma^2 (law of total variance), so no random draw is needed.

    Args:
        moments: Sums per channel.
        settings: Whether the U-Net learns mu alone, and how to scale.
    """
    posterior = torch.zeros_like(moments.variance) if settings.only_mu else moments.variance
    mean = moments.mu / moments.count
    second = (moments.mu_squared + posterior) / moments.count
    std = (second - mean.square()).clamp(min=0).sqrt()
    global_mean = float(mean.mean())
    global_std = math.sqrt(max(0.0, float(second.mean()) - global_mean**2))
    if settings.scaling_factor:
        shift, scale = [0.0], [settings.scaling_factor]
    elif settings.normalize == "global":
        shift, scale = [0.0], [1 / max(global_std, 1e-6)]
    else:
        shift, scale = mean.tolist(), (1 / std.clamp(min=1e-6)).tolist()
    return Statistics(
        only_mu=settings.only_mu,
        count=moments.count,
        mean=global_mean,
        std=global_std,
        channel_mean=mean.tolist(),
        channel_std=std.tolist(),
        channel_sigma=(moments.variance / moments.count).sqrt().tolist(),
        shift=shift,
        scale=scale,
    )


def print_statistics(s: Statistics, settings: ScaleSettings) -> None:
    """Print the statistics as a table, with warnings about unusual channels."""
    what = "mu" if s.only_mu else "z = mu + sigma eps"
    title = f"Latents of the training split: {what}, {s.count:,} elements per channel"
    headings = ("channel", "mean", "std", "posterior sigma", "carries", "shift", "scale")
    rows: list[tuple[str, ...]] = [
        headings,
        ("all", f"{s.mean:.4f}", f"{s.std:.4f}", "", "", "", f"{1 / max(s.std, 1e-6):.4f}"),
    ]
    for c, bits in enumerate(channel_bits(s)):
        shift, scale = s.shift[c % len(s.shift)], s.scale[c % len(s.scale)]
        numbers = (s.channel_mean[c], s.channel_std[c], s.channel_sigma[c])
        rows.insert(-1, (str(c), *(f"{v:.4f}" for v in numbers), f"{bits:.2f} bits", f"{shift:.4f}", f"{scale:.4f}"))
    console.print(title)
    for row in rows:
        console.print("  ".join(f"{cell:>{max(9, len(heading))}}" for cell, heading in zip(row, headings, strict=True)))
    console.print("The U-Net is trained on x0 = (z - shift) * scale, which should have mean 0 and std 1.")
    if settings.scaling_factor:
        std = s.std * settings.scaling_factor
        console.print(f"The scaling factor {settings.scaling_factor} was set by hand: x0 has a std of {std:.3f}.")
    for warning in channel_warnings(s):
        console.print(f"warning: {warning}", style="yellow")


def channel_bits(s: Statistics) -> list[float]:
    """Bits that a latent element can carry, for each channel."""
    pairs = zip(s.channel_std, s.channel_sigma, strict=True)
    return [bits_per_element(std**2 - (0.0 if s.only_mu else sigma**2), sigma**2) for std, sigma in pairs]


def bits_per_element(mu_variance: float, noise_variance: float) -> float:
    """Capacity of a Gaussian channel: 1/2 log2(1 + var(mu) / sigma^2) bits (Shannon 1948, theorem 17)."""
    return 0.5 * math.log2(1 + max(0.0, mu_variance) / max(noise_variance, 1e-24))


def channel_warnings(s: Statistics) -> list[str]:
    """What is unusual about these statistics, channel by channel."""
    found = []
    for c, (std, bits) in enumerate(zip(s.channel_std, channel_bits(s), strict=True)):
        if bits < DEAD_BITS:
            found.append(
                f"channel {c} carries no information (std of mu far below sigma): lower --kl-beta or use fewer channels"
            )
        elif std > 20 or std < 0.05:
            found.append(f"channel {c} has a std of {std:.3g}; between 0.2 and 5 is usual: check --kl-beta")
    return found
