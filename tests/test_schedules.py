"""Noise schedules against their formulas, the original scripts' tables and hand-computed spacings."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import GOLDEN, needs_golden, normal

from lightdiff.diffusion.schedules import CLEAN, Schedule, alpha_bar_table, random_levels, sampling_levels
from lightdiff.settings import LevelSettings, ScheduleSettings, Spacing

LINEAR = ScheduleSettings(schedule="linear")
COSINE = ScheduleSettings(schedule="cosine")
FLOW = ScheduleSettings(schedule="flow")
SPACINGS: list[Spacing] = ["trailing", "uniform", "karras", "quadratic"]
PROPERTY = settings(deadline=None, max_examples=60, derandomize=True, database=None)
schedules = st.builds(
    ScheduleSettings,
    schedule=st.sampled_from(["linear", "scaled-linear", "cosine"]),
    timesteps=st.integers(2, 1500),
    beta_start=st.floats(1e-5, 1e-2),
    beta_end=st.floats(1e-3, 0.05),
)


def preserving(alpha_bar: torch.Tensor) -> Schedule:
    return Schedule(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def betas_of(alpha_bar: torch.Tensor) -> torch.Tensor:
    return 1 - alpha_bar / torch.cat([torch.ones(1, dtype=alpha_bar.dtype), alpha_bar[:-1]])


@PROPERTY
@given(schedules)
def test_a_table_falls_strictly_inside_0_and_1(schedule: ScheduleSettings) -> None:
    table = alpha_bar_table(schedule)
    assert table.shape == (schedule.timesteps,)
    assert table.dtype == torch.float64
    assert bool((table > 0).all() and (table < 1).all())
    assert bool((table.diff() < 0).all())


@PROPERTY
@given(schedules)
def test_a_table_is_the_product_of_its_betas(schedule: ScheduleSettings) -> None:
    table = alpha_bar_table(schedule)
    betas = betas_of(table)
    assert bool((betas > 0).all() and (betas <= 0.999 + 1e-12).all())
    # rtol: 1 - beta loses up to 3 of float64's 16 digits where beta is 0.999, the product of 1500 another 3
    torch.testing.assert_close(torch.cumprod(1 - betas, dim=0), table, rtol=1e-10, atol=0)


@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_linear_betas_are_evenly_spaced(steps: int) -> None:
    table = alpha_bar_table(ScheduleSettings(schedule="linear", timesteps=steps, beta_start=1e-3, beta_end=0.3))
    product, expected = 1.0, []
    for i in range(steps):
        product *= 1 - (1e-3 + (0.3 - 1e-3) * i / (steps - 1))
        expected.append(product)
    # rtol: a product of 1000 factors in float64, in another order
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=0)


def test_the_linear_default_is_ddpms() -> None:
    betas = betas_of(alpha_bar_table(LINEAR))
    assert float(betas[0]) == pytest.approx(1e-4)
    assert float(betas[-1]) == pytest.approx(0.02)


@pytest.mark.parametrize("steps", [10, 250, 1000, 4000])
def test_cosine_follows_its_formula_up_to_the_clipped_end(steps: int) -> None:
    def f(t: int) -> float:  # Nichol & Dhariwal 2021, Eq. 17, s = 0.008
        return math.cos((t / steps + 0.008) / (1 + 0.008) * math.pi / 2) ** 2

    formula = [f(t + 1) / f(0) for t in range(steps)]  # their t counts from 1, ours from 0
    clipped = [1 - b / a > 0.999 for a, b in pairwise([1.0, *formula])]
    first = clipped.index(True)
    assert first == steps - 1  # only the end, where the formula says beta = 1
    table = alpha_bar_table(ScheduleSettings(schedule="cosine", timesteps=steps))
    # rtol: up to 4000 factors against one cosine
    torch.testing.assert_close(table[:first], torch.tensor(formula[:first], dtype=torch.float64), rtol=1e-9, atol=0)
    assert float(table[-1] / table[-2]) == pytest.approx(0.001)


def test_the_cosine_table_ends_near_2e_9() -> None:
    assert float(alpha_bar_table(COSINE)[-1]) == pytest.approx(2.43e-9, rel=1e-2)


@needs_golden
@pytest.mark.reference
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_tables_are_those_of_the_original_scripts(name: str) -> None:
    theirs = safetensors.torch.load_file(GOLDEN / "original_reference.safetensors")[f"{name}.alpha_bar"].double()
    ours = alpha_bar_table(ScheduleSettings.model_validate({"schedule": name}))
    if name == "cosine":  # their last entry is the rounding error of cos(pi / 2), not the product of clipped betas
        assert float(theirs[-1]) < 1e-14
        ours, theirs = ours[:-1], theirs[:-1]
    # rtol: theirs is float32 throughout
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def test_noised_has_the_mean_and_variance_of_its_level() -> None:
    alpha_bar = torch.tensor([0.99, 0.5, 0.01], dtype=torch.float64)
    x0 = torch.full((3, 1, 400, 400), 2.0, dtype=torch.float64)
    x_t = preserving(alpha_bar).q_sample(x0, normal(3, 1, 400, 400), torch.arange(3))
    # 160,000 samples: the mean's standard error is 0.0025, the variance's 0.0035
    torch.testing.assert_close(x_t.mean((1, 2, 3)), 2 * alpha_bar.sqrt(), rtol=0, atol=0.012)
    torch.testing.assert_close(x_t.var((1, 2, 3)), 1 - alpha_bar, rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", [(5, 5, 5, 5), (4, 3, 2, 4), (2, 2, 3, 5), (1, 4, 4, 4)])
def test_noised_gives_each_image_its_own_level(shape: tuple[int, ...]) -> None:
    # Where batch == width, levels broadcast along the width would go unnoticed by shapes alone.
    x0, eps = normal(*shape, seed=1), normal(*shape, seed=2)
    alpha_bar = torch.linspace(0.05, 0.95, shape[0], dtype=torch.float64)
    x_t = preserving(alpha_bar).q_sample(x0, eps, torch.arange(shape[0]))
    for i in range(shape[0]):
        a = float(alpha_bar[i])
        torch.testing.assert_close(x_t[i], math.sqrt(a) * x0[i] + math.sqrt(1 - a) * eps[i])


@pytest.mark.parametrize(
    ("timesteps", "num_steps", "expected"),
    [
        (10, 1, [9]),
        (10, 2, [9, 4]),
        (10, 5, [9, 7, 5, 3, 1]),
        (10, 10, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        (10, 3, [9, 6, 2]),  # 10, 6.67, 3.33 rounded, less one
        (10, 4, [9, 7, 4, 1]),  # 10, 7.5, 5, 2.5: halves go to the even neighbour, as in numpy
        (2, 2, [1, 0]),
        (1000, 4, [999, 749, 499, 249]),
    ],
)
def test_spacing_is_trailing(timesteps: int, num_steps: int, expected: list[int]) -> None:
    settings = ScheduleSettings(schedule="cosine", timesteps=timesteps)
    table, levels = alpha_bar_table(settings), sampling_levels(Schedule.of(settings), num_steps)
    assert [level.t for level in levels[:-1]] == expected
    for level in levels[:-1]:
        assert level.alpha == pytest.approx(math.sqrt(float(table[int(level.t)])), rel=1e-15)
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1)


@PROPERTY
@given(schedules, st.data(), st.sampled_from([0.0, 1e-6, 2e-5, 0.1]))
def test_levels_fall_without_repetition_and_end_clean(
    schedule: ScheduleSettings, data: st.DataObject, floor: float
) -> None:
    table = Schedule.of(schedule)
    usable = int((table.signal() >= floor).sum())
    assume(usable > 0)
    num_steps = data.draw(st.integers(1, usable))
    levels = sampling_levels(table, num_steps, floor)
    assert len(levels) == num_steps + 1
    assert levels[-1] == CLEAN == (-1, 1.0, 0.0)
    assert levels[0].t == usable - 1
    assert all(a.t > b.t and a.alpha < b.alpha and a.sigma > b.sigma for a, b in pairwise(levels))
    assert all(level.t >= 0 and level.alpha**2 >= floor * (1 - 1e-12) for level in levels[:-1])
    strides = -np.diff([level.t for level in levels])
    assert strides.max() - strides.min() <= 2  # equal but for rounding


def test_levels_with_too_little_signal_are_left_out() -> None:
    table, schedule = alpha_bar_table(COSINE), Schedule.of(COSINE)
    assert sampling_levels(schedule, 10)[0].t == 999
    first = int(sampling_levels(schedule, 10, 2e-5)[0].t)
    assert first < 999
    assert float(table[first]) >= 2e-5 > float(table[first + 1])


@pytest.mark.parametrize(
    ("num_steps", "floor", "text"),
    [
        (11, 0.0, "11 steps asked for, but the schedule has 10 usable levels"),
        (0, 0.0, "0 steps asked for, but the schedule has 10 usable levels"),
        (-1, 0.0, "-1 steps asked for, but the schedule has 10 usable levels"),
        (10, 0.01, "10 steps asked for, but the schedule has 9 usable levels"),
        (1, 0.9999, "1 steps asked for, but the schedule has 0 usable levels"),
    ],
)
def test_more_steps_than_levels_are_refused(num_steps: int, floor: float, text: str) -> None:
    schedule = Schedule.of(ScheduleSettings(schedule="cosine", timesteps=10))
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        sampling_levels(schedule, num_steps, floor)


# --- schedules that came later ------------------------------------------------------------------------------------


def test_scaled_linear_is_that_of_stable_diffusion() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ours = alpha_bar_table(ScheduleSettings(schedule="scaled-linear", beta_start=0.00085, beta_end=0.012))
    torch.testing.assert_close(theirs.alphas_cumprod.double(), ours, rtol=2e-4, atol=0)  # theirs: float32


@pytest.mark.parametrize("schedule", ["linear", "scaled-linear", "cosine"])
def test_zero_terminal_snr_ends_with_noise_alone(schedule: str) -> None:
    plain = ScheduleSettings.model_validate({"schedule": schedule})
    table = alpha_bar_table(plain.model_copy(update={"zero_terminal_snr": True}))
    assert float(table[-1]) == 0
    assert float(table[0]) == pytest.approx(float(alpha_bar_table(plain)[0]), rel=1e-12)
    assert bool((table.diff() < 0).all())


def test_zero_terminal_snr_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, rescale_betas_zero_snr=True)
    ours = alpha_bar_table(ScheduleSettings(schedule="linear", zero_terminal_snr=True))
    torch.testing.assert_close(theirs.alphas_cumprod.double(), ours, rtol=1e-3, atol=1e-9)  # theirs: float32


def test_rectified_flow_draws_straight_lines_from_data_to_noise() -> None:
    schedule = Schedule.of(FLOW)
    torch.testing.assert_close(schedule.alpha + schedule.sigma, torch.ones(1000, dtype=torch.float64))
    assert (float(schedule.alpha[-1]), float(schedule.sigma[-1])) == (0.0, 1.0)
    assert float(schedule.sigma[0]) == pytest.approx(1 / 1000)
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler().sigmas.flip(0).double()
    torch.testing.assert_close(theirs, schedule.sigma, rtol=1e-6, atol=0)


# --- levels to train at -------------------------------------------------------------------------------------------


@PROPERTY
@given(st.integers(1, 300), st.integers(0, 2**31))
def test_stratified_levels_have_one_number_from_each_part(count: int, seed: int) -> None:
    u = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    t = random_levels(u, LevelSettings(density="uniform", stratified=True), 1000 * count)
    assert t.dtype == torch.int64
    parts = (t // 1000).tolist()
    # in float32 a number that is nearly 1 may be rounded into the next part
    assert all(part in (i, min(i + 1, count - 1)) for i, part in enumerate(parts))
    assert sum(part != i for i, part in enumerate(parts)) <= 1 + count // 50


def test_uniform_levels_have_equal_shares() -> None:
    u = torch.tensor([0.0, 0.0999, 0.1, 0.55, 0.99999994])
    assert random_levels(u, LevelSettings(density="uniform", stratified=False), 10).tolist() == [0, 0, 1, 5, 9]


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.2, 1.2), (0.5, 0.3)])
def test_logit_normal_levels_have_their_distribution(mean: float, std: float) -> None:
    settings = LevelSettings(density="logit-normal", density_mean=mean, density_std=std, stratified=True)
    t = random_levels(torch.full((20_000,), 0.5), settings, 1000)
    for place in (0.05, 0.3, 0.5, 0.8, 0.97):
        expected = torch.distributions.Normal(mean, std).cdf(torch.logit(torch.tensor(place)))
        # atol: levels are 1/1000 wide, and the density at most 2.5 / std^... times the uniform one
        assert float((t < place * 1000).double().mean()) == pytest.approx(float(expected), abs=0.006)
    assert int(t.min()) >= 0
    assert int(t.max()) <= 999


# --- levels to sample at ------------------------------------------------------------------------------------------


@PROPERTY
@given(
    st.sampled_from([COSINE, LINEAR, FLOW, ScheduleSettings(schedule="linear", zero_terminal_snr=True)]),
    st.sampled_from(SPACINGS),
    st.integers(1, 60),
    st.sampled_from([0.0, 3e-3]),
    st.sampled_from([0.3, 1.0]),
)
def test_every_spacing_falls_and_has_as_many_levels_as_asked_for(
    settings: ScheduleSettings, spacing: Spacing, num_steps: int, floor: float, strength: float
) -> None:
    schedule = Schedule.of(settings)
    levels = sampling_levels(schedule, num_steps, floor, spacing, strength)
    assert len(levels) == num_steps + 1
    assert levels[-1] == CLEAN
    assert all(a.t > b.t and a.alpha < b.alpha and a.sigma > b.sigma for a, b in pairwise(levels))
    assert 0 <= levels[-2].t <= levels[0].t <= 1000 * strength - 1
    assert levels[0].alpha ** 2 / (levels[0].alpha ** 2 + levels[0].sigma ** 2) >= floor - 1e-12


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [("uniform", [99, 66, 33, 0]), ("quadratic", [99, 44, 11, 0]), ("trailing", [99, 74, 49, 24])],
)
def test_whole_spacings_by_hand(spacing: Spacing, expected: list[int]) -> None:
    schedule = Schedule.of(ScheduleSettings(schedule="cosine", timesteps=100))
    assert [level.t for level in sampling_levels(schedule, 4, spacing=spacing)[:-1]] == expected


def test_quadratic_levels_move_apart_where_they_would_coincide() -> None:
    schedule = Schedule.of(ScheduleSettings(schedule="cosine", timesteps=20))
    assert [level.t for level in sampling_levels(schedule, 20, spacing="quadratic")[:-1]] == list(range(19, -1, -1))


@pytest.mark.parametrize("settings", [LINEAR, COSINE, FLOW])
def test_karras_levels_follow_their_formula(settings: ScheduleSettings) -> None:
    schedule = Schedule.of(settings)
    levels = sampling_levels(schedule, 10, spacing="karras")[:-1]
    ratio = schedule.sigma / schedule.alpha
    high = float(ratio[ratio.isfinite()][-1])
    roots = np.linspace(high ** (1 / 7), float(ratio[0]) ** (1 / 7), 10)
    assert [level.sigma / level.alpha for level in levels] == pytest.approx(list(roots**7), rel=1e-6)
    for level in levels:  # they lie on the schedule's own curve
        assert (level.alpha + level.sigma if settings is FLOW else level.alpha**2 + level.sigma**2) == pytest.approx(
            1, rel=2e-3
        )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
def test_karras_levels_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.EulerDiscreteScheduler(
        beta_start=1e-4, beta_end=0.02, use_karras_sigmas=True, timestep_spacing="linspace"
    )
    theirs.set_timesteps(12)
    levels = sampling_levels(Schedule.of(LINEAR), 12, spacing="karras")[:-1]
    assert [level.sigma / level.alpha for level in levels] == pytest.approx(theirs.sigmas[:-1].tolist(), rel=1e-3)
    assert [level.t for level in levels] == pytest.approx(theirs.timesteps.tolist(), abs=0.02)
