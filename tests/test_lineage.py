"""Stages one after the other: what each leaves, what it knows of those before it, and latents or VAEs of other runs."""

import json
import shutil

import pytest
from conftest import UNET_FLAGS, call, succeed
from small_run import encode_all, train_first, train_second

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.index import read_index
from lightdiff.errors import UserError
from lightdiff.extras import demo
from lightdiff.extras.evidence import latents_behind
from lightdiff.extras.settings import DemoSettings
from lightdiff.pipeline import Pipeline, vae_behind
from lightdiff.run_folder import RunFolder
from lightdiff.settings import ScaleSettings, TrainUNetSettings
from lightdiff.stages import scale


def test_a_run_has_the_files_it_should(finished):
    for name in (
        "vae/checkpoints/last.safetensors",
        "vae/checkpoints/best.safetensors",
        "vae/checkpoints/step-00000002.safetensors",
        "vae/settings.json",
        "vae/metrics.jsonl",
        "vae/images/step-00000004.png",
        "latents/index.safetensors",
        "latents/shard-00002.safetensors",
        "latents/vae.safetensors",
        "unet/checkpoints/last.safetensors",
        "unet/checkpoints/best.safetensors",
        "unet/images/step-00000004.png",
    ):
        assert (finished / name).is_file(), name


def test_default_levels_follow_the_size(finished):
    assert read_index(finished / "latents").shape == (4, 8, 8)
    assert Checkpoint(finished / "unet/checkpoints/last.safetensors").metadata.settings["model"]["channels"] == [16, 16]


def test_later_stages_know_what_earlier_ones_saw(finished):
    unet = Checkpoint(finished / "unet/checkpoints/last.safetensors").metadata
    index = read_index(finished / "latents")
    assert unet.lineage == {"vae": index.vae_digest, "latents": index.digest}
    assert unet.settings["latent"]["scale"] == index.statistics.scale


def test_validation_losses_come_whole_and_by_band(finished):
    row = json.loads((finished / "unet/metrics.jsonl").read_text().splitlines()[-1])
    bands = [row[f"val_loss_band_{n}"] for n in (1, 2, 3, 4)]
    assert row["val_loss"] == pytest.approx(sum(bands) / 4)
    assert bands[0] > bands[3]  # noise in an almost clean latent is the hardest to see


@pytest.mark.slow
def test_the_demo_runs_all_stages_and_says_where_things_are(tmp_path, capsys):
    out = demo.run(DemoSettings(run=tmp_path / "demo", resolution=16, count=60, vae_steps=3, unet_steps=3))
    assert len(list(out.glob("000*.png"))) == 64
    said = capsys.readouterr().err
    assert "lightdiff train-unet --run runs/mine" in said
    assert str(out / "grid.png") in said


# --- of other runs ------------------------------------------------------------------------------------------------


def test_a_unet_of_other_latents_is_refused(copy, faces_32, tmp_path):
    train_first(tmp_path / "other", faces_32, random_crop=1.0)
    with pytest.raises(UserError, match=r"was trained on latents of VAE [0-9a-f]{8}, but .* holds [0-9a-f]{8}"):
        Pipeline.load(copy, vae=tmp_path / "other")
    encode_all(copy, vae=tmp_path / "other", restart=True)
    with pytest.raises(UserError, match="no scaling factor yet: run 'lightdiff scale'"):
        train_second(copy)
    scale.run(ScaleSettings(run=copy))
    with pytest.raises(UserError, match="choose another --run, or --restart"):
        train_second(copy)


def test_a_unet_finds_its_latents_and_their_vae_in_another_run(copy, run):
    """In its own run are latents of another VAE, and it is resumed, drawn with and looked at without naming any."""
    shutil.rmtree(run / "unet")
    succeed("train-unet", "--run", run, "--latents", copy, *UNET_FLAGS)
    unet = Checkpoint(RunFolder(run).unet.last, "unet")
    assert latents_behind(unet, RunFolder(run)) == copy / "latents"
    assert vae_behind(unet, None, RunFolder(run)) == copy / "latents" / "vae.safetensors"
    succeed("train-unet", "--run", run, *UNET_FLAGS, "--steps", 5)
    succeed("generate", "--run", run, "--num-images", 1, "--num-steps", 1, "--device", "cpu")
    shutil.rmtree(copy)
    assert latents_behind(unet, RunFolder(run)) == run / "latents"  # there are no others any more
    assert call("generate", "--run", run, "--num-images", 1).code == 2


def test_a_saved_settings_file_of_other_latents_may_be_taken_up(copy, tmp_path):
    """In a run of the U-Net alone, which is drawn with without naming the latents or their VAE."""
    succeed("scale", "--run", copy, "--scaling-factor", 3)
    saved = copy / "unet" / "settings.json"
    succeed("train-unet", "--run", tmp_path / "new", "--latents", copy, "--settings", saved, "--steps", 1)
    settings = Checkpoint(RunFolder(tmp_path / "new").unet.last, "unet").settings(TrainUNetSettings)
    assert settings.latent.scale == (3.0,)
    few = ("--num-images", 1, "--num-steps", 1, "--device", "cpu", "--out", tmp_path / "out")
    succeed("generate", "--run", tmp_path / "new", *few)
    assert (tmp_path / "out/00000.png").is_file()
