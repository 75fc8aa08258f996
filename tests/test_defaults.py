"""Defaults that follow resolution, data and machine, against the rules that they are said to follow."""

import json
from pathlib import Path

import pytest
from conftest import UNET_FLAGS, VAE_FLAGS, call, succeed

from lightdiff import defaults
from lightdiff.checkpoint import Checkpoint
from lightdiff.extras.toy_faces import draw_dataset
from lightdiff.options import build, preset_layer
from lightdiff.run_folder import RunFolder
from lightdiff.settings import EncodeSettings, ImageSettings, LoopSettings, TrainUNetSettings, TrainVAESettings


def train_vae(resolution: int, preset: str = "small") -> TrainVAESettings:
    """The settings of train-vae with nothing but a preset and a resolution."""
    layers = [preset_layer("vae", preset, resolution), {"images": {"resolution": resolution}}]
    settings: TrainVAESettings = build(TrainVAESettings, layers)
    below = defaults.following(settings)
    return build(TrainVAESettings, [below, *layers])  # type: ignore[no-any-return]


@pytest.mark.parametrize("preset", ["tiny", "small", "base-s", "base", "base-l"])
@pytest.mark.parametrize("resolution", [16, 64, 128, 256, 512])
def test_the_pull_of_kl_on_a_latents_number_does_not_grow_with_compression(preset: str, resolution: int) -> None:
    """Weight times numbers of an image over numbers of its latent: 12 x 3e-3, as measured at 64 px."""
    settings = train_vae(resolution, preset)
    model = settings.model.resolved(resolution)
    latent = model.latent_channels * (resolution // model.factor) ** 2
    assert settings.loss.kl_beta * 3 * resolution**2 / latent == pytest.approx(12 * 3e-3, rel=1e-12)


def test_at_64_px_the_small_preset_is_what_the_recipe_measured() -> None:
    settings = train_vae(64)
    assert (settings.loss.kl_beta, settings.loop.lr, settings.loop.batch_size) == (3e-3, 2e-3, 16)
    assert settings.model.resolved(64) == TrainVAESettings().model.resolved(64)
    unet = build(TrainUNetSettings, [preset_layer("unet", "small")])
    assert defaults.following(unet)["loop"]["lr"] == 2e-3 == unet.loop.lr
    resolved = unet.model.resolved(16)
    assert (resolved.channels, resolved.attend_levels) == ((64, 64, 128), (1,))


@pytest.mark.parametrize(("width", "lr"), [(32, 2e-3), (64, 2e-3), (128, 1e-3), (256, 5e-4)])
def test_the_learning_rate_falls_with_the_width(width: int, lr: float) -> None:
    unet = build(TrainUNetSettings, [{"model": {"width": width}}])
    assert defaults.following(unet)["loop"]["lr"] == pytest.approx(lr)
    vae = build(TrainVAESettings, [{"model": {"encoder_width": 16, "decoder_width": width // 2}}])
    assert defaults.following(vae)["loop"]["lr"] == pytest.approx(lr)


@pytest.mark.parametrize("architecture", ["kl", "original"])
def test_a_vae_that_was_imported_is_trained_on_at_its_authors_learning_rate(architecture: str) -> None:
    vae = build(TrainVAESettings, [{"model": {"architecture": architecture}}])  # what --init-from alone says
    assert defaults.following(vae)["loop"]["lr"] == 1e-4


def test_kl_f8_trains_the_u_net_of_base_for_as_long() -> None:
    base, other = (build(TrainUNetSettings, [preset_layer("unet", name, 256)]) for name in ("base", "kl-f8"))
    assert other == base


@pytest.mark.parametrize(("side", "sides"), [(8, (8,)), (16, (8,)), (32, (16, 8)), (64, (16,)), (128, ())])
def test_attention_is_at_4_to_8_pixels_and_at_16_below_finer_levels(side: int, sides: tuple[int, ...]) -> None:
    model = TrainUNetSettings().model.resolved(side)
    assert tuple(side // 2**level for level in model.attend_levels) == sides  # type: ignore[union-attr]


@pytest.mark.parametrize("side", [64, 128, 256, 512])
def test_encode_takes_as_many_pixels_at_a_time(side: int) -> None:
    settings = EncodeSettings(images=ImageSettings(resolution=side)).resolved()
    assert settings.batch_size == min(64, 64 * 128**2 // side**2)
    assert EncodeSettings(batch_size=7, images=ImageSettings(resolution=side)).resolved().batch_size == 7


@pytest.mark.parametrize(("images", "steps"), [(1, 9), (190, 1781), (100_000, 50_000)])
def test_steps_are_limited_by_passes_over_the_images(images: int, steps: int) -> None:
    loop = LoopSettings(steps=50_000, batch_size=32, max_passes=300)
    assert loop.total_steps(images) == steps
    assert LoopSettings(steps=50_000, batch_size=32).total_steps(images) == 50_000
    assert defaults.with_intervals(loop, steps, {}).total_steps(10**9) == steps  # decided once


def test_intervals_fit_the_steps_unless_set_or_begun_with() -> None:
    short, long = (defaults.with_intervals(LoopSettings(), total, {}) for total in (400, 50_000))
    assert (short.warmup_steps, short.val_every, short.save_every) == (40, 40, 40)
    assert (long.warmup_steps, long.val_every, long.save_every) == (100, 1000, 1000)
    begun = {"loop.val_every": 7, "loop.warmup_steps": 0}
    chosen = defaults.with_intervals(LoopSettings(save_every=3), 400, begun)
    assert (chosen.warmup_steps, chosen.val_every, chosen.save_every) == (0, 7, 3)


def test_few_images_end_after_300_passes_and_the_u_net_takes_over_the_preset(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "faces", 12, 0, 16)
    run = tmp_path / "run"
    short = [flag for flag in VAE_FLAGS if flag not in "--steps 3 --val-every --save-every 2 --kl-beta 0.003".split()]
    first = call("train-vae", "--run", run, "--data", tmp_path / "faces", *short, "--epochs", 1)
    assert first.code == 0, first.stderr
    assert "preset tiny, KL weight 0.012, lr 0.002, warm-up of 1 steps" in first.err
    assert "training images are few, and samples may be copies of them" in first.err
    succeed("encode", "--run", run, "--workers", 0, "--device", "cpu")
    succeed("scale", "--run", run)
    said = json.loads(succeed("train-unet", "--run", run, "--dry-run", "--device", "cpu").stdout)
    assert (said["preset"], said["model"]["width"], said["loop"]["max_passes"]) == ("tiny", 32, 300)
    long = json.loads(succeed("train-unet", "--run", run, "--dry-run", "--device", "cpu", "--steps", 7).stdout)
    assert (long["loop"]["steps"], long["loop"]["max_passes"]) == (7, 0)
    succeed("train-unet", "--run", run, *UNET_FLAGS)
    assert Checkpoint(RunFolder(run).unet.last).metadata.settings["preset"] == "tiny"
    assert json.loads(succeed("train-unet", "--run", run, "--dry-run", "--device", "cpu").stdout)["preset"] == "tiny"


def test_without_a_preset_a_cpu_takes_the_small_one_and_a_gpu_base(tmp_path: Path) -> None:
    assert [defaults.preset_for(device) for device in ("cpu", "mps", "cuda")] == ["small", "small", "base"]
    flags = ["train-vae", "--run", tmp_path, "--resolution", 256, "--lpips-gamma", 0, "--dry-run"]
    for asked, name in (("cpu", "small"), ("cuda", "base")):  # a dry run for a GPU needs none
        said = json.loads(succeed(*flags, "--device", asked).stdout)
        assert (said["preset"], said["loss"]["kl_beta"]) == (name, 7.5e-4)
