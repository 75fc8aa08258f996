"""The further U-Nets of the recipe's rows."""

from collections import Counter

import pytest
import torch
from torch import nn

from lightdiff.settings import UNetSettings
from tests.bench import networks
from tests.bench.networks import ConvNeXtBlock, ConvNeXtUNet, DiffusersUNet, ResponseNorm

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


def test_a_settings_file_chooses_them(monkeypatch):
    kinds = dict(UNetSettings.ARCHITECTURES)
    monkeypatch.setattr(networks.UNetArchitecture, "ARCHITECTURES", kinds)
    networks.register()
    for name, network in {"convnext": ConvNeXtUNet, "diffusers": DiffusersUNet}.items():
        settings = networks.UNetArchitecture.model_validate({"architecture": name})
        assert settings.NETWORK == f"tests.bench.networks:{network.__name__}"
        assert issubclass(network, nn.Module)
