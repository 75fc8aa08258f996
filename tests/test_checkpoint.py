"""Snapshots: what is written is read back or refused, never half of it, never something else."""

import errno
import json
import math
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightdiff import __version__, checkpoint, run_folder
from lightdiff.checkpoint import (
    DTYPES,
    FORMAT,
    KEY,
    Checkpoint,
    Metadata,
    save,
    tensor_digest,
)
from lightdiff.errors import NoRoom, RunError, UserError
from lightdiff.run_folder import atomic_link, atomic_write, atomic_write_text, remove_temporaries
from lightdiff.settings import ScheduleSettings

PROPERTY = settings(
    deadline=None,
    max_examples=80,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example overwrites the same file
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
UNTOUCHED = "; what was saved before is untouched"
MAKE_ROOM = "; make room and run the same command again"
FULL = ("No space left on device", "Disk quota exceeded")


def some_tensors() -> dict[str, Tensor]:
    """Weights, averaged weights and the state of an optimizer, a few hundred bytes."""
    g = torch.Generator().manual_seed(0)
    return {
        "model.a": torch.randn(3, 4, generator=g),
        "model.b": torch.randn(5, generator=g).to(torch.bfloat16),
        "ema.a": torch.randn(3, 4, generator=g),
        "ema.b": torch.randn(5, generator=g).to(torch.bfloat16),
        "optimizer.0.step": torch.tensor(7, dtype=torch.int64),
        "optimizer.0.exp_avg": torch.randn(3, 4, generator=g, dtype=torch.float64),
    }


def saved(path: Path, **about: Any) -> Path:
    metadata = Metadata(stage="vae", settings={"lr": 0.5, "channels": [8, 16]}, step=3, metrics={"loss": 0.25})
    save(path, some_tensors(), metadata.model_copy(update=about))
    return path


def read_all(path: Path) -> dict[str, Tensor]:
    return Checkpoint(path).tensors("")


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def data_range(path: Path, name: str) -> tuple[int, int]:
    """Where a tensor's bytes lie in a file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    begin, end = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + begin, 8 + length + end


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.unlink()  # a file that is open elsewhere stays as it is
    path.write_bytes(content)


def fail_with(error: BaseException) -> Callable[..., None]:
    """A writer that fails half-way."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise error

    return write


# --- what is written is read back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (7,), (2, 3, 4)])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.arange(math.prod(shape)).reshape(shape) - 2).to(dtype)
    save(tmp_path / "a.safetensors", {"model.x": tensor}, Metadata(stage="vae"))
    read = Checkpoint(tmp_path / "a.safetensors", "vae").tensor("model.x")
    assert (read.dtype, read.shape) == (dtype, tensor.shape)
    assert torch.equal(read, tensor)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point])
def test_round_trip_of_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, 0.1]).to(dtype)
    save(tmp_path / "a", {"x": special}, Metadata(stage="vae"))
    assert bits(Checkpoint(tmp_path / "a").tensor("x")) == bits(special)


def test_tensors_of_any_layout(tmp_path: Path) -> None:
    base = torch.arange(24.0, requires_grad=True)
    views = {"t": base.reshape(4, 6).T, "s": base[::3], "e": torch.ones(1).expand(3)}
    save(tmp_path / "a", views, Metadata(stage="vae"))
    for name, read in read_all(tmp_path / "a").items():
        assert torch.equal(read, views[name])
        assert not read.requires_grad


def test_a_file_without_tensors(tmp_path: Path) -> None:
    save(tmp_path / "a", {}, Metadata(stage="vae", step=9))
    assert Checkpoint(tmp_path / "a").metadata.step == 9
    assert Checkpoint(tmp_path / "a").weights() == {}


def test_the_document_comes_back(tmp_path: Path) -> None:
    metadata = save(tmp_path / "deep" / "er" / "a", some_tensors(), Metadata(stage="vae", extra={"ä": [1, None, "\n"]}))
    read = Checkpoint(tmp_path / "deep" / "er" / "a").metadata
    assert read == metadata
    assert (read.format, read.lightdiff, read.extra) == (FORMAT, __version__, {"ä": [1, None, "\n"]})
    assert read.digests == {name: tensor_digest(tensor) for name, tensor in some_tensors().items()}


@PROPERTY
@given(st.dictionaries(st.text(), JSON, max_size=3))
def test_any_document_comes_back(tmp_path: Path, facts: dict[str, Any]) -> None:
    metadata = save(tmp_path / "a", {}, Metadata(stage="vae", extra=facts, settings=facts))
    assert Checkpoint(tmp_path / "a").metadata == metadata
    assert metadata.extra == facts


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 1e-300, 0.1, -0.0])
def test_metrics_of_any_value_come_back(tmp_path: Path, number: float) -> None:
    save(tmp_path / "a", {}, Metadata(stage="vae", metrics={"psnr": number}, extra={"best": number}))
    read = Checkpoint(tmp_path / "a").metadata
    assert str(read.metrics["psnr"]) == str(read.extra["best"]) == str(number)


def test_paths_that_are_not_utf_8_come_back(tmp_path: Path) -> None:
    folder = os.fsdecode(b"/data/\xff")
    save(tmp_path / "a", {}, Metadata(stage="vae", settings={"data": [folder]}, extra={"ä": "☃"}))
    read = Checkpoint(tmp_path / "a").metadata
    assert read.settings == {"data": [folder]}
    assert read.extra == {"ä": "☃"}


def test_names_prefixes_and_weights(tmp_path: Path) -> None:
    file = Checkpoint(saved(tmp_path / "a"))
    tensors = some_tensors()
    assert sorted(file.names()) == sorted(tensors)
    assert sorted(file.names("optimizer.")) == ["optimizer.0.exp_avg", "optimizer.0.step"]
    assert (file.weights_prefix(), file.weights_prefix(ema=0)) == ("ema.", "model.")
    assert torch.equal(file.weights()["a"], tensors["ema.a"])
    assert torch.equal(file.weights(ema=0)["b"], tensors["model.b"])
    save(tmp_path / "b", {"model.a": tensors["model.a"]}, Metadata(stage="vae"))
    assert Checkpoint(tmp_path / "b").weights_prefix() == "model."
    assert list(Checkpoint(tmp_path / "b").weights()) == ["a"]


def test_the_weights_digest_depends_on_the_weights_alone(tmp_path: Path) -> None:
    tensors = some_tensors()
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    full = save(tmp_path / "a", tensors, Metadata(stage="vae", step=5)).weights_digest("model.")
    assert save(tmp_path / "b", weights, Metadata(stage="vae")).weights_digest("model.") == full
    backwards = dict(reversed(list(tensors.items())))
    assert save(tmp_path / "c", backwards, Metadata(stage="vae")).weights_digest("model.") == full
    averaged = {name.replace("model.", "ema."): tensor for name, tensor in weights.items()}
    assert save(tmp_path / "d", averaged, Metadata(stage="vae")).weights_digest("ema.") == full
    assert Checkpoint(tmp_path / "a").metadata.weights_digest("model.") == full
    other = {
        "value": {**weights, "model.a": weights["model.a"] + 1e-6},
        "name": {"model.c": weights["model.a"], "model.b": weights["model.b"]},
        "one less": {"model.a": weights["model.a"]},
        "one more": {**weights, "model.c": torch.zeros(1)},
    }
    digests = {save(tmp_path / "e", t, Metadata(stage="vae")).weights_digest("model.") for t in other.values()}
    assert len(digests | {full}) == 5


# --- writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
        (OSError("odd"), "odd"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
)
def test_a_failing_writer_leaves_everything_as_it_was(tmp_path: Path, error: Exception, text: str) -> None:
    path = tmp_path / "a"
    for before in (None, b"old"):
        if before:
            path.write_bytes(before)
        with pytest.raises(RunError) as caught:
            atomic_write(path, fail_with(error))
        expected = f"{path} could not be written: {text}{UNTOUCHED}"
        assert str(caught.value) == (expected + MAKE_ROOM if text in FULL else expected)
        assert caught.value.__cause__ is error
        assert [p.read_bytes() for p in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
        (SafetensorError("Error while serializing: I/O error: No space left (os error 28)"), "No space left on device"),
        (SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "full" })'), "No space left on device"),
        (SafetensorError("something else"), "something else"),
    ],
)
def test_a_failing_save_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    monkeypatch.setattr(checkpoint, "save_file", lambda tensors, path, metadata: fail_with(error)(path))
    path = tmp_path / "a"
    for before in (None, b"old"):
        if before:
            path.write_bytes(before)
        with pytest.raises(RunError) as caught:
            saved(path)
        expected = f"{path} could not be written: {text}{UNTOUCHED}"
        assert str(caught.value) == (expected + MAKE_ROOM if text in FULL else expected)
        assert isinstance(caught.value, NoRoom) == (text in FULL)
        assert error in (caught.value.__cause__, caught.value.__cause__.__cause__)
        assert [p.read_bytes() for p in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a mistake"), SystemExit(1)])
def test_any_other_failure_passes_and_leaves_nothing_either(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(type(error)):
        atomic_write(tmp_path / "a", fail_with(error))
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    path = saved(tmp_path / "last.safetensors")
    old = path.read_bytes()

    def full(tensors: object, temporary: Path, metadata: object) -> None:
        temporary.write_bytes(old[:100])
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError) as caught:
        save(path, {"model.a": torch.zeros(1)}, Metadata(stage="vae"))
    assert str(caught.value) == f"{path} could not be written: No space left on device{UNTOUCHED}{MAKE_ROOM}"
    assert caught.value.exit_code == 1
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    assert sorted(read_all(path)) == sorted(some_tensors())


@pytest.mark.parametrize("step", ["replace", "fsync", "chmod"])
def test_a_failure_at_each_step_of_publishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    (tmp_path / "a").write_text("old")

    def broken(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(run_folder.os, step, broken)
    with pytest.raises(RunError, match="could not be written: Input/output error"):
        atomic_write_text(tmp_path / "a", "new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match="could not be written: "):
        saved(tmp_path / "file" / "a")
    with pytest.raises(RunError, match="could not be written: Is a directory"):
        saved(tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.skipif(os.name != "posix", reason="modes and umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        saved(tmp_path / "a")
        atomic_write_text(tmp_path / "b", "text")
    finally:
        assert os.umask(before) == umask
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {mode}


def test_saving_again_replaces(tmp_path: Path) -> None:
    path = saved(tmp_path / "a")
    reader = Checkpoint(path)
    save(path, {"model.a": torch.ones(2)}, Metadata(stage="unet", step=4))
    assert torch.equal(reader.tensor("model.a"), some_tensors()["model.a"])  # what is open stays whole
    assert Checkpoint(path, "unet").metadata.step == 4
    assert list(tmp_path.iterdir()) == [path]


def test_texts(tmp_path: Path) -> None:
    for text in ("eins", "zwei, größer\n"):
        atomic_write_text(tmp_path / "a", text)
        assert (tmp_path / "a").read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


@pytest.mark.parametrize("links", [True, False])
def test_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(source: Path, place: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:  # as on exFAT
        monkeypatch.setattr(run_folder.os, "link", refuse)
    one, two, last = saved(tmp_path / "1", step=1), saved(tmp_path / "2", step=2), tmp_path / "last"
    for source in (one, two, two, one):
        atomic_link(last, source)
        assert last.read_bytes() == source.read_bytes()
        assert last.samefile(source) == links
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "last"]
    one.unlink()
    assert Checkpoint(last).metadata.step == 1


@pytest.mark.skipif(os.name != "posix", reason="modes")
def test_a_link_leaves_the_mode_of_its_source(tmp_path: Path) -> None:
    """Encoding with the VAE of another run must not change that run."""
    source = saved(tmp_path / "a")
    source.chmod(0o440)
    atomic_link(tmp_path / "b", source)
    assert source.stat().st_mode & 0o777 == 0o440
    assert source.samefile(tmp_path / "b")


def test_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "last").write_text("old")
    with pytest.raises(RunError, match="No such file"):
        atomic_link(tmp_path / "last", tmp_path / "none")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_temporaries_are_removed_everywhere_below_and_nothing_else(tmp_path: Path) -> None:
    kept = ["a", "a.tmp", ".hidden", "b.safetensors", "deep"]
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in [*kept[:-1], ".a.x1y2.tmp", ".last.safetensors.abc.tmp", "deep/er/.a.tmp", "deep/.b~host~1~ab.tmp"]:
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)
    assert [p.name for p in (tmp_path / "deep").rglob("*")] == ["er"]
    remove_temporaries(tmp_path / "none")


def test_what_a_killed_process_leaves_is_a_temporary(tmp_path: Path) -> None:
    names: list[str] = []
    atomic_write(tmp_path / "a", lambda temporary: names.append(temporary.name))
    (tmp_path / names[0]).touch()
    remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


# --- damage -------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a").read_bytes()
    chance, path, missed = random.Random(0), tmp_path / "b", []
    for position in range(len(whole)):
        content = bytearray(whole)
        bit = chance.randrange(8)
        content[position] ^= 1 << bit
        path.write_bytes(content)
        try:
            read_all(path)
            missed.append((position, bit))
        except UserError:
            pass
        path.unlink()
    assert not missed


def test_a_file_cut_off_anywhere_is_found(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a").read_bytes()
    for length in (*range(0, 40), *range(40, len(whole), 7), len(whole) - 1):
        (tmp_path / "b").write_bytes(whole[:length])
        with pytest.raises(UserError, match="is damaged or no checkpoint"):
            Checkpoint(tmp_path / "b")
        (tmp_path / "b").unlink()


def test_a_file_with_more_at_its_end_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path / "a")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match="is damaged"):
        Checkpoint(path)


def test_tensors_are_verified_when_they_are_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "a")
    flip(path, data_range(path, "optimizer.0.exp_avg")[0] + 5, bit=3)
    file = Checkpoint(path, "vae")
    assert torch.equal(file.weights()["a"], some_tensors()["ema.a"])
    assert torch.equal(file.weights(ema=0)["a"], some_tensors()["model.a"])
    for read in (
        lambda: file.tensor("optimizer.0.exp_avg"),
        lambda: file.tensors("optimizer."),
        lambda: read_all(path),
    ):
        with pytest.raises(UserError, match=r"is damaged: optimizer\.0\.exp_avg does not match its digest"):
            read()


def test_exchanged_tensors_are_found(tmp_path: Path) -> None:
    path = saved(tmp_path / "a")
    content = bytearray(path.read_bytes())
    (a, b), (c, d) = data_range(path, "model.a"), data_range(path, "ema.a")
    content[a:b], content[c:d] = content[c:d], content[a:b]
    path.write_bytes(content)
    with pytest.raises(UserError, match="does not match its digest"):
        Checkpoint(path).weights()


@pytest.mark.parametrize(
    "change",
    [
        {"step": 4}, {"stage": "unet"}, {"settings": {}}, {"metrics": {}}, {"digest": ""}, {"digests": {}},
        {"lightdiff": "0.0"}, {"extra": {"a": 1}}, {"lineage": {"a": "b"}}, {"novel": 1}, {"step": "x"}, {"format": 0},
    ],
)  # fmt: skip
def test_a_changed_document_is_found(tmp_path: Path, change: dict[str, Any]) -> None:
    metadata = Checkpoint(saved(tmp_path / "a")).metadata.model_dump(mode="json")
    save_file(some_tensors(), tmp_path / "b", metadata={KEY: json.dumps(metadata)})
    assert len(read_all(tmp_path / "b")) == 6
    save_file(some_tensors(), tmp_path / "c", metadata={KEY: json.dumps(metadata | change)})
    with pytest.raises(UserError, match=r"is damaged: its (header or )?metadata"):
        Checkpoint(tmp_path / "c")


# --- other files --------------------------------------------------------------------------------------------------


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    newer = {"format": FORMAT + 1, "lightdiff": "9.8.7", "novel": {"a": 1}}
    save_file({}, tmp_path / "a", metadata={KEY: json.dumps(newer)})
    with pytest.raises(UserError) as caught:
        Checkpoint(tmp_path / "a")
    assert str(caught.value) == (
        f"{tmp_path / 'a'} has format {FORMAT + 1}, written by lightdiff 9.8.7; "
        f"this lightdiff {__version__} reads up to format {FORMAT}: upgrade it"
    )


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_foreign_files(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a", metadata=metadata)
    with pytest.raises(UserError, match=r"is no checkpoint of lightdiff$"):
        Checkpoint(tmp_path / "a")


@pytest.mark.parametrize(
    ("stage", "wanted", "message"),
    [
        ("vae", "unet", "holds a VAE, but a U-Net is needed here"),
        ("unet", "vae", "holds a U-Net, but a VAE is needed here"),
        ("latents", "vae", "holds a shard of latents, but a VAE is needed here"),
        ("novel", "latents", "holds novel, but a shard of latents is needed here"),
    ],
)
def test_the_wrong_stage(tmp_path: Path, stage: str, wanted: str, message: str) -> None:
    path = saved(tmp_path / "a", stage=stage)
    assert Checkpoint(path).metadata.stage == stage
    assert Checkpoint(path, stage).metadata.stage == stage
    with pytest.raises(UserError) as caught:
        Checkpoint(path, wanted)
    assert str(caught.value) == f"{path} {message}"


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such checkpoint"):
        Checkpoint(tmp_path / "none")
    with pytest.raises(UserError, match="is a folder; name a checkpoint file"):
        Checkpoint(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"no checkpoint|no such checkpoint"):
        Checkpoint(tmp_path / "file")
    with pytest.raises(UserError):
        Checkpoint(tmp_path / "file" / "below")


@pytest.mark.parametrize("content", [b"", b"\0", b"PK\x03\x04" * 50, b"\x80\x02}q\x00." * 30, b"{}", b"\xff" * 64])
def test_files_of_other_kinds(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match="is damaged or no checkpoint"):
        Checkpoint(tmp_path / "a")


@PROPERTY
@given(st.binary(max_size=300) | st.tuples(st.binary(max_size=80), st.text(max_size=80)).map(
    lambda pair: struct.pack("<Q", len(pair[1].encode())) + pair[1].encode() + pair[0]
))  # fmt: skip
def test_garbage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError):
        Checkpoint(tmp_path / "a")


@PROPERTY
@given(st.text(max_size=60) | JSON.map(json.dumps) | st.fixed_dictionaries(
    {"stage": st.text() | JSON},
    optional={name: JSON for name in Metadata.model_fields if name != "stage"},
).map(json.dumps))  # fmt: skip
def test_garbage_for_a_document(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a", metadata={KEY: text})
    with pytest.raises(UserError, match=r"is damaged: |upgrade it"):
        Checkpoint(tmp_path / "a")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "null",
        '{"format": 1e400, "stage": "vae"}',
        '{"stage": "vae", "extra": {"a": "\\ud800"}}',
        '{"stage": "vae", "extra": {"\\ud800": 1}}',
        '{"stage": "\\ud800"}',
        '{"stage": "vae", "extra": {"a": NaN}}',
        '{"stage": "vae", "extra": {"a": ' + "[" * 400 + "]" * 400 + "}}",
        '{"stage": "vae", "step": ' + "9" * 5000 + "}",
    ],
)
def test_odd_documents(tmp_path: Path, text: str) -> None:
    save_file({}, tmp_path / "a", metadata={KEY: text})
    with pytest.raises(UserError, match="is damaged"):
        Checkpoint(tmp_path / "a")


def test_settings_of_another_version_are_named(tmp_path: Path) -> None:
    file = saved(tmp_path / "a", settings={"schedule": "sine"}, lightdiff="9.9")
    with pytest.raises(UserError, match=re.escape("schedule: Input should be 'auto'")) as error:
        Checkpoint(file).settings(ScheduleSettings)
    assert f"cannot be read by this lightdiff, {__version__}; 9.9 wrote it" in str(error.value)
