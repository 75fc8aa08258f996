"""`--guidance` without a class: away from the U-Net as it was after a tenth of its steps, which train-unet keeps."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightdiff.checkpoint import Checkpoint
from lightdiff.run_folder import RunFolder, StageFolder
from tests.conftest import UNET_FLAGS, Result, call, succeed

TEN = ("--steps", 10, "--save-every", 1, "--keep", 20, "--val-every", 0)


@pytest.fixture(scope="module")
def ten(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose U-Net was saved after each of ten steps."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("ten") / "run"))
    succeed("train-unet", "--run", run, *UNET_FLAGS, *TEN, "--lr", 0.01, "--restart")
    return run


def draw(run: Path, out: Path, *flags: object) -> Result:
    return call("generate", "--run", run, "--out", out, "--num-images", 2, "--num-steps", 3, "--device", "cpu", *flags)


def first_image(folder: Path) -> np.ndarray:
    with Image.open(folder / "00000.png") as image:
        return np.asarray(image)


def same_weights(one: Path, other: Path) -> bool:
    a, b = Checkpoint(one, "unet").tensors("ema."), Checkpoint(other, "unet").tensors("ema.")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_first_save_after_a_tenth_of_the_steps_is_kept_without_optimizer_state(ten: Path) -> None:
    unet = RunFolder(ten).unet
    assert Checkpoint(unet.early, "unet").metadata.step == 1
    assert not Checkpoint(unet.early, "unet").names("optimizer.")
    assert same_weights(unet.early, unet.step(1))
    assert not same_weights(unet.early, unet.last)
    assert not RunFolder(ten).vae.early.exists()


def test_steps_that_ten_does_not_divide_have_theirs_after_a_tenth_too(trained: Path, tmp_path: Path) -> None:
    """29 steps are saved after 2, 4, ... by default, and two are a tenth, rounded down as that interval is."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    flags = "--preset tiny --batch-size 6 --precision fp32 --device cpu --steps 29 --val-every 0 --restart"
    succeed("train-unet", "--run", run, *flags.split())
    assert Checkpoint(RunFolder(run).unet.early, "unet").metadata.step == 2


def test_guidance_without_a_class_leads_away_from_it(ten: Path, tmp_path: Path) -> None:
    assert draw(ten, tmp_path / "plain").code == 0
    assert draw(ten, tmp_path / "guided", "--guidance", 2).code == 0
    assert draw(ten, tmp_path / "named", "--guidance", 2, "--guide-with", "step-1").code == 0
    assert np.array_equal(first_image(tmp_path / "guided"), first_image(tmp_path / "named"))
    assert not np.array_equal(first_image(tmp_path / "guided"), first_image(tmp_path / "plain"))


def test_it_stays_when_a_run_goes_on_and_is_set_aside_with_what_is_newer(ten: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(ten, tmp_path / "run"))
    unet = RunFolder(run).unet
    flags = [*UNET_FLAGS, *TEN, "--lr", 0.01]
    succeed("train-unet", "--run", run, *flags, "--steps", 20)
    assert Checkpoint(unet.early, "unet").metadata.step == 1
    shutil.copyfile(unet.step(4), unet.early)
    succeed("train-unet", "--run", run, *flags, "--steps", 20, "--from-step", 1)
    assert Checkpoint(unet.early, "unet").metadata.step == 2
    assert (sorted(unet.checkpoints.glob("after-step-1.old-*"))[-1] / "early.safetensors").is_file()


def test_a_run_that_was_stopped_keeps_the_step_that_another_does(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    unet = RunFolder(run).unet
    flags = ["train-unet", "--run", run, *UNET_FLAGS, "--steps", 20, "--save-every", 3, "--val-every", 0]
    assert call(*flags, "--restart", "--max-time", 1e-6).code == 75
    assert call(*flags, "--max-time", 1e-6).code == 75
    assert (Checkpoint(unet.last, "unet").metadata.step, unet.early.exists()) == (2, False)
    succeed(*flags)
    assert Checkpoint(unet.early, "unet").metadata.step == 3


def test_without_a_save_at_the_time_there_is_none_and_guidance_says_so(trained: Path, tmp_path: Path) -> None:
    assert not StageFolder(trained / "unet").early.exists()  # three steps, saved after the second
    result = draw(trained, tmp_path / "out", "--guidance", 2)
    wanted = "--guidance needs a --class to guide to, or a worse U-Net to guide away from: there is no"
    assert (result.code, f"{wanted} {trained / 'unet/checkpoints/early.safetensors'}" in result.err) == (2, True)
    assert not (tmp_path / "out").exists()
