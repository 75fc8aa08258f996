"""Kills, failing disks and hostile files. `nox -s faults` is the long form of the first test."""

import errno
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lightdiff import checkpoint, run_folder
from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.data.index import read_index
from lightdiff.errors import LightdiffError, NoRoom, RunError, UserError
from lightdiff.extras.toy_faces import draw_dataset
from lightdiff.models.vae import VAE
from lightdiff.pipeline import load_vae
from lightdiff.run_folder import RunFolder
from lightdiff.runtime.stage import translate_errors
from lightdiff.settings import (
    EncodeSettings,
    ImageSettings,
    LoopSettings,
    StageSettings,
    TrainVAESettings,
    VAELossSettings,
    VAESettings,
    with_changes,
)
from lightdiff.stages import encode, train_vae
from lightdiff.training.timing import memory_in_use

HOME = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="forks and kills")
def test_some_stops_of_each_stage_change_nothing():
    words = [sys.executable, "-m", "tests.bench.faults", "--kills", "7"]
    run = subprocess.run(words, cwd=HOME, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(re.findall(r"(?m)^[a-z-]+: [1-9]\d* stops, (\d+) of \1 runs equal$", run.stdout)) == 7, run.stdout


# --- a disk that fails ----------------------------------------------------------------------------------------------

STEPS_OF_A_SAVE = ("write", "chmod", "fsync", "replace", "fsync of the folder")


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs but what the operating system does."""


@pytest.mark.parametrize("what", [errno.ENOSPC, errno.EIO, Killed])
@pytest.mark.parametrize("where", STEPS_OF_A_SAVE)
def test_whatever_fails_in_a_save_a_whole_checkpoint_is_there(tmp_path, monkeypatch, where, what):
    path = tmp_path / "last.safetensors"
    old, new = ({"model.a": torch.full((1000,), value)} for value in (1.0, 2.0))
    checkpoint.save(path, old, Metadata(stage="vae", step=1))

    def fail(*_, **__):
        raise Killed if what is Killed else OSError(what, os.strerror(what))

    def half_written(tensors, file, metadata):
        Path(file).write_bytes(b"\x10\0\0\0\0\0\0\0{")
        fail()

    def folders_fail(handle):
        if os.fstat(handle).st_mode & 0o040000:
            fail()

    patches = {
        "write": (checkpoint, "save_file", half_written),
        "chmod": (run_folder.os, "chmod", fail),
        "fsync": (run_folder.os, "fsync", fail),
        "replace": (run_folder.os, "replace", fail),
        "fsync of the folder": (run_folder.os, "fsync", folders_fail),
    }
    with monkeypatch.context() as patched:
        patched.setattr(*patches[where])
        if what is Killed:
            patched.setattr(Path, "unlink", fail)  # a killed process tidies nothing up
        with pytest.raises(Killed if what is Killed else RunError):
            checkpoint.save(path, new, Metadata(stage="vae", step=2))
    found = Checkpoint(path).verify()
    published = where == "fsync of the folder"
    assert found.metadata.step == (2 if published else 1)
    torch.testing.assert_close(found.tensor("model.a"), (new if published else old)["model.a"])
    run_folder.remove_temporaries(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]
    checkpoint.save(path, new, Metadata(stage="vae", step=3))
    assert Checkpoint(path).verify().metadata.step == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("where", ["os.fsync", "os.open", "os.replace"])
@pytest.mark.parametrize("command", ["scale", "generate --num-steps 2 --num-images 2", "train-unet --steps 5"])
def test_a_disk_that_takes_nothing_more_is_told_of_by_every_stage(run, cli, monkeypatch, command, where, number):
    """In pictures, documents, snapshots and locks alike."""

    work = getattr(os, where.removeprefix("os."))

    def fail(path, flags=os.O_RDONLY, *more, **options):
        if where == "os.open" and not flags & (os.O_WRONLY | os.O_RDWR):
            return work(path, flags, *more, **options)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(where, fail)
        result = cli(*command.split(), "--run", run, *["--device", "cpu"] * (command != "scale"))
    assert result.code == 1, result.err
    assert f"could not be written: {os.strerror(number)}; what was saved before is untouched" in result.err
    assert ("make room and run the same command again" in result.err) == (number != errno.EROFS)
    assert "Traceback" not in result.err
    assert "should not happen" not in result.err
    assert not list(run.rglob("*.tmp"))
    assert cli(*command.split(), "--run", run, *["--device", "cpu"] * (command != "scale")).code == 0


def test_what_the_system_refuses_is_told_in_a_sentence():
    for error, kind, said in (
        (
            OSError(errno.ENOSPC, "No space left on device", "/a/b"),
            NoRoom,
            "/a/b could not be written: No space left on",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), NoRoom, "a file could not be written: No space left on"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b"),
            RunError,
            "/a/b: No such file or directory",
        ),
        (OSError("encoder error -2"), RunError, "the system refused a file or connection: encoder error -2"),
    ):
        with pytest.raises(kind, match=f"^{said}"), translate_errors(StageSettings()):
            raise error


def test_a_shard_that_cannot_be_written_ends_encoding_and_the_next_start_resumes(tmp_path, monkeypatch):
    """Shards are written in the background while the next one is encoded."""
    draw_dataset(tmp_path / "faces", 12, 0, 16)
    images = ImageSettings(data=(tmp_path / "faces",), resolution=16)
    model = VAESettings(encoder_width=4, decoder_width=4, encoder_blocks=(1,), decoder_blocks=(1,)).resolved(16)
    weights = {f"model.{name}": value for name, value in VAE(model).state_dict().items()}
    settings = TrainVAESettings(images=images, model=model).to_save()
    run = RunFolder(tmp_path / "run")
    checkpoint.save(run.vae.best, weights, Metadata(stage="vae", settings=settings))
    encoding = EncodeSettings(run=run.path, images=images, shard_size=2, batch_size=2)
    write = checkpoint.save_file

    def full(tensors, path, metadata):
        if "shard-00002" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, path, metadata=metadata)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", full)
        with pytest.raises(RunError, match=r"shard-00002\.safetensors could not be written: No space left on device"):
            encode.run(encoding)
    written = sorted(path.name for path in run.latents.glob("shard-*"))
    assert written[:2] == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert len(written) < 5  # it did not go on to the end
    kept = {name: (run.latents / name).stat().st_mtime_ns for name in written}
    encode.run(encoding)
    assert read_index(run.latents).complete
    assert {name: (run.latents / name).stat().st_mtime_ns for name in written} == kept


# --- hostile files --------------------------------------------------------------------------------------------------


def opened_safely(path: Path) -> None:
    """Open and read all of a file that is no VAE: it is refused in a sentence, and nothing else happens."""
    with pytest.raises(LightdiffError) as refused:
        load_vae(Checkpoint(path).verify(), torch.device("cpu"))
    assert str(path) in str(refused.value)
    assert len(str(refused.value)) < 1000


def raw_file(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def sealed(tensors: dict, settings: dict, **metadata) -> bytes:
    """A file whose digests are right but whose settings are hostile."""
    whole = Metadata(stage="vae", settings=settings, **metadata)
    layout = {name: (kind, shape) for name, (kind, shape, _) in tensors.items()}
    digests = {n: checkpoint.hashlib.sha256(data).hexdigest() for n, (_, _, data) in tensors.items()}
    whole = whole.model_copy(update={"digests": digests})
    whole = whole.model_copy(update={"digest": whole.compute_digest(layout)})
    header: dict = {"__metadata__": {checkpoint.KEY: json.dumps(whole.model_dump(mode="json"))}}
    place = 0
    for name, (kind, shape, data) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [place, place + len(data)]}
        place += len(data)
    return raw_file(json.dumps(header).encode(), b"".join(data for _, _, data in tensors.values()))


FUZZ = settings(
    max_examples=300, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@FUZZ
@given(data=st.binary(max_size=400))
@example(b"")
@example(raw_file(b"{}", length=1 << 60))
@example(raw_file(b'{"__metadata__":' + b"[" * 100_000))
@example(raw_file(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'))
@example(
    raw_file(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
        bytes(12),
    )
)
@example(raw_file(b'{"__metadata__":{"lightdiff":"' + b"9" * 100_000 + b'"}}'))
@example(raw_file(b'{"__metadata__":{"lightdiff":"' + b"[" * 50_000 + b'"}}'))
def test_any_bytes_are_refused_in_a_sentence(tmp_path, data):
    path = tmp_path / "file.safetensors"
    path.write_bytes(data)
    opened_safely(path)


@FUZZ
@given(metadata=JSON)
def test_any_document_is_refused_in_a_sentence(tmp_path, metadata):
    path = tmp_path / "file.safetensors"
    path.write_bytes(raw_file(json.dumps({"__metadata__": {checkpoint.KEY: json.dumps(metadata)}}).encode()))
    opened_safely(path)


SIZES = st.integers(-(2**70), 2**70) | st.integers(1, 2**20)


@FUZZ
@given(
    model=st.fixed_dictionaries(
        {},
        optional={
            "encoder_channels": st.lists(SIZES, max_size=30),
            "decoder_channels": st.lists(SIZES, max_size=30),
            "encoder_blocks": st.lists(SIZES, max_size=4),
            "mid_blocks": SIZES,
            "latent_channels": SIZES,
            "architecture": st.sampled_from(["default", "original", "none"]),
            "attention": st.booleans(),
            "anything": JSON,
        },
    )
)
@example({"encoder_channels": [2**14] * 10, "decoder_channels": [2**14] * 10, "mid_blocks": 64})
@example({"encoder_channels": [2**40, 2**40], "decoder_channels": [2**40, 2**40]})
def test_no_settings_make_loading_allocate_what_the_file_does_not_hold(tmp_path, model):
    """The digests are right: the settings alone ask for petabytes. The network is built without memory at first."""
    path = tmp_path / "file.safetensors"
    path.write_bytes(sealed({"model.a": ("F32", [2], bytes(8))}, {"model": model}))
    before = checkpoint_memory()
    with pytest.raises(UserError):
        load_vae(Checkpoint(path).verify(), torch.device("cpu"))
    assert checkpoint_memory() - before < 300e6


def test_a_state_whose_settings_are_not_those_of_its_tensors_is_not_resumed(tmp_path):
    """Each process looks before it builds the network; 2 TB are asked for here."""
    run = RunFolder(tmp_path / "run")
    draw_dataset(tmp_path / "faces", 4, 0, 16)
    run.vae.checkpoints.mkdir(parents=True)
    model = VAESettings(encoder_channels=(2**14,) * 8, decoder_channels=(2**14,) * 8, mid_blocks=64)
    settings = TrainVAESettings(
        run=run.path,
        images=ImageSettings(data=(tmp_path / "faces",), resolution=4096),
        loss=VAELossSettings(lpips_gamma=0),
        model=model,
        loop=LoopSettings(precision="fp32"),
    ).resolved()
    tensors = {"model.a": ("F32", [2], bytes(8)), "optimizer.exp_avg.a": ("F32", [2], bytes(8))}
    run.vae.last.write_bytes(sealed(tensors, settings.to_save()))
    before = checkpoint_memory()
    with pytest.raises(UserError, match="does not fit this architecture"):
        train_vae.run(settings)
    with pytest.raises(
        UserError, match=r"was started with --model\.\S+ .*: choose another --run, or leave that setting"
    ):
        train_vae.run(with_changes(settings, model=VAESettings()))
    assert checkpoint_memory() - before < 300e6


def checkpoint_memory() -> float:
    """Peak memory of this process, in bytes."""
    return memory_in_use(torch.device("cpu"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "vae.safetensors"
    model = VAESettings(encoder_width=4, decoder_width=4, encoder_blocks=(1,), decoder_blocks=(1,)).resolved(8)
    tensors = {f"model.{name}": value for name, value in VAE(model).state_dict().items()}
    checkpoint.save(path, tensors, Metadata(stage="vae", settings={"model": model.model_dump(mode="json")}))
    load_vae(Checkpoint(path), torch.device("cpu"))
    return path.read_bytes()


@FUZZ
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cuts=st.booleans())
def test_a_changed_file_is_found_to_be_damaged(tmp_path, whole, share, bit, cuts):
    data, place = bytearray(whole), int(share * len(whole))
    if cuts:
        del data[place:]
    else:
        data[place] ^= 1 << bit
    path = tmp_path / "file.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged|is no checkpoint|there is no such"):
        Checkpoint(path).verify()
