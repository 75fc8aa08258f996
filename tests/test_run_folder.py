"""Where files lie below a run folder: fixed names, and what is said when they are not there."""

import contextlib
import errno
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightdiff import run_folder
from lightdiff.checkpoint import Checkpoint
from lightdiff.data.images import BadImage, load_image
from lightdiff.errors import NoRoom, RunError, UserError
from lightdiff.extras.set_aside import set_aside
from lightdiff.run_folder import (
    RunFolder,
    StageFolder,
    append_text,
    ensure_writable,
    find_latents,
    find_unet,
    find_vae,
    open_regular,
    read_json,
    remove_abandoned,
)

Find = Callable[[Path | None, RunFolder], Path]


def touched(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize("name", ["vae", "unet"])
def test_a_stages_files(name: str) -> None:
    stage: StageFolder = getattr(RunFolder(Path("runs/a")), name)
    paths = {
        "settings": stage.settings,
        "metrics": stage.metrics,
        "images": stage.images,
        "bad_files": stage.bad_files,
        "checkpoints": stage.checkpoints,
        "last": stage.last,
        "best": stage.best,
        "step": stage.step(2000),
    }
    assert {key: path.as_posix() for key, path in paths.items()} == {
        "settings": f"runs/a/{name}/settings.json",
        "metrics": f"runs/a/{name}/metrics.jsonl",
        "images": f"runs/a/{name}/images",
        "bad_files": f"runs/a/{name}/bad-files.txt",
        "checkpoints": f"runs/a/{name}/checkpoints",
        "last": f"runs/a/{name}/checkpoints/last.safetensors",
        "best": f"runs/a/{name}/checkpoints/best.safetensors",
        "step": f"runs/a/{name}/checkpoints/step-00002000.safetensors",
    }


def test_a_runs_folders() -> None:
    run = RunFolder(Path("runs/a"))
    assert run.latents.as_posix() == "runs/a/latents"
    assert run.samples.as_posix() == "runs/a/samples"


def test_step_files_come_oldest_first(tmp_path: Path) -> None:
    stage = RunFolder(tmp_path).vae
    assert stage.steps() == []
    for step in (10_000, 900, 0, 99_999_999, 2000):
        touched(stage.step(step))
    for other in (stage.last, stage.best, stage.checkpoints / ".step-1.safetensors.x.tmp"):
        touched(other)
    assert stage.steps() == [stage.step(step) for step in (0, 900, 2000, 10_000, 99_999_999)]


# --- what a later stage finds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("find", "name", "first", "second"),
    [(find_vae, "vae", "best", "last"), (find_unet, "unet", "last", "best")],
)
@pytest.mark.parametrize("given", [False, True])
def test_checkpoints_are_found(tmp_path: Path, find: Find, name: str, first: str, second: str, given: bool) -> None:
    run, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "other")
    elsewhere: StageFolder = getattr(run if given else other, name)
    touched(elsewhere.best)
    touched(elsewhere.last)  # nothing to be found there
    place = other.path if given else None
    stage: StageFolder = getattr(other if given else run, name)
    touched(stage.step(3))
    message = f"{stage.path} holds no checkpoint: run 'lightdiff train-{name}' first, or point --{name} at one"
    other.path.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        find(place, run)
    touched(getattr(stage, second))
    assert find(place, run) == getattr(stage, second)
    touched(getattr(stage, first))
    assert find(place, run) == getattr(stage, first)


def test_a_stages_own_folder_is_as_good_as_its_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    for find, stage in ((find_vae, run.vae), (find_unet, run.unet)):
        stage.checkpoints.mkdir(parents=True)
        stage.last.touch()
        assert find(stage.path, RunFolder(tmp_path)) == find(run.path, RunFolder(tmp_path)) == stage.last


@pytest.mark.parametrize(("find", "flag"), [(find_vae, "--vae"), (find_unet, "--unet")])
def test_a_checkpoint_that_is_given(tmp_path: Path, find: Find, flag: str) -> None:
    run = RunFolder(tmp_path / "run")
    touched(run.vae.best)
    touched(run.unet.last)
    file = touched(tmp_path / "my.safetensors")
    assert find(file, run) == file
    missing = tmp_path / "none"
    message = f"{flag}: {missing} does not exist; name a checkpoint file or a run folder"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        find(missing, run)


def test_a_folder_in_a_checkpoints_place_is_none(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.vae.best.mkdir(parents=True)
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_vae(None, run)
    touched(run.vae.last)
    assert find_vae(None, run) == run.vae.last


def test_latents_are_found(tmp_path: Path) -> None:
    run, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "other")
    end = "holds no latents: run 'lightdiff encode' first, or point --latents at some"
    for given, named in ((None, run.latents), (other.path, other.latents)):
        with pytest.raises(UserError, match=f"^{re.escape(f'{named} {end}')}$"):
            find_latents(given, run)
    touched(run.latents / "index.safetensors")
    assert find_latents(None, run) == run.latents
    with pytest.raises(UserError, match="holds no latents"):
        find_latents(other.path, run)
    touched(other.latents / "index.safetensors")
    assert find_latents(other.path, run) == other.latents
    assert find_latents(other.latents, run) == other.latents
    assert find_latents(None, run) == run.latents


# --- folders ------------------------------------------------------------------------------------------------------


def test_ensure_writable_makes_the_folder_and_leaves_what_is_there(tmp_path: Path) -> None:
    ensure_writable(tmp_path / "a" / "b")
    file = touched(tmp_path / "a" / "b" / "c")
    ensure_writable(tmp_path / "a" / "b")
    assert file.is_file()


@pytest.mark.parametrize("below", ["", "deep", "deep/er"])
def test_ensure_writable_where_a_file_is_in_the_way(tmp_path: Path, below: str) -> None:
    place = touched(tmp_path / "a") / below
    with pytest.raises(UserError, match=f"^{re.escape(str(place))} cannot be made: a file of that name is in the way$"):
        ensure_writable(place)


def test_ensure_writable_where_nothing_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, int]] = []
    monkeypatch.setattr(run_folder.os, "access", lambda path, mode: asked.append((path, mode)))
    with pytest.raises(UserError, match=r"cannot be written to: check its owner and permissions$"):
        ensure_writable(tmp_path / "a")
    assert asked == [(tmp_path / "a", os.W_OK | os.X_OK)]


def test_ensure_writable_where_no_folder_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot be made: Read-only file system$"):
        ensure_writable(tmp_path / "a")


def test_set_aside_counts_on(tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    touched(folder / ".lock")  # hidden files stay
    assert set_aside(folder) is None
    for number in (1, 2, 3):
        touched(folder / "file").write_text(str(number))
        touched(folder / "checkpoints" / "last.safetensors")
        assert set_aside(folder) == tmp_path / f"vae.old-{number}"
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert [(tmp_path / f"vae.old-{n}" / "file").read_text() for n in (1, 2, 3)] == ["1", "2", "3"]
    assert all((tmp_path / f"vae.old-{n}" / "checkpoints" / "last.safetensors").is_file() for n in (1, 2, 3))
    (tmp_path / "vae.old-2").rename(tmp_path / "gone")
    touched(folder / "file")
    assert set_aside(folder) == tmp_path / "vae.old-2"


def test_set_aside_spares_a_file_of_that_name(tmp_path: Path) -> None:
    touched(tmp_path / "a.b.old-1")
    touched(tmp_path / "a.b" / "file")
    assert set_aside(tmp_path / "a.b") == tmp_path / "a.b.old-2"


# --- files --------------------------------------------------------------------------------------------------------


def test_read_json(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"ä": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "a") == {"ä": [1, None]}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b'"text"', b'{"a": 1}}', b'{"a": "\xff"}'])
def test_read_json_of_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(RunError, match=f"^{re.escape(str(tmp_path / 'a'))} cannot be read: .+"):
        read_json(tmp_path / "a")


def test_read_json_of_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(RunError, match=f"^{re.escape(str(path))} cannot be read: "):
            read_json(path)


@pytest.fixture(params=["pipe", "device", "socket", "link to a pipe"])
def irregular(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A name in a folder that no file is behind."""
    path, kind = tmp_path / "x", request.param
    with contextlib.ExitStack() as held:
        if kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "socket":
            held.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX))).bind(os.path.relpath(path))
        else:
            os.mkfifo(tmp_path / "pipe")
            path.symlink_to("pipe") if kind.startswith("link") else (tmp_path / "pipe").rename(path)
        yield path


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with named pipes")
def test_only_regular_files_are_opened_and_nothing_else_is_waited_for(irregular: Path) -> None:
    with pytest.raises(OSError, match=r"regular file|No such device"):
        open_regular(irregular)
    with pytest.raises(RunError, match="cannot be read"):
        read_json(irregular)
    with pytest.raises(UserError, match="is no regular file; name a checkpoint file"):
        Checkpoint(irregular)
    with pytest.raises(BadImage, match=r"regular file|No such device"):
        load_image(irregular)


def test_a_regular_file_is_opened_for_reading_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"text")
    (tmp_path / "b").symlink_to("a")
    for name in ("a", "b"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"text"
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


# --- what a stage keeps writing to ---------------------------------------------------------------------------------


def test_append_text_begins_a_file_and_adds_to_it(tmp_path: Path) -> None:
    for text in ("a\n", "\udce4b\n"):  # a file's name need not be UTF-8
        append_text(tmp_path / "log", text)
    assert (tmp_path / "log").read_bytes() == b"a\n\xe4b\n"


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_append_text_follows_no_link_and_waits_for_no_pipe(tmp_path: Path) -> None:
    log, secret = tmp_path / "log", touched(tmp_path / "secret")
    for make in (lambda: log.symlink_to(secret), lambda: log.symlink_to(tmp_path / "none"), lambda: os.mkfifo(log)):
        make()
        with pytest.raises(RunError, match=r"log could not be written: a link, a pipe or a device is in its place"):
            append_text(log, "text")
        log.unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert secret.read_text() == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "open_own", lambda path, flags: os.open(path, os.O_WRONLY))
    with pytest.raises(NoRoom, match=r"^/dev/full could not be written: No space left on device; .*make room"):
        append_text(Path("/dev/full"), "text")


# --- half-written files --------------------------------------------------------------------------------------------

HERE = socket.gethostname()
PLACES = ["", "vae/images", "vae/checkpoints", "latents", "samples/0001", "evaluation/samples-1", "unet/tensorboard"]


@pytest.mark.parametrize("place", PLACES)
def test_what_killed_processes_left_goes_everywhere_in_a_run(tmp_path: Path, place: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        ended.wait()
    gone = [f".a.png~{HERE}~{ended.pid}~0123abcd.tmp", ".a.abcd.tmp"]
    stays = [f".a~{HERE}~{os.getpid()}~ab.tmp", ".a~elsewhere~1~ab.tmp", ".lock", "a.tmp"]
    for name in [*gone, *stays]:
        touched(tmp_path / place / name)
    old = touched(tmp_path / place / ".b~elsewhere~1~ab.tmp")
    os.utime(old, (0, 0))
    remove_abandoned(RunFolder(tmp_path))
    assert {path.name for path in (tmp_path / place).iterdir() if path.is_file()} == set(stays)


def test_the_users_own_folders_in_a_run_are_not_searched(tmp_path: Path) -> None:
    mine = touched(tmp_path / "data" / ".a.abcd.tmp")
    remove_abandoned(RunFolder(tmp_path))
    assert mine.exists()
