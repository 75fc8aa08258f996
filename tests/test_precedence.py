"""Where a setting comes from: flags over file over saved run over preset over defaults; a dry run gives all back."""

import json

import pytest
from parsing import dry

from lightdiff.cli import COMMANDS
from lightdiff.data.index import read_index

ROUND_TRIPS = [
    ("train-vae", "--data", "faces", "--resolution", "32", "--preset", "base", "--epochs", "2.5", "--no-flip"),
    ("train-vae", "--model.attention", "on", "--model.encoder-channels", "8,16", "--lpips-weights", "vgg.pth"),
    ("train-vae", "--preset", "original", "--background", "#102030", "--data", "a", "--data", "b"),
    ("scale", "--only-mu", "--normalize", "global", "--latents", "elsewhere"),
    ("generate", *"--name face --sampler ddim --eta 0.5 --ema 0 --out new --num-images 3".split()),
    ("demo", "--count", "20", "--seed", "3", "--device", "cpu"),
]


@pytest.mark.parametrize("args", ROUND_TRIPS, ids=" ".join)
def test_a_dry_run_can_be_given_back_as_settings(cli, tmp_path, args):
    flags = (*args, "--run", tmp_path / "run")
    first = dry(cli, *flags)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(first))
    assert dry(cli, args[0], "--settings", file) == first
    assert COMMANDS[args[0]].model.model_validate(first).model_dump(mode="json") == first
    assert not (tmp_path / "run").exists()  # a dry run makes nothing


@pytest.mark.parametrize(
    "args",
    [
        ("train-vae", "--lr", "0.01"),
        ("encode", "--dtype", "float32", "--shard-size", "5"),
        ("train-unet", "--model.attend-levels", "none", "--timesteps", "100"),
        ("train-unet", "--epochs", "3"),
    ],
    ids=" ".join,
)
def test_so_can_that_of_a_run_that_was_started(cli, run, tmp_path, args):
    first = dry(cli, *args, "--run", run)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(first))
    assert dry(cli, args[0], "--settings", file) == first


@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_the_settings_kept_in_a_run_can_be_given_back(cli, run, stage):
    saved = json.loads((run / stage / "settings.json").read_text())
    back = dry(cli, f"train-{stage}", "--settings", run / stage / "settings.json", "--run", run)
    assert {name: back[name] for name in saved} == saved | {"run": str(run)}
    anew = {"job", "restart", "from_step"} | ({"allow_missing"} if stage == "vae" else set())
    assert back.keys() - saved.keys() == anew  # said at each start


def test_flags_over_file_over_saved_run_over_preset_over_defaults(cli, run, tmp_path):
    """Each layer is added on top of the one before, and only it says something new."""
    file = tmp_path / "mine.toml"
    file.write_text("[model]\nencoder_width = 24\n[loop]\nlr = 0.03\n")

    def said(*args):
        found = dry(cli, "train-vae", *args)
        return found["model"]["encoder_width"], found["loop"]["lr"], found["loop"]["batch_size"]

    nowhere = ("--run", tmp_path / "new")
    assert said(*nowhere) == (32, 2e-3, 16)
    assert said(*nowhere, "--preset", "tiny") == (16, 2e-3, 16)
    assert said(*nowhere, "--preset", "tiny", "--settings", file) == (24, 0.03, 16)
    assert said("--run", run) == said("--run", run, "--preset", "tiny") == (16, 2e-3, 6)
    assert said("--run", run, "--preset", "tiny", "--settings", file) == (24, 0.03, 6)
    assert said("--run", run, "--preset", "tiny", "--settings", file, "--lr", "0.5") == (24, 0.5, 6)
    assert said("--run", run, "--settings", file, "--model.encoder-width", 40, "--batch-size", 7) == (40, 0.03, 7)
    refused = cli("train-vae", "--run", run, "--preset", "base", "--dry-run")  # rather than silently the saved one
    assert (refused.code, refused.out) == (2, "")
    assert "--preset base: this run holds another architecture" in refused.err


def test_a_unets_settings_have_the_same_order(cli, run, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"run": str(run), "model": {"width": 64}, "noise": {"timesteps": 50}}))
    said = dry(cli, "train-unet", "--preset", "tiny", "--settings", file, "--timesteps", 60)
    assert (said["model"]["width"], said["model"]["time_dim"], said["noise"]["timesteps"]) == (64, 128, 60)
    assert said["loop"]["steps"] == 3
    assert dry(cli, "train-unet", "--run", run)["run"] == str(run)


def test_a_stage_has_defaults_of_its_own(cli, tmp_path, run):
    assert dry(cli, "train-vae", "--run", tmp_path / "new")["loop"]["steps"] == 20_000
    (run / "unet").rename(run / "unet-before")
    said = dry(cli, "train-unet", "--run", run, "--lr", "0.1")["loop"]
    assert (said["steps"], said["lr"], said["batch_size"]) == (50_000, 0.1, 32)


def test_restart_forgets_the_saved_run(cli, run):
    said = dry(cli, "train-vae", "--run", run, "--restart")
    assert (said["restart"], said["images"]["data"], said["model"]["encoder_width"]) == (True, [], 32)


def test_the_later_of_steps_and_epochs_wins(cli, tmp_path, run):
    file = tmp_path / "mine.toml"
    file.write_text("[loop]\nepochs = 2\n")
    nowhere = ("train-vae", "--run", tmp_path / "new")
    assert dry(cli, *nowhere, "--settings", file)["loop"]["epochs"] == 2
    assert dry(cli, *nowhere, "--settings", file, "--steps", 9)["loop"]["epochs"] == 0
    assert dry(cli, *nowhere, "--settings", file, "--steps", 9)["loop"]["steps"] == 9
    assert dry(cli, "train-vae", "--run", run, "--epochs", 4)["loop"]["epochs"] == 4


def test_another_objective_for_a_run_is_refused_as_such(cli, run):
    refused = (
        f"{run}/unet was started with --objective flow, not v: choose another --run, or leave that setting as it was"
    )
    assert cli("train-unet", "--run", run, "--objective", "v").err == f"error: {refused}"


def test_a_label_for_a_run_without_one_is_refused_in_words(cli, run):
    assert (
        f"error: {run}/unet was started without --label class:"
        in cli("train-unet", "--run", run, "--label", "class").err
    )


def test_encode_takes_the_images_from_the_vae(cli, run, faces):
    said = dry(cli, "encode", "--run", run)["images"]
    assert (said["data"], said["resolution"], said["val_share"]) == ([str(faces)], 16, 0.2)
    assert dry(cli, "encode", "--run", run, "--no-flip")["images"] == said | {"flip": False}


def test_train_unet_takes_shape_and_scale_from_the_latents(cli, run):
    said = dry(cli, "train-unet", "--run", run)["latent"]
    index = read_index(run / "latents")
    assert (said["channels"], said["height"], said["width"]) == index.shape == (4, 8, 8)
    assert said["shift"] == index.statistics.shift
    assert said["scale"] == index.statistics.scale
