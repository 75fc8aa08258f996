"""Several sources of images, each drawn as often as its weight says: `--data A=2 --data B=1`."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightdiff.data.order import batch_at, generator
from lightdiff.errors import UserError


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
