"""Statistics of a sample of a run's latents, channel by channel: moments, KL, information, histogram."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightdiff.data.index import LatentIndex, open_shard, read_index
from lightdiff.data.latents import Scaling
from lightdiff.errors import Damaged, UserError
from lightdiff.models.vae import Posterior
from lightdiff.settings import ScaleSettings
from lightdiff.stages.scale import LatentMoments, bits_per_element, statistics

EDGES: tuple[float, ...] = tuple(round(0.2 * i - 4, 1) for i in range(41))
ACTIVE = 0.01  # variance of mu over images above which a unit is active (Burda et al. 2016, arXiv:1509.00519, Eq. 8)
MAX_SHARDS = 16
MAX_ELEMENTS = 1 << 24  # latent elements read: about a second
CHUNK = 1 << 20  # latent elements processed at a time


class UnitMoments(LatentMoments):
    """The same sums for each unit (c, h, w) of a latent: over images only; and that of logvar."""

    SUMS: ClassVar = 5

    @property
    def logvar(self) -> Tensor:
        """The sum of logvar, (c, h, w); a view."""
        return self.sums[4]

    def add(self, mu: Tensor, logvar: Tensor) -> None:
        """Add latents (n, m, c, h, w)."""
        super().add(mu, logvar)
        self.sums[4] += self.rows(logvar.float()).sum(1, dtype=torch.float64).view_as(self.logvar)

    def rows(self, x: Tensor) -> Tensor:
        """All of a unit, (n, m, c, h, w) -> (c h w, images)."""
        return x.flatten(0, 1).flatten(1).T


class ChannelFacts(BaseModel):
    """One channel, over the sampled images and all positions of the latent.

    z is what the U-Net learns: mu, or mu + sigma noise after `scale --no-only-mu` and before any `scale`.
    `scaled_mean` and `scaled_std` are of (z - shift) * scale, and equal `mean` and `std` before `scale` has run.
    """

    mean: float  # of z
    std: float
    scaled_mean: float
    scaled_std: float
    kl: float  # nats per element; a little less than it is where latents were encoded without logvar
    posterior_std: float  # square root of the mean of sigma^2
    bits: float  # per element; of mu, only what varies over the images at the same position counts
    active_share: float  # share of positions where mu varies over the images by a variance above ACTIVE
    histogram: list[float]  # density of scaled z between EDGES; values outside are left out


class LatentFacts(BaseModel):
    """The facts of all channels, and how many images they come from."""

    images: int
    channels: list[ChannelFacts]


def latent_facts(folder: Path, max_images: int = 1000) -> LatentFacts:
    """Facts of at most `max_images` training images' latents (fewer of large ones), spread evenly over the set.

    Mirror images count where they were encoded. Digests of tensors are not verified: that would read all of them.

    Raises:
        UserError: If encoding has not finished, a shard is missing or damaged, or there are no training images.
        RunError: If the index is damaged.
    """
    index = read_index(folder, finished=True)
    scaled = index.statistics
    only_mu = scaled is not None and scaled.only_mu
    shift, scale = (torch.tensor(v) for v in ((scaled.shift, scaled.scale) if scaled else ([0.0], [1.0])))
    moments, images = UnitMoments(*index.shape), 0
    histogram = torch.zeros(index.shape[0], len(EDGES) - 1, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    for mu, logvar in sampled_latents(folder, index, max_images):
        moments.add(mu, logvar)
        images += len(mu)
        posterior = Posterior(mu.flatten(0, 1), logvar.flatten(0, 1))
        z = posterior.mu if only_mu else posterior.sample(torch.randn(posterior.mu.shape, generator=rng))
        for c, x0 in enumerate(Scaling(shift, scale).to_x0(z).unbind(1)):
            histogram[c] += torch.histc(x0, len(EDGES) - 1, EDGES[0], EDGES[-1])
    if not images:
        raise UserError(f"{folder} has no latents in the training split; encode more images")
    s = statistics(sum_positions(moments), ScaleSettings(only_mu=only_mu))
    mean, std = torch.tensor([s.channel_mean, s.channel_std], dtype=torch.float64)
    spread = variance_over_images(moments).mean((1, 2)).tolist()
    columns: dict[str, list[float] | list[list[float]]] = {
        "mean": s.channel_mean,
        "std": s.channel_std,
        "scaled_mean": ((mean - shift) * scale).tolist(),
        "scaled_std": (std * scale).tolist(),
        "kl": channel_kl(moments),
        "posterior_std": s.channel_sigma,
        "bits": [bits_per_element(v, sigma**2) for v, sigma in zip(spread, s.channel_sigma, strict=True)],
        "active_share": channel_active_share(moments),
        "histogram": (histogram / (s.count * (EDGES[1] - EDGES[0]))).tolist(),
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return LatentFacts(images=images, channels=[ChannelFacts.model_validate(row) for row in rows])


def sampled_latents(folder: Path, index: LatentIndex, max_images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of mu and logvar (n, m, c, h, w) of training images, spread evenly over at most MAX_SHARDS shards."""
    size = (1 + index.mirrored) * math.prod(index.shape)
    parts, wanted = list(index.by_shard().items()), index.encoded & index.of_split("train")
    shards = [parts[i] for i in evenly(len(parts), MAX_SHARDS)]
    train = [
        (open_shard(folder, index, number, mine).path, row)
        for number, mine in shards
        for row in index.row[mine[wanted[mine]]].tolist()
    ]
    rows: dict[Path, list[int]] = {}
    for i in evenly(len(train), min(max_images, max(2, MAX_ELEMENTS // size))):
        rows.setdefault(train[i][0], []).append(train[i][1])
    for path in rows:
        try:
            with safe_open(path, framework="pt") as file:
                mu = file.get_tensor("mu")
                logvar = file.get_tensor("logvar" if index.logvar else "variance")
        except (SafetensorError, OSError) as error:
            raise Damaged(f"{path} is damaged: {error}") from None
        logvar = logvar if index.logvar else logvar.log()[..., None, None].expand_as(mu)
        for chunk in torch.split(torch.tensor(rows[path]), max(1, CHUNK // size)):
            yield mu[chunk].float(), logvar[chunk].float()


def evenly(count: int, maximum: int) -> list[int]:
    """At most `maximum` of the numbers below `count`, evenly spread."""
    return [i * count // maximum for i in range(maximum)] if count > maximum else list(range(count))


def sum_positions(moments: UnitMoments) -> LatentMoments:
    """Moments per channel, from those per unit."""
    channels = LatentMoments(len(moments.mu))
    channels.sums += moments.sums[:4].sum((2, 3))
    return channels


def variance_over_images(moments: UnitMoments) -> Tensor:
    """Variance of each unit's mu over the images, (c, h, w)."""
    return moments.mu_squared / moments.count - (moments.mu / moments.count).square()


def channel_kl(moments: UnitMoments) -> list[float]:
    """KL(N(mu, sigma^2) || N(0, 1)) of each channel, in nats per element (see `losses.kl_per_element`)."""
    kl = 0.5 * (moments.mu_squared + moments.variance - moments.logvar) / moments.count - 0.5
    return kl.mean((1, 2)).tolist()


def channel_active_share(moments: UnitMoments) -> list[float]:
    """Share of each channel's units that are active: their mu varies over the images by more than ACTIVE."""
    return (variance_over_images(moments) > ACTIVE).double().mean((1, 2)).tolist()
