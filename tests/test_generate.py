"""The stage `generate`: what its settings do, what pictures tell, and a folder that is stopped in or not its own."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import succeed
from PIL import Image
from small_run import draw, pixels, train_second

from lightdiff.checkpoint import Checkpoint
from lightdiff.errors import LightdiffError, Stopped, UserError
from lightdiff.extras import compile as compile_extra
from lightdiff.run_folder import RunFolder
from lightdiff.settings import ScaleSettings
from lightdiff.stages import generate, scale


def test_pictures_do_not_depend_on_the_batch(finished, tmp_path):
    draw(finished, tmp_path / "a", batch_size=5)
    draw(finished, tmp_path / "b", batch_size=2, num_images=3)
    for name in ("00000.png", "00001.png", "00002.png"):
        assert np.abs(pixels(tmp_path / "a" / name) - pixels(tmp_path / "b" / name)).max() <= 1
    assert not np.array_equal(pixels(tmp_path / "a/00000.png"), pixels(tmp_path / "a/00001.png"))
    assert (tmp_path / "a/grid.png").is_file()


def test_noise_of_each_step_does_not_depend_on_the_batch(finished, tmp_path):
    draw(finished, tmp_path / "a", sampler="ddim", eta=1.0)
    draw(finished, tmp_path / "b", sampler="ddim", eta=1.0, batch_size=1, num_images=2)
    assert np.abs(pixels(tmp_path / "a/00001.png") - pixels(tmp_path / "b/00001.png")).max() <= 1


@pytest.fixture(scope="module")
def drawn(finished, tmp_path_factory):
    """What `draw` draws with no settings but its own. Not to be written to."""
    return draw(finished, tmp_path_factory.mktemp("drawn") / "out")


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
def test_every_setting_of_the_sampler_does_something(finished, drawn, tmp_path, change):
    draw(finished, tmp_path, **change)
    assert not np.array_equal(pixels(drawn / "00000.png"), pixels(tmp_path / "00000.png"))


def test_eta_does_something(finished, tmp_path):
    for eta in (0.0, 0.5):
        draw(finished, tmp_path / str(eta), sampler="ddim", eta=eta)
    assert not np.array_equal(pixels(tmp_path / "0.0/00000.png"), pixels(tmp_path / "0.5/00000.png"))


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
@pytest.mark.filterwarnings("ignore")  # torch's own, on the way to its compiler
def test_a_compiled_network_draws_the_same_pictures(finished, tmp_path, monkeypatch):
    """In a process of its own: the checks of types that tests run with would cut the network into many pieces."""
    how = ["--run", finished, *"--num-images 5 --batch-size 3 --num-steps 4 --device cpu --precision fp32".split()]
    on = [sys.executable, "-m", "lightdiff", "generate", *how, "--out", tmp_path / "on", "--compile", "on"]
    done = subprocess.run(on, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if "is not compiled" in done.stderr:
        pytest.skip("there is no C++ compiler")
    succeed("generate", *how, "--out", tmp_path / "off")
    for compiling in ("off", "on"):
        assert json.loads((tmp_path / compiling / "settings.json").read_text())["compute"]["compile"] == compiling
    for i in range(5):  # the second batch, of two, was filled up to three
        off, on = (pixels(tmp_path / name / f"{i:05d}.png") for name in ("off", "on"))
        assert abs(off - on).max() <= 1
    compiled = []
    monkeypatch.setattr(compile_extra, "compiler_works", lambda device: True)
    monkeypatch.setattr(compile_extra, "compile_sampling", compiled.append)
    (tmp_path / "on/00001.png").unlink()
    succeed("generate", *how, "--out", tmp_path / "on")  # auto: as it was started
    assert (tmp_path / "on/00001.png").is_file()
    assert len(compiled) == 1


# --- the folder ---------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(finished, tmp_path):
    draw(finished, tmp_path / "out")
    with pytest.raises(UserError, match="was started with --seed 0, not 1: choose another --out, or a --name"):
        draw(finished, tmp_path / "out", seed=1)
    (tmp_path / "out/settings.json").unlink()
    with pytest.raises(UserError, match=r"holds 00000\.png already: choose another --out, or a --name"):
        draw(finished, tmp_path / "out")


def test_calls_without_out_get_folders_of_their_own(copy):
    folders = [draw(copy, None, num_images=1) for _ in range(2)]
    assert [folder.name for folder in folders] == ["0001", "0002"]


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
