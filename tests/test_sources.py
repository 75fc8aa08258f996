"""A data source that is no folder of images, added as how-lightdiff-is-built.md describes."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VAE_FLAGS
from PIL import Image

from lightdiff.data import files
from lightdiff.data.files import Source
from lightdiff.data.images import BadImage, load_image
from lightdiff.data.latents import LatentSet
from lightdiff.data.loading import ImageDataset
from lightdiff.errors import UserError
from lightdiff.settings import ImageSettings
from tests.image_files import scan


def names_in_array(file: Path, passed_over: Counter[str]) -> Iterator[str]:
    return (f"{i:06d}" for i in range(len(np.load(file, mmap_mode="r"))))


def open_in_array(file: Path, name: str) -> Image.Image:
    return Image.fromarray(np.load(file, mmap_mode="r")[int(name)])


@pytest.fixture
def array(faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The faces as one .npy file of (n, h, w, 3) bytes, which is a source."""
    monkeypatch.setitem(files.SOURCES, ".npy", Source(names_in_array, open_in_array))
    np.save(tmp_path / "faces.npy", np.stack([np.asarray(Image.open(path)) for path in sorted(faces.rglob("*.png"))]))
    return tmp_path / "faces.npy"


def test_the_images_of_another_source_are_listed_split_and_read(array: Path, faces: Path) -> None:
    found = scan([array, faces], 0.3)
    assert [(file.root, file.path) for file in found[:2]] == [(0, "000000"), (0, "000001")]
    assert {file.split for file in found if file.root == 0} == {"train", "val"}
    dataset = ImageDataset(found, ImageSettings(data=(array, faces), resolution=16), seed=0, train=False)
    for i in range(24):
        there, here = dataset[0, i].x, dataset[0, 24 + i].x
        assert there is not None
        assert here is not None
        assert torch.equal(there, here)
    assert dataset.path(3) == str(array / "000003")


def test_what_a_source_raises_says_that_an_image_is_unreadable(array: Path) -> None:
    with pytest.raises(BadImage, match=r"^index 99 is out of bounds"):
        load_image("99", folder=array, source=files.SOURCES[".npy"])


def test_a_source_is_known_by_its_suffix_and_only_one_that_is_there(array: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.npy does not exist$"):
        scan([tmp_path / "absent.npy"], 0)
    (tmp_path / "faces.lmdb").touch()
    with pytest.raises(UserError, match=r"faces\.lmdb is a file; name the folder that holds the images, or a \.zip or"):
        scan([tmp_path / "faces.lmdb"], 0)
    with pytest.raises(UserError, match=r"faces\.npy is given twice$"):
        scan([array, array], 0)
    with pytest.raises(UserError, match=r"faces\.npy lies inside"):
        scan([array, tmp_path], 0)


def test_the_command_line_trains_and_encodes_from_another_source(cli, array, faces, tmp_path):
    runs = {"array": array, "folder": faces}
    for name, data in runs.items():
        trained = cli("train-vae", "--run", tmp_path / name, "--data", data, *VAE_FLAGS, "--val-share", 0)
        assert trained.code == 0, trained.stderr
        encoded = cli("encode", "--run", tmp_path / name, "--workers", 0, "--device", "cpu")
        assert encoded.code == 0, encoded.stderr
    latents, others = (LatentSet(tmp_path / name / "latents") for name in runs)
    assert len(latents.train) == 24
    # The same pixels in the same order: names matter to the split alone, and there is none.
    assert torch.equal(latents.gather(list(latents.train))[0], others.gather(list(others.train))[0])
    report = json.loads(cli("inspect", array, "--json").stdout)
    assert (report["images"], report["bad"], report["folders"][0]["layout"]) == (24, [], "plain")


def test_an_image_of_another_source_that_cannot_be_read_is_listed(cli, array, tmp_path, monkeypatch):
    def open_most(file: Path, name: str) -> Image.Image:
        if name == "000005":
            raise OSError("a hole in the archive")
        return open_in_array(file, name)

    monkeypatch.setitem(files.SOURCES, ".npy", Source(names_in_array, open_most))
    flags = ("--run", tmp_path / "run", "--data", array, *VAE_FLAGS, "--val-share", 0, "--max-bad", 0.1)
    assert cli("train-vae", *flags, "--steps", 8).code == 0
    report = (tmp_path / "run" / "vae" / "bad-files.txt").read_text()
    assert report == "0\t000005\ta hole in the archive\n"
