"""The way from a predicted noise to (x0, eps), and back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GaussianData, normal
from torch import Tensor

from lightdiff.diffusion.objectives import denoiser, eps_from_x0, x0_from_eps
from lightdiff.diffusion.schedules import Level, noised

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True, database=None)
levels = st.floats(1e-4, 1 - 1e-4).map(lambda bar: Level(7, math.sqrt(bar), math.sqrt(1 - bar)))
seeds = st.integers(0, 2**31)


class Network:
    """Counts its calls and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.asked.append((x_t, t))
        return torch.sin(3 * x_t) + 0.1


@PROPERTY
@given(levels, seeds)
def test_x0_and_eps_round_trip(level: Level, seed: int) -> None:
    x0, eps = normal(2, 3, 4, 4, seed=seed), normal(2, 3, 4, 4, seed=seed + 1)
    x_t = noised(x0, eps, torch.full((2,), level.alpha**2, dtype=torch.float64))
    # atol: float64's 1e-16, times 1 / alpha or 1 / sigma of at most 100
    torch.testing.assert_close(x0_from_eps(x_t, eps, level), x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(eps_from_x0(x_t, x0, level), eps, rtol=0, atol=1e-11)
    torch.testing.assert_close(eps_from_x0(x_t, x0_from_eps(x_t, eps, level), level), eps, rtol=0, atol=1e-9)
    torch.testing.assert_close(x0_from_eps(x_t, eps_from_x0(x_t, x0, level), level), x0, rtol=0, atol=1e-9)


@PROPERTY
@given(levels, seeds, st.sampled_from([0.0, 0.3, 1.0, 3.0]))
def test_what_a_denoiser_says_adds_up_to_x_t(level: Level, seed: int, clamp: float) -> None:
    x_t = normal(2, 3, 4, 4, seed=seed)
    x0, eps = denoiser(Network(), clamp)(x_t, level)
    torch.testing.assert_close(level.alpha * x0 + level.sigma * eps, x_t, rtol=0, atol=1e-11)
    if clamp:
        assert float(x0.abs().max()) <= clamp


def test_a_clamp_changes_only_what_it_reaches() -> None:
    level, x_t = Level(3, 0.6, 0.8), normal(2, 3, 8, 8)
    free, eps_free = denoiser(Network())(x_t, level)
    x0, eps = denoiser(Network(), clamp=1.0)(x_t, level)
    inside = free.abs() <= 1
    assert 0 < int(inside.sum()) < inside.numel()
    torch.testing.assert_close(x0[inside], free[inside])
    torch.testing.assert_close(eps[inside], eps_free[inside])
    torch.testing.assert_close(x0[~inside], free[~inside].sign())
    assert bool((eps - eps_free)[~inside].abs().min() > 0)


@pytest.mark.parametrize("clamp", [0.0, 1.0])
def test_one_call_of_a_denoiser_is_one_of_the_network(clamp: float) -> None:
    network, x_t = Network(), normal(5, 3, 4, 4)
    denoiser(network, clamp)(x_t, Level(42, 0.6, 0.8))
    assert len(network.asked) == 1
    seen, t = network.asked[0]
    assert seen is x_t
    assert t.tolist() == [42] * 5
    assert t.dtype == torch.int64


def test_without_a_clamp_the_networks_noise_is_handed_on() -> None:
    x_t = normal(2, 3, 4, 4)
    _, eps = denoiser(Network())(x_t, Level(3, 0.6, 0.8))
    torch.testing.assert_close(eps, torch.sin(3 * x_t) + 0.1, rtol=0, atol=0)


def test_the_best_noise_of_gaussian_data_gives_its_best_x0() -> None:
    data, level, x_t = GaussianData(0.7, 0.4), Level(5, 0.6, 0.8), normal(2, 3, 4, 4)
    x0, _ = denoiser(lambda x, t: data.eps(x, level))(x_t, level)
    torch.testing.assert_close(x0, data.x0(x_t, level))
