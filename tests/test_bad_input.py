"""Every mistake ends in one message that says what to do, and in exit code 2 (1 where it shows only at run time)."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import UNET_FLAGS, VAE_FLAGS, call, succeed
from safetensors import safe_open
from safetensors.torch import save_file

from lightdiff.data.index import read_index

ON_CPU = ("--device", "cpu")
DRAW = ("--num-images", 1, "--num-steps", 2, *ON_CPU)


@pytest.fixture
def refused(cli):
    """Call the command line, see that it is refused in one message, and return that message."""

    def call(*args, code=2):
        result = cli(*args)
        assert result.code == code, result.stderr or result.stdout
        assert "Traceback" not in result.stderr
        assert "should not happen" not in result.err
        assert result.out == ""
        told = [line for line in result.stderr.splitlines() if line.startswith(("error:", "╭─ Error"))]
        assert len(told) == 1, result.stderr
        before = result.stderr[: result.stderr.index(told[0])]
        assert code == 1 or before == "" or before.startswith(("Usage:", "resuming from step")), result.stderr
        return result.err.partition("error: ")[2] or result.err

    return call


@pytest.fixture
def new(tmp_path) -> Path:
    """The path of a run that does not exist yet."""
    return tmp_path / "new"


def vae(run: Path, stage: str = "vae", name: str = "last") -> Path:
    return run / stage / "checkpoints" / f"{name}.safetensors"


# --- images ---------------------------------------------------------------------------------------------------------


def test_no_data_folder_of_that_name(refused, new, tmp_path):
    told = refused("train-vae", "--run", new, "--data", tmp_path / "absent", *VAE_FLAGS)
    assert f"--data: {tmp_path / 'absent'} does not exist" in told
    assert not new.exists()


def test_no_data_folder_given(refused, new):
    assert "--data: name a folder or an archive of images" in refused("train-vae", "--run", new, *VAE_FLAGS)
    assert not new.exists()


def test_empty_data_folder(refused, new, tmp_path):
    (tmp_path / "empty").mkdir()
    told = refused("train-vae", "--run", new, "--data", tmp_path / "empty", *VAE_FLAGS)
    assert f"{tmp_path / 'empty'} holds no image" in told
    assert ".png" in told


def test_no_readable_image(refused, new, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nand then nothing")
    told = refused("train-vae", "--run", new, "--data", tmp_path / "data", *VAE_FLAGS, code=1)
    assert "1 of 1" in told
    assert str(new / "vae" / "bad-files.txt") in told


def test_a_file_for_a_folder(refused, new, tmp_path):
    (tmp_path / "image.png").touch()
    told = refused("train-vae", "--run", new, "--data", tmp_path / "image.png", *VAE_FLAGS)
    assert "image.png is a file; name the folder that holds the images" in told


def test_inspect_and_show_of_nothing(refused, tmp_path):
    assert "does not exist" in refused("inspect", tmp_path / "absent")
    assert "absent does not exist" in refused("show", tmp_path / "absent")
    assert "holds no checkpoint and no latents" in refused("show", tmp_path)
    assert "PATH" in refused("show")


def test_mistaken_data_is_found_before_lpips_is_fetched(refused, new, tmp_path, monkeypatch):
    """Half a gigabyte is not to be downloaded for a misspelt folder."""

    def fetch(*args):
        raise AssertionError("fetched")

    monkeypatch.setattr("lightdiff.stages.train_vae.VAELoss", fetch)
    told = refused("train-vae", "--run", new, "--data", tmp_path / "absent", "--precision", "fp32")
    assert "does not exist" in told


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "many"], ["--steps", "whole number"]),
        (["--steps", "1.5"], ["--steps", "whole number"]),
        (["--lr", "fast"], ["--lr", "number"]),
        (["--model.encoder-channels", "8,wide"], ["--model.encoder-channels", "integer", "wide"]),
        (["--lr=-1"], ["--lr", "greater than 0", "-1"]),
        (["--steps", "0"], ["--steps", "greater than or equal to 1", "0"]),
        (["--val-share", "1"], ["--val-share", "less than 1"]),
        (["--beta2", "1"], ["--beta2", "less than 1"]),
        (["--resolution", "4"], ["--resolution", "8", "4"]),
        (["--model.encoder-channels", "8"], ["--model", "two numbers or more"]),
        (["--model.encoder-channels", "8,8", "--model.decoder-channels", "8,8,8"], ["2 encoder_channels", "3 decoder"]),
        (["--device", "abacus"], ["--device", "abacus", "cuda"]),
        (["--lpips-net", "resnet"], ["--lpips-net", "resnet", "vgg", "squeeze"]),
        (["--preset", "huge"], ["--preset", "huge", "tiny", "original"]),
        (["--background", "reddish"], ["reddish"]),
        (["--stpes", "3"], ["--stpes", "--steps"]),
        (["--data"], ["--data", "argument"]),
        (["runs/mine"], ["runs/mine"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("-") else "",
)
def test_wrong_values(refused, new, faces, flags, words):
    told = refused("train-vae", "--run", new, "--data", faces, *VAE_FLAGS, *flags)
    for word in words:
        assert word in told


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--eta", "2"], ["--eta", "less than or equal to 1", "2"]),
        (["--num-images", "0"], ["--num-images", "1"]),
        (["--name", "a/b"], ["--name", "a/b"]),
        (["--resolution", "17"], ["--resolution", "17", "16 or 18"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("-") else "",
)
def test_wrong_values_of_generate(refused, run, flags, words):
    told = refused("generate", "--run", run, *DRAW, *flags)
    for word in words:
        assert word in told


def test_several_mistakes_are_told_at_once(refused, new):
    told = refused("train-vae", "--run", new, "--lr=-1", "--clip=-2")
    assert "--lr" in told
    assert "--clip" in told


def test_no_such_command(refused):
    assert "trian-vae" in refused("trian-vae")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "[loop]\nstepz = 3\n", ["unknown setting loop.stepz", "loop.steps"]),
        ("a.toml", "lr = 0.1\n", ["unknown setting lr", "loop.lr"]),
        ("a.toml", "[loop]\nbatch-size = 3\n", ["unknown setting loop.batch-size", "loop.batch_size"]),
        ("a.toml", "[loop]\nlr = 'fast'\n", ["--lr", "fast"]),
        ("a.toml", "[loop\n", ["a.toml", "TOML"]),
        ("a.toml", "loop = 3\n", ["loop"]),
        ("a.json", "{'loop': 3}", ["a.json", "JSON"]),
        ("a.json", "[1, 2]", ["a.json holds no settings"]),
        ("a.json", "", ["a.json", "JSON"]),
        ("a.toml", "run = 3\n", ["--run", "3"]),
        ("a.json", '{"run": null}', ["--run"]),
    ],
)
def test_mistakes_in_a_settings_file(refused, tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    told = refused("train-vae", "--settings", tmp_path / name)
    for word in words:
        assert word in told


def test_no_settings_file_of_that_name(refused, tmp_path):
    assert "--settings: " in refused("train-vae", "--settings", tmp_path / "absent.toml")
    assert "cannot be read" in refused("train-vae", "--settings", tmp_path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--resolution", "31"], "31 is not divisible by 2; the nearest that fit: 30 or 32"),
        (["--resolution", "34"], "34 is not divisible by 4; the nearest that fit: 32 or 36"),
        (["--resolution", "30", "--model.encoder-channels", "8,8,8"], "by 4; the nearest that fit: 28 or 32"),
        (["--resolution", "9", "--model.encoder-channels", "8,8,8,8,8"], "the nearest that fit: 16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_resolution_that_does_not_divide(refused, new, faces, flags, words):
    assert words in refused("train-vae", "--run", new, "--data", faces, *VAE_FLAGS, *flags)


def test_a_device_that_is_absent(refused, run, new, faces, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("train-vae", "encode", "train-unet", "generate"):
        told = refused(command, "--run", run, "--device", "cuda")
        assert told.startswith("--device cuda: ")
        assert "--device cpu" in told


def test_no_file_with_lpips_weights(refused, new, faces, tmp_path):
    more = ("--lpips-gamma", 0.1, "--lpips-weights", tmp_path / "absent.pth")
    told = refused("train-vae", "--run", new, "--data", faces, *VAE_FLAGS, *more)
    assert f"--lpips-weights: there is no file {tmp_path / 'absent.pth'}" in told


# --- the order of the stages ----------------------------------------------------------------------------------------


def test_encode_before_training(refused, new):
    assert "run 'lightdiff train-vae' first" in refused("encode", "--run", new)


def test_scale_before_encode(refused, run):
    shutil.rmtree(run / "latents")
    assert "run 'lightdiff encode' first" in refused("scale", "--run", run)
    assert "run 'lightdiff encode' first" in refused("train-unet", "--run", run)


def test_train_unet_before_scale(refused, run):
    latents = run / "latents"
    read_index(latents).model_copy(update={"statistics": None}).write(latents / "index.safetensors")
    assert "run 'lightdiff scale' first" in refused("train-unet", "--run", run)


def test_generate_before_training(refused, run, new):
    assert "run 'lightdiff train-unet' first" in refused("generate", "--run", new)
    shutil.rmtree(run / "unet")
    assert "run 'lightdiff train-unet' first" in refused("generate", "--run", run)


def test_unfinished_latents(refused, run):
    latents = run / "latents"
    read_index(latents).model_copy(update={"digest": ""}).write(latents / "index.safetensors")
    for command in ("scale", "train-unet"):
        assert "run 'lightdiff encode' again" in refused(command, "--run", run)


@pytest.mark.parametrize(("flag", "command"), [("--unet", "generate"), ("--vae", "generate"), ("--vae", "encode")])
def test_a_network_that_is_not_there(refused, run, flag, command, tmp_path):
    told = refused(command, "--run", run, flag, tmp_path / "absent")
    assert f"{flag}: {tmp_path / 'absent'} does not exist" in told


# --- damaged and mistaken checkpoints -------------------------------------------------------------------------------


def truncated(file: Path, run: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def emptied(file: Path, run: Path) -> None:
    file.write_bytes(b"")


def flipped_in_the_tensors(file: Path, run: Path) -> None:
    with safe_open(file, framework="pt") as snapshot:
        tensors = {name: snapshot.get_tensor(name) for name in snapshot.keys()}
        metadata = snapshot.metadata()
    for name, tensor in tensors.items():  # one in each, so that every reader meets one
        if tensor.numel():
            tensors[name] = tensor.clone()
            tensors[name].view(-1).view(torch.uint8)[0] ^= 1
    save_file(tensors, file, metadata=metadata)


def flipped_in_the_document(file: Path, run: Path) -> None:
    data = bytearray(file.read_bytes())
    data[data.index(b"images_seen") + 15] ^= 1  # a digit of a number
    file.write_bytes(data)


def of_another_stage(file: Path, run: Path) -> None:
    other = "vae" if "unet" in file.parts or "unet" in file.name else "unet"
    shutil.copy(vae(run, other), file.with_suffix(".tmp-copy"))
    os.replace(file.with_suffix(".tmp-copy"), file)


def of_a_newer_format(file: Path, run: Path) -> None:
    with safe_open(file, framework="pt") as snapshot:
        tensors = {name: snapshot.get_tensor(name) for name in snapshot.keys()}
        metadata = json.loads(snapshot.metadata()["lightdiff"])
    save_file(tensors, file, metadata={"lightdiff": json.dumps(metadata | {"format": 2, "lightdiff": "9.9"})})


def of_something_else(file: Path, run: Path) -> None:
    file.write_text("these are no weights" * 10)


def of_another_program(file: Path, run: Path) -> None:
    save_file({"weight": torch.zeros(2)}, file)


HARM = {
    truncated: "is damaged or no checkpoint",
    emptied: "is damaged or no checkpoint",
    flipped_in_the_tensors: "does not match its digest",
    flipped_in_the_document: "is damaged",
    of_another_stage: "is needed here",
    of_a_newer_format: "written by lightdiff 9.9",
    of_something_else: "is damaged or no checkpoint",
    of_another_program: "is no checkpoint of lightdiff",
}
harm = pytest.mark.parametrize(("harm", "words"), HARM.items(), ids=lambda value: getattr(value, "__name__", ""))


@harm
@pytest.mark.parametrize(("flag", "stage"), [("--unet", "unet"), ("--vae", "vae")])
def test_a_bad_checkpoint_is_named(refused, run, tmp_path, harm, words, flag, stage):
    file = Path(shutil.copy(vae(run, stage), tmp_path / f"given-{stage}.safetensors"))
    harm(file, run)
    told = refused("generate", "--run", run, flag, file, *DRAW)
    assert str(file) in told
    assert words in told
    assert len(list((run / "samples").iterdir())) == 1


@harm
@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_a_runs_own_bad_checkpoint_is_named(refused, run, harm, words, stage):
    file = vae(run, stage)
    for older in file.parent.glob("step-*"):  # else one of them is taken instead
        older.unlink()
    harm(file, run)
    told = refused(f"train-{stage}", "--run", run, "--steps", 4)
    assert str(file) in told
    assert words in told


@pytest.mark.parametrize("command", ["encode", "generate"])
def test_of_another_stage_says_which(refused, run, command):
    told = refused(command, "--run", run, "--vae", vae(run, "unet"))
    assert "holds a U-Net, but a VAE is needed here" in told


@harm
def test_show_of_a_bad_checkpoint(cli, run, harm, words):
    if harm in (of_another_stage, flipped_in_the_tensors):  # show takes every stage, and reads no tensor
        return
    harm(vae(run), run)
    result = cli("show", vae(run))
    assert (result.code, result.out) == (2, "")
    assert words in result.err


def test_a_damaged_index_of_latents(refused, run):
    (run / "latents" / "index.safetensors").write_text("{")
    assert "index.safetensors is damaged" in refused("scale", "--run", run, code=1)


def test_a_damaged_shard_of_latents(refused, run):
    shard = run / "latents" / "shard-00000.safetensors"
    truncated(shard, run)
    for command in ("scale", "train-unet"):
        assert f"{shard} is damaged" in refused(command, "--run", run)


def test_no_checkpoint_to_import(refused, new, tmp_path):
    assert "there is no such file" in refused("import", tmp_path / "absent.pth", "--run", new)
    (tmp_path / "text.pth").write_text("no weights")
    assert "text.pth" in refused("import", tmp_path / "text.pth", "--run", new)


# --- runs that do not belong together -------------------------------------------------------------------------------


def digest(file: Path) -> str:
    from lightdiff.checkpoint import Checkpoint
    from lightdiff.pipeline import vae_digest

    return vae_digest(Checkpoint(file, "vae"))[:8]


def test_a_unet_with_another_vae(refused, run, new, faces):
    succeed("train-vae", "--run", new, "--data", faces, *VAE_FLAGS, "--seed", 1)
    ours, other = digest(vae(run, name="best")), digest(vae(new, name="best"))
    assert ours != other
    told = refused("generate", "--run", run, "--vae", new, *DRAW)
    assert f"VAE {ours}" in told
    assert f"holds {other}" in told
    told = refused("encode", "--run", run, "--vae", new)
    assert f"{run / 'latents'} was started with --vae {ours}, not {other}: " in told
    assert ours in told
    assert other in told


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--resolution", "32"], "--resolution 16, not 32"),
        (["--model.encoder-width", "24"], "--model.encoder-width 16, not 24"),
        (["--seed", "1"], "--seed 0, not 1"),
        (["--kl-beta", "1"], "--kl-beta 0.003, not 1.0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_folder_that_holds_another_run(refused, run, flags, words):
    told = refused("train-vae", "--run", run, *flags)
    assert f"{run / 'vae'} was started with {words}: " in told
    assert "--run" in told


def test_a_run_of_other_images(refused, run, faces, tmp_path):
    """Its folder may have moved, and files may have come; but other images are another run."""
    moved = Path(shutil.copytree(faces, tmp_path / "moved"))
    assert call("train-vae", "--run", run, "--data", moved, "--steps", 4).code == 0
    few = tmp_path / "few"
    for file in sorted(faces.rglob("*.png"))[:10]:
        (few / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, few / file.parent.name)
    told = refused("train-vae", "--run", run, "--data", few, "--steps", 5)
    assert f"--data: {few} holds other images than {run / 'vae'} was trained on" in told


def test_a_folder_that_holds_another_unet(refused, run):
    told = refused("train-unet", "--run", run, *UNET_FLAGS, "--model.time-dim", 64)
    assert f"{run / 'unet'} was started with --model.time-dim 128, not 64: " in told


def test_a_folder_that_holds_other_latents(refused, run):
    told = refused("encode", "--run", run, "--dtype", "float32")
    assert f"{run / 'latents'} was started with --dtype float16, not float32: " in told
    assert "'lightdiff encode --restart'" in told


# --- where results go -----------------------------------------------------------------------------------------------


def test_no_write_permission(refused, run, new, faces, monkeypatch):
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and allowed(path, mode))
    for args in (
        ("train-vae", "--run", new, "--data", faces, *VAE_FLAGS),
        ("train-unet", "--run", run, "--steps", 9),
        ("encode", "--run", run),
        ("generate", "--run", run, *DRAW),
    ):
        told = refused(*args)
        assert "cannot be written to: check its owner and permissions" in told


def test_a_file_where_the_run_folder_should_be(refused, new, faces):
    new.write_text("in the way")
    told = refused("train-vae", "--run", new, "--data", faces, *VAE_FLAGS)
    assert "a file of that name is in the way" in told


@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_a_full_disk_while_saving(cli, run, stage):
    """A real write that fails half-way: no file may grow beyond a limit, as on a full disk."""
    import resource

    last = vae(run, stage)
    before = last.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        result = cli(f"train-{stage}", "--run", run, "--steps", 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (result.code, result.out) == (1, "")
    assert "could not be written: " in result.err
    assert "File too large" in result.err
    assert "what was saved before is untouched" in result.err
    assert "Traceback" not in result.err
    assert last.read_bytes() == before
    assert not list(last.parent.glob(".*"))
    assert cli("show", last).code == 0
    assert cli(f"train-{stage}", "--run", run, "--steps", 5).code == 0  # and it goes on from there


def test_images_are_not_overwritten(refused, run):
    out = run / "samples" / "0001"
    before = (out / "00000.png").read_bytes()
    told = refused("generate", "--run", run, "--out", out, *DRAW, "--seed", 5)
    assert f"{out} was started with --seed 0, not 5: " in told
    assert "choose another --out, or a --name" in told
    assert (out / "00000.png").read_bytes() == before


def test_more_steps_than_levels(refused, run):
    told = refused("generate", "--run", run, "--num-images", 1, "--num-steps", 2000, *ON_CPU)
    assert told.startswith("--num-steps: 2000 steps asked for")
    assert "usable levels" in told


# --- stopping, and odd names ----------------------------------------------------------------------------------------


def test_an_error_of_ours_is_told_without_a_traceback(cli, run, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("one [bold]over[/] zero")

    monkeypatch.setattr("lightdiff.stages.scale.run", broken)
    result = cli("scale", "--run", run)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ZeroDivisionError: one [bold]over[/] zero This should not happen; --debug")
    with pytest.raises(ZeroDivisionError):
        cli("--debug", "scale", "--run", run)


def test_ctrl_c_says_that_nothing_is_lost(cli, run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightdiff.stages.scale.read_index", interrupted)
    result = cli("scale", "--run", run)
    assert result.code == 130
    assert "interrupted; what was saved is untouched" in result.err


def test_brackets_in_the_name_of_a_run(cli, run):
    place = run.rename(run.with_name("run[bold]1"))
    result = cli("generate", "--run", place, *DRAW)
    assert result.code == 0
    assert f"are in {place / 'samples' / '0002'}" in result.err


def test_a_home_of_a_user_who_does_not_exist(refused, new):
    told = refused("train-vae", "--run", new, "--data", "~nobody-of-this-name/photos")
    assert "--data: ~nobody-of-this-name: there is no such user" in told
