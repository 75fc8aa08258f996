"""The latents' cache, read lazily; z <-> x0. What lies where: see `index.py`."""

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lightdiff.data.index import LatentIndex, open_shard, read_index, repairable
from lightdiff.errors import UserError
from lightdiff.settings import LatentsSettings

T = TypeVar("T")
SIZE = ("channels", "height", "width")  # fields of LatentsSettings


@dataclass(frozen=True)
class Scaling:
    """z <-> x0: x0 = (z - shift) * scale, what diffusion calls clean; each a number or one a channel."""

    shift: Float[Tensor, " c"]
    scale: Float[Tensor, " c"]

    @classmethod
    def of(cls, settings: LatentsSettings, device: torch.device | str = "cpu") -> "Scaling":
        """The scaling that a U-Net was trained with, where latents will be."""
        return cls(torch.tensor(settings.shift, device=device), torch.tensor(settings.scale, device=device))

    def to_x0(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Latents of the VAE -> clean latents of diffusion, of about unit variance."""
        return (z - self.shift.to(z)[:, None, None]) * self.scale.to(z)[:, None, None]

    def to_z(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Clean latents of diffusion -> latents that the VAE can decode."""
        return x0 / self.scale.to(x0)[:, None, None] + self.shift.to(x0)[:, None, None]


class LatentSet:
    """Finished latents, opened for reading; shards are mapped into memory, not loaded, until `to` is called."""

    def __init__(self, folder: Path) -> None:
        """Open a folder of latents and verify every shard.

        Raises:
            UserError: If encoding has not finished, or a shard is missing or damaged.
        """
        self.folder, self.index = folder, read_index(folder, finished=True)
        planned = self.index.by_shard()
        with repairable():
            shards = [open_shard(folder, self.index, number, mine) for number, mine in planned.items()]
            self._mu = [shard.tensor("mu") for shard in shards]
            self._logvar = [shard.tensor("logvar") for shard in shards] if self.index.logvar else []
        # The first row of each shard, counted over all of them, and the row of each position, (n,).
        counts = torch.tensor([len(mu) for mu in self._mu])
        self._starts = counts.cumsum(0) - counts
        first = np.zeros(len(self.index.shards), np.int64)
        first[list(planned)] = self._starts
        self._row = torch.from_numpy((self.index.row + first[self.index.shard]).astype(np.int32))
        positions = (self.index.positions(split).astype(np.int32) for split in ("train", "val"))
        self.train, self.val = (array("i", found.tobytes()) for found in positions)

    @property
    def nbytes(self) -> int:
        """Size of all latents, in bytes."""
        return sum(t.nbytes for t in (*self._mu, *self._logvar))

    def to(self, device: torch.device) -> "LatentSet":
        """Put all latents on a device, as one tensor."""
        self._mu, self._logvar = (
            [torch.cat([x.to(device) for x in parts])] if parts else [] for parts in (self._mu, self._logvar)
        )
        self._starts = self._starts[:1]
        return self

    def gather(
        self, positions: Sequence[int], mirror: Tensor | None = None, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mu and logvar (b, c, h, w), float32, of images at these positions; mu twice where there is no logvar.

        Args:
            positions: Positions in the index.
            mirror: Which of them to take mirrored, (b,) of 0 and 1; none if not given.
            device: Where they are wanted, if not where they lie; they travel as they are stored.
        """
        row = self._row[torch.as_tensor(positions)].long()
        side = mirror if mirror is not None and self.index.mirrored else torch.zeros_like(row)
        both = (self._mu, self._logvar) if self._logvar else (self._mu,)
        if len(self._starts) == 1:  # as on a GPU
            rows, sides = (async_copy(index, self._mu[0].device) for index in (row, side))
            found = torch.stack([latents[rows, sides] for (latents,) in both])
        else:  # one by one, in half the time of an index for each shard
            shard = torch.bucketize(row, self._starts, right=True) - 1
            places = list(zip(shard.tolist(), (row - self._starts[shard]).tolist(), side.tolist(), strict=True))
            one_by_one = [latents[n][at, m] for latents in both for n, at, m in places]
            found = torch.stack(one_by_one).view(len(both), -1, *self.index.shape)
        found = async_copy(found, device or found.device).float()
        return found[0], found[-1]


def async_copy(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; on its way to a GPU nothing waits."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def prefetch(works: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What each of these returns, in order; the next one is at work in another thread while this one is used."""
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    device = torch.cuda.current_device() if on_gpu else None

    def start_thread() -> None:
        torch.set_num_threads(1)  # more would take the cores from the network
        if device is not None:
            torch.cuda.set_device(device)  # a thread begins on GPU 0, whatever this process computes on

    with ThreadPoolExecutor(1, initializer=start_thread) as pool:
        # `pairwise` asks for the next before it hands out this one; the last has nothing after it.
        futures = itertools.chain((pool.submit(work) for work in works), [Future[T]()])
        for future, _ in itertools.pairwise(futures):
            yield future.result()


def latents_settings(found: Path | LatentIndex) -> LatentsSettings:
    """What a U-Net must know of latents, found in a folder or by their index.

    Raises:
        UserError: If `scale` has not run.
    """
    index = read_index(found) if isinstance(found, Path) else found
    if index.statistics is None:
        raise UserError(f"{found}: the latents have no scaling factor yet: run 'lightdiff scale' first")
    scaling = index.statistics.model_dump(include={"shift", "scale", "only_mu"})
    labels = index.label_values(index.of_split("train"))
    return LatentsSettings(**dict(zip(SIZE, index.shape, strict=True)), **scaling, labels=labels)
