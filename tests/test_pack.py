"""`lightdiff pack`: what is packed is what training would have made of it, and packing can be stopped."""

import hashlib
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import VAE_FLAGS, succeed
from PIL import Image

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.files import find_images
from lightdiff.data.loading import ImageDataset
from lightdiff.extras import pack
from lightdiff.extras.pack import Plan
from lightdiff.run_folder import RunFolder
from lightdiff.settings import ImageSettings

FLAGS = ("--resolution", 16, "--shard-size", 10, "--processes", 1)


def labelled(faces: Path, folder: Path) -> Path:
    """The faces in two class folders, larger than needed, one of them under two formats."""
    for i, path in enumerate(sorted(faces.rglob("*.png"))):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((40, 48)).save(folder / "ab"[i % 2] / f"{i:02d}.png")
    return folder


@pytest.mark.parametrize(("kind", "shards"), [("webp", "tar"), ("png", "zip")])
def test_a_lossless_pack_trains_to_the_same_weights(kind, shards, faces, tmp_path):
    data, out = labelled(faces, tmp_path / "data"), tmp_path / "pack"
    said = succeed("pack", data, out, *FLAGS, "--image", kind, "--shards", shards, "--val-share", 0.2)
    assert "24 images in 3 shards" in said.err
    found = {}
    for name, source in (("before", data), ("after", out / f"*.{shards}")):
        flags = [*VAE_FLAGS, "--random-crop", 1]
        succeed("train-vae", "--run", tmp_path / name, "--data", source, *flags)
        found[name] = Checkpoint(RunFolder(tmp_path / name).vae.last, "vae").tensors("")
    assert all(torch.equal(found["before"][key], found["after"][key]) for key in found["before"])
    packed = find_images([out / f"*.{shards}"], 0.2)
    assert [file.labels["class"] for file in packed.files] == [file.path.split("/")[1] for file in packed.files]
    sums = dict(reversed(line.split("  ")) for line in (out / "SHA256SUMS").read_text().splitlines())
    assert sums == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("shard-*")}


def test_packing_that_was_stopped_goes_on(faces, tmp_path):
    data, out = labelled(faces, tmp_path / "data"), tmp_path / "pack"
    succeed("pack", data, out, *FLAGS)
    whole = {path.name: path.read_bytes() for path in out.glob("shard-*")}
    (out / "shard-00001.tar").unlink()
    (out / ".shard-00001.tar~elsewhere~1~0.tmp").write_bytes(b"half of one")
    kept = (out / "shard-00000.tar").stat().st_mtime_ns
    succeed("pack", data, out, *FLAGS)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".tar"} == whole
    assert (out / "shard-00000.tar").stat().st_mtime_ns == kept
    assert not list(out.glob(".*.tmp"))


def test_several_processes_write_the_shards_of_one(faces, tmp_path):
    """Labels, and the images that cannot be read, are told by the processes that pack."""
    data = labelled(faces, tmp_path / "data")
    (data / "a" / "99.png").write_bytes(b"none")
    written = {}
    for processes in (1, 2):
        out = tmp_path / f"by-{processes}"
        said = succeed("pack", data, out, *FLAGS[:-1], processes, "--val-share", 0.2, "--max-bad", 0.1)
        assert "24 images in 3 shards" in said.err
        written[processes] = {path.name: path.read_bytes() for path in out.iterdir()}
    assert written[1] == written[2]
    assert b"99.png" in written[2]["bad-files.txt"]


def test_a_pack_of_other_images_is_not_mixed_with(cli, faces, tmp_path):
    data, out = labelled(faces, tmp_path / "data"), tmp_path / "pack"
    (out / "x").mkdir(parents=True)
    (out / "shard-00000.tar").touch()
    assert "is there already: choose another folder" in cli("pack", data, out, *FLAGS).err
    (out / "shard-00000.tar").unlink()
    (out / "pack.json").write_text(json.dumps({"plan": "another"}))
    assert "holds a pack of other images or settings" in cli("pack", data, out, *FLAGS).err
    assert cli("pack", data, out, "--resolution", "x").code == 2
    assert "--quality: 0 is not between 1 and 100" in cli("pack", data, out, *FLAGS, "--quality", 0).err


@pytest.fixture
def planned(monkeypatch):
    """Shards in this process, without starting others."""

    def plan(data: Path, out: Path, size: int = 100, **more: object) -> Plan:
        files = find_images([data] if isinstance(data, Path) else data, 0.0).files
        images = ImageSettings(data=data if isinstance(data, tuple) else (data,), resolution="16x24")
        made = Plan(out, ImageDataset(files, images, 0, train=False), files, "webp", 95, "tar", size)
        monkeypatch.setattr(pack, "PLANS", [made])
        return made

    return plan


def test_members_of_several_sources_and_formats(planned, faces, tmp_path):
    first = tmp_path / "a"
    first.mkdir()
    image = sorted(faces.rglob("*.png"))[0]
    shutil.copy(image, first / "1.png")
    Image.open(image).save(first / "1.jpg")
    (first / "2.png").write_bytes(b"none")
    second = shutil.copytree(first, tmp_path / "b")
    plan = planned((first, Path(second)), tmp_path)
    number, _, bad = pack.write_shard(0)
    with tarfile.open(plan.path(number)) as archive:
        names = archive.getnames()
        assert Image.open(archive.extractfile(names[0])).size == (24, 16)
    assert names == [f"source-{root}/1.{suffix}.webp" for root in (0, 1) for suffix in ("jpg", "png")]
    assert [i for i, _ in bad] == [2, 5]


def test_zip_members_are_stored(tmp_path):
    pack.write_zip(tmp_path / "a.zip", iter([("a", b"x" * 1000)]))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert [member.compress_type for member in archive.infolist()] == [zipfile.ZIP_STORED]
