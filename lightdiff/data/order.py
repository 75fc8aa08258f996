"""Which item comes when, and every other random choice: pure functions of (seed, purpose, position).

There is no random state to save or to lose: a run that was stopped computes the numbers that a run never stopped
would have drawn, and so does another number of processes, workers or micro-batches.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightdiff.errors import UserError


def key(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose. Hashed, so that neighbouring seeds and steps share nothing."""
    text = "\x1f".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(device: torch.device | str, seed: int, *purpose: str | int) -> torch.Generator:
    """A generator on this device for one purpose."""
    return torch.Generator(device).manual_seed(key(seed, *purpose))


def item_noise(shape: tuple[int, ...], items: list[int], seed: int, purpose: str) -> Tensor:
    """Standard normal numbers (len(items), *shape), item by item on the CPU: the same whatever the batch."""
    return torch.stack([torch.randn(shape, generator=generator("cpu", seed, purpose, item)) for item in items])


@lru_cache(maxsize=2)
def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """The order of `count` items in one epoch, (count,), in four bytes each where these hold them."""
    order = torch.randperm(count, generator=generator("cpu", seed, "order", epoch))
    return order.int() if count < 1 << 31 else order


@dataclass(frozen=True)
class Order:
    """All items, each once an epoch."""

    count: int
    seed: int

    def batch_at(self, position: int, size: int) -> list[tuple[int, int]]:
        """The (epoch, item) of `size` items, after `position` items have been drawn."""
        return batch_at(position, size, self.count, self.seed)


class Mixture:
    """Several sources of items, each drawn as often as its weight says, however many items it has.

    An epoch has as many draws as there are items, and each source its share of them, to the nearest whole number. A
    source's draws go through its items again and again, every pass in an order of its own.
    """

    def __init__(self, sources: NDArray[np.int32], weights: Sequence[float], seed: int) -> None:
        """Divide an epoch.

        Args:
            sources: The number of each item's source, (n,).
            weights: How often items of each source are drawn, up to a factor.
            seed: Of all orders.

        Raises:
            UserError: If a source has no item.
        """
        self.items = [np.flatnonzero(sources == k) for k in range(len(weights))]
        if empty := [k for k, items in enumerate(self.items) if not len(items)]:
            raise UserError(f"--data: the source number {1 + empty[0]} has a weight, but no training images")
        exact = np.array(weights) / sum(weights) * len(sources)
        self.draws = np.floor(exact).astype(int)
        most = np.argsort(self.draws - exact, kind="stable")  # what was cut off, most first
        self.draws[most[: len(sources) - self.draws.sum()]] += 1
        self.seed, self._passes = seed, dict[int, tuple[int, Tensor]]()

    def batch_at(self, position: int, size: int) -> list[tuple[int, int]]:
        """The (pass, item) of `size` items, after `position` items have been drawn: no pair comes twice."""
        ends = np.cumsum(self.draws)
        return [self._item(epoch, slot, ends) for epoch, slot in batch_at(position, size, int(ends[-1]), self.seed)]

    def _item(self, epoch: int, slot: int, ends: NDArray[np.int64]) -> tuple[int, int]:
        """What is drawn in this place of an epoch."""
        k = int(np.searchsorted(ends, slot, side="right"))
        drawn = epoch * int(self.draws[k]) + slot - int(ends[k] - self.draws[k])
        number, at = divmod(drawn, len(self.items[k]))
        if self._passes.get(k, (-1,))[0] != number:
            order = torch.randperm(len(self.items[k]), generator=generator("cpu", self.seed, "order", k, number))
            self._passes[k] = number, order
        return number, int(self.items[k][self._passes[k][1][at]])


def batch_at(position: int, size: int, count: int, seed: int) -> list[tuple[int, int]]:
    """The (epoch, item) of `size` images, after `position` images have been seen.

    Epochs follow one another without a gap, so every batch is full and no item is dropped; `size` may exceed `count`.
    """
    batch: list[tuple[int, int]] = []
    while len(batch) < size:
        epoch, first = divmod(position + len(batch), count)
        items = permutation(count, seed, epoch)[first : first + size - len(batch)]
        batch += [(epoch, item) for item in items.tolist()]
    return batch
