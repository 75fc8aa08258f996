"""Latents that may be shrunk and turned like images, and a decoder trained alone."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import UNET_FLAGS, VAE_FLAGS, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import normal

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.table import ImageList, ImageTable
from lightdiff.losses import VAELoss
from lightdiff.models.vae import VAE, LatentTransform
from lightdiff.options import build
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.stage import Stage
from lightdiff.settings import TrainVAESettings, VAELossSettings, VAESettings
from lightdiff.stages.train_vae import VAETask, sample_transform

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True, database=None)
changes = st.builds(LatentTransform, st.integers(1, 4), st.integers(0, 3))


@PROPERTY
@given(changes)
def test_four_turns_and_a_whole_side_change_nothing(change):
    x = normal(2, 3, 8, 8)
    assert torch.equal(LatentTransform(4, 0)(x), x)
    turned = x
    for _ in range(4):
        turned = LatentTransform(4, change.turns)(turned)
    assert torch.equal(turned, x)
    assert change(x).shape == (2, 3, 2 * change.quarters, 2 * change.quarters)


@PROPERTY
@given(changes)
def test_a_change_of_images_is_that_of_latents_where_the_decoder_only_enlarges(change):
    # A decoder that repeats each number 4 x 4 times commutes with turning, and with shrinking to a half or a quarter
    # where averages of constant blocks are taken; here the images are constant, as any shrinking keeps.
    z = normal(2, 4, 1, 1).expand(2, 4, 8, 8)
    enlarged = torch.nn.functional.interpolate(z, scale_factor=4.0)
    torch.testing.assert_close(torch.nn.functional.interpolate(change(z), scale_factor=4.0), change(enlarged))
    z = normal(2, 4, 8, 8)
    turn = LatentTransform(4, change.turns)
    torch.testing.assert_close(
        torch.nn.functional.interpolate(turn(z), scale_factor=4.0),
        turn(torch.nn.functional.interpolate(z, scale_factor=4.0)),
    )


@pytest.mark.parametrize("resolution", [40, 56, 64, 72, 120])
def test_decoded_latents_and_images_are_changed_to_the_same_size(resolution):
    latent = normal(1, 4, resolution // 4, resolution // 4)
    for change in (LatentTransform(quarters, turns) for quarters in (1, 2, 3, 4) for turns in (0, 1)):
        small, image = change(latent), change(normal(1, 3, resolution, resolution), 4)
        assert image.shape[2:] == tuple(4 * side for side in small.shape[2:])


def test_images_of_a_size_that_is_not_divided_by_16_are_trained_on(faces, tmp_path):
    flags = [*VAE_FLAGS, "--resolution", 20, "--equivariance", 1, "--steps", 6]
    succeed("train-vae", "--run", tmp_path, "--data", faces, *flags)


def test_changes_come_as_often_as_asked_for_and_each_alike():
    rng = random.Random(0)
    assert {sample_transform(rng, 0.0) for _ in range(100)} == {LatentTransform(4, 0)}
    seen = [sample_transform(rng, 1.0) for _ in range(3000)]
    assert {(c.quarters, c.turns) for c in seen} == {(q, t) for q in (1, 2, 3, 4) for t in range(4)} - {(4, 0)}
    some = [sample_transform(rng, 0.3) for _ in range(3000)]
    assert sum(c != (4, 0) for c in some) / 3000 == pytest.approx(0.3, abs=0.04)


def test_the_loss_of_a_changed_step_is_that_of_changed_images():
    model = VAE(VAESettings(encoder_width=8, decoder_width=8).resolved(32)).double().requires_grad_(False)
    x, noise, change = normal(2, 3, 32, 32), normal(2, 4, 8, 8), LatentTransform(2, 1)
    x_hat, posterior = model(x, noise, change)
    z = torch.rot90(
        torch.nn.functional.interpolate(posterior.sample(noise), (4, 4), mode="bilinear", antialias=True), 1, (2, 3)
    )
    torch.testing.assert_close(x_hat, model.decoder(z))
    loss = VAELoss(VAELossSettings(lpips_gamma=0))(change(x), x_hat, posterior)
    assert float(loss["mse"]) == pytest.approx(float((change(x) - model.decoder(z)).square().mean()))


@pytest.mark.parametrize(
    "change", [LatentTransform(4, 0), LatentTransform(4, 3), LatentTransform(2, 0), LatentTransform(3, 2)]
)
def test_a_training_step_decodes_changed_latents_to_images_changed_alike(change, tmp_path):
    layer = {
        "images": {"resolution": 32},
        "loss": {"lpips_gamma": 0, "kl_beta": 0.1, "equivariance": 1.0},
        "model": {"encoder_width": 8, "decoder_width": 8},
    }
    settings = build(TrainVAESettings, [layer]).resolved()
    task = VAETask(Stage("vae", settings, torch.device("cpu"), Processes(), tmp_path), ImageList(ImageTable.of([])))
    x, noise = normal(2, 3, 32, 32).float().tanh(), normal(2, 4, 8, 8, seed=1).float()
    part = {"x": x, "noise": noise, "change": torch.tensor([change]).expand(2, -1)}
    found = task.loss(task.model, part)
    posterior = task.model.encoder(x)
    error = change(x) - task.model.decoder(change(posterior.sample(noise)))
    assert error.shape[2] == 8 * change.quarters
    torch.testing.assert_close(found["mse"], error.square().mean())
    torch.testing.assert_close(found["loss"], found["mse"] + 0.1 * found["kl"])


def test_micro_batches_of_changed_steps_equal_one_batch(faces, tmp_path):
    found = []
    for micro in (0, 2):
        run = tmp_path / f"{micro}"
        flags = [*VAE_FLAGS, "--equivariance", 1, "--steps", 2, "--micro-batch", micro]
        succeed("train-vae", "--run", run, "--data", faces, *flags)
        found.append(Checkpoint(run / "vae/checkpoints/last.safetensors").tensors("model."))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=2e-5, msg=name)  # AdamW, float32


# --- the decoder alone --------------------------------------------------------------------------------------------


def test_a_frozen_encoder_stays_and_latents_and_unets_stay_valid(trained, faces, tmp_path):
    run = tmp_path / "finer"
    source = trained / "vae/checkpoints/best.safetensors"
    flags = ["--data", faces, *VAE_FLAGS, "--lr", "1e-2", "--init-from", source, "--freeze-encoder"]
    succeed("train-vae", "--run", run, *flags)
    succeed("train-vae", "--run", run, *flags, "--steps", 5)  # goes on
    before, after = Checkpoint(source), Checkpoint(run / "vae/checkpoints/last.safetensors")
    for prefix in ("model.", "ema."):
        old, new = before.tensors(before.weights_prefix()), after.tensors(prefix)
        assert all(torch.equal(old[name], new[name]) for name in old if name.startswith("encoder."))
        assert any(not torch.equal(old[name], new[name]) for name in old if name.startswith("decoder."))
    assert after.metadata.step == 5
    finer = run / "vae/checkpoints/best.safetensors"
    drawn = ["--num-images", 1, "--num-steps", 2, "--device", "cpu"]
    succeed("generate", "--run", trained, *drawn, "--vae", finer, "--out", tmp_path / "out")
    copy = Path(shutil.copytree(trained, tmp_path / "run"))
    assert "already" in succeed("encode", "--run", copy, "--vae", finer, "--workers", 0, "--device", "cpu").err
    succeed("train-unet", "--run", copy, *UNET_FLAGS, "--steps", 4)


def test_a_frozen_encoder_of_random_weights_is_refused(faces, tmp_path, cli):
    result = cli("train-vae", "--run", tmp_path / "run", "--data", faces, *VAE_FLAGS, "--freeze-encoder")
    assert (result.code, "--freeze-encoder needs the VAE that it belongs to" in result.err) == (2, True)
