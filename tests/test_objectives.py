"""Objectives there and back, weights by their formulas, guidance and inpainting against closed forms."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GaussianData, normal
from torch import Tensor

from lightdiff.diffusion.objectives import (
    Guidance,
    denoiser,
    eps_from_x0,
    loss_weight,
    target,
    x0_and_eps,
)
from lightdiff.diffusion.samplers import SAMPLERS
from lightdiff.diffusion.schedules import Level, Schedule, sampling_levels
from lightdiff.extras.edit import inpainting
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.stage import Stage
from lightdiff.settings import (
    NOISY,
    ImageSettings,
    Objective,
    SamplerName,
    ScheduleName,
    ScheduleSettings,
    TrainUNetSettings,
)
from lightdiff.stages.train_unet import UNetTask

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True, database=None)
preserving = st.floats(1e-4, 1 - 1e-4).map(lambda bar: Level(7, math.sqrt(bar), math.sqrt(1 - bar)))
straight = st.floats(1e-2, 1 - 1e-2).map(lambda time: Level(7, 1 - time, time))
levels = st.one_of(preserving, straight)
seeds = st.integers(0, 2**31)
OBJECTIVES: list[Objective] = ["eps", "x0", "v", "flow"]


class Network:
    """Counts its calls and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.asked.append((x_t, t))
        return torch.sin(3 * x_t) + 0.1


@PROPERTY
@given(st.sampled_from(OBJECTIVES), levels, seeds)
def test_every_objective_leads_back_to_x0_and_eps(objective: Objective, level: Level, seed: int) -> None:
    x0, eps = normal(2, 3, 4, 4, seed=seed), normal(2, 3, 4, 4, seed=seed + 1)
    x_t = level.alpha * x0 + level.sigma * eps
    wanted = target(objective, x0, eps, level.alpha, level.sigma)
    # atol: float64's 1e-16, times 1 / alpha or 1 / sigma of at most 100
    found = x0_and_eps(objective, x_t, wanted, level.alpha, level.sigma)
    torch.testing.assert_close(found[0], x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(found[1], eps, rtol=0, atol=1e-11)
    torch.testing.assert_close(eps_from_x0(x_t, x0, level), eps, rtol=0, atol=1e-11)


@PROPERTY
@given(st.sampled_from(OBJECTIVES), levels, seeds)
def test_whatever_is_predicted_adds_up_to_x_t(objective: Objective, level: Level, seed: int) -> None:
    x_t, prediction = normal(2, 3, 4, 4, seed=seed), normal(2, 3, 4, 4, seed=seed + 1)
    x0, eps = x0_and_eps(objective, x_t, prediction, level.alpha, level.sigma)
    torch.testing.assert_close(level.alpha * x0 + level.sigma * eps, x_t, rtol=0, atol=1e-10)


def test_targets_by_hand() -> None:
    x0, eps, level = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 10.0), Level(0, 0.6, 0.8)
    found = {name: float(target(name, x0, eps, level.alpha, level.sigma)) for name in OBJECTIVES}
    assert found == pytest.approx({"eps": 10, "x0": 2, "v": 0.6 * 10 - 0.8 * 2, "flow": 8})


def test_flow_is_the_velocity_of_straight_lines_and_v_that_of_the_circle() -> None:
    x0, eps, step = normal(1, 1, 3, 3, seed=1), normal(1, 1, 3, 3, seed=2), 1e-6
    lines = [(1 - t) * x0 + t * eps for t in (0.3, 0.3 + step)]
    torch.testing.assert_close((lines[1] - lines[0]) / step, target("flow", x0, eps, 0.7, 0.3), rtol=0, atol=1e-8)
    arcs = [math.cos(a) * x0 + math.sin(a) * eps for a in (0.4, 0.4 + step)]
    v = target("v", x0, eps, math.cos(0.4), math.sin(0.4))
    torch.testing.assert_close((arcs[1] - arcs[0]) / step, v, rtol=0, atol=1e-5)  # the arc bends by step / 2


def test_v_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02)
    x0, eps, t = normal(3, 2, 4, 4, seed=1).float(), normal(3, 2, 4, 4, seed=2).float(), torch.tensor([5, 400, 990])
    schedule = Schedule.of(ScheduleSettings(schedule="linear")).to(torch.device("cpu"))
    ours = target("v", x0, eps, *schedule.at(t))
    torch.testing.assert_close(ours, scheduler.get_velocity(x0, eps, t), rtol=0, atol=1e-4)  # float32 tables


# --- weights ------------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.sampled_from(OBJECTIVES), levels, seeds, st.sampled_from([1.0, 5.0]))
def test_min_snr_weighs_the_error_of_x0_whatever_is_predicted(
    objective: Objective, level: Level, seed: int, gamma: float
) -> None:
    x_t, prediction = normal(1, 2, 3, 3, seed=seed), normal(1, 2, 3, 3, seed=seed + 1)
    other = prediction + 0.1 * normal(1, 2, 3, 3, seed=seed + 2)
    alpha, sigma = (torch.full((1, 1, 1, 1), share, dtype=torch.float64) for share in (level.alpha, level.sigma))
    weight = loss_weight("min-snr", gamma, objective, alpha, sigma)
    x0_error = (
        x0_and_eps(objective, x_t, prediction, level.alpha, level.sigma)[0]
        - x0_and_eps(objective, x_t, other, level.alpha, level.sigma)[0]
    )
    expected = min((level.alpha / level.sigma) ** 2, gamma) * x0_error.square()
    torch.testing.assert_close(weight * (prediction - other).square(), expected, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("snr", [0.01, 1.0, 4.0, 5.0, 30.0])
def test_min_snr_by_its_formulas(snr: float) -> None:
    # Hang et al. 2023: min(SNR, gamma) / SNR for eps, min(SNR, gamma) for x0, min(SNR, gamma) / (SNR + 1) for v
    alpha = torch.tensor(math.sqrt(snr / (1 + snr)), dtype=torch.float64).view(1, 1, 1, 1)
    sigma = (1 - alpha.square()).sqrt()
    expected = {"eps": min(snr, 5) / snr, "x0": min(snr, 5), "v": min(snr, 5) / (snr + 1)}
    for name, value in expected.items():
        found = loss_weight("min-snr", 5.0, name, alpha, sigma)  # type: ignore[arg-type]
        assert float(found) == pytest.approx(value, rel=1e-9)
    assert float(loss_weight("none", 5.0, "eps", alpha, sigma)) == 1


@pytest.mark.parametrize("kind", ["none", "min-snr"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_training_loss_is_the_weighed_error(objective: Objective, kind: str) -> None:
    layer = {
        "target": {"objective": objective, "loss_weight": kind, "min_snr_gamma": 3.0},
        "latent": {"height": 8, "width": 8},
        "model": {"width": 8, "time_dim": 8},
    }
    whole = TrainUNetSettings.model_validate(layer).resolved()
    stage = Stage("unet", whole, torch.device("cpu"), Processes(), Path())
    task = UNetTask(stage, cast(Any, SimpleNamespace(train=[], val=[], index=SimpleNamespace(images=ImageSettings()))))
    x0, eps = (normal(3, 4, 8, 8, seed=seed, dtype=torch.float32) for seed in (1, 2))
    t = torch.tensor([150, 500, 850])

    class Half(torch.nn.Module):
        """Predicts half of x_t."""

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return x_t / 2

    expected = []
    for i, at in enumerate(t.tolist()):
        alpha, sigma = float(task.schedule.alpha[at]), float(task.schedule.sigma[at])
        wanted = {"eps": eps[i], "x0": x0[i], "v": alpha * eps[i] - sigma * x0[i], "flow": eps[i] - x0[i]}[objective]
        error = float(((alpha * x0[i] + sigma * eps[i]) / 2 - wanted).square().mean())
        # The error of x0 is that of the prediction times sigma / alpha, 1, sigma, or sigma of a straight line
        share = {"eps": sigma / alpha, "x0": 1.0, "v": sigma, "flow": sigma}[objective]
        expected.append(error if kind == "none" else min((alpha / sigma) ** 2, 3.0) * share**2 * error)
    loss = task.loss(Half(), {"x0": x0, "eps": eps, "t": t})["loss"]
    assert float(loss) == pytest.approx(sum(expected) / 3, rel=1e-4)


# --- denoisers ----------------------------------------------------------------------------------------------------


@PROPERTY
@given(levels, seeds, st.sampled_from([0.0, 0.3, 1.0, 3.0]))
def test_what_a_denoiser_says_adds_up_to_x_t(level: Level, seed: int, clamp: float) -> None:
    x_t = normal(2, 3, 4, 4, seed=seed)
    x0, eps = denoiser(Network(), "eps", clamp)(x_t, level)
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
    denoiser(network, "eps", clamp)(x_t, Level(42, 0.6, 0.8))
    assert len(network.asked) == 1
    seen, t = network.asked[0]
    assert seen is x_t
    assert t.tolist() == [42] * 5
    assert t.dtype == torch.float32  # levels may lie between whole ones


def test_without_a_clamp_the_networks_noise_is_handed_on() -> None:
    x_t = normal(2, 3, 4, 4)
    _, eps = denoiser(Network())(x_t, Level(3, 0.6, 0.8))
    torch.testing.assert_close(eps, torch.sin(3 * x_t) + 0.1, rtol=1e-14, atol=0)


def test_the_best_noise_of_gaussian_data_gives_its_best_x0() -> None:
    data, level, x_t = GaussianData(0.7, 0.4), Level(5, 0.6, 0.8), normal(2, 3, 4, 4)
    x0, _ = denoiser(lambda x, t: data.eps(x, level))(x_t, level)
    torch.testing.assert_close(x0, data.x0(x_t, level))


# --- guidance and inpainting --------------------------------------------------------------------------------------


class TwoClasses:
    """The best network for data of two classes, N(-2, 0.3^2) and N(2, 0.3^2), as many of one as of the other."""

    def __init__(self, schedule: Schedule, objective: Objective) -> None:
        self.schedule, self.objective, self.batches = schedule, objective, list[int]()

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.batches.append(len(x_t))
        alpha, sigma = self.schedule.at(t.long())
        total = alpha.square() * 0.09 + sigma.square()
        guesses = torch.stack([mean + alpha * 0.09 / total * (x_t - alpha * mean) for mean in (-2.0, 2.0)])
        # What the classes' shares are, given x_t (Bayes)
        odds = torch.stack([-(x_t - alpha * mean).square() / (2 * total) for mean in (-2.0, 2.0)]).softmax(0)
        either = (odds * guesses).sum(0)
        known = label[:, None, None, None]
        x0 = torch.where(known == 2, either, torch.where(known == 1, guesses[1], guesses[0]))
        eps = (x_t - alpha * x0) / sigma
        return target(self.objective, x0, eps, alpha, sigma)


@pytest.mark.parametrize("objective", ["eps", "v"])
def test_guidance_is_its_formula_in_one_call(objective: Objective) -> None:
    schedule = Schedule.of(ScheduleSettings(schedule="cosine"))
    network, x_t, level = TwoClasses(schedule, objective), normal(4, 1, 2, 2), sampling_levels(schedule, 2)[1]
    label = torch.tensor([0, 1, 1, 0])

    def eps_of(guidance: Guidance) -> Tensor:
        return denoiser(network, objective, 0.0, guidance)(x_t, level)[1]

    with_class, without = eps_of(Guidance(label, 2)), eps_of(Guidance(torch.full((4,), 2), 2))
    for weight in (0.0, 0.5, 3.0):
        network.batches.clear()
        guided = eps_of(Guidance(label, 2, weight))
        torch.testing.assert_close(guided, without + weight * (with_class - without), rtol=0, atol=1e-5)
        assert network.batches == [8]
    network.batches.clear()
    for interval in ((level.t + 1, 1000.0), (0.0, level.t - 1)):  # elsewhere: the class alone
        torch.testing.assert_close(eps_of(Guidance(label, 2, 3.0, *interval)), with_class)
    assert network.batches == [4, 4]


def draw(weight: float, label: int) -> Tensor:
    """Samples of the two classes' distribution, by 100 steps."""
    schedule = Schedule.of(ScheduleSettings(schedule="cosine"))
    guidance = Guidance(torch.full((2000,), label), 2, weight)
    denoise = denoiser(TwoClasses(schedule, "v"), "v", 0.0, guidance)
    return SAMPLERS["heun"](denoise, sampling_levels(schedule, 100), normal(2000, 1, 1, 1)).flatten()


def gaussian(std: float, schedule: Schedule, objective: Objective) -> Any:
    """The best network for data N(0, std^2)."""
    data = GaussianData(0.0, std)

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        level: Any = Level(0, *schedule.at(t.long()))
        return target(objective, data.x0(x_t, level), data.eps(x_t, level), level.alpha, level.sigma)

    return network


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in NOISY])
@pytest.mark.parametrize(("schedule", "objective"), [("flow", "flow"), ("cosine", "v")])
@pytest.mark.parametrize("weight", [0.5, 1.5, 3.0])
def test_guidance_by_a_worse_network_of_gaussian_data(
    name: SamplerName, schedule: ScheduleName, objective: Objective, weight: float
) -> None:
    """Along the flow of N(0, s^2), log x moves as log std of x_t; a guided flow adds w of one and 1 - w of the other.

    From unit variance, x ends at s^w s_weak^(1 - w) times where it began: narrower than both for w > 1.
    """
    table = Schedule.of(ScheduleSettings(schedule=schedule))
    guidance = Guidance(None, 0, weight, weak=gaussian(0.8, table, objective))
    denoise = denoiser(gaussian(0.5, table, objective), objective, guidance=guidance)
    x = normal(100, 1, 1, 1).double()
    end = SAMPLERS[name](denoise, sampling_levels(table, 500), x)
    torch.testing.assert_close(end, x * 0.5**weight * 0.8 ** (1 - weight), rtol=0.02, atol=0)


def test_guidance_of_weight_1_or_outside_of_its_levels_asks_no_other_network() -> None:
    table = Schedule.of(ScheduleSettings(schedule="flow"))
    network, weak, x_t = gaussian(0.5, table, "flow"), Network(), normal(4, 1, 2, 2)
    level = sampling_levels(table, 2)[1]
    alone = denoiser(network, "flow")(x_t, level)
    for guidance in (Guidance(None, 0, 1.0, weak=weak), Guidance(None, 0, 3.0, 0, level.t - 1, weak)):
        guided = denoiser(network, "flow", guidance=guidance)(x_t, level)
        assert all(torch.equal(a, b) for a, b in zip(guided, alone, strict=True))
    assert not weak.asked
    guided = denoiser(network, "flow", guidance=Guidance(None, 0, 3.0, 0, level.t, weak))(x_t, level)
    assert not torch.equal(guided[0], alone[0])


def test_a_worse_network_is_given_the_class() -> None:
    schedule = Schedule.of(ScheduleSettings(schedule="cosine"))
    networks = [TwoClasses(schedule, "v"), TwoClasses(schedule, "v")]
    label, x_t, level = torch.tensor([0, 1, 2]), normal(3, 1, 2, 2), sampling_levels(schedule, 2)[1]
    alone = denoiser(networks[0], "v", guidance=Guidance(label, 2))(x_t, level)[0]
    guided = denoiser(networks[0], "v", guidance=Guidance(label, 2, 3.0, weak=networks[1]))(x_t, level)[0]
    torch.testing.assert_close(guided, alone)  # two of a kind: nothing to lead away from
    assert networks[1].batches == [3]


def test_samples_of_a_class_are_of_that_class() -> None:
    for label, mean in ((0, -2.0), (1, 2.0)):
        found = draw(1.0, label)
        # 2,000 samples of std 0.3: standard errors 0.007 and 0.005; 100 steps of Heun are exact to 1e-3
        assert float(found.mean()) == pytest.approx(mean, abs=0.03)
        assert float(found.std()) == pytest.approx(0.3, abs=0.02)


def test_without_a_class_samples_are_of_both_and_with_guidance_they_move_away_from_the_other() -> None:
    either = draw(1.0, 2)
    assert float((either > 0).double().mean()) == pytest.approx(0.5, abs=0.05)
    assert float(either.abs().mean()) == pytest.approx(2.0, abs=0.05)
    # Far from the other class both halves agree, so that guidance changes where samples go, not where a class lies.
    strong = draw(4.0, 1)
    assert float(strong.min()) > 0
    assert float(strong.mean()) >= 2.0


def test_inpainting_keeps_what_it_is_told_and_lets_the_rest_go_its_way() -> None:
    schedule = Schedule.of(ScheduleSettings(schedule="cosine"))
    data, known = GaussianData(0.7, 0.4), normal(2, 1, 4, 4, seed=5)
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    mask[..., :2] = 1
    levels, x = sampling_levels(schedule, 20), normal(2, 1, 4, 4)
    for name, sampler in SAMPLERS.items():
        if name in NOISY:
            continue
        free = sampler(data.denoise, levels, x)
        kept = sampler(inpainting(data.denoise, known, mask), levels, x)
        torch.testing.assert_close(kept[..., 2:], known[..., 2:], rtol=0, atol=1e-9)
        torch.testing.assert_close(kept[..., :2], free[..., :2], rtol=0, atol=1e-9)
