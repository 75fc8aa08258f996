"""Samplers against closed forms on Gaussian data, a naive loop, and diffusers."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from oracles import GaussianData, ddpm_variance, naive_ddim, normal
from torch import Tensor

from lightdiff.diffusion.objectives import Denoise, denoiser, target
from lightdiff.diffusion.samplers import SAMPLERS, ddim, dpmpp_2m, heun
from lightdiff.diffusion.schedules import CLEAN, Level, Schedule, alpha_bar_table, sampling_levels
from lightdiff.settings import NOISY, WITH_ETA, Objective, SamplerName, ScheduleSettings, Spacing

SCHEDULES = ["linear", "cosine"]
DATA = GaussianData(mean=0.8, std=0.5)
SHAPE = (2, 3, 4, 4)


def levels_of(schedule: str, num_steps: int, floor: float = 0.0) -> list[Level]:
    return sampling_levels(Schedule.of(ScheduleSettings.model_validate({"schedule": schedule})), num_steps, floor)


def recorded(denoise: Denoise, visited: list[Tensor]) -> Denoise:
    def inner(x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        visited.append(x_t)
        return denoise(x_t, level)

    return inner


def step_noise(step: int) -> Tensor:
    return normal(*SHAPE, seed=1000 + step)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_n_steps_are_n_calls(num_steps: int, eta: float) -> None:
    levels = levels_of("cosine", num_steps)
    asked: list[Level] = []

    def denoise(x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        asked.append(level)
        return DATA.denoise(x_t, level)

    ddim(denoise, levels, normal(*SHAPE), step_noise, eta)
    assert asked == levels[:-1]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_last_step_lands_on_the_predicted_x0(num_steps: int, eta: float) -> None:
    said: list[Tensor] = []

    def denoise(x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        said.append(torch.tanh(x_t) + level.alpha)
        return said[-1], x_t.square()

    x = ddim(denoise, levels_of("linear", num_steps), normal(*SHAPE), step_noise, eta)
    assert torch.equal(x, said[-1])


def test_fresh_noise_is_asked_for_only_where_it_is_used() -> None:
    asked: list[int] = []

    def noise(step: int) -> Tensor:
        asked.append(step)
        return step_noise(step)

    ddim(DATA.denoise, levels_of("linear", 5), normal(*SHAPE), noise)
    assert asked == []
    ddim(DATA.denoise, levels_of("linear", 5), normal(*SHAPE), noise, 0.3)
    assert asked == [0, 1, 2, 3]  # the last step ends clean
    with pytest.raises(AssertionError, match="eta > 0 needs noise for each step"):
        ddim(DATA.denoise, levels_of("linear", 5), normal(*SHAPE), eta=0.3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 3, 20])
def test_a_point_mass_is_hit_exactly(schedule: str, num_steps: int) -> None:
    point = GaussianData(mean=-1.3, std=0.0)
    visited: list[Tensor] = []
    levels, x = levels_of(schedule, num_steps), normal(*SHAPE)
    eps = point.eps(x, levels[0])
    end = ddim(recorded(point.denoise, visited), levels, x)
    # The exact flow keeps eps: every x on the way is alpha m + sigma eps. atol: float64, at most 20 steps.
    for level, x_t in zip(levels, [*visited, end], strict=True):
        torch.testing.assert_close(x_t, level.alpha * -1.3 + level.sigma * eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_error_halves_when_steps_double(schedule: str) -> None:
    x = normal(*SHAPE)
    errors = []
    for num_steps in (40, 80, 160, 320):
        # Without the last levels of the cosine schedule: its trailing strides would begin with one huge step.
        levels = levels_of(schedule, num_steps, floor=2e-5)
        exact = DATA.flow(x, levels[0], CLEAN)
        errors.append(float((ddim(DATA.denoise, levels, x) - exact).abs().max()))
    ratios = [a / b for a, b in pairwise(errors)]
    assert errors[-1] < 0.02
    assert all(1.7 < ratio < 2.3 for ratio in ratios), ratios  # order 1: 2 in the limit


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_each_level_of_a_point_mass_has_its_variance(eta: float) -> None:
    # DDIM's marginals are q(x_t | x0) whatever eta is (Song et al. 2021, lemma 1), exactly so for a point mass.
    point, shape = GaussianData(mean=0.4, std=0.0), (1, 1, 200, 200)
    visited: list[Tensor] = []
    levels = levels_of("linear", 8)
    x = levels[0].alpha * 0.4 + levels[0].sigma * normal(*shape)
    ddim(recorded(point.denoise, visited), levels, x, lambda step: normal(*shape, seed=50 + step), eta)
    for level, x_t in zip(levels, visited, strict=False):
        # 40,000 samples: standard errors 0.5 % of sigma, 0.7 % of the variance; the bounds are four of them
        assert float(x_t.mean()) == pytest.approx(level.alpha * 0.4, abs=0.02 * level.sigma)
        assert float(x_t.var()) == pytest.approx(level.sigma**2, rel=0.03)


def test_eta_1_adds_ddpms_variance_at_each_step() -> None:
    levels = levels_of("cosine", 10)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for here, there in pairwise(levels[:-1]):
        # x0 = eps = 0: what is left of a step is its fresh noise
        fresh = ddim(lambda x, level: (x * 0, x * 0), [here, there], zero, lambda step: zero + 1, 1.0)
        assert float(fresh) ** 2 == pytest.approx(ddpm_variance(here.alpha**2, there.alpha**2), rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ancestral_sampling_gives_gaussian_data_its_variance(schedule: str) -> None:
    shape = (1, 1, 250, 250)
    levels = levels_of(schedule, 200, floor=2e-5)
    first = levels[0]
    x = first.alpha * DATA.mean + math.sqrt(DATA.variance_at(first)) * normal(*shape)
    drawn = ddim(DATA.denoise, levels, x, lambda step: normal(*shape, seed=7 + step), 1.0)
    # 62,500 samples: standard errors 0.002 of the mean and 0.6 % of the variance
    assert float(drawn.mean()) == pytest.approx(DATA.mean, abs=0.01)
    assert float(drawn.var()) == pytest.approx(DATA.ddim_variance(levels, 1.0), rel=0.025)
    # Steps of finite size lose the spread of x0 around its mean: 200 of them a few per cent
    assert float(drawn.var()) == pytest.approx(DATA.std**2, rel=0.08)


def eta_of(name: SamplerName, eta: float) -> dict[str, float]:
    return {"eta": eta} if name in WITH_ETA else {}


def spread(name: SamplerName, levels: list[Level], eta: float) -> tuple[float, float]:
    """Mean and variance that a sampler ends with from those of DATA at levels[0].

    With a linear denoiser the end is linear in the start and in the noise of each step. A batch shows what becomes of
    each: an item has noise 1 at one step alone, the last but one begins a standard deviation off, the last is the mean.
    """
    steps, first = len(levels) - 1, levels[0]
    alone = torch.eye(steps + 2, dtype=torch.float64)[:, :, None, None, None]
    x = first.alpha * DATA.mean + math.sqrt(DATA.variance_at(first)) * alone[steps]
    end = SAMPLERS[name](DATA.denoise, levels, x, lambda step: alone[step], **eta_of(name, eta)).flatten()
    return float(end[-1]), float((end[:-1] - end[-1]).square().sum())


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_ancestral_samplings_variance_converges(name: SamplerName) -> None:
    lost = []
    for num_steps in (50, 100, 200, 500):
        levels = levels_of("linear", num_steps)
        mean, variance = spread(name, levels, 1.0)
        assert mean == pytest.approx(DATA.mean, rel=1e-9)
        assert variance == pytest.approx(DATA.ddim_variance(levels, 1.0), rel=1e-9)
        lost.append(1 - variance / DATA.std**2)
    assert all(0 < b < a for a, b in pairwise(lost))


def wavy(x: np.ndarray, t: int) -> np.ndarray:
    return np.sin(2 * x + t / 300) + 0.3 * x


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_steps", [1, 7, 30])
def test_ddim_is_the_naive_loop(schedule: str, eta: float, num_steps: int) -> None:
    table = alpha_bar_table(ScheduleSettings.model_validate({"schedule": schedule}))
    levels = levels_of(schedule, num_steps, 1e-3)
    noise = [step_noise(i).numpy() for i in range(num_steps)]
    x = normal(*SHAPE)
    expected = naive_ddim(wavy, table.numpy(), [level.t for level in levels[:-1]], x.numpy(), eta, noise)

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.from_numpy(wavy(x_t.numpy(), int(t[0])))

    visited: list[Tensor] = []
    end = ddim(recorded(denoiser(network), visited), levels, x, step_noise, eta)
    for ours, naive in zip([*visited, end], expected, strict=True):
        # float64 rounding, grown by 1 / alpha of at most 30 and a network that is not contracting
        torch.testing.assert_close(ours, torch.from_numpy(naive), rtol=1e-8, atol=1e-9)


@pytest.mark.reference
@pytest.mark.parametrize("own_table", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [1, 4, 50, 1000])
@pytest.mark.parametrize(("schedule", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_every_step_is_that_of_diffusers(
    schedule: str, theirs: str, num_steps: int, eta: float, own_table: bool
) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=theirs,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )
    table = alpha_bar_table(ScheduleSettings.model_validate({"schedule": schedule}))
    # rtol: theirs is a float32 product of 1000 factors; 1 - 0.999 alone is off by 5e-5 in float32
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), table, rtol=2e-4, atol=0)
    if own_table:  # then nothing but rounding in float64 is left between the two
        scheduler.alphas_cumprod = table
    scheduler.set_timesteps(num_steps)
    levels = sampling_levels(Schedule.of(ScheduleSettings.model_validate({"schedule": schedule})), num_steps)
    assert scheduler.timesteps.tolist() == [level.t for level in levels[:-1]]

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        bar = float(table[int(t[0])])
        return DATA.eps(x_t, Level(int(t[0]), math.sqrt(bar), math.sqrt(1 - bar)))

    x = normal(*SHAPE)
    expected = [x]
    for i, t in enumerate(scheduler.timesteps):
        noise = step_noise(i) if eta > 0 else None
        eps = network(expected[-1], t.expand(len(x)))
        expected.append(scheduler.step(eps, t, expected[-1], eta=eta, variance_noise=noise).prev_sample)
    visited: list[Tensor] = []
    end = ddim(recorded(denoiser(network), visited), levels, x, step_noise, eta)
    # Own table: float64. Theirs: float32's rounding of alpha_bar; where the cosine schedule begins, sigma's 3e-8
    # divided by alpha = 5e-5 is 6e-4 of x0.
    atol = 1e-8 if own_table else 5e-3
    for ours, other in zip([*visited, end], expected, strict=True):
        torch.testing.assert_close(ours, other.double(), rtol=0, atol=atol)


# --- the other samplers -------------------------------------------------------------------------------------------


class Promise(NamedTuple):
    """What a sampler's docstring says of it."""

    order: int  # without noise of its own; 0: it has some
    calls: Callable[[int], int] = lambda steps: steps


PROMISES: dict[SamplerName, Promise] = {
    "ddim": Promise(order=1),
    "ddpm": Promise(order=0),
    "dpm++2m": Promise(order=2),
    "heun": Promise(order=2, calls=lambda steps: 2 * steps - 1),
    "euler": Promise(order=1),
}
NAMES = list(PROMISES)


def path(kind: str, count: int) -> list[Level]:
    """Levels from far to little noise along a smooth path, which does not end clean."""
    places = [0.95 - 0.85 * i / count for i in range(count + 1)]
    if kind == "straight":
        return [Level(i, 1 - p, p) for i, p in enumerate(places)]
    if kind == "exploding":  # alpha 1, sigma from 20 to 0.05, evenly in log(sigma)
        return [
            Level(i, 1.0, math.exp(math.log(0.05) + (p - 0.1) / 0.85 * math.log(400))) for i, p in enumerate(places)
        ]
    return [Level(i, math.cos(p * math.pi / 2), math.sin(p * math.pi / 2)) for i, p in enumerate(places)]


def test_the_table_of_samplers_is_complete() -> None:
    assert list(SAMPLERS) == NAMES
    assert {name for name, promise in PROMISES.items() if not promise.order} == NOISY


@pytest.mark.parametrize("kind", ["circle", "straight", "exploding"])
@pytest.mark.parametrize("name", [name for name, promise in PROMISES.items() if promise.order])
def test_every_sampler_converges_at_its_order(name: SamplerName, kind: str) -> None:
    x, order = normal(*SHAPE), PROMISES[name].order
    errors = []
    for count in (80, 160, 320, 640):
        levels = path(kind, count)
        start = levels[0].alpha * DATA.mean + math.sqrt(DATA.variance_at(levels[0])) * x
        end = SAMPLERS[name](DATA.denoise, levels, start, step_noise)
        errors.append(float((end - DATA.flow(start, levels[0], levels[-1])).abs().max()))
    ratios = [a / b for a, b in pairwise(errors)]
    assert errors[-1] < (0.02 if order == 1 else 1e-3)
    assert all(2**order * 0.8 < ratio < 2**order * 1.25 for ratio in ratios), f"{ratios}: not of order {order}"


@pytest.mark.parametrize("kind", ["circle", "straight", "exploding"])
@pytest.mark.parametrize(("name", "eta"), [("ddpm", 0.0), ("ddim", 1.0), ("ddim", 0.5)])
def test_the_variance_of_samplers_with_noise_is_of_first_order(name: SamplerName, eta: float, kind: str) -> None:
    errors = []
    for count in (80, 160, 320, 640):
        levels = path(kind, count)
        mean, variance = spread(name, levels, eta)
        assert mean == pytest.approx(levels[-1].alpha * DATA.mean, rel=1e-9)
        errors.append(abs(1 - variance / DATA.variance_at(levels[-1])))
    ratios = [a / b for a, b in pairwise(errors)]
    assert errors[-1] < 0.01
    assert all(1.9 < ratio < 2.1 for ratio in ratios), ratios


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_n_steps_are_so_many_calls_and_end_on_the_predicted_x0(name: SamplerName, num_steps: int) -> None:
    said: list[Tensor] = []

    def denoise(x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        said.append(torch.tanh(x_t) + level.alpha)
        return said[-1], (x_t - level.alpha * said[-1]) / level.sigma

    x = SAMPLERS[name](denoise, levels_of("cosine", num_steps), normal(*SHAPE), step_noise)
    assert len(said) == PROMISES[name].calls(num_steps)
    torch.testing.assert_close(x, said[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
@pytest.mark.parametrize("num_steps", [1, 12, 100])
def test_ddpm_is_ancestral_sampling_and_euler_follows_the_probability_flow(schedule: str, num_steps: int) -> None:
    levels, start = levels_of(schedule, num_steps, floor=2e-5), normal(*SHAPE)
    ancestral, straight = start, start
    for step, (here, there) in enumerate(pairwise(levels)):
        # Ho et al. 2020, Eq. 7: the mean and the variance of q(x_there | x_here, x0), for any alpha and sigma
        x0, _ = DATA.denoise(ancestral, here)
        share = (here.alpha / there.alpha * there.sigma / here.sigma) ** 2
        mean = share * there.alpha / here.alpha * ancestral if here.alpha else 0.0
        std = there.sigma * math.sqrt(max(0.0, 1 - share))
        ancestral = mean + there.alpha * (1 - share) * x0 + std * step_noise(step)
        x0, eps = DATA.denoise(straight, here)
        straight = straight + (there.alpha - here.alpha) * x0 + (there.sigma - here.sigma) * eps
    end = SAMPLERS["ddpm"](DATA.denoise, levels, start, step_noise)
    torch.testing.assert_close(end, ancestral, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, ddim(DATA.denoise, levels, start, step_noise, 1.0))
    torch.testing.assert_close(SAMPLERS["euler"](DATA.denoise, levels, start), straight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["circle", "straight", "exploding"])
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_ancestral_samples_have_the_variance_of_each_level(name: SamplerName, kind: str) -> None:
    # For a point mass the marginals are exact: mean alpha m, variance sigma^2, on every kind of path.
    point, shape, visited = GaussianData(mean=0.4, std=0.0), (1, 1, 200, 200), list[Tensor]()
    levels = path(kind, 6)
    x = levels[0].alpha * 0.4 + levels[0].sigma * normal(*shape)
    noise = lambda step: normal(*shape, seed=50 + step)  # noqa: E731
    SAMPLERS[name](recorded(point.denoise, visited), levels, x, noise, **eta_of(name, 1.0))
    for level, x_t in zip(levels, visited, strict=False):
        # 40,000 samples: standard errors 0.5 % of sigma, 0.7 % of the variance; the bounds are four of them
        assert float(x_t.mean()) == pytest.approx(level.alpha * 0.4, abs=0.02 * level.sigma)
        assert float(x_t.var()) == pytest.approx(level.sigma**2, rel=0.03)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", ["trailing", "uniform", "karras", "quadratic"])
@pytest.mark.parametrize(
    ("objective", "noise"),
    [
        ("eps", {"schedule": "cosine"}),
        ("x0", {"schedule": "flow"}),
        ("v", {"schedule": "linear", "zero_terminal_snr": True}),
        ("flow", {"schedule": "flow"}),
    ],
)
def test_every_sampler_runs_with_every_objective_and_spacing(
    name: SamplerName, spacing: Spacing, objective: Objective, noise: dict[str, object]
) -> None:
    schedule = Schedule.of(ScheduleSettings.model_validate(noise))
    levels = sampling_levels(schedule, 40, 3e-3 if objective == "eps" else 0.0, spacing)
    level_of = {round(float(torch.tensor(level.t, dtype=torch.float32)), 3): level for level in levels}

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        level = level_of[round(float(t[0]), 3)]
        x0, eps = DATA.denoise(x_t, level)
        return target(objective, x0, eps, level.alpha, level.sigma)

    x, shape = normal(1, 1, 60, 60), (1, 1, 60, 60)
    noise_of = lambda step: normal(*shape, seed=9 + step)  # noqa: E731
    drawn = SAMPLERS[name](denoiser(network, objective), levels, x, noise_of)
    by_hand = SAMPLERS[name](DATA.denoise, levels, x, noise_of)
    torch.testing.assert_close(drawn, by_hand, rtol=0, atol=1e-6)
    # 3,600 samples, standard error of the mean 0.008. 40 steps come near to the spread, ancestral ones less so: each
    # forgets the spread of x0 around its mean.
    assert float(drawn.mean()) == pytest.approx(DATA.mean, abs=0.05)
    assert float(drawn.std()) == pytest.approx(DATA.std, rel=0.35 if name in NOISY else 0.2)


# --- diffusers ----------------------------------------------------------------------------------------------------


def eps_network(schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
    def network(x_t: Tensor, t: Tensor) -> Tensor:
        at = int(t[0])
        return DATA.eps(x_t, Level(at, float(schedule.alpha[at]), float(schedule.sigma[at])))

    return network


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
@pytest.mark.parametrize("num_steps", [1, 5, 20])
def test_every_step_of_dpmpp_2m_is_that_of_diffusers(num_steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing", final_sigmas_type="zero", solver_order=2
    )
    schedule = Schedule.of(ScheduleSettings(schedule="linear"))
    network, levels, x = eps_network(schedule), levels_of("linear", num_steps), normal(*SHAPE)
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == [level.t for level in levels[:-1]]
    expected, visited = [x], list[Tensor]()
    for t in scheduler.timesteps:
        expected.append(scheduler.step(network(expected[-1], t.expand(len(x))), t, expected[-1]).prev_sample)
    end = dpmpp_2m(recorded(denoiser(network), visited), levels, x)
    for ours, other in zip([*visited, end], expected, strict=True):
        torch.testing.assert_close(ours, other.double(), rtol=0, atol=2e-3)  # their tables are float32


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
@pytest.mark.parametrize("num_steps", [1, 5, 20])
def test_every_step_of_euler_is_that_of_diffusers(num_steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing")
    schedule = Schedule.of(ScheduleSettings(schedule="linear"))
    network, levels, x = eps_network(schedule), levels_of("linear", num_steps), normal(*SHAPE)
    scheduler.set_timesteps(num_steps)
    y, visited = x / levels[0].alpha, list[Tensor]()  # theirs is x / alpha
    expected = [y]
    for t in scheduler.timesteps:
        eps = network(scheduler.scale_model_input(expected[-1], t), t.expand(len(x)))
        expected.append(scheduler.step(eps, t, expected[-1]).prev_sample)
    end = SAMPLERS["euler"](recorded(denoiser(network), visited), levels, x)
    for level, ours, other in zip(levels, [*visited, end], expected, strict=True):
        torch.testing.assert_close(ours, level.alpha * other.double(), rtol=0, atol=2e-3)  # their tables are float32


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
@pytest.mark.parametrize("num_steps", [2, 5, 20])
def test_every_step_of_heun_is_that_of_diffusers(num_steps: int) -> None:
    """Theirs steps in x / alpha, where alpha is 1 and sigma is sigma / alpha: ours is told the same levels that way."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing")
    schedule = Schedule.of(ScheduleSettings(schedule="linear"))
    network, levels, x = eps_network(schedule), levels_of("linear", num_steps), normal(*SHAPE)
    scheduler.set_timesteps(num_steps)
    y, visited = x / levels[0].alpha, list[Tensor]()
    expected = [y]  # and, as both tell it, each Euler step that is tried before the one that is taken
    for t in scheduler.timesteps:
        eps = network(scheduler.scale_model_input(expected[-1], t), t.expand(len(x)))
        expected.append(scheduler.step(eps, t, expected[-1]).prev_sample)

    def denoise(y_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        eps = network(y_t / math.hypot(1, level.sigma), torch.tensor([level.t]))
        return y_t - level.sigma * eps, eps

    end = heun(recorded(denoise, visited), [Level(level.t, 1.0, level.sigma / level.alpha) for level in levels], y)
    for ours, other in zip([*visited, end], expected, strict=True):
        torch.testing.assert_close(ours, other.double(), rtol=1e-5, atol=2e-3)  # their tables are float32


@pytest.mark.parametrize("num_steps", [1, 5, 50])
@pytest.mark.parametrize("schedule", ["linear", "scaled-linear"])
def test_every_step_of_ddpm_is_that_of_diffusers(schedule: str, num_steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="trailing", variance_type="fixed_small")
    settings = ScheduleSettings.model_validate({"schedule": schedule})
    scheduler.alphas_cumprod = alpha_bar_table(settings)  # theirs is float32
    network, levels, x = eps_network(Schedule.of(settings)), levels_of(schedule, num_steps), normal(*SHAPE)
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == [level.t for level in levels[:-1]]
    expected, visited = [x], list[Tensor]()
    for step, t in enumerate(scheduler.timesteps):
        eps = network(expected[-1], t.expand(len(x)))
        noise = torch.Generator().manual_seed(1000 + step)  # that of step_noise
        expected.append(scheduler.step(eps, t, expected[-1], generator=noise).prev_sample)
    end = SAMPLERS["ddpm"](recorded(denoiser(network), visited), levels, x, step_noise)
    for ours, other in zip([*visited, end], expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-8)


@pytest.mark.parametrize("num_steps", [2, 10])
@pytest.mark.parametrize(("name", "theirs"), [("euler", "FlowMatchEulerDiscrete"), ("heun", "FlowMatchHeunDiscrete")])
def test_every_step_of_rectified_flow_is_that_of_diffusers(name: SamplerName, theirs: str, num_steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler, x = getattr(diffusers, f"{theirs}Scheduler")(), normal(*SHAPE)
    scheduler.set_timesteps(num_steps)

    def velocity(x_t: Tensor, time: float) -> Tensor:
        x0, eps = DATA.denoise(x_t, Level(0, 1 - time, time))
        return eps - x0

    expected, visited = [x], list[Tensor]()
    for t in scheduler.timesteps:
        expected.append(scheduler.step(velocity(expected[-1], float(t) / 1000), t, expected[-1]).prev_sample)
    sigmas = sorted({round(float(sigma), 6) for sigma in scheduler.sigmas}, reverse=True)
    levels = [Level(1000 * sigma, 1 - sigma, sigma) for sigma in sigmas]
    assert levels[-1][1:] == CLEAN[1:]
    denoise = denoiser(lambda x_t, t: velocity(x_t, float(t[0]) / 1000), "flow")
    end = SAMPLERS[name](recorded(denoise, visited), levels, x)
    for ours, other in zip([*visited, end], expected, strict=True):
        torch.testing.assert_close(ours, other.double(), rtol=0, atol=2e-6)  # theirs is rounded to float32
