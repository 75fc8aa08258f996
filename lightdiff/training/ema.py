"""Exponential moving average of weights."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class EMA:
    """A copy of a network whose weights follow it slowly.

    After step n: ema += (1 - d_n) (weights - ema) with d_n = min(decay, (1 + n) / (10 + n)), so that early averages
    forget the random start quickly (a fixed 0.999 still holds 37 % of it after 1,000 steps). The warm-up is that of
    TensorFlow's ExponentialMovingAverage with `num_updates`.
    """

    model: nn.Module  # the averaged copy
    decay: float

    def decay_at(self, step: int) -> float:
        """The decay used at optimizer step `step`, counted from 1: warmed up."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model's weights, after optimizer step `step`."""
        averaged: list[Tensor] = list(self.model.parameters())
        current: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averaged, current, 1 - self.decay_at(step))  # one call for all of them
