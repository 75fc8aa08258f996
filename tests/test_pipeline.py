"""All five stages, by their functions and by the library, on small drawn faces."""

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import UNET_FLAGS, VAE_FLAGS, call, succeed
from oracles import GaussianData
from PIL import Image

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.images import frame, load_image, to_float
from lightdiff.data.index import read_index, shard_path
from lightdiff.data.latents import LatentSet, Scaling, latents_settings
from lightdiff.data.order import item_noise
from lightdiff.diffusion.samplers import SAMPLERS
from lightdiff.diffusion.schedules import CLEAN, Level, Schedule
from lightdiff.errors import LightdiffError, RunError, Stopped, UserError
from lightdiff.extras import demo
from lightdiff.extras.compile import PassTime, pick_compile
from lightdiff.extras.evidence import latents_behind
from lightdiff.extras.settings import DemoSettings
from lightdiff.extras.toy_faces import draw_dataset
from lightdiff.options import build
from lightdiff.pipeline import Pipeline, guidance_for, vae_behind
from lightdiff.run_folder import RunFolder
from lightdiff.settings import (
    EncodeSettings,
    GenerateSettings,
    JobSettings,
    LatentsSettings,
    SamplingSettings,
    ScaleSettings,
    TrainUNetSettings,
    TrainVAESettings,
)
from lightdiff.stages import encode, generate, scale, train_unet, train_vae

LOOP = {"steps": 4, "batch_size": 8, "workers": 0, "val_every": 2, "save_every": 2, "warmup_steps": 0}


def train_first(run: Path, faces: Path, resolution: int = 32, **images):
    layer = {
        "run": run,
        "images": {"data": [faces], "resolution": resolution, "val_share": 0.2, **images},
        "loss": {"lpips_gamma": 0},
        "loop": {**LOOP, "precision": "fp32"},
        "model": {"encoder_width": 8, "decoder_width": 8},
    }
    return train_vae.run(build(TrainVAESettings, [layer]))


def encode_all(run: Path, vae: Path | None = None, **more):
    layers = [
        encode.inherited(run, vae),
        {"run": run, "vae": vae, "compute": {"workers": 0, "precision": "fp32"}, **more},
    ]
    return encode.run(build(EncodeSettings, layers))


def train_second(run: Path, **more):
    own = {"run": run, "loop": {**LOOP, "lr": 1e-2}, "model": {"width": 16, "blocks": 1, "time_dim": 16}, **more}
    return train_unet.run(build(TrainUNetSettings, [train_unet.inherited(run, None), own]))


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    draw_dataset(folder, 40, 0, 32)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, faces):
    """A run through the first four stages."""
    run = tmp_path_factory.mktemp("run")
    train_first(run, faces)
    encode_all(run, shard_size=16, dtype="float32")
    scale.run(ScaleSettings(run=run, only_mu=False))  # after four steps, mu varies far less than sigma
    train_second(run)
    return run


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def pixels(path: Path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


# --- files and shapes -----------------------------------------------------------------------------------------------


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


# --- encode ---------------------------------------------------------------------------------------------------------


def test_latents_are_what_the_encoder_says_of_each_image_and_its_mirror_image(finished, faces):
    model = Pipeline.load(finished)
    latents = LatentSet(finished / "latents")
    for position in (0, 17, 39):
        x = to_float(frame(load_image(faces / latents.index.name(position)), 32))[None]
        for mirror, image in ((0, x), (1, x.flip(-1))):
            mu, logvar = latents.gather([position], torch.tensor([mirror]))
            posterior = model.vae.encoder(image)
            torch.testing.assert_close(mu, posterior.mu, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(logvar, posterior.logvar, atol=1e-4, rtol=1e-4)


def test_an_interrupted_encoding_goes_on_and_gives_the_same(copy):
    shards = [shard_path(copy / "latents", n) for n in range(3)]
    before = [shard.read_bytes() for shard in shards]
    index = read_index(copy / "latents")
    index.digest = ""
    index.write(copy / "latents/index.safetensors")
    shards[1].unlink()
    damaged = bytearray(before[2])
    damaged[-5] ^= 4
    shards[2].write_bytes(damaged)
    encode_all(copy, shard_size=16, dtype="float32")
    assert [shard.read_bytes() for shard in shards] == before
    assert read_index(copy / "latents").complete


def test_automatic_precision_stays_what_it_was_begun_in(copy, tmp_path, monkeypatch):
    def faster_by_now(name, _):
        return "bf16" if name == "auto" else name

    index = read_index(copy / "latents")
    index.digest = ""
    index.write(copy / "latents/index.safetensors")
    monkeypatch.setattr("lightdiff.runtime.stage.pick_precision", faster_by_now)
    encode_all(copy, shard_size=16, dtype="float32", compute={"workers": 0})
    assert read_index(copy / "latents").precision == "fp32"
    draw(copy, tmp_path / "out")
    (tmp_path / "out/00004.png").unlink()
    draw(copy, tmp_path / "out", compute={})
    draw(copy, tmp_path / "new", compute={})
    kept = [
        json.loads((tmp_path / name / "settings.json").read_text())["compute"]["precision"] for name in ("out", "new")
    ]
    assert kept == ["fp32", "bf16"]


def test_restart_replaces_latents_whose_index_is_damaged(copy):
    path = copy / "latents/index.safetensors"
    path.write_bytes(path.read_bytes().replace(b'precision\\": \\"fp32', b'precision\\": \\"bf16'))
    with pytest.raises(RunError, match="encode --restart"):
        encode_all(copy, compute={"workers": 0})
    encode_all(copy, restart=True, compute={"workers": 0})
    assert read_index(copy / "latents").complete


def test_latents_of_other_settings_are_refused_and_restart_keeps_them_aside(copy):
    with pytest.raises(UserError, match=r"latents was started with --dtype float32, not float16.*encode --restart"):
        encode_all(copy, shard_size=16)
    with pytest.raises(UserError, match="started with --flip True, not False"):
        encode_all(copy, shard_size=16, dtype="float32", images={"flip": False})
    encode_all(copy, restart=True, images={"flip": False})
    assert (copy / "latents.old-1/index.safetensors").is_file()
    assert LatentSet(copy / "latents").gather([0])[0].shape == (1, 4, 8, 8)
    assert not read_index(copy / "latents").mirrored


def test_unreadable_images_are_named_and_left_out(tmp_path, faces):
    folder = Path(shutil.copytree(faces, tmp_path / "faces"))
    broken = next(folder.rglob("*.png"))
    train_first(tmp_path / "run", folder, max_bad=0.1)
    broken.write_bytes(b"no image")
    encode_all(tmp_path / "run", images={"max_bad": 0.1})
    latents = LatentSet(tmp_path / "run/latents")
    assert len(latents.train) + len(latents.val) == 39
    assert broken.name in (tmp_path / "run/latents/bad-files.txt").read_text()
    scale.run(ScaleSettings(run=tmp_path / "run"))
    train_second(tmp_path / "run")
    with pytest.raises(RunError, match="--max-bad"):
        encode_all(tmp_path / "run", restart=True, images={"max_bad": 0.0})


def test_unfinished_latents_are_not_used(copy):
    index = read_index(copy / "latents")
    index.digest = ""
    index.write(copy / "latents/index.safetensors")
    for use in (lambda: LatentSet(copy / "latents"), lambda: scale.run(ScaleSettings(run=copy))):
        with pytest.raises(UserError, match="encoding has not finished: run 'lightdiff encode' again"):
            use()


def test_exchanged_shards_are_noticed(copy):
    shutil.copy(shard_path(copy / "latents", 0), shard_path(copy / "latents", 1))
    with pytest.raises(UserError, match="is not the shard of this index"):
        LatentSet(copy / "latents")


def test_latents_on_a_device_are_the_same(finished):
    positions, mirror = [3, 30, 17], torch.tensor([0, 1, 1])
    mapped = LatentSet(finished / "latents").gather(positions, mirror)
    resident = LatentSet(finished / "latents").to(torch.device("cpu")).gather(positions, mirror)
    for a, b in zip(mapped, resident, strict=True):
        assert torch.equal(a, b)


# --- scale ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("only_mu", [True, False])
def test_statistics_equal_those_of_all_latents_at_once(copy, only_mu):
    scale.run(ScaleSettings(run=copy, only_mu=only_mu))
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
    scale.run(ScaleSettings(run=copy, normalize="global"))
    found = read_index(copy / "latents").statistics
    assert found.shift == [0.0]
    assert found.scale == [pytest.approx(1 / found.std)]
    scale.run(ScaleSettings(run=copy, scaling_factor=0.9498))
    found = read_index(copy / "latents").statistics
    assert (found.shift, found.scale) == ([0.0], [0.9498])


def test_a_channel_that_carries_nothing_is_warned_of(finished):
    statistics = read_index(finished / "latents").statistics
    dead = statistics.model_copy(
        update={"only_mu": False, "channel_std": [1.0, 1, 1, 1], "channel_sigma": [0.1, 1.0, 0.1, 0.1]}
    )
    assert [w.split(":")[0] for w in scale.channel_warnings(dead)] == [
        "channel 1 carries no information (std of mu far below sigma)"
    ]


# --- train-unet -----------------------------------------------------------------------------------------------------


def test_a_unet_of_other_latents_is_refused(copy, faces, tmp_path):
    train_first(tmp_path / "other", faces, random_crop=1.0)
    with pytest.raises(UserError, match=r"was trained on latents of VAE [0-9a-f]{8}, but .* holds [0-9a-f]{8}"):
        Pipeline.load(copy, vae=tmp_path / "other")
    encode_all(copy, vae=tmp_path / "other", restart=True)
    with pytest.raises(UserError, match="no scaling factor yet: run 'lightdiff scale'"):
        train_second(copy)
    scale.run(ScaleSettings(run=copy))
    with pytest.raises(UserError, match="choose another --run, or --restart"):
        train_second(copy)


# --- generate -------------------------------------------------------------------------------------------------------


def draw(run: Path, out: Path, **more):
    sampling = {"num_steps": 4, **{name: more.pop(name) for name in SamplingSettings.model_fields if name in more}}
    settings = {"run": run, "out": out, "num_images": 5, "sampling": sampling, "compute": {"precision": "fp32"}, **more}
    return generate.run(build(GenerateSettings, [settings]))


def test_a_unet_finds_its_latents_and_their_vae_in_another_run(copy, faces, tmp_path):
    """In its own run are latents of another VAE, and it is resumed, drawn with and looked at without naming any."""
    mixed = tmp_path / "mixed"
    succeed("train-vae", "--run", mixed, "--data", faces, *VAE_FLAGS, "--seed", 9)
    succeed("encode", "--run", mixed, "--workers", 0, "--device", "cpu")
    succeed("scale", "--run", mixed)
    succeed("train-unet", "--run", mixed, "--latents", copy, *UNET_FLAGS)
    unet = Checkpoint(RunFolder(mixed).unet.last, "unet")
    assert latents_behind(unet, RunFolder(mixed)) == copy / "latents"
    assert vae_behind(unet, None, RunFolder(mixed)) == copy / "latents" / "vae.safetensors"
    succeed("train-unet", "--run", mixed, *UNET_FLAGS, "--steps", 5)
    succeed("generate", "--run", mixed, "--num-images", 1, "--num-steps", 1, "--device", "cpu")
    shutil.rmtree(copy)
    assert latents_behind(unet, RunFolder(mixed)) == mixed / "latents"  # there are no others any more
    assert call("generate", "--run", mixed, "--num-images", 1).code == 2


def test_a_saved_settings_file_of_other_latents_may_be_taken_up(copy, tmp_path):
    succeed("scale", "--run", copy, "--scaling-factor", 3)
    saved = copy / "unet" / "settings.json"
    succeed("train-unet", "--run", tmp_path / "new", "--latents", copy, "--settings", saved, "--steps", 1)
    settings = Checkpoint(RunFolder(tmp_path / "new").unet.last, "unet").settings(TrainUNetSettings)
    assert settings.latent.scale == (3.0,)


def test_pictures_do_not_depend_on_the_batch(finished, tmp_path):
    draw(finished, tmp_path / "a", batch_size=5)
    draw(finished, tmp_path / "b", batch_size=2, num_images=3)
    for name in ("00000.png", "00001.png", "00002.png"):
        assert np.abs(pixels(tmp_path / "a" / name) - pixels(tmp_path / "b" / name)).max() <= 1
    assert not np.array_equal(pixels(tmp_path / "a/00000.png"), pixels(tmp_path / "a/00001.png"))
    assert (tmp_path / "a/grid.png").is_file()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"ema": 0.0},
        {"sampler": "ddim"},
        {"sampler": "ddpm"},
        {"clamp": 0.1},
        {"num_steps": 3},
        {"sampler": "euler", "spacing": "quadratic"},
        {"sampler": "heun"},
        {"min_alpha_bar": 0.1},
    ],
)
def test_every_setting_of_the_sampler_does_something(finished, tmp_path, change):
    draw(finished, tmp_path / "a")
    draw(finished, tmp_path / "b", **change)
    assert not np.array_equal(pixels(tmp_path / "a/00000.png"), pixels(tmp_path / "b/00000.png"))


def test_eta_does_something(finished, tmp_path):
    for eta in (0.0, 0.5):
        draw(finished, tmp_path / str(eta), sampler="ddim", eta=eta)
    assert not np.array_equal(pixels(tmp_path / "0.0/00000.png"), pixels(tmp_path / "0.5/00000.png"))


def test_the_library_draws_as_the_command_does_unless_told_otherwise(finished):
    model = Pipeline.load(finished)
    assert torch.equal(model.sample(1), model.sample(1, sampling=GenerateSettings().sampling))


def test_guidance_that_would_do_nothing_is_refused_in_the_library_too(finished):
    model = Pipeline.load(finished)
    with pytest.raises(UserError, match="--guidance needs a --class to guide to; this U-Net was trained without"):
        model.sample(1, sampling=SamplingSettings(guidance=2.0))
    with pytest.raises(UserError, match="--class: this U-Net knows no red; it was trained without --label"):
        model.sample(1, sampling=SamplingSettings(guidance=2.0, class_=("red",)))


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_step_file_guides_with_every_sampler(finished, sampler):
    weak = Path("step-2")
    plain, model = Pipeline.load(finished), Pipeline.load(finished, guide_with=weak)
    assert model.digests["guide"] == Checkpoint(RunFolder(finished).unet.step(2)).metadata.digest
    one, two = (SamplingSettings(sampler=sampler, num_steps=3, guidance=w) for w in (1.0, 2.0))
    assert torch.equal(model.sample(2, 0, one), plain.sample(2, 0, one))
    assert not torch.equal(model.sample(2, 0, two), plain.sample(2, 0, one))


def test_what_guides_is_told_by_images_and_settings(finished, tmp_path):
    draw(finished, tmp_path / "a", guide_with=Path("step-2"), guidance=2.0, guidance_interval=(0.1, 0.9))
    draw(finished, tmp_path / "b", guide_with=RunFolder(finished).unet.step(2), guidance=2.0)
    about = json.loads((tmp_path / "a/settings.json").read_text())
    digest = Checkpoint(RunFolder(finished).unet.step(2)).metadata.digest
    assert (about["guide"], about["settings"]["sampling"]["guidance"]) == (digest, 2.0)
    assert "guide_with" not in about["settings"]
    with Image.open(tmp_path / "a/00000.png") as image:
        assert image.text["guide"] == digest
    assert not np.array_equal(pixels(tmp_path / "a/00000.png"), pixels(tmp_path / "b/00000.png"))
    with pytest.raises(UserError, match="choose another --out"):
        draw(finished, tmp_path / "a", guide_with=Path("step-4"), guidance=2.0, guidance_interval=(0.1, 0.9))


def test_guides_that_make_no_sense_are_refused(finished, copy, tmp_path):
    with pytest.raises(UserError, match=r"--guide-with does nothing at --guidance 1: try 1\.5 or 2"):
        draw(finished, tmp_path / "out", guide_with=Path("step-2"))
    with pytest.raises(UserError, match=r"--guide-with step-3: .* has no such step file; there are: step-2, step-4"):
        draw(finished, tmp_path / "out", guide_with=Path("step-3"), guidance=2.0)
    with pytest.raises(UserError, match="--guide-with: nowhere does not exist"):
        draw(finished, tmp_path / "out", guide_with=Path("nowhere"), guidance=2.0)
    shutil.rmtree(copy / "unet")
    train_second(copy, target={"objective": "v"}, noise={"schedule": "cosine"})
    (copy / "unet").rename(tmp_path / "v")
    scale.run(ScaleSettings(run=copy, scaling_factor=3))
    train_second(copy)
    for guide, how in (
        (tmp_path / "v", "with --objective v than"),
        (copy, "on latents with another shift or scale than"),
    ):
        with pytest.raises(UserError, match=f"--guide-with: .* was trained {how} .*: guidance needs two of a kind"):
            draw(finished, tmp_path / "out", guide_with=guide, guidance=2.0)
    assert not (tmp_path / "out").exists()


def test_noise_of_each_step_does_not_depend_on_the_batch(finished, tmp_path):
    draw(finished, tmp_path / "a", sampler="ddim", eta=1.0)
    draw(finished, tmp_path / "b", sampler="ddim", eta=1.0, batch_size=1, num_images=2)
    assert np.abs(pixels(tmp_path / "a/00001.png") - pixels(tmp_path / "b/00001.png")).max() <= 1


def test_a_picture_tells_how_it_was_made_and_no_path(finished, tmp_path):
    draw(finished, tmp_path / "out", seed=3, name="face")
    with Image.open(tmp_path / "out/face-00002.png") as image:
        image.load()
    assert image.size == (32, 32)
    assert (image.text["seed"], image.text["index"]) == ("3", "2")
    assert json.loads(image.text["settings"])["sampling"]["num_steps"] == 4
    assert image.text["unet"] == Checkpoint(finished / "unet/checkpoints/last.safetensors").metadata.digest
    assert str(tmp_path) not in str(image.text)
    assert str(finished) not in str(image.text)
    assert (tmp_path / "out/face-grid.png").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, on the way to a compiled network
def test_a_compiled_network_draws_the_same_pictures(finished, tmp_path, monkeypatch):
    if pick_compile("on", torch.device("cpu"), 1, lambda: PassTime(1, 1.0, 0.0)) == "off":
        pytest.skip("there is no C++ compiler")
    from torch._inductor import config

    monkeypatch.setattr(config, "freezing", config.freezing)  # put back afterwards
    for compiling in ("off", "on"):
        draw(finished, tmp_path / compiling, batch_size=3, compute={"precision": "fp32", "compile": compiling})
        assert json.loads((tmp_path / compiling / "settings.json").read_text())["compute"]["compile"] == compiling
    for i in range(5):  # the second batch, of two, was filled up to three
        off, on = (pixels(tmp_path / name / f"{i:05d}.png") for name in ("off", "on"))
        assert abs(off - on).max() <= 1
    (tmp_path / "on/00001.png").unlink()
    draw(finished, tmp_path / "on", batch_size=3, compute={"precision": "fp32"})  # auto: as it was started
    assert (tmp_path / "on/00001.png").is_file()


def test_nothing_is_overwritten(finished, tmp_path):
    draw(finished, tmp_path / "out")
    with pytest.raises(UserError, match="was started with --seed 0, not 1: choose another --out, or a --name"):
        draw(finished, tmp_path / "out", seed=1)
    (tmp_path / "out/settings.json").unlink()
    with pytest.raises(UserError, match=r"holds 00000\.png already: choose another --out, or a --name"):
        draw(finished, tmp_path / "out")


def test_two_that_start_at_once_take_two_folders(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: generate.new_folder(tmp_path / "samples"), range(16)))
    assert sorted(path.name for path in taken) == [f"{i:04d}" for i in range(1, 17)]
    for junk in ("20", "9²", "7x", "\u0669"):  # a number, and three that are none
        (tmp_path / "samples" / junk).mkdir()
    assert generate.new_folder(tmp_path / "samples").name == "0021"


def test_a_folder_that_was_taken_goes_again_when_nothing_is_drawn(copy, cli):
    assert cli("generate", "--run", copy, "--class", "none").code == 2
    assert not (copy / "samples").exists()


@pytest.mark.parametrize("name", ["settings.json", "grid.png", "00001.png"])
@pytest.mark.parametrize("content", ["{}", '{"command": "generate"}', "junk", "directory"])
def test_what_others_put_into_out_is_neither_taken_nor_lost(finished, tmp_path, name, content):
    path = tmp_path / "out" / name
    path.parent.mkdir()
    path.mkdir() if content == "directory" else path.write_text(content)
    with pytest.raises(LightdiffError) as caught:
        draw(finished, tmp_path / "out")
    assert str(path) in str(caught.value) or f"{path.parent} holds {name} already" in str(caught.value)
    assert path.is_dir() or path.read_text() == content


def test_a_foreign_picture_among_ones_own_is_told(finished, tmp_path):
    draw(finished, tmp_path / "out")
    draw(finished, tmp_path / "other", seed=1)
    mine = tmp_path / "out/00001.png"
    whole = mine.read_bytes()
    for content in ((tmp_path / "other/00001.png").read_bytes(), (tmp_path / "out/00002.png").read_bytes(), b"junk"):
        mine.write_bytes(content)
        with pytest.raises(UserError, match=r"00001\.png is another image: remove it"):
            draw(finished, tmp_path / "out")
    mine.write_bytes(whole[: len(whole) - 50])  # the words are there, the pixels are not
    with pytest.raises(UserError, match=r"00001\.png is no whole picture: remove it"):
        draw(finished, tmp_path / "out")
    mine.unlink()
    draw(finished, tmp_path / "out")
    assert mine.read_bytes() == whole


def test_classes_compare_in_one_unicode_form():
    known = TrainUNetSettings(label="kind", latent=LatentsSettings(labels={"kind": ("Ame\u0301lie", "Zoë")}))
    typed = SamplingSettings(class_=("Am\u00e9lie", "Zoe\u0308"))
    guidance = guidance_for(known, typed, range(4))
    assert guidance is not None
    assert guidance.label.tolist() == [0, 1, 0, 1]
    many = LatentsSettings(labels={"kind": tuple(f"class {i}" for i in range(9999))})
    with pytest.raises(UserError, match="knows no xx") as caught:
        guidance_for(TrainUNetSettings(label="kind", latent=many), SamplingSettings(class_=("x" * 9999,)), [0])
    assert len(str(caught.value)) < 600


def test_generate_and_encode_keep_to_their_time_and_go_on(finished, copy, tmp_path):
    short = JobSettings(max_time=1e-6)
    with pytest.raises(Stopped, match="what is done is saved"):
        draw(finished, tmp_path / "out", num_images=5, batch_size=2, job=short)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["00000.png", "00001.png"]
    draw(finished, tmp_path / "out", num_images=5, batch_size=2)
    assert (tmp_path / "out/grid.png").is_file()
    chosen = encode.inherited(copy, None) | {"run": copy, "restart": True, "shard_size": 10}
    with pytest.raises(Stopped) as stopped:
        encode.run(EncodeSettings.model_validate(chosen | {"job": short}))
    assert stopped.value.exit_code == 75
    shards = copy / "latents"
    assert len(list(shards.glob("shard-*"))) == 1
    encode.run(EncodeSettings.model_validate(chosen | {"restart": False}))
    assert read_index(shards).complete


def test_generate_goes_on_where_it_was_stopped(finished, tmp_path, monkeypatch):
    """Batches of 2, stopped in the middle of the second: it is drawn again whole, the first is left alone."""
    whole = draw(finished, tmp_path / "whole", num_images=5, batch_size=2)
    saved = []

    def stopping(path, *rest):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path.name)
        return save_png(path, *rest)

    save_png = generate.save_png
    monkeypatch.setattr(generate, "save_png", stopping)
    with pytest.raises(Stopped, match=r"run the same command again with --out .*out to resume"):
        draw(finished, tmp_path / "out", num_images=5, batch_size=2)
    monkeypatch.undo()
    first = (tmp_path / "out/00000.png").stat().st_mtime_ns
    draw(finished, tmp_path / "out", num_images=5, batch_size=2)
    assert (tmp_path / "out/00000.png").stat().st_mtime_ns == first
    for path in whole.glob("*.png"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_calls_without_out_get_folders_of_their_own(copy):
    folders = [draw(copy, None, num_images=1) for _ in range(2)]
    assert [folder.name for folder in folders] == ["0001", "0002"]


def test_other_sizes_where_the_networks_allow_them(finished, tmp_path):
    for size in (48, 36):  # the latter's latents are 9 x 9, an odd size
        draw(finished, tmp_path / str(size), resolution=size, num_images=1)
        assert pixels(tmp_path / str(size) / "00000.png").shape == (size, size, 3)
    with pytest.raises(UserError, match="50 is not divisible by 4; the nearest that fit: 48 or 52"):
        draw(finished, tmp_path / "odd", resolution=50)


def test_more_steps_than_levels_are_refused(finished, tmp_path):
    with pytest.raises(UserError, match="--num-steps: 5000 steps asked for, but the schedule has"):
        draw(finished, tmp_path / "out", num_steps=5000)
    assert not (tmp_path / "out").exists()


# --- the library ----------------------------------------------------------------------------------------------------


def test_the_library_in_four_calls(finished):
    model = Pipeline.load(finished)
    assert model.resolution == (32, 32)
    z = model.sample(3, seed=1, sampling=SamplingSettings(num_steps=3))
    assert z.shape == (3, 4, 8, 8)
    x = model.decode(z)
    assert x.shape == (3, 3, 32, 32)
    assert x.abs().max() <= 1
    assert model.encode(x).shape == z.shape
    again = model.sample([2], seed=1, sampling=SamplingSettings(num_steps=3))
    torch.testing.assert_close(again[0], z[2], rtol=1e-4, atol=1e-4)


def test_one_step_is_one_call_of_the_network(finished):
    model = Pipeline.load(finished)
    calls = []
    model.unet.register_forward_hook(lambda *_: calls.append(1))
    model.sample(2, sampling=SamplingSettings(num_steps=7))
    assert len(calls) == 7


# --- latents of a network that is known -----------------------------------------------------------------------------

DATA = GaussianData(mean=0.8, std=0.5)
CPU = torch.device("cpu")
LATENT = {"channels": 2, "height": 24, "width": 24, "shift": [1.0, -2.0], "scale": [4.0, 0.5]}


class Perfect:
    """The best network for Gaussian data, of any objective. It keeps the levels that it is asked about."""

    def __init__(self, settings):
        self.objective, self.asked = settings.target.objective, []
        self.schedule = Schedule.of(settings.noise.resolved(self.objective))

    def __call__(self, x_t, t):
        level = Level(int(t[0]), float(self.schedule.alpha[int(t[0])]), float(self.schedule.sigma[int(t[0])]))
        self.asked.append(level)
        x0, eps = DATA.denoise(x_t, level)
        return {"eps": eps, "x0": x0, "v": level.alpha * eps - level.sigma * x0, "flow": eps - x0}[self.objective]


def test_a_sampler_of_ones_own_needs_no_change_of_a_file(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "mine", SAMPLERS["heun"])
    settings = TrainUNetSettings(latent=LATENT)
    pipeline = Pipeline(None, None, Perfect(settings), settings, CPU)
    mine, heun = (SamplingSettings.model_construct(sampler=name, num_steps=5) for name in ("mine", "heun"))
    assert torch.equal(pipeline.sample(2, 0, mine), pipeline.sample(2, 0, heun))


@pytest.mark.parametrize(
    ("objective", "noise"),
    [
        ("eps", {"schedule": "cosine"}),
        ("eps", {"schedule": "linear"}),
        ("x0", {"schedule": "cosine"}),
        ("x0", {"schedule": "flow"}),
        ("v", {"schedule": "cosine"}),
        # More than a third of the variance would be signal where these end
        ("v", {"schedule": "linear", "beta_end": 2e-3, "zero_terminal_snr": True}),
        ("x0", {"schedule": "scaled-linear", "beta_end": 2e-3, "zero_terminal_snr": True}),
        ("flow", {"schedule": "flow"}),
    ],
)
def test_what_is_drawn_is_the_data_whatever_the_network_predicts(objective, noise):
    settings = TrainUNetSettings.model_validate({"target": {"objective": objective}, "noise": noise, "latent": LATENT})
    network = Perfect(settings)
    z = Pipeline(None, None, network, settings, CPU).sample([3, 5], 7, SamplingSettings(num_steps=100, sampler="heun"))
    start = network.asked[0]
    left_out = network.schedule.signal()[start.t + 1 :]
    if objective == "eps":
        assert start.alpha**2 >= 3e-3
        assert bool((left_out < 3e-3).all())
    else:
        assert not len(left_out)
    x0 = torch.stack([(z[:, 0] - 1) * 4, (z[:, 1] + 2) * 0.5], 1)
    x = math.hypot(start.alpha, start.sigma) * item_noise((2, 24, 24), [3, 5], 7, "start")
    # The error of 100 steps is 0.01 at most
    torch.testing.assert_close(x0, DATA.flow(x, start, CLEAN), rtol=0, atol=0.02)
    # 2,304 samples, standard errors 0.01 and 0.007; eps begins with 5 % of signal that is noise, too
    assert float(x0.mean()) == pytest.approx(DATA.mean, abs=0.06)
    assert float(x0.std()) == pytest.approx(DATA.std, abs=0.03)


@pytest.mark.parametrize(
    ("spacing", "levels"),
    [
        ("trailing", [999, 799, 599, 399, 199]),
        ("uniform", [999, 749.25, 499.5, 249.75, 0]),
        ("quadratic", [999, 561.9, 249.75, 62.4, 0]),
        # ((1 - p) 999^(1/7) + p 999^(-1/7))^7 is sigma / alpha, and t = 1000 sigma - 1
        ("karras", [998, 993.57, 950, 410.52, 0]),
    ],
)
def test_the_network_is_asked_about_the_levels_of_the_spacing(spacing, levels):
    asked = []

    def network(x_t, t):
        asked.append(float(t[0]))
        return x_t

    pipeline = Pipeline(None, None, network, TrainUNetSettings(), CPU)
    pipeline.sample(1, 0, SamplingSettings(num_steps=5, spacing=spacing))
    assert asked == pytest.approx(levels, abs=0.51)  # whole levels are rounded to, and karras interpolates


# --- the demo -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_runs_all_stages_and_says_where_things_are(tmp_path, capsys):
    out = demo.run(DemoSettings(run=tmp_path / "demo", count=60, vae_steps=3, unet_steps=3))
    assert len(list(out.glob("000*.png"))) == 64
    said = capsys.readouterr().err
    assert "lightdiff train-unet --run runs/mine" in said
    assert str(out / "grid.png") in said
