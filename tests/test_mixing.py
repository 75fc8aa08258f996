"""Sources that are drawn as often as weights say: `--data A=2 --data B=1`."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import UNET_FLAGS, VAE_FLAGS, succeed

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.index import read_index
from lightdiff.errors import UserError
from lightdiff.run_folder import RunFolder
from lightdiff.settings import ImageSettings, TrainVAESettings, with_changes

STEADY = ("--lr-schedule", "constant", "--val-share", 0)


@pytest.fixture
def unequal(faces: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A folder of 20 images and one of 4."""
    for i, path in enumerate(sorted(faces.rglob("*.png"))):
        folder = tmp_path / ("few" if i < 4 else "many")
        folder.mkdir(exist_ok=True)
        shutil.copy(path, folder)
    return tmp_path / "many", tmp_path / "few"


def test_weights_are_read_from_what_data_names(tmp_path: Path) -> None:
    settings = ImageSettings(data=[f"{tmp_path}/a=2", f"{tmp_path}/b"])
    assert settings.data == (tmp_path / "a", tmp_path / "b")
    assert settings.data_weights == (2, 1)
    assert with_changes(settings, flip=False).data_weights == (2, 1)
    (tmp_path / "a=2").mkdir()
    assert ImageSettings(data=[f"{tmp_path}/a=2"]).data == (tmp_path / "a=2",)
    assert ImageSettings(data=[f"{tmp_path}/a=x.5"]).data_weights == ()
    for weights in ((1,), (1, 0)):
        wrong = TrainVAESettings(images=ImageSettings(data=[tmp_path / "a", tmp_path / "b"], data_weights=weights))
        with pytest.raises(UserError, match=r"^--data-weights: give a number above 0 for each --data$"):
            wrong.resolved()


def test_both_trainings_mix_and_resume(cli, unequal, tmp_path):
    many, few = unequal
    data = ("--data", f"{many}=1", "--data", f"{few}=1")
    for name, stops in {"whole": (4,), "stopped": (2, 4)}.items():
        for steps in stops:
            succeed("train-vae", "--run", tmp_path / name, *data, *VAE_FLAGS, *STEADY, "--steps", steps)
    one, other = (Checkpoint(RunFolder(tmp_path / name).vae.last).tensors("") for name in ("whole", "stopped"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    run = ("--run", tmp_path / "whole")
    succeed("encode", *run, "--workers", 0, "--device", "cpu")
    succeed("scale", *run)
    assert read_index(RunFolder(tmp_path / "whole").latents).images.data_weights == (1, 1)
    unet = ("--latents", tmp_path / "whole", *UNET_FLAGS, *STEADY[:2])
    for name, stops in {"a": (4,), "b": (2, 4)}.items():
        for steps in stops:
            succeed("train-unet", "--run", tmp_path / name, *unet, "--steps", steps)
    one, other = (Checkpoint(RunFolder(tmp_path / name).unet.last).tensors("") for name in "ab")
    assert all(torch.equal(one[key], other[key]) for key in one)
    succeed("train-vae", "--run", tmp_path / "plain", "--data", many, "--data", few, *VAE_FLAGS, *STEADY, "--steps", 4)
    plain, mixed = (Checkpoint(RunFolder(tmp_path / name).vae.last).tensors("") for name in ("plain", "whole"))
    assert not all(torch.equal(plain[key], mixed[key]) for key in plain)
    changed = cli("train-vae", *run, "--data", f"{many}=1", "--data", f"{few}=3", *VAE_FLAGS, *STEADY, "--steps", 6)
    assert "--data-weights" in changed.err
    assert changed.code == 2
