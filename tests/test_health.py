"""Health: runs broken on purpose get a finding, a healthy one does not; each rule is tried on both sides."""

import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result, call, succeed
from torch import nn

from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.data.files import scan
from lightdiff.data.latents import LatentSet, Scaling
from lightdiff.extras import health, health_data
from lightdiff.extras.evidence import metrics_of, rows_of
from lightdiff.extras.health import Finding, check_settings, examine
from lightdiff.extras.latent_facts import EDGES, ChannelFacts, LatentFacts, latent_facts
from lightdiff.extras.toy_faces import draw_dataset
from lightdiff.run_folder import RunFolder
from lightdiff.runtime.progress import Row
from lightdiff.settings import (
    ImageSettings,
    LatentsSettings,
    LoopSettings,
    TrainUNetSettings,
    TrainVAESettings,
    with_changes,
)
from lightdiff.training.ema import EMA

HERE = "--precision fp32 --device cpu --optimizer adamw --warmup-steps 20 --batch-size 8".split()
VAE = (
    "--preset tiny --resolution 16 --workers 0 --lpips-gamma 0 --no-flip --random-crop 1 --val-share 0.1 --lr 4e-3"
).split()
SMALL = "--model.encoder-channels 16,16,32 --model.decoder-channels 32,16,16 --val-share 0.3".split()  # 4 x 4 latents
SHORT = {"low-psnr"}  # what any training of a few steps gets


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
    succeed("train-unet", "--run", run, *HERE, "--preset", "tiny", "--steps", 100, "--val-every", 40)
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
        kept = [command]
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
    assert page.endswith("nothing unusual found")
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
    assert loss_settings(copied) == (8, "flow", 2)


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
    (finding,) = examine(copied)
    assert (finding.code, finding.stage) == ("signal-left", "unet")
    left = math.prod(1 - (1e-4 + i * (0.02 - 1e-4) / 19) for i in range(20))
    assert f"leaves {left:.3g} of" in finding.measured
    saved = copied / "unet" / "settings.json"
    assert finding.advice == f"lightdiff train-unet --run {copied} --restart --settings {saved} --timesteps 1000"
    succeed(*commands(finding.advice)[0])
    assert loss_settings(copied) == (8, "eps", 3)  # what was chosen stays
    assert codes(copied) == []


def test_advice_can_be_typed_as_it_is_whatever_the_run_is_called(tmp_path: Path) -> None:
    run = tmp_path / r"my run\next"
    saved = run / "vae" / "settings.json"
    saved.parent.mkdir(parents=True)
    saved.write_text("{}")
    (words,) = commands(health.complete_commands("lightdiff train-vae --restart --kl-beta 0.003, then encode", run))
    assert words == ["train-vae", "--run", str(run), "--restart", "--settings", str(saved), "--kl-beta", "0.003"]
    best = str(run / "unet" / "checkpoints" / "best.safetensors")
    advice = health.complete_commands(
        "lightdiff generate --unet RUN/unet/checkpoints/best.safetensors, or more images", run
    )
    assert commands(advice) == [["generate", "--run", str(run), "--unet", best]]
    assert commands(health.complete_commands("lightdiff evaluate measures it; fewer steps", run)) == [
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


# --- single rules -------------------------------------------------------------------------------------------------


def channel(**changes: object) -> ChannelFacts:
    """A healthy channel, with changes: normal, of unit scale, a quarter of it noise."""
    edges = torch.tensor(EDGES, dtype=torch.float64)
    density = torch.distributions.Normal(0.0, 1.0).cdf(edges).diff() / 0.2
    plain = {"mean": 0.0, "std": 1.0, "scaled_mean": 0.0, "scaled_std": 1.0, "kl": 1.4, "posterior_std": 0.25}
    plain |= {"bits": 2.0, "active_share": 1.0, "histogram": density.tolist()}
    return ChannelFacts.model_validate(plain | changes)


DEAD = {"active_share": 0.0, "posterior_std": 0.99, "kl": 0.001, "bits": 0.005}


@pytest.mark.parametrize(
    ("beta", "metrics", "channels", "wanted"),
    [
        (3e-3, {"mse": 0.005, "psnr": 29.0}, [channel()] * 4, []),
        (3e-3, {"kl": 0.001, "psnr": 12.0}, [], ["posterior-collapsed"]),
        (3e-3, {"kl": 0.1, "psnr": 29.0}, [], []),
        (3e-3, {"psnr": 29.0}, [channel(), channel(**DEAD)], ["dead-channels"]),
        (3e-3, {"psnr": 29.0}, [channel(), channel(active_share=0.0)], []),  # of little variance, and of less noise
        (0.1, {"mse": 0.08, "psnr": 17.0}, [channel()], ["kl-dominates"]),  # beta costs 0.05
        (0.1, {"mse": 0.12, "psnr": 15.2}, [channel()], ["low-psnr"]),  # less than half of it
        (0.01, {"mse": 0.009, "psnr": 26.7}, [channel()], []),  # more than half, but not much
        (3e-3, {"psnr": 19.9}, [channel()], ["low-psnr"]),
        (3e-3, {"psnr": 20.1}, [channel()], []),
        (0.0, {"kl": 8.0, "psnr": 30.0}, [], ["no-kl"]),
        (1e-9, {"psnr": 30.0}, [channel(posterior_std=0.001)], ["no-kl"]),
        (1e-4, {"psnr": 30.0}, [channel(posterior_std=0.02)], []),
    ],
)
def test_rules_of_the_vae(beta: float, metrics: Row, channels: list[ChannelFacts], wanted: list[str]) -> None:
    settings = TrainVAESettings.model_validate({"loss": {"kl_beta": beta}})
    facts = LatentFacts(images=100, channels=channels) if channels else None
    assert [finding.code for finding in health.check_vae(settings, metrics, facts)] == wanted


def test_a_frozen_encoder_needs_no_kl() -> None:
    settings = TrainVAESettings.model_validate({"freeze_encoder": True, "loss": {"kl_beta": 0}})
    assert not list(health.check_vae(settings, {"psnr": 30.0}, LatentFacts(images=9, channels=[channel()])))


def test_without_validation_training_metrics_count() -> None:
    rows = [{"step": 20.0, "mse": 0.4, "kl": 1.0}, {"step": 40.0, "mse": 0.04, "kl": 2.0}]
    found = metrics_of(Metadata(stage="vae"), rows)
    assert (found["kl"], found["psnr"]) == (2.0, pytest.approx(20.0))
    assert metrics_of(Metadata(stage="vae", metrics={"val_psnr": 31.0}), rows) == {"psnr": 31.0}


def heavy(share: float) -> ChannelFacts:
    """A channel with this share beyond the histogram."""
    plain = channel()
    inside = sum(plain.histogram) * 0.2
    return channel(histogram=[density * (1 - share) / inside for density in plain.histogram])


@pytest.mark.parametrize(
    ("channels", "wanted"),
    [
        ([channel()], []),
        ([channel(scaled_std=0.4), channel(scaled_std=1.4)], []),  # about 1 as a whole
        ([channel(scaled_std=2.1)], ["latent-scale"]),
        ([channel(scaled_std=1.9)], []),
        ([channel(scaled_std=0.45)], ["latent-scale"]),
        ([channel(scaled_mean=-1.2)], ["latent-scale"]),
        ([channel(scaled_std=math.nan)], ["latent-scale"]),
        ([channel(), heavy(0.007)], ["heavy-tails"]),
        ([channel(), heavy(0.004)], []),
        ([channel(scaled_std=1.5, histogram=heavy(0.01).histogram)], []),  # a normal one has 0.008 there
    ],
)
def test_rules_of_the_latents(channels: list[ChannelFacts], wanted: list[str]) -> None:
    facts = LatentFacts(images=100, channels=channels)
    assert [finding.code for finding in health.check_latents(facts, regular=True)] == wanted


@pytest.mark.parametrize(
    ("objective", "noise", "wanted"),
    [
        ("flow", {}, []),
        ("flow", {"timesteps": 20}, []),
        ("v", {"schedule": "cosine"}, []),
        ("eps", {"schedule": "linear"}, []),
        ("eps", {"schedule": "scaled-linear", "beta_start": 0.00085, "beta_end": 0.012}, []),  # Stable Diffusion's
        ("eps", {"schedule": "linear", "timesteps": 100}, ["signal-left --timesteps 1000"]),
        ("eps", {"schedule": "linear", "beta_end": 0.002}, ["signal-left --schedule cosine"]),
        ("v", {"schedule": "linear", "timesteps": 100, "zero_terminal_snr": True}, []),
        ("v", {"schedule": "cosine", "timesteps": 5}, ["noisy-start --timesteps 1000"]),
        ("flow", {"timesteps": 5}, ["noisy-start --timesteps 1000"]),
        ("eps", {"schedule": "linear", "beta_start": 0.015}, ["noisy-start --beta-start 1e-4"]),
    ],
)
def test_rules_of_the_schedule(objective: str, noise: dict[str, object], wanted: list[str]) -> None:
    settings = TrainUNetSettings.model_validate({"target": {"objective": objective}, "noise": noise})
    found = [
        f"{f.code} {f.advice.removeprefix('lightdiff train-unet --restart ')}" for f in health.check_schedule(settings)
    ]
    assert found == wanted


@pytest.mark.parametrize(("decay", "steps"), [(0.999, 300), (0.9, 300), (0.5, 300), (0.9999, 40)])
def test_the_age_of_ema_weights_is_that_of_the_loop(decay: float, steps: int) -> None:
    ema, age = EMA(nn.Linear(1, 1), decay), 0.0
    for step in range(1, steps + 1):
        age = ema.decay_at(step) * (age + 1)  # a step older, but for the share that is new
    assert health.average_age(decay, steps) == pytest.approx(age, rel=0.02)


def curve(*points: tuple[int, float], **more: float) -> list[Row]:
    return [{"step": step, "val_loss": loss, **more} for step, loss in points]


@pytest.mark.parametrize(
    ("decay", "rows", "lags"),
    [
        (0.999, curve((100, 1.0), (200, 0.6)), True),  # falls by half with each doubling; a tenth of that is 7 %
        (0.999, curve((100, 1.0), (200, 0.9)), False),
        (0.999, curve((100, 0.6), (200, 1.0)), False),
        (0.9, curve((1000, 1.0), (2000, 0.6)), False),  # 9 steps of 2,000
        (0.0, curve((100, 1.0), (200, 0.6)), False),
        (0.999, curve((199, 0.61), (200, 0.6)), False),  # too near to each other to tell
        (0.999, [], False),
    ],
)
def test_ema_weights_lag_while_the_loss_falls_fast(decay: float, rows: list[Row], lags: bool) -> None:
    found = health.check_ema(LoopSettings(ema_decay=decay), rows)
    assert [finding.code for finding in found] == ["ema-lags"] * lags


def trained(losses: list[float], band: list[float]) -> list[Row]:
    return [
        {"step": 100 * (i + 1), "images_seen": 1600 * (i + 1), "loss": loss, "val_loss_band_2": value}
        for i, (loss, value) in enumerate(zip(losses, band, strict=True))
    ]


@pytest.mark.parametrize(
    ("losses", "band", "wanted"),
    [
        ([1.0, 0.8, 0.6, 0.4], [1.0, 0.9, 0.95, 1.05], ["overfitting"]),
        ([1.0, 0.8, 0.6, 0.4], [1.0, 0.9, 1.2, 1.4], ["overfitting", "copies-likely"]),
        ([1.0, 0.8, 0.6, 0.4], [1.0, 0.9, 0.95, 0.98], []),  # within a tenth of its best
        ([1.0, 0.8, 0.9, 1.1], [1.0, 0.9, 0.95, 1.05], []),  # training does worse, too
        ([1.0, 0.8, 0.6, 0.4], [1.0, 0.9, 0.8, 0.7], []),
    ],
)
def test_overfitting_is_a_band_that_rises_while_training_falls(
    losses: list[float], band: list[float], wanted: list[str]
) -> None:
    rows = trained(losses, band)
    found = [*health.check_overfitting(rows, 20), *health.check_samples({}, rows, 20)]
    assert [finding.code for finding in found] == wanted
    if found:
        assert "band 2 (+" in found[0].measured
        assert "320 passes over 20 images" in found[0].measured
        assert "--steps 200 " in found[0].advice


@pytest.mark.parametrize(("images", "wanted"), [(20, ["not-validated"]), (2000, []), (0, [])])
def test_few_images_and_no_validation(images: int, wanted: list[str]) -> None:
    rows = [{"step": 20_000, "images_seen": 320_000, "loss": 0.1}]
    assert [finding.code for finding in health.check_overfitting(rows, images)] == wanted
    validated = [row | {"val_loss_band_1": 0.2} for row in rows]
    assert list(health.check_overfitting(validated, images)) == []


def test_copies_as_evaluate_measures_them() -> None:
    from lightdiff.extras.evaluate import copies

    held_out = torch.linspace(1, 2, 1000)
    for near, wanted in ((0.2, ["copies"]), (0.02, [])):
        samples = torch.full((500,), 1.5)
        samples[: int(500 * near)] = 0.5
        found = {"samples": 500, **copies(samples, held_out)}
        findings = list(health.check_samples(found, [], 1000))
        assert [finding.code for finding in findings] == wanted
        assert not findings or findings[0].measured.startswith("20% of 500 samples")
    few = {"samples": 8, **copies(torch.tensor([0.5] + [1.5] * 7), held_out)}
    assert list(health.check_samples(few, [], 1000)) == []  # one of eight says nothing
    steep = trained([1.0, 0.8, 0.6, 0.4], [1.0, 0.9, 1.2, 1.4])
    assert list(health.check_samples(few, steep, 1000)) == []  # what is measured counts, not what is likely


@pytest.fixture
def pictures(tmp_path: Path) -> ImageSettings:
    draw_dataset(tmp_path / "pictures", count=30, seed=3, size=16)
    return ImageSettings(data=(tmp_path / "pictures",), val_share=0.3, resolution=16)


def test_duplicates_are_counted(pictures: ImageSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(health_data.check_data(pictures)) == []
    folder = pictures.data[0]
    files = scan([folder], pictures.val_share)
    train, val = (next(f for f in files if f.split == split) for split in ("train", "val"))
    shutil.copy(folder / train.path, folder / val.path)
    (finding,) = health_data.check_data(pictures)
    held_out = sum(f.split == "val" for f in files)
    assert (finding.code, finding.stage) == ("duplicates", "data")
    assert finding.measured.startswith("1 of 30 files repeat another one")
    assert f"1 of {held_out} held-out images are also among the training images" in finding.measured
    monkeypatch.setattr(health_data, "MAX_FILES", 29)
    assert list(health_data.check_data(pictures)) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with named pipes")
def test_devices_and_pipes_among_the_images_are_not_read(pictures: ImageSettings) -> None:
    folder = pictures.data[0]
    original = next(folder.rglob("*.png"))
    for name in ("a.png", "b.png"):
        os.mkfifo(folder / f"pipe-{name}")
        (folder / f"zero-{name}").symlink_to("/dev/zero")
        (folder / f"nothing-{name}").symlink_to("nowhere")
        shutil.copy(original, folder / f"copy-{name}")
    (finding,) = health_data.check_data(pictures)
    assert finding.measured.startswith("2 of 38 files repeat another one")


def test_enlarged_images_are_found(pictures: ImageSettings) -> None:
    assert list(health_data.check_data(pictures)) == []
    (finding,) = health_data.check_data(with_changes(pictures, resolution=32))
    assert (finding.code, finding.stage) == ("enlarged", "data")
    assert finding.measured == "100% of 30 images looked at; median shorter side: 16 pixels"
    assert [f.code for f in health_data.check_sizes(pictures, [16] * 9 + [15])] == []
    assert [f.code for f in health_data.check_sizes(pictures, [16] * 7 + [15] * 3)] == ["enlarged"]


def test_no_finding_on_data_that_is_not_there(tmp_path: Path) -> None:
    assert list(health_data.check_data(ImageSettings(data=(tmp_path / "gone",)))) == []
    (tmp_path / "empty").mkdir()
    assert list(health_data.check_data(ImageSettings(data=(tmp_path / "empty",)))) == []


@pytest.mark.parametrize(
    ("loop", "images", "found"),
    [
        ({"steps": 20}, 0, True),
        ({"steps": 99}, 50, True),
        ({"steps": 100}, 50, False),
        ({"steps": 20, "warmup_steps": 0}, 50, False),
        ({"epochs": 2, "batch_size": 10}, 50, True),
        ({"epochs": 2, "batch_size": 10}, 5000, False),
        ({"epochs": 2, "batch_size": 10}, 0, False),  # who knows
    ],
)
def test_a_training_that_ends_before_its_warm_up(loop: dict[str, float], images: int, found: bool) -> None:
    settings = TrainVAESettings(loop=LoopSettings.model_validate(loop))
    findings = list(check_settings(settings, "vae", images))
    assert [finding.code for finding in findings] == ["warm-up"] * found
    for finding in findings:
        assert re.search(r"lightdiff train-vae --restart --warmup-steps \d+$", finding.advice)


def test_a_network_that_was_never_told_a_label() -> None:
    latent = LatentsSettings(labels={"class": ("cat", "dog")})
    for dropout, codes in ((1.0, ["no-labels"]), (0.5, [])):
        settings = TrainUNetSettings(label="class", label_dropout=dropout, latent=latent)
        assert [finding.code for finding in check_settings(settings, "unet", 9)] == codes


def test_the_page_lists_every_finding() -> None:
    page = (Path(__file__).parent.parent / "docs/how-to/health.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)
    assert listed == re.findall(
        r'code="([a-z-]+)"', "".join(Path(m.__file__).read_text(encoding="utf-8") for m in (health_data, health))
    )
