"""z <-> x0, the latents of the VAE and those of diffusion; the statistics that `scale` computes."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import UNET_FLAGS
from oracles import normal

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.index import read_index, shard_path
from lightdiff.data.latents import LatentSet, Scaling, latents_settings
from lightdiff.extras.latent_facts import UnitMoments, latent_facts, sum_positions
from lightdiff.pipeline import vae_digest
from lightdiff.run_folder import VAE_COPY, RunFolder
from lightdiff.settings import LatentsSettings, ScaleSettings
from lightdiff.stages import scale as stage
from lightdiff.stages.scale import LatentMoments, channel_bits, channel_warnings, statistics
from tests.bench.cases import made_up_latents

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


def test_latents_gathered_are_the_rows_of_their_shards_in_float32(tmp_path: Path) -> None:
    made_up_latents(tmp_path, 50, 4, shard_size=20)
    latents, positions = LatentSet(tmp_path), [41, 3, 20, 19, 3]
    assert latents.index.vae_digest == vae_digest(Checkpoint(tmp_path / VAE_COPY))  # else train-unet refuses them
    shards = [Checkpoint(shard_path(tmp_path, number)) for number in range(3)]
    for found, name in zip(latents.gather(positions), ("mu", "logvar"), strict=True):
        rows = [shards[position // 20].tensor(name)[position % 20, 0] for position in positions]
        assert rows[0].dtype == torch.float16
        torch.testing.assert_close(found, torch.stack(rows).float(), rtol=0, atol=0)
    elsewhere, _ = latents.gather(positions, device=torch.device("meta"))
    assert (elsewhere.device.type, elsewhere.dtype, elsewhere.shape) == ("meta", torch.float32, (5, 4, 4, 4))


@pytest.mark.parametrize("only_mu", [True, False])
def test_statistics_are_those_of_all_latents_whatever_the_batches(only_mu: bool) -> None:
    mu, logvar = 3 * normal(50, 2, 3, 4, 5, seed=1) + 1, normal(50, 2, 3, 4, 5, seed=2) - 2
    moments = LatentMoments(3)
    for rows in (slice(0, 7), slice(7, 7), slice(7, 50)):
        moments.add(mu[rows], logvar[rows])
    found = statistics(moments, ScaleSettings(only_mu=only_mu))
    posterior = 0 if only_mu else logvar.exp().mean((0, 1, 3, 4))
    variance = mu.transpose(0, 2).flatten(1).var(1, correction=0) + posterior
    assert found.count == 50 * 2 * 4 * 5
    # rel: latents are added up in float64, but squared and exponentiated in float32
    assert found.channel_mean == pytest.approx(mu.mean((0, 1, 3, 4)).tolist(), rel=1e-6)
    assert found.channel_std == pytest.approx(variance.sqrt().tolist(), rel=1e-6)
    assert found.channel_sigma == pytest.approx(logvar.exp().mean((0, 1, 3, 4)).sqrt().tolist(), rel=1e-6)
    assert found.scale == pytest.approx((1 / variance.sqrt()).tolist(), rel=1e-6)


def test_moments_of_units_sum_to_those_of_channels() -> None:
    mu, logvar = normal(20, 2, 3, 4, 5, seed=1), normal(20, 2, 3, 4, 5, seed=2)
    channels, units = LatentMoments(3), UnitMoments(3, 4, 5)
    channels.add(mu, logvar)
    units.add(mu, logvar)
    assert units.count == 40
    torch.testing.assert_close(units.mu, mu.sum((0, 1)), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(sum_positions(units).sums, channels.sums)
    assert sum_positions(units).count == channels.count


def test_a_channel_that_is_noise_or_far_too_large_gets_a_warning() -> None:
    mu, logvar = normal(200, 1, 4, 8, 8, seed=1), torch.full((200, 1, 4, 8, 8), -2.0)
    mu[:, :, 1] *= 0.01
    mu[:, :, 2] *= 100
    moments = LatentMoments(4)
    moments.add(mu, logvar)
    found = statistics(moments, ScaleSettings(only_mu=True))
    assert channel_bits(found)[0] == pytest.approx(0.5 * math.log2(1 + math.exp(2)), rel=0.02)  # var(mu) is about 1
    assert channel_bits(statistics(moments, ScaleSettings(only_mu=False)))[0] == pytest.approx(channel_bits(found)[0])
    warnings = channel_warnings(found)
    assert [w[:9] for w in warnings] == ["channel 1", "channel 2"]
    for warning, part in zip(warnings, ("carries no information", "has a std of"), strict=True):
        assert part in warning


def test_latents_without_logvar_take_half_of_the_disk_and_are_scaled_alike(cli, trained, tmp_path):
    run, found = RunFolder(Path(shutil.copytree(trained, tmp_path / "run"))), {}
    for flag in ("--logvar", "--no-logvar"):
        encoded = cli("encode", "--run", run.path, flag, "--restart", "--workers", 0, "--device", "cpu")
        assert encoded.code == 0, encoded.stderr
        assert cli("scale", "--run", run.path).code == 0
        size = sum(path.stat().st_size for path in run.latents.glob("shard-*"))
        found[flag] = LatentSet(run.latents), size, latent_facts(run.latents)
    (whole, size, facts), (half, smaller, close) = found.values()
    for name in ("mean", "channel_std", "shift", "scale"):
        assert getattr(half.index.statistics, name) == getattr(whole.index.statistics, name)
    # float16 holds logvar to about 1e-3 of its size; that of an untrained VAE is about 0
    assert half.index.statistics.channel_sigma == pytest.approx(whole.index.statistics.channel_sigma, rel=2e-3)
    assert torch.equal(half.gather([0, 1])[0], whole.gather([0, 1])[0])
    assert smaller < size
    assert half.nbytes * 2 == whole.nbytes
    for one, other in zip(close.channels, facts.channels, strict=True):
        assert other.kl - 0.05 < one.kl < other.kl + 1e-3
    refused = cli("scale", "--run", run.path, "--no-only-mu")
    assert refused.code == 2
    assert "has no logvar: 'lightdiff encode --logvar --restart' stores it" in refused.err
    assert cli("train-unet", "--run", run.path, *UNET_FLAGS, "--restart").code == 0
    asked = cli("encode", "--run", run.path, "--workers", 0, "--device", "cpu")
    assert asked.code == 2
    assert "--logvar" in asked.err


# --- of a run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("only_mu", [True, False])
def test_statistics_equal_those_of_all_latents_at_once(copy, only_mu):
    stage.run(ScaleSettings(run=copy, only_mu=only_mu))
    latents = LatentSet(copy / "latents")
    both = [latents.gather(latents.train, torch.full((len(latents.train),), m)) for m in (0, 1)]
    mu, logvar = (torch.cat(parts).double() for parts in zip(*both, strict=True))
    variance = mu.var((0, 2, 3), correction=0) + (0 if only_mu else logvar.exp().mean((0, 2, 3)))
    found = latents.index.statistics
    torch.testing.assert_close(
        torch.tensor(found.channel_mean, dtype=torch.float64), mu.mean((0, 2, 3)), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        torch.tensor(found.channel_std, dtype=torch.float64), variance.sqrt(), rtol=1e-9, atol=1e-9
    )
    x0 = Scaling.of(latents_settings(latents.folder)).to_x0(mu.float())
    assert x0.mean((0, 2, 3)).abs().max() < 1e-4
    if only_mu:
        torch.testing.assert_close(x0.std((0, 2, 3), correction=0), torch.ones(4), rtol=1e-3, atol=1e-3)


def test_drawn_latents_have_the_statistics_that_scale_states(finished):
    latents = LatentSet(finished / "latents")
    mu, logvar = latents.gather(latents.train)
    noise = torch.randn((200, *mu.shape), generator=torch.Generator().manual_seed(0))
    z = mu + torch.exp(0.5 * logvar) * noise
    stated = torch.tensor(latents.index.statistics.channel_std)
    torch.testing.assert_close(z.std((0, 1, 3, 4)), stated, rtol=0.02, atol=0)  # mirror images are left out here


def test_scaling_factor_global_and_by_hand(copy):
    stage.run(ScaleSettings(run=copy, normalize="global"))
    found = read_index(copy / "latents").statistics
    assert found.shift == [0.0]
    assert found.scale == [pytest.approx(1 / found.std)]
    stage.run(ScaleSettings(run=copy, scaling_factor=0.9498))
    found = read_index(copy / "latents").statistics
    assert (found.shift, found.scale) == ([0.0], [0.9498])


def test_a_channel_that_carries_nothing_is_warned_of(finished):
    statistics = read_index(finished / "latents").statistics
    dead = statistics.model_copy(
        update={"only_mu": False, "channel_std": [1.0, 1, 1, 1], "channel_sigma": [0.1, 1.0, 0.1, 0.1]}
    )
    assert [w.split(":")[0] for w in channel_warnings(dead)] == [
        "channel 1 carries no information (std of mu far below sigma)"
    ]
