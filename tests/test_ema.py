"""Averaged weights against their geometric sum."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import training_stage
from torch import nn

from lightdiff.models.unet import UNet
from lightdiff.models.vae import VAE
from lightdiff.settings import LoopSettings, UNetSettings, VAESettings
from lightdiff.training.ema import EMA
from lightdiff.training.loop import Trainer


def filled(value: float) -> nn.Module:
    model = nn.Linear(2, 3).double()
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def values(model: nn.Module) -> list[float]:
    return sorted({x for p in model.parameters() for x in p.detach().flatten().tolist()})


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_an_average_is_its_geometric_sum(decay: float) -> None:
    weights = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0] * 3  # weights[0]: at the start
    ema = EMA(filled(weights[0]), decay)
    for step in range(1, len(weights)):
        ema.update(filled(weights[step]), step)
    # ema = sum_n w_n (1 - d_n) prod_{k > n} d_k, with d_0 = 0 for the start
    expected = 0.0
    for n, weight in enumerate(weights):
        share = 1.0 if n == 0 else 1 - min(decay, (1 + n) / (10 + n))
        for k in range(n + 1, len(weights)):
            share *= min(decay, (1 + k) / (10 + k))
        expected += share * weight
    assert values(ema.model) == pytest.approx([expected] * len(values(ema.model)), rel=1e-12)


def test_the_decay_warms_up_and_is_capped() -> None:
    ema = EMA(filled(0), 0.99)
    rates = [ema.decay_at(step) for step in range(1, 3000)]
    assert rates[:3] == pytest.approx([2 / 11, 3 / 12, 4 / 13])
    assert rates == sorted(rates)
    assert max(rates) == 0.99
    assert ema.decay_at(889) < 0.99 == ema.decay_at(891)  # (1 + n) / (10 + n) = 0.99 at n = 890


def test_the_start_is_soon_forgotten() -> None:
    ema = EMA(filled(1.0), 0.999)
    for step in range(1, 1001):
        ema.update(filled(0.0), step)
    # prod (1 + n) / (10 + n) = 10! / (1002 * 1003 * ... * 1010) of the start is left, 4e-21; of a fixed 0.999, 37 %
    assert values(ema.model)[-1] < 1e-20


def test_the_average_of_constant_weights_is_constant() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.GroupNorm(5, 5), nn.Linear(4, 4))
    ema = EMA(copy.deepcopy(model), 0.999)
    for step in range(1, 200):
        ema.update(model, step)
    for name, parameter in model.named_parameters():
        assert torch.equal(ema.model.get_parameter(name), parameter), name


def test_decay_0_is_a_copy() -> None:
    ema = EMA(filled(1.0), 0.0)
    ema.update(filled(7.0), 1)
    assert values(ema.model) == [7.0]


def test_a_trainer_averages_in_a_frozen_copy_of_its_own(tmp_path: Path) -> None:
    model = filled(1.0).train()
    task: Any = SimpleNamespace(model=model)
    loop = LoopSettings(precision="fp32", compile="off", ema_decay=(0.9,))
    (ema,) = Trainer(task, training_stage(tmp_path, loop)).emas
    assert ema.decay == 0.9
    assert ema.model.state_dict().keys() == model.state_dict().keys()
    assert not ema.model.training
    assert model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        next(model.parameters()).fill_(5.0)
    assert values(ema.model) == [1.0]
    ema.update(filled(3.0), 1)
    assert values(model) == [1.0, 5.0]
    assert all(p.grad is None for p in ema.model.parameters())


def test_each_weight_follows_its_own() -> None:
    settings = UNetSettings(channels=(8, 8), blocks=1, heads=2, time_dim=8)
    start, end = UNet(settings, 4), UNet(settings, 4)
    with torch.no_grad():
        for parameter in end.parameters():
            parameter.normal_()
    ema = EMA(copy.deepcopy(start), 0.9)
    ema.update(end, 5)  # 6 / 15
    for name, parameter in end.named_parameters():
        expected = 0.4 * start.get_parameter(name) + 0.6 * parameter
        torch.testing.assert_close(ema.model.get_parameter(name), expected)


def test_no_network_has_buffers_that_training_changes() -> None:
    # The average follows parameters alone; a BatchNorm, say, would need more.
    unet = UNet(UNetSettings(channels=(8, 8), blocks=1, heads=2, time_dim=8), 4)
    vae = VAE(VAESettings(encoder_channels=(8, 8), decoder_channels=(8, 8)))
    assert [name for name, _ in unet.named_buffers()] == ["time.freq"]
    assert list(vae.named_buffers()) == []
