"""Which item comes when, and every other random choice: pure functions of (seed, purpose, position).

There is no random state to save or to lose: a run that was stopped computes the numbers that a run never stopped
would have drawn, and so does another number of processes, workers or micro-batches.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


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
