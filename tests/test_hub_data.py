"""hf://datasets/OWNER/NAME: what a made-up client fetches is read as its folder, archives or Parquet files are."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VAE_FLAGS, succeed
from PIL import Image

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.files import find_images, fingerprinters, source_of
from lightdiff.errors import RunError, UserError
from lightdiff.extras.data import hub_data
from lightdiff.run_folder import RunFolder

Fetch = Callable[..., str]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local copy of each data set, whose files are links, as the client's are."""
    hub_data.copied.cache_clear()

    class Library:
        @staticmethod
        def snapshot_download(name: str, allow_patterns: list[str], repo_type: str) -> str:
            assert repo_type == "dataset"
            assert not any(kind.endswith(("*", ".py")) for kind in allow_patterns)
            if not (tmp_path / "blobs" / name).is_dir():
                raise OSError("404: no such repository\nand more")
            copy = tmp_path / "snapshots" / name
            for path in (tmp_path / "blobs" / name).rglob("*"):
                if path.is_file() and any(path.match(kind) for kind in allow_patterns):
                    link = copy / path.relative_to(tmp_path / "blobs" / name)
                    link.parent.mkdir(parents=True, exist_ok=True)
                    if not link.is_symlink():
                        link.symlink_to(path)
            return str(copy)

    monkeypatch.setattr("lightdiff.extras.hub.library", lambda: Library)
    return tmp_path / "blobs"


def test_a_data_set_trains_as_its_folder_does(hub: Path, faces: Path, tmp_path: Path) -> None:
    shutil.copytree(faces, hub / "me/faces")
    (hub / "me/faces/load.py").write_text("raise SystemExit")
    found: dict[str, Any] = {}
    for name, data in {"hub": "hf://datasets/me/faces", "folder": faces}.items():
        succeed("train-vae", "--run", tmp_path / name, "--data", data, *VAE_FLAGS)
        found[name] = Checkpoint(RunFolder(tmp_path / name).vae.last, "vae")
    one, other = (found[name].tensors("model.") for name in ("hub", "folder"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert found["hub"].metadata.settings["images"]["data"] == ["hf:/datasets/me/faces"]  # as a path has it
    assert not (tmp_path / "snapshots/me/faces/load.py").exists()
    succeed("encode", "--run", tmp_path / "hub", "--workers", 0, "--device", "cpu")


def test_archives_tables_and_parts_of_a_data_set(hub: Path, faces: Path, tmp_path: Path) -> None:
    shutil.make_archive(str(hub / "me/packed/data/a"), "zip", faces)
    (hub / "me/packed/data/README.txt").touch()
    place = Path("hf://datasets/me/packed")
    files = find_images([place], 0.5).files
    assert [f.path for f in files] == [f.path for f in find_images([hub / "me/packed/data/a.zip"], 0.5).files]
    there, here = fingerprinters([place, hub / "me/packed/data/a.zip"])
    assert there(files[0].path, True) == here(files[0].path, True)
    for name in ("cats/1.png", "cats/2.png", "dogs/1.png"):
        (hub / "me/pets" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(next(faces.rglob("*.png")), hub / "me/pets" / name)
    assert [f.labels["class"] for f in find_images([Path("hf://datasets/me/pets")], 0).files] == [
        "cats",
        "cats",
        "dogs",
    ]
    assert [f.path for f in find_images([Path("hf://datasets/me/pets/dogs")], 0).files] == ["1.png"]


def test_parquet_files_of_a_data_set_are_preferred(hub: Path, faces: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (hub / "me/table/data").mkdir(parents=True)
    pictures = [path.read_bytes() for path in sorted(faces.rglob("*.png"))[:5]]
    for split, rows in (("train", pictures[:3]), ("validation", pictures[3:])):
        table = pa.table({"image": [{"bytes": data, "path": "1.png"} for data in rows], "label": range(len(rows))})
        parquet.write_table(table, hub / f"me/table/data/{split}-00000-of-00001.parquet")
    (hub / "me/table/preview.png").write_bytes(pictures[0])
    place = Path("hf://datasets/me/table")
    files, source = find_images([place], 0).files, source_of(place)
    assert [file.split for file in files] == ["train"] * 3 + ["val"] * 2
    assert [file.labels["label"] for file in files] == ["0", "1", "2", "0", "1"]
    for file, data in zip(files, pictures, strict=True):
        with source.open(place, file.path) as image, Image.open(io.BytesIO(data)) as wanted:
            assert image.tobytes() == wanted.tobytes()


def test_what_cannot_be_fetched_is_said(hub: Path) -> None:
    (hub / "me/pets").mkdir(parents=True)
    for address, kind, message in (
        ("hf://datasets/me/none", RunError, "hf://datasets/me/none cannot be fetched: 404: no such repository$"),
        ("hf://me/none", UserError, "hf://me/none is no address of a data set: write hf://datasets/OWNER/NAME$"),
        ("hf://datasets/me", UserError, "is no address"),
        ("hf://datasets/me/pets/dogs", UserError, "me/pets has no folder dogs$"),
    ):
        with pytest.raises(kind, match=message):
            find_images([Path(address)], 0)
