"""Parquet files of images, in Hugging Face's layout."""

import io
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import VAE_FLAGS, succeed
from PIL import Image

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.files import find_images, fingerprinters, source_of
from lightdiff.data.images import BadImage, load_image
from lightdiff.data.latents import LatentSet
from lightdiff.errors import UserError
from lightdiff.extras.data import parquet
from lightdiff.run_folder import RunFolder

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet as pq  # noqa: E402


def write(path: Path, images: list[bytes | None], group: int = 3, **columns: list[object]) -> Path:
    """A file as `datasets` writes it: images of bytes and paths, and classes by number."""
    rows = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table({"image": pa.array(rows), **columns})
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(about), path, row_group_size=group)
    return path


def png(value: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (9, 8), (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def test_images_and_labels(tmp_path: Path) -> None:
    more = {"label": [0, 1, None, 1], "text": ["a", "b", "a", ""], "score": [0.5] * 4}
    place = write(tmp_path / "a.parquet", [png(i) for i in range(4)], **more)
    found = find_images([place], 0)
    assert [(file.path, file.labels) for file in found.files] == [
        ("a:00000000", {"label": "cat", "text": "a"}),
        ("a:00000001", {"label": "dog", "text": "b"}),
        ("a:00000002", {"text": "a"}),
        ("a:00000003", {"label": "dog"}),
    ]
    source = source_of(place)
    assert [load_image(f.path, folder=place, source=source).getpixel((0, 0))[0] for f in found.files] == [0, 1, 2, 3]
    (fingerprint,) = fingerprinters([place])
    assert fingerprint("a:00000003", False)[0] == 0
    assert fingerprint("a:00000003", True)[2] != fingerprint("a:00000002", True)[2]
    assert fingerprint("a:00000009", True) == (-1, 0, bytes(16))
    captions = write(tmp_path / "b.parquet", [png()] * 12, caption=[f"caption {i}" for i in range(12)])
    assert not any(file.labels for file in find_images([captions], 0).files)


def test_files_for_training_and_validation(tmp_path: Path) -> None:
    for name, count in {"train-00000-of-00001": 3, "validation-00000-of-00001": 2, "test-00000-of-00001": 1}.items():
        write(tmp_path / f"{name}.parquet", [png()] * count)
    found = find_images([tmp_path / "*.parquet"], 0.5)
    assert [file.split for file in found.files] == ["train"] * 3 + ["val"] * 2
    assert found.notes[-1].endswith("1 images in a folder for testing are left out")


def test_rows_are_told_apart_by_number_and_files_by_name(tmp_path: Path) -> None:
    for name in ("a", "a-b", "deeper/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(
            tmp_path / f"{name}.parquet", [png(i) for i in range(2)], label=[int(name == "a")] * 2
        )  # paths 0.png, 1.png
    place = tmp_path / "**" / "*.parquet"
    found = find_images([place], 0).files
    assert [f.path for f in found] == [f"{stem}:{row:08d}" for stem in ("a-b", "a", "c") for row in range(2)]
    assert [f.labels["label"] for f in found] == ["cat"] * 2 + ["dog"] * 2 + ["cat"] * 2  # in the order of sorted names
    write(tmp_path / "deeper/a.parquet", [png()])
    with pytest.raises(UserError, match=r"^--data: .*a\.parquet and .*a\.parquet are named alike: name"):
        find_images([place], 0)


def test_few_row_groups_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = write(tmp_path / "a.parquet", [png(i) for i in range(40)], group=2)
    read = [parquet.read(place, name) for name in parquet.names(place, Counter())]
    assert read == [png(i) for i in range(40)]
    assert parquet._group.cache_info().currsize <= parquet.GROUPS
    monkeypatch.setattr(parquet, "LARGEST", 10)
    parquet._group.cache_clear()
    with pytest.raises(BadImage, match=r"^its row group has .* bytes, more than 10"):
        parquet.read(place, "a:00000000")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"^--data: .*a\.parquet is damaged, or no Parquet file"):
        find_images([tmp_path / "a.parquet"], 0)
    with pytest.raises(UserError, match=r"^--data: .*none\.parquet does not exist$"):
        find_images([tmp_path / "none.parquet"], 0)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet has no column of images, structs with 'bytes', but x$"):
        find_images([tmp_path / "b.parquet"], 0)
    place = write(tmp_path / "c.parquet", [png(), None])
    with pytest.raises(BadImage, match=r"^the row has no bytes, only a path$"):
        load_image("c:00000001", folder=place, source=source_of(place))


def test_the_same_images_in_a_folder_train_to_the_same_weights(faces: Path, tmp_path: Path) -> None:
    images = iter([path.read_bytes() for path in sorted(faces.rglob("*.png"))])
    for stem, count in {"train-00000-of-00002": 12, "train-00001-of-00002": 8, "validation-00000-of-00001": 4}.items():
        part = [next(images) for _ in range(count)]
        write(tmp_path / f"{stem}.parquet", part, group=5)
        (tmp_path / "folder" / stem.partition("-")[0]).mkdir(parents=True, exist_ok=True)
        for row, data in enumerate(part):
            (tmp_path / "folder" / stem.partition("-")[0] / f"{stem}-{row:08d}.png").write_bytes(data)
    runs = {"parquet": tmp_path / "*.parquet", "stopped": tmp_path / "*.parquet", "folder": tmp_path / "folder"}
    for name, data in runs.items():
        flags = ("--run", tmp_path / name, "--data", data, *VAE_FLAGS, "--lr-schedule", "constant")
        if name == "stopped":
            succeed("train-vae", *flags, "--steps", 2)
        done = succeed("train-vae", *flags)
        assert ("resuming from step 2" in done.err) == (name == "stopped")
        assert "split by its folders into 20 training and 4 validation images" in done.err
        succeed("encode", "--run", tmp_path / name, "--workers", 0, "--device", "cpu")
    weights = {name: Checkpoint(RunFolder(tmp_path / name).vae.last, "vae").tensors("") for name in runs}
    latents = {name: LatentSet(tmp_path / name / "latents") for name in runs}
    for name in ("parquet", "stopped"):
        assert weights[name].keys() == weights["folder"].keys()
        assert all(torch.equal(value, weights["folder"][key]) for key, value in weights[name].items())
        one, other = (of.gather(list(of.train))[0] for of in (latents[name], latents["folder"]))
        assert torch.equal(one, other)
