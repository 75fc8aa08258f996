"""What happens when images are changed, added, removed or moved after a stage has seen them."""

import shutil
from pathlib import Path

import pytest
from conftest import UNET_FLAGS, VAE_FLAGS, succeed

ENCODE = ("--workers", 0, "--device", "cpu")


@pytest.fixture
def data(faces: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(faces, tmp_path / "photos"))


def test_an_unreadable_image_counts_once_wherever_the_data_lie(data: Path, tmp_path: Path) -> None:
    (data / "00000.png").write_bytes(b"no image")
    flags = ("--max-bad", 0.05, "--batch-size", 24, "--val-share", 0)
    succeed("train-vae", "--run", tmp_path / "run", "--data", data, *VAE_FLAGS, *flags)
    data = data.rename(tmp_path / "moved")
    succeed("train-vae", "--run", tmp_path / "run", "--data", data, "--steps", 4)
    (row,) = (tmp_path / "run/vae/bad-files.txt").read_text().splitlines()
    assert row.split("\t")[:2] == ["0", "00000.png"]


def test_that_nothing_is_validated_is_said_at_the_start(data: Path, tmp_path: Path) -> None:
    said = "there are no validation images, so nothing is validated: best.safetensors is the newest state"
    run = ("--run", tmp_path / "run")
    assert said in succeed("train-vae", *run, "--data", data, *VAE_FLAGS, "--val-share", 0).err
    assert said in succeed("train-vae", *run, "--steps", 4).err
    succeed("encode", *run, *ENCODE)
    succeed("scale", *run)
    assert said in succeed("train-unet", *run, *UNET_FLAGS).err
    other = succeed("train-vae", "--run", tmp_path / "other", "--data", data, *VAE_FLAGS)
    assert said not in other.err
