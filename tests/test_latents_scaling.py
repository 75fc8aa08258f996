"""z <-> x0, the latents of the VAE and those of diffusion."""

import pytest
import torch
from oracles import normal

from lightdiff.data.latents import Scaling
from lightdiff.settings import LatentsSettings

GLOBAL = LatentsSettings(channels=3, shift=(0.25,), scale=(1.7,))
CHANNEL = LatentsSettings(channels=3, shift=(0.5, -2.0, 0.0), scale=(2.0, 0.1, 30.0))


@pytest.mark.parametrize("settings", [GLOBAL, CHANNEL], ids=["global", "channel"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 3, 3, 3), (1, 3, 1, 3)])
def test_there_and_back(settings: LatentsSettings, shape: tuple[int, ...]) -> None:
    scaling, z = Scaling.of(settings), normal(*shape)
    # atol: float64, numbers up to 100
    torch.testing.assert_close(scaling.to_z(scaling.to_x0(z)), z, rtol=0, atol=1e-12)
    torch.testing.assert_close(scaling.to_x0(scaling.to_z(z)), z, rtol=0, atol=1e-12)


def test_x0_is_shifted_then_scaled() -> None:
    z = normal(2, 3, 4, 5, dtype=torch.float32)
    torch.testing.assert_close(Scaling.of(GLOBAL).to_x0(z), (z - 0.25) * 1.7)


def test_each_channel_has_its_own() -> None:
    z = normal(3, 3, 3, 3, dtype=torch.float32)  # all sides alike: a wrong axis would not show in shapes
    x0, back = Scaling.of(CHANNEL).to_x0(z), Scaling.of(CHANNEL).to_z(z)
    for c, (shift, scale) in enumerate(zip(CHANNEL.shift, CHANNEL.scale, strict=True)):
        torch.testing.assert_close(x0[:, c], (z[:, c] - shift) * scale)
        torch.testing.assert_close(back[:, c], z[:, c] / scale + shift)


def test_one_number_a_channel_may_be_the_same_number() -> None:
    z = normal(2, 3, 4, 5)
    repeated = LatentsSettings(channels=3, shift=(0.25,) * 3, scale=(1.7,) * 3)
    assert torch.equal(Scaling.of(repeated).to_x0(z), Scaling.of(GLOBAL).to_x0(z))


def test_nothing_is_scaled_by_default() -> None:
    z = normal(2, 4, 3, 3)
    assert torch.equal(Scaling.of(LatentsSettings()).to_x0(z), z)
    assert torch.equal(Scaling.of(LatentsSettings()).to_z(z), z)


def test_mean_and_deviation_make_unit_variance() -> None:
    z = (
        normal(64, 3, 8, 8) * torch.tensor([0.2, 1.0, 5.0])[:, None, None]
        + torch.tensor([3.0, 0.0, -1.0])[:, None, None]
    )
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    scaling = Scaling.of(LatentsSettings(channels=3, shift=tuple(mean.tolist()), scale=tuple((1 / std).tolist())))
    x0 = scaling.to_x0(z)
    # atol: the numbers were kept in float32
    torch.testing.assert_close(x0.mean((0, 2, 3)), torch.zeros(3, dtype=z.dtype), rtol=0, atol=1e-5)
    torch.testing.assert_close(x0.std((0, 2, 3)), torch.ones(3, dtype=z.dtype), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_type_is_kept(dtype: torch.dtype) -> None:
    z = normal(1, 3, 2, 2, dtype=dtype)
    assert Scaling.of(CHANNEL).to_x0(z).dtype == Scaling.of(CHANNEL).to_z(z).dtype == dtype
