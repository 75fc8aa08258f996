"""Health, rule by rule: each is tried on both sides of its limit, on made-up numbers."""

import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import call
from test_health import commands
from torch import nn

from lightdiff.checkpoint import Metadata
from lightdiff.extras.evidence import metrics_of
from lightdiff.extras.grid_pattern import PATTERN, GridPattern, grid_pattern
from lightdiff.extras.health import Finding, complete_commands, data, latents, samples, training, unet, vae
from lightdiff.extras.health.data import check_data, check_sizes
from lightdiff.extras.health.latents import check_latents, check_lineage
from lightdiff.extras.health.samples import check_quality, check_samples
from lightdiff.extras.health.training import check_rise, check_spikes, check_unused, check_warmup
from lightdiff.extras.health.unet import (
    average_age,
    check_baseline,
    check_ema,
    check_labels,
    check_overfitting,
    check_schedule,
)
from lightdiff.extras.health.vae import MAX_PATTERN, check_pattern, check_vae
from lightdiff.extras.latent_facts import EDGES, ChannelFacts, LatentFacts
from lightdiff.extras.toy_faces import draw_dataset
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
from tests.image_files import scan

HEALTH_PAGE = Path(__file__).parent.parent / "docs/how-to/health.md"


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
        (1e-9, {}, [channel(posterior_std=0.001)], []),  # an imported VAE has no metrics
        (1e-4, {"psnr": 30.0}, [channel(posterior_std=0.02)], []),
    ],
)
def test_rules_of_the_vae(beta: float, metrics: Row, channels: list[ChannelFacts], wanted: list[str]) -> None:
    settings = TrainVAESettings.model_validate({"loss": {"kl_beta": beta}})
    facts = LatentFacts(images=100, channels=channels) if channels else None
    assert [finding.code for finding in check_vae(settings, metrics, facts)] == wanted


def test_a_frozen_encoder_needs_no_kl() -> None:
    settings = TrainVAESettings.model_validate({"freeze_encoder": True, "loss": {"kl_beta": 0}})
    assert not list(check_vae(settings, {"psnr": 30.0}, LatentFacts(images=9, channels=[channel()])))


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
    assert [finding.code for finding in check_latents(facts, regular=True)] == wanted


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
    found = [f"{f.code} {f.advice.removeprefix('lightdiff train-unet --restart ')}" for f in check_schedule(settings)]
    assert found == wanted


@pytest.mark.parametrize(("decay", "steps"), [(0.999, 300), (0.9, 300), (0.5, 300), (0.9999, 40)])
def test_the_age_of_ema_weights_is_that_of_the_loop(decay: float, steps: int) -> None:
    ema, age = EMA(nn.Linear(1, 1), decay), 0.0
    for step in range(1, steps + 1):
        age = ema.decay_at(step) * (age + 1)  # a step older, but for the share that is new
    assert average_age(decay, steps) == pytest.approx(age, rel=0.02)


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
    found = check_ema(LoopSettings(ema_decay=(decay,)), rows)
    assert [finding.code for finding in found] == ["ema-lags"] * lags


def trained(losses: list[float], band: list[float]) -> list[Row]:
    return [
        {"step": 100 * (i + 1), "images_seen": 800 * (i + 1), "loss": loss, "val_loss_band_2": value}
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
    found = [*check_overfitting(rows, 20), *check_samples({}, rows, 20)]
    assert [finding.code for finding in found] == wanted
    if found:
        assert "band 2 (+" in found[0].measured
        assert "160 passes over 20 images" in found[0].measured
        assert "--steps 200 " in found[0].advice


@pytest.mark.parametrize(("images", "wanted"), [(20, ["not-validated"]), (2000, []), (0, [])])
def test_few_images_and_no_validation(images: int, wanted: list[str]) -> None:
    rows = [{"step": 20_000, "images_seen": 320_000, "loss": 0.1}]
    assert [finding.code for finding in check_overfitting(rows, images)] == wanted
    validated = [row | {"val_loss_band_1": 0.2} for row in rows]
    assert list(check_overfitting(validated, images)) == []


def validated(*bands: float, step: int = 400) -> Row:
    return {"step": step, "images_seen": 32 * step, "loss": 1.0} | {
        f"val_loss_band_{number}": loss for number, loss in enumerate(bands, 1)
    }


MUSH = validated(1.413, 1.340, 1.470, 1.671)


@pytest.mark.parametrize(
    ("layer", "rows", "z_std", "wanted"),
    [
        ({}, [MUSH], [], "14"),  # where knowing the level alone gives 1.288, 1.855, 1.854, 1.286
        ({}, [validated(0.752, 0.375, 0.420, 0.838)], [], ""),  # the demo's
        ({}, [validated(1.27, 1.84, 1.84, 1.27)], [], ""),
        ({}, [validated(1.2, 1.7, 1.7, 1.2), MUSH], [], ""),  # it knew more before: overfitting, or a leap of the loss
        ({"target": {"objective": "v"}}, [validated(0.9, 1.01, 0.9, 0.9)], [], "2"),
        ({"target": {"objective": "eps"}}, [validated(0.5, 0.3, 0.2, 0.06)], [], ""),  # 0.049: nearly known
        ({"target": {"objective": "eps"}}, [validated(0.95, 0.7, 0.31, 0.06)], [], "123"),
        ({"latent": {"scale": [2.0]}}, [validated(1.0, 2.0, 2.4, 2.4)], [1.0] * 4, ""),  # latents of std 2
        ({"latent": {"scale": [0.5]}}, [validated(0.6, 0.6, 0.7, 0.5)], [1.0] * 4, "34"),  # of std 0.5
        ({}, [{"step": 400, "loss": 1.9}], [], ""),  # nothing is held out
        ({}, [], [], ""),
    ],
)
def test_a_network_that_knows_nothing_of_images(
    layer: dict[str, object], rows: list[Row], z_std: list[float], wanted: str
) -> None:
    settings = TrainUNetSettings.model_validate(layer | {"loop": {"steps": 400}})
    found = list(check_baseline(settings, rows, 1000, z_std))
    assert [finding.code for finding in found] == ["knows-nothing"] * bool(wanted)
    assert "".join(re.findall(r"band (\d)", found[0].measured if found else "")) == wanted


def test_a_network_is_given_time_to_learn() -> None:
    for step, total, found in ((399, 400, False), (400, 400, True), (1999, 20_000, False), (2000, 20_000, True)):
        settings = TrainUNetSettings(loop=LoopSettings(steps=total))
        findings = check_baseline(settings, [MUSH | {"step": step}], 1000, [])
        assert [finding.code for finding in findings] == ["knows-nothing"] * found


def losses(values: list[float], **more: float) -> list[Row]:
    return [{"step": 20 * (i + 1), "loss": value, **more} for i, value in enumerate(values)]


def varying(count: int, size: int) -> list[float]:
    """Losses that vary as those of batches do whose images' losses are distributed exponentially."""
    rng = torch.Generator().manual_seed(size)
    return [float(torch.empty(size).exponential_(generator=rng).mean()) for _ in range(count)]


@pytest.mark.parametrize(
    ("values", "spikes"),
    [
        (varying(2000, 1), 0),
        (varying(2000, 4), 0),
        (varying(2000, 32), 0),
        ([*varying(100, 32), 9.0, *varying(100, 32), 30.0, *varying(20, 32)], 2),
        ([*varying(100, 32), *[6.0] * 30], 1),  # it stays up there
        ([1 / (n + 1) for n in range(100)], 0),
        ([1.0, 9.0, 1.0], 0),  # too few before it to tell
        ([], 0),
    ],
)
def test_spikes_of_the_training_loss(values: list[float], spikes: int) -> None:
    found = list(check_spikes(LoopSettings(lr=1e-3), "vae", losses(values)))
    assert [finding.code for finding in found] == ["loss-spikes"] * bool(spikes)
    assert not found or found[0].measured.startswith(f"{spikes} of {len(values)} lines of metrics.jsonl; at step ")


def test_steps_that_were_skipped_are_told() -> None:
    (finding,) = check_spikes(LoopSettings(lr=1e-3, clip=0), "unet", losses([1.0] * 30, skipped=3))
    assert finding.measured == "0 of 30 lines of metrics.jsonl; 3 steps skipped as not finite"
    assert finding.advice.endswith("--lr 0.0005 --clip 1")


@pytest.mark.parametrize(
    ("rows", "rise"),
    [
        (curve((100, 1.0), (200, 0.5), (300, 0.6)), "20%"),
        (curve((100, 1.0), (200, 0.5), (300, 0.54)), ""),
        (curve((100, 1.0), (200, 0.5)), ""),
        (curve((100, 1.0)), ""),
        ([], ""),
    ],
)
def test_a_validation_loss_that_rises_again(rows: list[Row], rise: str) -> None:
    for stage in ("vae", "unet"):
        found = list(check_rise(LoopSettings(), stage, rows))
        assert [finding.code for finding in found] == ["loss-rose"] * bool(rise)
        assert not found or f"0.6 at step 300, {rise} above its best, 0.5 at step 200" in found[0].measured


@pytest.mark.parametrize(
    ("loop", "seen", "found"),
    [
        ({"steps": 100}, 999, True),
        ({"steps": 100}, 1000, False),
        ({"steps": 101}, 999, False),  # it goes on
        ({"epochs": 0.5, "batch_size": 5}, 500, True),
        ({"steps": 100}, -8, False),  # of a damaged document
    ],
)
def test_images_that_were_never_used(loop: dict[str, float], seen: int, found: bool) -> None:
    rows: list[Row] = [{"step": 50, "images_seen": seen // 2}, {"step": 100, "images_seen": seen}]
    findings = list(check_unused(LoopSettings.model_validate(loop), "unet", rows, 1000))
    assert [finding.code for finding in findings] == ["unused-images"] * found


@pytest.mark.parametrize(
    ("images", "seen", "found"),
    [(200, 64_000, True), (200, 58_000, False), (5000, 1_600_000, False), (0, 64_000, False)],
)
def test_few_images_seen_very_often(images: int, seen: int, found: bool) -> None:
    rows: list[Row] = [{"step": 2000, "images_seen": seen}]
    assert [finding.code for finding in check_samples({}, rows, images)] == ["many-passes"] * found
    measured = {"samples": 500, "share of samples nearer than 99% of those": 0.0}
    assert list(check_samples(measured, rows, images)) == []  # they are no copies


@pytest.mark.parametrize(
    ("precision", "recall", "samples", "title"),
    [
        (0.36, 0.0, 500, "Hardly any training images look like a sample"),
        (0.01, 0.2, 500, "Hardly any samples look like training images"),
        (
            0.0,
            0.0,
            500,
            "Hardly any samples look like training images, and hardly any training images look like a sample",
        ),
        (0.36, 0.06, 500, None),
        (0.36, 0.0, 50, None),  # too few to say so
    ],
)
@pytest.mark.parametrize("features", ["", " (768 features)"])
def test_precision_and_recall_near_0(
    precision: float, recall: float, samples: int, title: str | None, features: str
) -> None:
    found = {"samples": samples, "training images": 5000, "FID": 3.0}
    found |= {f"precision{features}": precision, f"recall{features}": recall}
    assert [finding.title for finding in check_quality(found, LoopSettings())] == ([title] if title else [])
    assert list(check_quality({}, LoopSettings())) == []


def test_copies_as_evaluate_measures_them() -> None:
    from lightdiff.extras.evaluate import copies

    held_out = torch.linspace(1, 2, 1000)
    for near, wanted in ((0.2, ["copies"]), (0.02, [])):
        samples = torch.full((500,), 1.5)
        samples[: int(500 * near)] = 0.5
        found = {"samples": 500, **copies(samples, held_out)}
        findings = list(check_samples(found, [], 1000))
        assert [finding.code for finding in findings] == wanted
        assert not findings or findings[0].measured.startswith("20% of 500 samples")
    few = {"samples": 8, **copies(torch.tensor([0.5] + [1.5] * 7), held_out)}
    assert list(check_samples(few, [], 1000)) == []  # one of eight says nothing
    steep = trained([1.0, 0.8, 0.6, 0.4], [1.0, 0.9, 1.2, 1.4])
    assert list(check_samples(few, steep, 1000)) == []  # what is measured counts, not what is likely


@pytest.fixture
def pictures(tmp_path: Path) -> ImageSettings:
    draw_dataset(tmp_path / "pictures", count=30, seed=3, size=16)
    return ImageSettings(data=(tmp_path / "pictures",), val_share=0.3, resolution=16)


def test_duplicates_are_counted(pictures: ImageSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(check_data(pictures)) == []
    folder = pictures.data[0]
    files = scan([folder], pictures.val_share)
    train, val = (next(f for f in files if f.split == split) for split in ("train", "val"))
    shutil.copy(folder / train.path, folder / val.path)
    (finding,) = check_data(pictures)
    held_out = sum(f.split == "val" for f in files)
    assert (finding.code, finding.stage) == ("duplicates", "data")
    assert finding.measured.startswith("1 of 30 files repeat another one")
    assert f"1 of {held_out} held-out images are also among the training images" in finding.measured
    monkeypatch.setattr(data, "MAX_FILES", 29)
    assert list(check_data(pictures)) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with named pipes")
def test_devices_and_pipes_among_the_images_are_not_read(pictures: ImageSettings) -> None:
    folder = pictures.data[0]
    original = next(folder.rglob("*.png"))
    for name in ("a.png", "b.png"):
        os.mkfifo(folder / f"pipe-{name}")
        (folder / f"zero-{name}").symlink_to("/dev/zero")
        (folder / f"nothing-{name}").symlink_to("nowhere")
        shutil.copy(original, folder / f"copy-{name}")
    (finding,) = check_data(pictures)
    assert finding.measured.startswith("2 of 38 files repeat another one")


def test_enlarged_images_are_found(pictures: ImageSettings) -> None:
    assert list(check_data(pictures)) == []
    (finding,) = check_data(with_changes(pictures, resolution=32))
    assert (finding.code, finding.stage) == ("enlarged", "data")
    assert finding.measured == "100% of 30 images looked at; median shorter side: 16 pixels"
    assert [f.code for f in check_sizes(pictures, [(16, 20)] * 9 + [(15, 20)])] == []
    assert [f.code for f in check_sizes(pictures, [(16, 20)] * 7 + [(20, 15)] * 3)] == ["enlarged"]


def test_no_finding_on_data_that_is_not_there(tmp_path: Path) -> None:
    assert list(check_data(ImageSettings(data=(tmp_path / "gone",)))) == []
    (tmp_path / "empty").mkdir()
    assert list(check_data(ImageSettings(data=(tmp_path / "empty",)))) == []


@pytest.mark.parametrize(
    ("loop", "images", "found"),
    [
        ({"steps": 20, "warmup_steps": 100}, 0, True),
        ({"steps": 99, "warmup_steps": 100}, 50, True),
        ({"steps": 100, "warmup_steps": 100}, 50, False),
        ({"steps": 20}, 50, False),
        ({"steps": 20, "warmup_steps": 0}, 50, False),
        ({"epochs": 2, "batch_size": 10, "warmup_steps": 100}, 50, True),
        ({"epochs": 2, "batch_size": 10, "warmup_steps": 100}, 5000, False),
        ({"epochs": 2, "batch_size": 10, "warmup_steps": 100}, 0, False),  # who knows
    ],
)
def test_a_training_that_ends_before_its_warm_up(loop: dict[str, float], images: int, found: bool) -> None:
    settings = TrainVAESettings(loop=LoopSettings.model_validate(loop))
    findings = list(check_warmup(settings.loop, "vae", images))
    assert [finding.code for finding in findings] == ["warm-up"] * found
    for finding in findings:
        assert re.search(r"lightdiff train-vae --restart --warmup-steps \d+$", finding.advice)


def labelled(dropout: float) -> TrainUNetSettings:
    latent = LatentsSettings(labels={"class": ("cat", "dog")})
    return TrainUNetSettings(label="class", label_dropout=dropout, latent=latent)


def test_a_network_that_was_never_told_a_label() -> None:
    for dropout, codes in ((1.0, ["no-labels"]), (0.5, [])):
        assert [finding.code for finding in check_labels(labelled(dropout))] == codes


LISTED = re.findall(r"^\| `([a-z-]+)` \|", HEALTH_PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def every_finding(pictures: ImageSettings) -> Iterator[Finding]:
    """One of each at least, whose advice fits a run with default settings."""
    file = next(pictures.data[0].rglob("*.png"))
    shutil.copy(file, file.with_name("copy.png"))
    loop, rising = LoopSettings(), trained([1.0, 0.8, 0.6, 0.4], [1.0, 0.9, 1.2, 1.4])
    spike, seldom = losses([*varying(30, 32), 50.0]), [{"step": 20_000, "images_seen": 9, "loss": 1.0}]
    yield from check_data(with_changes(pictures, resolution=32))
    for stage in ("vae", "unet"):
        yield from check_warmup(LoopSettings(steps=20, warmup_steps=100), stage, 9)
        yield from check_unused(loop, stage, seldom, 10)
        yield from check_spikes(loop, stage, spike)
        yield from check_rise(loop, stage, curve((100, 1.0), (200, 2.0)))
    for beta, psnr, channels in (
        (1.0, 9.0, [channel(**DEAD)]),
        (1.0, 9.0, [channel(), channel(**DEAD)]),
        (1.0, 9.0, [channel()]),
        (0.0, 9.0, [channel()]),
    ):
        settings = TrainVAESettings.model_validate({"loss": {"kl_beta": beta}})
        yield from check_vae(settings, {"mse": 0.5, "psnr": psnr}, LatentFacts(images=9, channels=channels))
    yield from check_pattern(TrainVAESettings(), {PATTERN: 9.0, f"{PATTERN} +-": 0.1})
    for one in (channel(scaled_std=9.0), heavy(0.1)):
        yield from check_latents(LatentFacts(images=9, channels=[one]), regular=True)
    index = SimpleNamespace(vae_digest="a")
    yield from check_lineage(cast(Any, SimpleNamespace(vae_digest="b", index=index, own_latents=True, same_vae=False)))
    yield from check_labels(labelled(1.0))
    yield from check_baseline(TrainUNetSettings(), [MUSH | {"step": 50_000}], 1000, [])
    for noise in ({"schedule": "linear", "timesteps": 100}, {"schedule": "cosine", "timesteps": 5}):
        yield from check_schedule(TrainUNetSettings.model_validate({"target": {"objective": "eps"}, "noise": noise}))
    yield from check_ema(loop, curve((100, 1.0), (200, 0.6)))
    yield from check_overfitting(rising, 20)
    yield from check_overfitting([{"step": 20_000, "images_seen": 320_000, "loss": 0.1}], 20)
    measured = {"samples": 500, "training images": 500, "precision": 0.0}
    yield from check_quality(measured, loop)
    yield from check_samples(measured | {"share of samples nearer than 99% of those": 0.5}, [], 20)
    yield from check_samples({}, rising, 20)
    yield from check_samples({}, [{"step": 20_000, "images_seen": 320_000}], 20)


def test_all_advice_can_be_typed_as_it_is(run: Path, pictures: ImageSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --dry-run, which resolves and checks all settings; the estimate that follows is left out."""
    monkeypatch.setattr("lightdiff.extras.estimate.estimate", lambda built: None)
    found = list(every_finding(pictures))
    assert {finding.code for finding in found} == set(LISTED)
    for finding in found:
        for command in commands(complete_commands(finding.advice, run)):
            dry = [] if command[0] == "inspect" else ["--dry-run"]
            result = call(*command, *dry)
            no_label = finding.code == "no-labels" and "--label" in result.err  # this run has none to be told
            assert result.code == 0 or no_label, (finding.code, finding.advice, result.err)


def test_the_page_lists_every_finding() -> None:
    modules = (data, training, vae, latents, unet, samples)
    source = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in modules)
    assert re.findall(r'code="([a-z-]+)"', source) == LISTED


# --- a pattern of the decoder -----------------------------------------------------------------------------------------


def checkerboard(side: int, every: int, height: float) -> torch.Tensor:
    """+height and -height in turn along both axes, each for half of `every` pixels."""
    half = (torch.arange(side) % every < every // 2).double() * 2 - 1
    return height * half[:, None] * half


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_the_strength_of_a_pattern_is_its_root_mean_square(factor: int) -> None:
    """Also on uneven ground; one that repeats otherwise is none."""
    own, slope = checkerboard(32, factor, 1.5), torch.linspace(-9, 9, 32, dtype=torch.float64).expand(32, 32)
    assert grid_pattern(own.expand(3, -1, -1) + 7, factor) == pytest.approx(1.5)
    assert grid_pattern((own + slope + slope.T).expand(3, -1, -1), factor) == pytest.approx(1.5, rel=0.05)
    assert grid_pattern(torch.stack([own, own * 0, own * 0]), factor) == pytest.approx(1.5 / math.sqrt(3))
    assert grid_pattern(checkerboard(32, 32, 1.5).expand(3, -1, -1), factor) < 0.01


def test_borders_edges_and_noise_are_no_pattern() -> None:
    """Each with an error that is ten times as large as the limit, or more."""
    border, edge = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    border[:, 0] = border[:, -1] = border[:, :, 0] = border[:, :, -1] = 20
    edge[:, 10:] = 20
    noise = 10 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert max(grid_pattern(error, 4) for error in (border, edge, noise)) < MAX_PATTERN
    assert grid_pattern(noise[:, :8, :8], 4) == 0  # too small to tell


def test_an_uneven_transposed_convolution_leaves_a_pattern() -> None:
    """Its kernel of 3 covers a pixel once, twice or four times (Odena et al. 2016); resizing first covers all alike."""
    torch.manual_seed(0)
    z = torch.ones(1, 4, 12, 12) + 0.1 * torch.randn(1, 4, 12, 12)
    uneven = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1)
    even = nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(4, 3, 3, padding=1))
    levels = [grid_pattern(127.5 * network(z)[0].detach().double(), 2) for network in (uneven, even)]
    assert levels[0] > 10 * MAX_PATTERN
    assert levels[1] < MAX_PATTERN


def test_what_chance_alone_would_give() -> None:
    """Errors that are all noise: their mean's energy at the pattern's frequencies is what is said."""
    rng, power = torch.Generator().manual_seed(0), []
    for _ in range(200):
        pattern = GridPattern(16, 16)
        x_hat = 0.1 * torch.randn(5, 3, 16, 16, generator=rng)
        pattern.add(torch.zeros_like(x_hat), x_hat)
        spectrum = (torch.fft.fft2(pattern.sums[0] / 5) / 256).abs().square()[:, ::4, ::4].sum((1, 2))
        power.append(float((spectrum - (pattern.sums[0] / 5).mean((1, 2)).square()).mean()))
    found = pattern.measures(5, 4)
    expected = math.sqrt(sum(power) / len(power)) * math.sqrt(4 / 5)  # the spread about the mean of 5 is smaller
    assert found[f"{PATTERN} +-"] == pytest.approx(expected, rel=0.06)
    assert found[PATTERN] < found[f"{PATTERN} +-"]


def test_a_pattern_that_can_be_seen_is_a_finding() -> None:
    for level, chance, wanted in ((0.9, 0.1, []), (1.1, 0.3, ["decoder-pattern"]), (1.1, 0.4, []), ("1.1", 0.1, [])):
        found = list(check_pattern(TrainVAESettings(), {PATTERN: level, f"{PATTERN} +-": chance}))
        assert [finding.code for finding in found] == wanted
