"""Health: runs broken on purpose get a finding, a healthy one does not; and advice that can be typed as it is."""

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result, call, succeed

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.latents import LatentSet, Scaling
from lightdiff.extras.evidence import rows_of
from lightdiff.extras.health import Finding, complete_commands, examine, vae
from lightdiff.extras.latent_facts import EDGES, latent_facts
from lightdiff.extras.toy_faces import draw_dataset
from lightdiff.run_folder import RunFolder
from lightdiff.settings import (
    TrainUNetSettings,
)

HERE = "--precision fp32 --device cpu --optimizer adamw --warmup-steps 20 --batch-size 8".split()
VAE = (
    "--preset tiny --resolution 16 --workers 0 --lpips-gamma 0 --no-flip --random-crop 1 --val-share 0.1 --lr 4e-3"
).split()
SMALL = "--model.encoder-channels 16,16,32 --model.decoder-channels 32,16,16 --val-share 0.3".split()  # 4 x 4 latents
SHORT = {"low-psnr", "unused-images", "knows-nothing"}  # what any training of a few steps gets


def train_vae(run: Path, data: Path, *more: object) -> None:
    succeed("train-vae", "--run", run, "--data", data, *HERE, *VAE, *more)
    succeed("encode", "--run", run, "--workers", 0, "--device", "cpu")


def codes(run: Path) -> list[str]:
    return [finding.code for finding in examine(run)]


def named(findings: list[Finding], code: str) -> Finding:
    return next(finding for finding in findings if finding.code == code)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("health") / "faces"
    draw_dataset(folder, count=120, seed=0, size=16)
    return folder


@pytest.fixture(scope="module")
def healthy(data: Path) -> Path:
    """A run as it is meant to be, but small. Not to be written to: see `copied`."""
    run = data.parent / "healthy"
    train_vae(run, data, "--steps", 320)
    succeed("scale", "--run", run)
    longer = "--preset tiny --steps 150 --batch-size 16 --val-every 75".split()
    succeed("train-unet", "--run", run, *HERE, *longer)
    return run


@pytest.fixture
def copied(healthy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "run"))


def commands(advice: str) -> list[list[str]]:
    """The commands in advice, as a shell takes them apart: flags, each with a value or none."""
    found = []
    for text in advice.split("lightdiff ")[1:]:
        words = re.split(r"(?<=\S)(?:[,;)(]| \()(?= |$)", text)[0]
        command, *rest = shlex.split(words)
        kept = [command, *(rest[:1] if command == "inspect" else [])]  # all others have flags alone
        while rest and rest[0].startswith("--"):
            takes_value = len(rest) > 1 and not rest[1].startswith("--") and rest[0] != "--restart"
            kept += rest[: 1 + takes_value]
            rest = rest[1 + takes_value :]
        found.append(kept)
    return found


def loss_settings(run: Path) -> tuple[int, str, int]:
    """Batch size, objective and steps of a run's U-Net."""
    settings = Checkpoint(run / "unet/checkpoints/last.safetensors", "unet").settings(TrainUNetSettings)
    return settings.loop.batch_size, settings.target.objective, settings.loop.steps


# --- whole runs ---------------------------------------------------------------------------------------------------


def test_a_healthy_run_gets_no_finding(healthy: Path, cli: Callable[..., Result]) -> None:
    assert examine(healthy) == []
    page = cli("show", healthy).out
    assert page.startswith("health nothing unusual found")
    assert re.search(r"val_loss_band_1 [\d.]+ \(1.288 from the noise level alone\)", page)
    parts = json.loads(cli("show", healthy, "--json").stdout)
    assert [part["findings"] for part in parts] == [[], [], []]


def test_a_beta_of_100_collapses_the_posterior(data: Path, tmp_path: Path) -> None:
    train_vae(tmp_path, data, "--steps", 60, "--kl-beta", 100)
    (finding,) = examine(tmp_path)
    assert (finding.code, finding.stage) == ("posterior-collapsed", "vae")
    assert "--kl-beta 100" in finding.measured
    assert "--kl-beta 0.003" in finding.advice
    assert all(c.active_share == 0 and c.kl < 0.02 for c in latent_facts(tmp_path / "latents").channels)


def test_a_beta_of_0_keeps_nothing_regular(data: Path, tmp_path: Path) -> None:
    train_vae(tmp_path, data, "--steps", 40, "--kl-beta", 0)
    findings = examine(tmp_path)
    assert {finding.code for finding in findings} - SHORT == {"no-kl"}
    assert named(findings, "no-kl").measured.startswith("--kl-beta 0; sigma is")


@pytest.mark.parametrize("factor", [10.0, 0.2])
def test_a_scaling_factor_set_by_hand_that_is_wrong(copied: Path, factor: float) -> None:
    succeed("scale", "--run", copied, "--scaling-factor", factor)
    (finding,) = examine(copied)
    assert (finding.code, finding.stage) == ("latent-scale", "latents")
    std = math.sqrt(sum(c.std**2 for c in latent_facts(copied / "latents").channels) / 4)
    assert f"a std of {factor * std:.3g} " in finding.measured
    again, anew = commands(finding.advice)
    assert again == ["scale", "--run", str(copied)]
    succeed(*again)
    assert codes(copied) == []
    succeed(*anew, "--steps", 2)  # the saved settings' section on latents is of the old ones: it is left out
    assert loss_settings(copied) == (16, "flow", 2)


def test_latents_of_an_earlier_vae_are_reported(copied: Path) -> None:
    succeed("train-vae", "--run", copied, "--steps", 322)
    (finding,) = [f for f in examine(copied) if f.code == "earlier-vae"]
    again, scaled, anew = commands(finding.advice)
    succeed(*again, "--workers", 0, "--device", "cpu")
    succeed(*scaled)
    succeed(*anew, "--steps", 2)
    assert "earlier-vae" not in codes(copied)


def test_a_linear_schedule_with_few_timesteps_leaves_signal(copied: Path) -> None:
    chosen = (
        "--restart --objective eps --schedule linear --timesteps 20 --preset tiny --steps 3 --warmup-steps 1".split()
    )
    succeed("train-unet", "--run", copied, *HERE, *chosen)
    (finding,) = [found for found in examine(copied) if found.code not in SHORT]
    assert (finding.code, finding.stage) == ("signal-left", "unet")
    left = math.prod(1 - (1e-4 + i * (0.02 - 1e-4) / 19) for i in range(20))
    assert f"leaves {left:.3g} of" in finding.measured
    saved = copied / "unet" / "settings.json"
    assert finding.advice == f"lightdiff train-unet --run {copied} --restart --settings {saved} --timesteps 1000"
    succeed(*commands(finding.advice)[0])
    assert loss_settings(copied) == (8, "eps", 3)  # what was chosen stays
    assert set(codes(copied)) <= SHORT


def test_advice_can_be_typed_as_it_is_whatever_the_run_is_called(tmp_path: Path) -> None:
    run = tmp_path / r"my run\next"
    saved = run / "vae" / "settings.json"
    saved.parent.mkdir(parents=True)
    saved.write_text("{}")
    (words,) = commands(complete_commands("lightdiff train-vae --restart --kl-beta 0.003, then encode", run))
    assert words == ["train-vae", "--run", str(run), "--restart", "--settings", str(saved), "--kl-beta", "0.003"]
    best = str(run / "unet" / "checkpoints" / "best.safetensors")
    advice = complete_commands("lightdiff generate --unet RUN/unet/checkpoints/best.safetensors, or more images", run)
    assert commands(advice) == [["generate", "--run", str(run), "--unet", best]]
    assert commands(complete_commands("lightdiff evaluate measures it; fewer steps", run)) == [
        ["evaluate", "--run", str(run)]
    ]


@pytest.mark.slow
def test_many_epochs_on_twenty_images_overfit(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "twenty", count=20, seed=1, size=16)
    run = tmp_path / "run"
    train_vae(run, tmp_path / "twenty", "--steps", 100, *SMALL, "--kl-beta", 1e-4)
    succeed("scale", "--run", run, "--only-mu")  # posteriors' noise would tell the same image apart
    loop = "--batch-size 16 --steps 280 --val-every 40 --lr 4e-3 --ema-decay 0.9".split()
    network = "--model.channels 64,64 --model.blocks 1 --model.attend-levels none --density uniform".split()
    succeed("train-unet", "--run", run, *HERE, *loop, *network)
    findings = examine(run)
    assert {finding.code for finding in findings} - SHORT - {"copies-likely"} == {"overfitting"}
    images = LatentSet(run / "latents").train
    assert (
        f"after {280 * 16 / len(images):.0f} passes over {len(images)} images"
        in named(findings, "overfitting").measured
    )


def test_images_that_a_vae_without_latents_has_not_seen(copied: Path) -> None:
    images = len(LatentSet(copied / "latents").train)
    for part in ("latents", "unet"):
        shutil.rmtree(copied / part)
    rows = rows_of(RunFolder(copied).vae)
    rows[-1]["images_seen"] = images - 1
    (copied / "vae/metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert f"{images - 1} of {images} images seen" in named(examine(copied), "unused-images").measured


def test_reconstructions_are_not_called_poor_while_a_training_goes_on(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae, "LOW_PSNR", 99.0)
    assert codes(copied) == ["low-psnr"]
    for part in ("latents", "unet"):
        shutil.rmtree(copied / part)
    assert codes(copied) == ["low-psnr"]
    (copied / "vae/metrics.jsonl").write_text("\n".join(map(json.dumps, rows_of(RunFolder(copied).vae)[:-1])))
    assert codes(copied) == []


def test_what_is_damaged_is_left_out_and_the_rest_is_examined(copied: Path) -> None:
    succeed("scale", "--run", copied, "--scaling-factor", 10)
    for damaged in ("vae/checkpoints/best.safetensors", "vae/checkpoints/last.safetensors"):
        (copied / damaged).write_bytes((copied / damaged).read_bytes()[:300])
    for file in copied.glob("vae/checkpoints/step-*"):
        file.write_bytes(b"")
    (copied / "evaluation").mkdir()
    (copied / "evaluation" / "metrics.json").write_text('{"unet": 3}')
    (copied / "unet" / "metrics.jsonl").write_text('{"step": 20, "loss": 1}\n{"step": 40, "lo\n7\n\n{"loss": NaN}')
    assert [row["step"] for row in rows_of(RunFolder(copied).unet)] == [20]
    assert codes(copied) == ["latent-scale"]
    (copied / "latents" / "shard-00000.safetensors").write_bytes(b"{")
    assert codes(copied) == []
    (copied / "latents" / "index.safetensors").write_text("[")
    (copied / "latents" / "vae.safetensors").unlink()
    assert codes(copied) == []
    assert examine(copied / "nothing here") == []


def test_show_prints_findings_and_puts_them_in_json(copied: Path, cli: Callable[..., Result]) -> None:
    succeed("scale", "--run", copied, "--scaling-factor", 10)
    (finding,) = examine(copied)
    page = cli("show", copied).out
    for text in (finding.title, finding.measured, finding.usual, finding.advice):
        assert " ".join(text.split()) in page
    assert "nothing unusual" not in page
    parts = json.loads(cli("show", copied, "--json").stdout)
    assert [[f["code"] for f in part["findings"]] for part in parts] == [[], ["latent-scale"], []]
    shutil.rmtree(copied / "unet")
    shutil.rmtree(copied / "vae")
    assert [f["code"] for f in json.loads(cli("show", copied, "--json").stdout)[0]["findings"]] == ["latent-scale"]
    latents = call("show", copied / "latents", "--json")  # no run, and no word on its health
    assert "findings" not in json.loads(latents.stdout)[0]


# --- latent facts -------------------------------------------------------------------------------------------------


def test_facts_are_those_of_the_closed_forms(copied: Path) -> None:
    succeed("scale", "--run", copied, "--no-only-mu")
    latents = LatentSet(copied / "latents")
    facts = latent_facts(copied / "latents")
    statistics = latents.index.statistics
    assert statistics is not None
    mu, logvar = (x.double() for x in latents.gather(list(latents.train)))
    normal = torch.distributions.Normal(mu, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    assert facts.images == len(mu) == len(latents.train)
    for c, found in enumerate(facts.channels):
        assert found.mean == pytest.approx(statistics.channel_mean[c], abs=1e-6)
        assert found.std == pytest.approx(statistics.channel_std[c], rel=1e-6)
        assert found.posterior_std == pytest.approx(statistics.channel_sigma[c], rel=1e-6)
        assert (found.scaled_mean, found.scaled_std) == pytest.approx((0, 1), abs=1e-5)
        assert found.kl == pytest.approx(kl[:, c].mean().item(), rel=1e-5)
        spread = mu[:, c].var(0, correction=0).mean() / logvar[:, c].exp().mean()
        assert found.bits == pytest.approx(0.5 * torch.log2(1 + spread).item(), rel=1e-5)
        assert found.active_share == ((mu[:, c].var(0, correction=0) > 0.01).double().mean().item())
        exact = torch.distributions.Normal(
            (mu[:, c] - statistics.shift[c]) * statistics.scale[c], (logvar[:, c] / 2).exp() * statistics.scale[c]
        )
        mass = torch.stack([exact.cdf(torch.tensor(edge).double()).mean() for edge in EDGES]).diff()
        density = torch.tensor(found.histogram).double()
        assert len(density) == len(EDGES) - 1 == 40
        # a count of n has a spread of sqrt(n)
        assert (density * 0.2 - mass).abs().le(6 * (mass / mu[:, c].numel()).sqrt() + 6 / mu[:, c].numel()).all()


def test_facts_are_of_mu_where_the_unet_learns_mu(copied: Path) -> None:
    succeed("scale", "--run", copied)
    latents = LatentSet(copied / "latents")
    assert latents.index.statistics is not None
    shift, scale = (torch.tensor(v) for v in (latents.index.statistics.shift, latents.index.statistics.scale))
    mu = Scaling(shift, scale).to_x0(latents.gather(list(latents.train))[0].double())
    for c, found in enumerate(latent_facts(copied / "latents").channels):
        assert (found.scaled_mean, found.scaled_std) == pytest.approx((0, 1), abs=1e-5)
        density = torch.histc(mu[:, c].float(), len(EDGES) - 1, EDGES[0], EDGES[-1]) / mu[:, c].numel() / 0.2
        assert found.histogram == pytest.approx(density.tolist(), abs=1e-3)


def test_facts_of_fewer_images_and_of_many_shards(copied: Path) -> None:
    whole = latent_facts(copied / "latents")
    few = latent_facts(copied / "latents", max_images=10)
    assert few.images == 10
    assert few.channels[0].mean != whole.channels[0].mean
    succeed("encode", "--run", copied, "--restart", "--shard-size", 16, "--workers", 0, "--device", "cpu")
    parts = latent_facts(copied / "latents")
    assert parts.images == whole.images
    for one, other in zip(parts.channels, whole.channels, strict=True):
        assert one.mean == pytest.approx(other.mean, abs=1e-5)
        assert one.kl == pytest.approx(other.kl, rel=1e-4)
        assert (one.scaled_mean, one.scaled_std) == (one.mean, one.std)  # not scaled yet
