"""What a run's latents look like, channel by channel: moments, information, histogram. Reads a sample of them."""

import math
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.latents import LatentIndex, Scaling, read_index
from lightdiff.errors import Damaged, UserError
from lightdiff.losses import kl_per_element
from lightdiff.models.vae import Posterior

EDGES: tuple[float, ...] = tuple(round(0.2 * i - 4, 1) for i in range(41))
ACTIVE = 0.01  # variance of mu over images above which a unit is active (Burda et al. 2016, arXiv:1509.00519, Eq. 8)
SHARDS = 16  # that are opened at most
NUMBERS = 1 << 24  # latent elements that are looked at, at most: about a second
CHUNK = 1 << 20  # of them at a time


class ChannelFacts(BaseModel):
    """What one channel holds, over the images looked at, at every position of the latent.

    z is what the U-Net learns: mu, or, where `scale --no-only-mu` said so or has not run, mu + sigma noise.
    `scaled_mean` and `scaled_std` are of (z - shift) scale, and equal to `mean` and `std` before `scale` has run.
    """

    mean: float  # of z
    std: float
    scaled_mean: float
    scaled_std: float
    kl: float  # nats an element
    posterior_std: float  # square root of the mean of sigma^2
    active_share: float  # share of positions whose mu varies over the images by a variance above ACTIVE
    histogram: list[float]  # density of scaled z between EDGES; what lies beyond is left out


class LatentFacts(BaseModel):
    """The facts of all channels, and how many images they come from."""

    images: int
    channels: list[ChannelFacts]


def latent_facts(folder: Path, most: int = 1000) -> LatentFacts:
    """Facts of at most `most` training images' latents (fewer of large ones), spread evenly over the set.

    Mirror images count where they were encoded. Digests of tensors are not verified: that would read all of them.

    Raises:
        UserError: If encoding has not finished, a shard is missing or damaged, or there are no training images.
        RunError: If the index is damaged.
    """
    index = read_index(folder)
    if not index.complete:
        raise UserError(f"{folder}: encoding has not finished: run 'lightdiff encode' again, it continues")
    sums = Sums(index)
    most = min(most, max(2, NUMBERS // ((1 + index.mirrored) * math.prod(index.shape))))
    for path, rows in chosen_rows(folder, index, most):
        try:
            with safe_open(path, framework="pt") as file:
                both = [file.get_tensor(name) for name in ("mu", "logvar")]
        except (SafetensorError, OSError) as error:
            raise Damaged(f"{path} is damaged: {error}") from None
        size = max(1, CHUNK // both[0][0].numel())
        for some in torch.split(torch.tensor(rows), size):
            mu, logvar = (tensor[some].flatten(0, 1).float() for tensor in both)
            sums.add(Posterior(mu, logvar))
        sums.images += len(rows)
    if not sums.images:
        raise UserError(f"{folder} has no latents in the training split; encode more images")
    return sums.facts()


def chosen_rows(folder: Path, index: LatentIndex, most: int) -> list[tuple[Path, list[int]]]:
    """Shards, and which of their rows to look at: training images, evenly spread."""
    paths = [index.shard_paths(folder)[n] for n in evenly(len(index.shards), SHARDS)]
    there = [
        (path, row)
        for path in paths
        for row, position in enumerate(Checkpoint(path, "latents").metadata.extra["positions"])
        if index.splits[position] == "t"
    ]
    found: dict[Path, list[int]] = {}
    for i in evenly(len(there), most):
        path, row = there[i]
        found.setdefault(path, []).append(row)
    return list(found.items())


def evenly(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, evenly spread."""
    return [i * count // most for i in range(most)] if count > most else list(range(count))


class Sums:
    """Sums over latents, in float64, from which the facts follow."""

    def __init__(self, index: LatentIndex) -> None:
        """Start with nothing."""
        statistics, self.channels = index.statistics, index.shape[0]
        unscaled = Scaling(torch.zeros(1), torch.ones(1))
        self.only_mu = statistics is not None and statistics.only_mu
        self.scaling = (
            Scaling(torch.tensor(statistics.shift), torch.tensor(statistics.scale)) if statistics else unscaled
        )
        self.rng = torch.Generator().manual_seed(0)  # of the histogram's noise
        self.images = self.sides = 0  # sides: images, and their mirror images
        self.mu, self.mu_squared, self.variance, self.kl = torch.zeros(4, *index.shape, dtype=torch.float64)
        self.counts = torch.zeros(self.channels, len(EDGES) - 1, dtype=torch.float64)

    def add(self, posterior: Posterior) -> None:
        """Take in some latents, (b, c, h, w)."""
        mu, logvar = posterior
        self.sides += len(mu)
        self.mu += mu.sum(0, dtype=torch.float64)
        self.mu_squared += mu.double().square().sum(0)
        self.variance += logvar.exp().sum(0, dtype=torch.float64)
        self.kl += kl_per_element(posterior).sum(0, dtype=torch.float64)
        z = mu if self.only_mu else posterior.sample(torch.randn(mu.shape, generator=self.rng))
        x0 = self.scaling.to_x0(z)
        for c in range(self.channels):
            self.counts[c] += torch.histc(x0[:, c], len(EDGES) - 1, EDGES[0], EDGES[-1])

    def facts(self) -> LatentFacts:
        """What follows from the sums."""
        mu, mu_squared, variance, kl = (s / self.sides for s in (self.mu, self.mu_squared, self.variance, self.kl))
        mean, noise = mu.mean((1, 2)), variance.mean((1, 2))  # (c,)
        drawn = torch.zeros_like(noise) if self.only_mu else noise
        std = (mu_squared.mean((1, 2)) + drawn - mean.square()).clamp(min=0).sqrt()  # law of total variance
        shift, scale = (value.double().expand(self.channels) for value in (self.scaling.shift, self.scaling.scale))
        density = self.counts / (self.sides * mu[0].numel() * (EDGES[1] - EDGES[0]))
        columns: dict[str, Tensor] = {
            "mean": mean,
            "std": std,
            "scaled_mean": (mean - shift) * scale,
            "scaled_std": std * scale,
            "kl": kl.mean((1, 2)),
            "posterior_std": noise.sqrt(),
            "active_share": (mu_squared - mu.square() > ACTIVE).double().mean((1, 2)),
            "histogram": density,
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return LatentFacts(
            images=self.images,
            channels=[ChannelFacts.model_validate(dict(zip(columns, row, strict=True))) for row in rows],
        )
