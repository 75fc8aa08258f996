"""Tables of images and the index of latents: what they keep, what they notice, and what hostile ones do."""

import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightdiff.checkpoint import Checkpoint, Metadata, save
from lightdiff.data.files import ImageFile
from lightdiff.data.index import LatentIndex, ShardFacts, open_shard, read_index, shard_path
from lightdiff.data.latents import LatentSet, latents_settings
from lightdiff.data.table import HASH_BYTES, ImageTable, fingerprint
from lightdiff.errors import Damaged, LightdiffError, RunError, UserError
from lightdiff.extras.data.changes import compare
from lightdiff.extras.latent_facts import latent_facts
from lightdiff.extras.show import as_objects
from lightdiff.settings import EncodeSettings, ImageSettings, ScaleSettings
from lightdiff.stages import encode, scale

FILES = [
    ImageFile(0, "a.png", "train", {"kind": "cat", "age": "3-9"}),
    ImageFile(0, "sub/é\udcff.png", "val", {"kind": "dog\udcfe"}),
    ImageFile(0, "z.png", "train", {}),
    ImageFile(1, "a.png", "train", {"kind": "cat"}),
]


def fingerprinters(folders: list[Path]) -> list[Callable[[str, bool], tuple[int, int, bytes]]]:
    return [partial(fingerprint, folder) for folder in folders]


def table_of(folder: Path, names: list[str]) -> ImageTable:
    """The table of files in a folder, as it is now, with hashes."""
    table = ImageTable.of([ImageFile(0, name, "train", {}) for name in names])
    table.take_fingerprints(fingerprinters([folder]))
    table.files["hash"][:] = [fingerprint(folder, name, contents=True)[2] for name in names]
    return table


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(f"pixels of {name}")
    return tmp_path


def test_a_table_comes_back_as_it_was(tmp_path: Path) -> None:
    table = ImageTable.of(FILES)
    table.write(tmp_path / "t.safetensors")
    back = ImageTable.read(tmp_path / "t.safetensors")
    assert list(back.keys(range(4))) == [(file.root, file.path) for file in FILES]
    assert back.of_split("val").tolist() == [False, True, False, False]
    assert back.labels == {"age": ["3-9"], "kind": ["cat", "dog\udcfe"]}
    assert back.codes.tolist() == [[0, -1, -1, -1], [0, 1, -1, 0]]
    assert back.label_values(back.of_split("train")) == {"age": ("3-9",), "kind": ("cat",)}
    assert back.list_digest() == table.list_digest()
    assert back.list_digest() != ImageTable.of(FILES[:3]).list_digest()


def test_a_damaged_or_missing_table_is_told(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(UserError, match="there is no such checkpoint"):
        ImageTable.read(path)
    ImageTable.of(FILES).write(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged):
        ImageTable.read(path)
    index = tmp_path / "index.safetensors"
    ImageTable.of(FILES).write(index)
    with pytest.raises(UserError, match="holds a list of images, but an index of latents is needed here"):
        read_index(tmp_path)
    index.write_bytes(b"{")
    with pytest.raises(RunError, match=r"index\.safetensors is damaged .*encode --restart"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: None, "0 changed, 0 added, 0 gone"),
        (lambda f: (f / "b").write_text("more pixels than before"), "1 changed, 0 added, 0 gone"),
        (lambda f: (f / "b").write_text("pixels of x"), "1 changed, 0 added, 0 gone"),
        (lambda f: os.utime(f / "b", (1, 1)), "0 changed, 0 added, 0 gone"),
        (lambda f: (f / "b").unlink(), "0 changed, 0 added, 1 gone"),
        (lambda f: (f / "d").write_text("new"), "0 changed, 1 added, 0 gone"),
        (lambda f: (f / "a").rename(f / "aa"), "0 changed, 1 added, 1 gone"),
    ],
)
def test_what_has_become_of_the_images(three: Path, change: Callable[[Path], object], words: str) -> None:
    before = table_of(three, ["a", "b", "c"])
    change(three)
    now = ImageTable.of([ImageFile(0, path.name, "train", {}) for path in sorted(three.iterdir())])
    now.take_fingerprints(fingerprinters([three]))
    assert str(compare(now, before, fingerprinters([three]), contents=True)) == words


def test_without_hashes_a_file_of_the_same_size_is_the_same(three: Path) -> None:
    before = table_of(three, ["a", "b", "c"])
    (three / "b").write_text("pixels of x")
    now = ImageTable.of([ImageFile(0, name, "train", {}) for name in "abc"])
    now.take_fingerprints(fingerprinters([three]))
    assert compare(now, before, fingerprinters([three]), contents=False).nothing
    assert compare(now, before, fingerprinters([three]), contents=True).changed.tolist() == [False, True, False]


def test_a_name_in_another_unicode_form_is_the_same_name(tmp_path: Path) -> None:
    composed, apart = "\u00e9.png", "e\u0301.png"
    for name in (composed, "x.png"):
        (tmp_path / name).write_text(name)
    before = table_of(tmp_path, [composed, "x.png"])
    shutil.move(tmp_path / composed, tmp_path / apart)
    now = table_of(tmp_path, [apart, "x.png"])
    assert compare(now, before, fingerprinters([tmp_path]), contents=True).nothing


def test_images_in_one_file_change_with_it(tmp_path: Path) -> None:
    archive = tmp_path / "images.npy"
    archive.write_bytes(b"12")
    before = ImageTable.of([ImageFile(0, name, "train", {}) for name in ("0", "1")])
    before.take_fingerprints(fingerprinters([archive]))
    assert before.files["size"].tolist() == [2, 2]
    assert fingerprint(archive, "0", contents=True)[2] == bytes(HASH_BYTES)  # it may be huge
    archive.write_bytes(b"21")
    os.utime(archive, (1, 1))
    now = before.model_copy()
    now.take_fingerprints(fingerprinters([archive]))
    assert compare(now, before, fingerprinters([archive]), contents=True).changed.all()


def test_a_broken_link_is_known_as_such(three: Path) -> None:
    (three / "d").symlink_to(three / "nowhere")
    before = table_of(three, ["a", "d"])
    assert before.files["size"].tolist() == [11, -1]
    assert compare(table_of(three, ["a", "d"]), before, fingerprinters([three]), contents=True).nothing
    (three / "nowhere").write_text("here now")
    now = ImageTable.of([ImageFile(0, name, "train", {}) for name in "ad"])
    now.take_fingerprints(fingerprinters([three]))
    assert compare(now, before, fingerprinters([three]), contents=True).changed.tolist() == [False, True]


def test_names_whose_ends_overflow_are_refused() -> None:
    table = ImageTable.of(FILES)
    table.check()
    for ends in ([2**63 - 1, -(2**63), -(2**63) + 1, len(table.text)], [5, 5, 6, len(table.text)]):
        with pytest.raises(ValueError, match="what does not fit together"):
            table.model_copy(update={"ends": np.array(ends)}).check()


# --- hostile ones -------------------------------------------------------------------------------------------------


def make_latents(folder: Path) -> Path:
    """Finished latents of 12 made-up images in three shards, the last of which are unreadable, with statistics."""
    files = [ImageFile(i % 2, f"{i}.png", "train" if i % 4 else "val", {"kind": str(i % 3)}) for i in range(12)]
    index = LatentIndex.of(
        sorted(files, key=lambda file: file.root),
        shape=(2, 3, 3),
        dtype="float16",
        mirrored=True,
        vae_digest="none",
        images=ImageSettings(data=(folder / "a", folder / "b")),
        shard_size=4,
        shard=np.arange(12, dtype=np.int32) // 4,
        row=np.full(12, -1, np.int32),
        shards=["", "", ""],
    )
    for number, mine in index.by_shard().items():
        bad = [(*key, "a hole") for key in index.keys(mine[3:].tolist())]
        facts = ShardFacts(vae="none", plan=index.plan(mine), bad=bad)
        tensors = {name: torch.randn(3, 2, 2, 3, 3).half() for name in ("mu", "logvar")}
        tensors["fingerprints"] = torch.ones(3, 32, dtype=torch.uint8)
        save(shard_path(folder, number), tensors, Metadata(stage="latents", extra=facts.model_dump()))
        index.take_in(number, mine, open_shard(folder, index, number, mine))
    index.digest = index.compute_digest()
    index.write(folder / "index.safetensors")
    scale.run(ScaleSettings(latents=folder, run=folder / "run"))
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_latents(tmp_path_factory.mktemp("latents"))


def rewrite(path: Path, tensors: dict[str, torch.Tensor], extra: dict[str, Any]) -> None:
    """Put these into a file, with digests that are right."""
    save(path, tensors, Checkpoint(path).metadata.model_copy(update={"extra": extra}))


def use(folder: Path) -> None:
    """Everything that commands do with latents before they compute."""
    index = read_index(folder)
    as_objects([(folder, index)], None)
    index.name(0)
    settings = latents_settings(index)
    for label, values in settings.labels.items():
        index.classes(label, values)
    found = LatentSet(folder)
    found.gather([*found.train, *found.val])
    latent_facts(folder)
    scale.run(ScaleSettings(latents=folder, run=folder / "run"))


def go_on(folder: Path) -> None:
    """What encode does with an index that it finds."""
    old = read_index(folder)
    now = LatentIndex.of(
        [ImageFile(0, "new.png", "train", {}), ImageFile(0, "0.png", "train", {})],
        **{name: getattr(old, name) for name in ("shape", "dtype", "mirrored", "vae_digest", "images", "shard_size")},
        shard=np.full(2, -1, np.int32),
        row=np.full(2, -1, np.int32),
    )
    stage: Any = type("FakeStage", (), {"path": folder, "settings": EncodeSettings(allow_missing=True)})
    encode.resume(stage, now, old)


NUMBERS = st.sampled_from([-1, 0, 1, 2, 5, 12, 10**9, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 255])
ODD = st.sampled_from(
    [None, True, "", "x", "\udcff", "~nobody/x", [], {}, [[]], [1, 2], math.nan, math.inf, 1e300, -1.0, 0.5, 2**70]
)
SHAPES = st.sampled_from([(0,), (1,), (12, 1), (2, 6), (13,), (0, 16), (12, 16), ()])


@st.composite
def harm(draw: st.DrawFn) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], object]:
    """A change of an index's columns or of its document."""
    kind = draw(st.sampled_from(["element", "element", "shape", "dtype", "missing", "swap", "value", "value", "item"]))
    position, number, odd = draw(st.integers(0, 20)), draw(NUMBERS), draw(NUMBERS | ODD)
    name, other, shape = draw(st.integers(0, 20)), draw(st.integers(0, 20)), draw(SHAPES)

    def apply(tensors: dict[str, torch.Tensor], extra: dict[str, Any]) -> None:
        column, second = (sorted(tensors)[i % len(tensors)] for i in (name, other))
        flat = tensors[column].reshape(-1)
        if kind == "element" and len(flat) and not flat.is_floating_point():
            low, high = torch.iinfo(flat.dtype).min, torch.iinfo(flat.dtype).max
            flat[position % len(flat)] = min(max(number, low), high)
        elif kind == "shape":
            tensors[column] = torch.ones(shape, dtype=flat.dtype) * (position % 3)
        elif kind == "dtype":
            kinds = [torch.float64, torch.uint8, torch.int32, torch.bfloat16, torch.int64]
            tensors[column] = tensors[column].to(kinds[position % 5])
        elif kind == "missing" and len(tensors) > 1:
            del tensors[column]
        elif kind == "swap":
            tensors[column] = tensors[second].clone()
        elif kind in ("value", "item"):
            key = sorted(extra)[name % len(extra)]
            inner = extra[key]
            if kind == "item" and isinstance(inner, dict) and inner:
                inner[sorted(inner)[other % len(inner)]] = odd
            elif kind == "item" and isinstance(inner, list) and inner:
                inner[other % len(inner)] = odd
            else:
                extra[key] = odd

    return apply


@settings(
    max_examples=int(os.environ.get("FUZZ", "150")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(changes=st.lists(harm(), min_size=1, max_size=3), finished=st.booleans(), number=st.sampled_from([-1, -1, 0, 2]))
def test_a_hostile_index_or_shard_is_refused_in_a_sentence_or_used(
    latents: Path, tmp_path: Path, changes: list[Any], finished: bool, number: int
) -> None:
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(latents, folder)
    if not finished:
        index = read_index(folder)
        index.digest = ""
        index.forget(0, index.by_shard()[0])
        index.write(folder / "index.safetensors")
    path = folder / "index.safetensors" if number < 0 else shard_path(folder, number)
    whole = Checkpoint(path)
    tensors, extra = {name: tensor.clone() for name, tensor in whole.tensors("").items()}, whole.metadata.extra
    for change in changes:
        change(tensors, extra)
    try:
        rewrite(path, tensors, extra)
    except (UnicodeEncodeError, ValueError):
        return  # what cannot be written cannot be met
    said = []
    for work in (use, go_on):
        try:
            work(folder)
        except LightdiffError as error:
            said.append(str(error))
    assert all("\n" not in words and len(words) < 600 for words in said)


@pytest.mark.parametrize(
    "change",
    [
        {"shard_size": 0},
        {"shape": [2, 3, 4]},
        {"shape": [65536, 65536, 65536]},
        {"dtype": "complex64"},
        {"shards": []},
        {"vae_digest": "another"},
        {"images": {"data": ["/a"]}},
    ],
)
def test_an_index_that_does_not_fit_is_refused_by_each_command(latents: Path, tmp_path: Path, change: Any) -> None:
    shutil.copytree(latents, tmp_path / "latents")
    path = tmp_path / "latents" / "index.safetensors"
    saved = Checkpoint(path)
    rewrite(path, saved.tensors(""), saved.metadata.extra | change)
    for command in ("scale", "train-unet"):
        result = call(command, "--run", tmp_path)
        assert result.code in (1, 2)
        assert result.err.startswith("error: ")
        assert "This should not happen" not in result.err
