"""What a predictor reaches that knows the noise level alone: against closed forms, regression, and the validation."""

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from oracles import normal
from torch import Tensor, nn

from lightdiff.checkpoint import Metadata
from lightdiff.diffusion.objectives import target
from lightdiff.diffusion.schedules import Schedule
from lightdiff.extras.baselines import band_baselines, baseline_loss, baselines_of
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.stage import Stage
from lightdiff.settings import (
    ImageSettings,
    Objective,
    ObjectiveSettings,
    ScheduleName,
    ScheduleSettings,
    TrainUNetSettings,
)
from lightdiff.stages.train_unet import UNetTask

PAIRS: list[tuple[Objective, ScheduleName]] = [("flow", "flow"), ("x0", "flow"), ("x0", "cosine")]
PAIRS += [("eps", "cosine"), ("eps", "linear"), ("v", "scaled-linear")]


def bands(objective: Objective, schedule: ScheduleName = "auto", **noise: int) -> list[float]:
    chosen = ScheduleSettings.model_validate({"schedule": schedule, **noise})
    whole, *each = band_baselines(ObjectiveSettings(objective=objective), chosen).values()
    assert whole == pytest.approx(sum(each) / 4)
    return each


def test_flow_by_its_integral() -> None:
    """The mean of 1 / (sigma^2 + (1 - sigma)^2) is a difference of arctan(2 sigma - 1), times 4 for a quarter."""
    edges = [math.atan(2 * sigma / 4 - 1) for sigma in range(5)]
    exact = [4 * (b - a) for a, b in pairwise(edges)]
    assert exact == pytest.approx([1.287, 1.855, 1.855, 1.287], abs=5e-4)
    assert bands("flow", timesteps=100_000) == pytest.approx(exact, rel=1e-4)
    assert bands("flow") == pytest.approx(exact, abs=2e-3)  # level t of 1,000 has sigma (t + 1) / 1000


def test_v_is_never_known_and_eps_and_x0_are_known_as_far_as_they_show() -> None:
    schedule = Schedule.of(ScheduleSettings(schedule="cosine"))
    torch.testing.assert_close(baseline_loss("v", schedule.alpha, schedule.sigma), torch.ones(1000).double())
    torch.testing.assert_close(baseline_loss("eps", schedule.alpha, schedule.sigma), schedule.alpha.square())
    torch.testing.assert_close(baseline_loss("x0", schedule.alpha, schedule.sigma), schedule.sigma.square())


@pytest.mark.parametrize("std", [1.0, 0.4, 3.0])
@pytest.mark.parametrize(("objective", "schedule"), PAIRS)
def test_it_is_what_regression_leaves(objective: Objective, schedule: ScheduleName, std: float) -> None:
    whole = Schedule.of(ScheduleSettings(schedule=schedule))
    expected = baseline_loss(objective, whole.alpha, whole.sigma, std)
    x0, eps = std * normal(4, 4, 50, 50, seed=1), normal(4, 4, 50, 50, seed=2)
    for t in (20, 400, 700, 990):
        alpha, sigma = float(whole.alpha[t]), float(whole.sigma[t])
        x_t, wanted = (alpha * x0 + sigma * eps).flatten(), target(objective, x0, eps, alpha, sigma).flatten()
        left = (wanted - torch.dot(x_t, wanted) / torch.dot(x_t, x_t) * x_t).square().mean()
        assert float(left) == pytest.approx(float(expected[t]), rel=0.03)  # 40,000 elements: 0.7 %


class Best(nn.Module):
    """The best prediction for independent normal elements: Cov(target, x_t) / Var(x_t) x_t."""

    def __init__(self, task: UNetTask) -> None:
        super().__init__()
        self.task = task

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.task.schedule.at(t)
        one, none = torch.ones_like(alpha), torch.zeros_like(alpha)
        objective = self.task.settings.target.objective
        a, b = (target(objective, *parts, alpha, sigma) for parts in ((one, none), (none, one)))
        return (a * alpha + b * sigma) / (alpha**2 + sigma**2) * x_t


@pytest.mark.parametrize(("objective", "schedule"), PAIRS)
def test_it_is_the_validation_loss_of_the_best_predictor(objective: Objective, schedule: ScheduleName) -> None:
    x0 = normal(1000, 4, 8, 8, seed=3, dtype=torch.float32)
    index = SimpleNamespace(images=ImageSettings())
    latents = SimpleNamespace(train=[], val=range(1000), index=index, gather=lambda positions, device: (x0[positions],))
    layer = {"target": {"objective": objective}, "noise": {"schedule": schedule}, "model": {"width": 8, "time_dim": 8}}
    layer |= {"loop": {"precision": "fp32", "batch_size": 250}, "latent": {"height": 8, "width": 8}}
    settings = TrainUNetSettings.model_validate(layer).resolved()
    stage = Stage("unet", settings, torch.device("cpu"), Processes(), Path())
    task = UNetTask(stage, cast(Any, latents))
    found = {f"val_{name}": loss for name, loss in task.validate(Best(task)).items()}
    expected = band_baselines(settings.target, settings.noise)
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=0.1)  # of 1,000 levels a band, where errors differ by up to their mean


def test_of_a_checkpoint() -> None:
    settings = TrainUNetSettings.model_validate({"target": {"objective": "v"}}).to_save()
    assert baselines_of(Metadata(stage="unet", settings=settings))["val_loss"] == pytest.approx(1)
    assert baselines_of(Metadata(stage="unet", settings={"target": 3})) == {}
    assert baselines_of(Metadata(stage="vae", settings=settings)) == {}
