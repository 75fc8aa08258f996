"""The library: a run in four calls, classes and guides, and the data themselves from a network that knows them."""

import math
from pathlib import Path

import pytest
import torch
from oracles import GaussianData

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.order import item_noise
from lightdiff.diffusion.samplers import SAMPLERS
from lightdiff.diffusion.schedules import CLEAN, Level, Schedule
from lightdiff.errors import UserError
from lightdiff.pipeline import Pipeline, guidance_for
from lightdiff.run_folder import RunFolder
from lightdiff.settings import GenerateSettings, LatentsSettings, SamplingSettings, TrainUNetSettings


@pytest.fixture(scope="module")
def model(finished):
    """The run's own model. Not to be changed."""
    return Pipeline.load(finished)


@pytest.fixture(scope="module")
def guided(finished):
    """The same, guided by an earlier state of its U-Net."""
    return Pipeline.load(finished, guide_with=Path("step-2"))


def test_the_library_in_four_calls(model):
    assert model.resolution == (32, 32)
    z = model.sample(3, seed=1, sampling=SamplingSettings(num_steps=3))
    assert z.shape == (3, 4, 8, 8)
    x = model.decode(z)
    assert x.shape == (3, 3, 32, 32)
    assert x.abs().max() <= 1
    assert model.encode(x).shape == z.shape
    again = model.sample([2], seed=1, sampling=SamplingSettings(num_steps=3))
    torch.testing.assert_close(again[0], z[2], rtol=1e-4, atol=1e-4)


def test_one_step_is_one_call_of_the_network(finished):
    model = Pipeline.load(finished)
    calls = []
    model.unet.register_forward_hook(lambda *_: calls.append(1))
    model.sample(2, sampling=SamplingSettings(num_steps=7))
    assert len(calls) == 7


def test_the_library_draws_as_the_command_does_unless_told_otherwise(model):
    assert torch.equal(model.sample(1), model.sample(1, sampling=GenerateSettings().sampling))


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_step_file_guides_with_every_sampler(finished, model, guided, sampler):
    assert guided.digests["guide"] == Checkpoint(RunFolder(finished).unet.step(2)).metadata.digest
    one, two = (SamplingSettings(sampler=sampler, num_steps=3, guidance=w) for w in (1.0, 2.0))
    plain = model.sample(2, 0, one)
    assert torch.equal(guided.sample(2, 0, one), plain)
    assert not torch.equal(guided.sample(2, 0, two), plain)


def test_guidance_that_would_do_nothing_is_refused_in_the_library_too(model):
    with pytest.raises(UserError, match="--guidance needs a --class to guide to; this U-Net was trained without"):
        model.sample(1, sampling=SamplingSettings(guidance=2.0))
    with pytest.raises(UserError, match="--class: this U-Net knows no red; it was trained without --label"):
        model.sample(1, sampling=SamplingSettings(guidance=2.0, class_=("red",)))


def test_classes_compare_in_one_unicode_form():
    known = TrainUNetSettings(label="kind", latent=LatentsSettings(labels={"kind": ("Ame\u0301lie", "Zoë")}))
    typed = SamplingSettings(class_=("Am\u00e9lie", "Zoe\u0308"))
    guidance = guidance_for(known, typed, range(4))
    assert guidance is not None
    assert guidance.label.tolist() == [0, 1, 0, 1]
    many = LatentsSettings(labels={"kind": tuple(f"class {i}" for i in range(9999))})
    with pytest.raises(UserError, match="knows no xx") as caught:
        guidance_for(TrainUNetSettings(label="kind", latent=many), SamplingSettings(class_=("x" * 9999,)), [0])
    assert len(str(caught.value)) < 600


# --- latents of a network that is known ---------------------------------------------------------------------------


DATA = GaussianData(mean=0.8, std=0.5)
CPU = torch.device("cpu")
LATENT = {"channels": 2, "height": 24, "width": 24, "shift": [1.0, -2.0], "scale": [4.0, 0.5]}


class Perfect:
    """The best network for Gaussian data, of any objective. It keeps the levels that it is asked about."""

    def __init__(self, settings):
        self.objective, self.asked = settings.target.objective, []
        self.schedule = Schedule.of(settings.noise.resolved(self.objective))

    def __call__(self, x_t, t):
        level = Level(int(t[0]), float(self.schedule.alpha[int(t[0])]), float(self.schedule.sigma[int(t[0])]))
        self.asked.append(level)
        x0, eps = DATA.denoise(x_t, level)
        return {"eps": eps, "x0": x0, "v": level.alpha * eps - level.sigma * x0, "flow": eps - x0}[self.objective]


def test_a_sampler_of_ones_own_needs_no_change_of_a_file(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "mine", SAMPLERS["heun"])
    settings = TrainUNetSettings(latent=LATENT)
    pipeline = Pipeline(None, None, Perfect(settings), settings, CPU)
    mine, heun = (SamplingSettings.model_construct(sampler=name, num_steps=5) for name in ("mine", "heun"))
    assert torch.equal(pipeline.sample(2, 0, mine), pipeline.sample(2, 0, heun))


@pytest.mark.parametrize(
    ("objective", "noise"),
    [
        ("eps", {"schedule": "cosine"}),
        ("eps", {"schedule": "linear"}),
        ("x0", {"schedule": "cosine"}),
        ("x0", {"schedule": "flow"}),
        ("v", {"schedule": "cosine"}),
        # More than a third of the variance would be signal where these end
        ("v", {"schedule": "linear", "beta_end": 2e-3, "zero_terminal_snr": True}),
        ("x0", {"schedule": "scaled-linear", "beta_end": 2e-3, "zero_terminal_snr": True}),
        ("flow", {"schedule": "flow"}),
    ],
)
def test_what_is_drawn_is_the_data_whatever_the_network_predicts(objective, noise):
    settings = TrainUNetSettings.model_validate({"target": {"objective": objective}, "noise": noise, "latent": LATENT})
    network = Perfect(settings)
    z = Pipeline(None, None, network, settings, CPU).sample([3, 5], 7, SamplingSettings(num_steps=100, sampler="heun"))
    start = network.asked[0]
    left_out = network.schedule.signal()[start.t + 1 :]
    if objective == "eps":
        assert start.alpha**2 >= 3e-3
        assert bool((left_out < 3e-3).all())
    else:
        assert not len(left_out)
    x0 = torch.stack([(z[:, 0] - 1) * 4, (z[:, 1] + 2) * 0.5], 1)
    x = math.hypot(start.alpha, start.sigma) * item_noise((2, 24, 24), [3, 5], 7, "start")
    # The error of 100 steps is 0.01 at most
    torch.testing.assert_close(x0, DATA.flow(x, start, CLEAN), rtol=0, atol=0.02)
    # 2,304 samples, standard errors 0.01 and 0.007; eps begins with 5 % of signal that is noise, too
    assert float(x0.mean()) == pytest.approx(DATA.mean, abs=0.06)
    assert float(x0.std()) == pytest.approx(DATA.std, abs=0.03)


@pytest.mark.parametrize(
    ("spacing", "levels"),
    [
        ("trailing", [999, 799, 599, 399, 199]),
        ("uniform", [999, 749.25, 499.5, 249.75, 0]),
        ("quadratic", [999, 561.9, 249.75, 62.4, 0]),
        # ((1 - p) 999^(1/7) + p 999^(-1/7))^7 is sigma / alpha, and t = 1000 sigma - 1
        ("karras", [998, 993.57, 950, 410.52, 0]),
    ],
)
def test_the_network_is_asked_about_the_levels_of_the_spacing(spacing, levels):
    asked = []

    def network(x_t, t):
        asked.append(float(t[0]))
        return x_t

    pipeline = Pipeline(None, None, network, TrainUNetSettings(), CPU)
    pipeline.sample(1, 0, SamplingSettings(num_steps=5, spacing=spacing))
    assert asked == pytest.approx(levels, abs=0.51)  # whole levels are rounded to, and karras interpolates
