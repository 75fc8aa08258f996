"""The further U-Nets of the recipe's rows."""

import tomllib
from collections import Counter
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightdiff.architectures import UNetArchitecture
from lightdiff.diffusion.objectives import target
from lightdiff.diffusion.schedules import Schedule
from lightdiff.models.unet import UNet, build_unet
from lightdiff.settings import ScheduleSettings, UNetSettings
from lightdiff.stages.train_unet import UNetTask
from tests.bench import networks
from tests.bench.networks import (
    ConvNeXtBlock,
    ConvNeXtUNet,
    DiffusersUNet,
    PairedSettings,
    ResponseNorm,
    X0UNet,
    paired,
)

SETTINGS = UNetSettings(channels=(32, 32, 64), attend_levels=(1,), time_dim=32)


def test_the_layout_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )

    def convolutions(network):
        return Counter(tuple(p.shape) for p in network.parameters() if p.ndim == 4)

    assert convolutions(DiffusersUNet(SETTINGS, 4)) == convolutions(peer)


@pytest.mark.parametrize("network", [ConvNeXtUNet, DiffusersUNet])
def test_every_parameter_is_trained(network):
    torch.manual_seed(0)
    unet = network(SETTINGS, 4)
    for parameter in unet.parameters():  # past the start, where residual branches are zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    predicted = unet(torch.randn(2, 4, 16, 16), torch.tensor([10.0, 900.0]))
    assert predicted.shape == (2, 4, 16, 16)
    predicted.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in unet.parameters())


def test_a_convnext_block_passes_its_input_on_at_first():
    x = torch.randn(2, 32, 8, 8)
    assert torch.equal(ConvNeXtBlock(32, 32, 16)(x, torch.randn(2, 16)), x)


def test_responses_are_normalised_as_in_convnext_v2():
    norm, x = ResponseNorm(3), torch.randn(2, 3, 4, 5)
    assert torch.equal(norm(x), x)
    norm.gamma.data, norm.beta.data = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.2, 0.3])
    length = x.square().sum((2, 3)).sqrt()  # (b, c)
    share = length / length.mean(1, keepdim=True)
    wanted = (x * share[..., None, None] * norm.gamma.data.view(3, 1, 1)) + norm.beta.data.view(3, 1, 1) + x
    torch.testing.assert_close(norm(x), wanted)


def test_a_network_that_is_right_about_x0_is_right_about_the_velocity(monkeypatch):
    schedule = Schedule.of(ScheduleSettings(schedule="flow"))
    x0, eps = torch.randn(2, 3, 4, 16, 16)
    t = torch.tensor([60, 400, 999])
    unet = X0UNet(SETTINGS, 4)
    monkeypatch.setattr(UNet, "forward", lambda self, x, t, label: x0)
    velocity = unet(schedule.q_sample(x0, eps, t).float(), t)
    torch.testing.assert_close(velocity, target("flow", x0, eps, *schedule.at(t)).float(), rtol=1e-4, atol=1e-4)


def test_noise_is_paired_so_that_distances_are_least():
    rng = torch.Generator().manual_seed(0)
    drawn = {"x0": torch.randn(5, 1, 2, 2, generator=rng), "eps": torch.randn(5, 1, 2, 2, generator=rng)}

    def summed(order):
        return (drawn["x0"] - drawn["eps"][list(order)]).square().sum().item()

    for model, least in ((PairedSettings(), True), (UNetSettings(), False)):
        task = SimpleNamespace(settings=SimpleNamespace(model=model))
        found = paired(lambda task, batch, rng: dict(drawn))(task, None, rng)
        order = [[torch.equal(e, other) for other in drawn["eps"]].index(True) for e in found["eps"]]
        assert sorted(order) == list(range(5))
        assert (summed(order) == min(map(summed, permutations(range(5))))) == least


def test_a_settings_file_chooses_them(monkeypatch):
    monkeypatch.setattr(UNetArchitecture, "ARCHITECTURES", dict(UNetSettings.ARCHITECTURES))
    monkeypatch.setattr(UNetTask, "prepare", UNetTask.prepare)
    networks.register()
    files = sorted((Path(networks.__file__).parent / "unets").glob("*.toml"))
    assert [file.stem for file in files] == sorted(networks.KINDS)
    for file in files:
        settings = UNetArchitecture.model_validate(tomllib.loads(file.read_text())["model"])
        assert type(settings) is networks.KINDS[file.stem]
        assert build_unet(settings.resolved(16), 4)(torch.randn(1, 4, 16, 16), torch.ones(1)).shape == (1, 4, 16, 16)
