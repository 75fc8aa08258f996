"""A folder that one process alone writes to: locks, the words in them, and file systems without any."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lightdiff.errors import NoRoom, UserError
from lightdiff.run_folder import process_runs, start_time
from lightdiff.runtime.lock import open_stage_dir

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
HERE = socket.gethostname()


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def no_locks(request, monkeypatch):
    """A file system that has no locks."""

    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr("fcntl.flock", refuse)


def take(folder: Path, force: bool = False) -> str:
    """Take a folder and let go of it; the lock's words meanwhile."""
    with open_stage_dir(folder, force) as opened:
        return (opened / ".lock").read_text()


def test_where_there_are_no_locks_hosts_are_told_apart_by_the_files_words(tmp_path, no_locks):
    folder = tmp_path / "run" / "vae"
    assert take(folder).split()[:2] == [HERE, str(os.getpid())]
    assert not (tmp_path / "run").exists()
    folder.mkdir(parents=True)
    (folder / ".lock").write_text("elsewhere 17\n")
    with pytest.raises(UserError, match="was locked by process 17 on elsewhere"):
        take(folder)
    assert take(folder, force=True).startswith(HERE)


def test_where_there_are_no_locks_a_process_that_runs_on_this_host_is_respected(tmp_path, no_locks):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        for words in (f"{HERE} {other.pid}", f"{HERE} {other.pid} {start_time(other.pid)}"):
            (tmp_path / ".lock").write_text(words + "\n")
            with pytest.raises(UserError, match=f"is in use by process {other.pid} on {HERE}: wait for it"):
                take(tmp_path)
            assert (tmp_path / ".lock").read_text() == words + "\n"
        if sys.platform == "linux":  # the number has come again
            (tmp_path / ".lock").write_text(f"{HERE} {other.pid} 1\n")
            assert take(tmp_path)
        other.kill()
        other.wait()
    (tmp_path / ".lock").write_text(words)
    assert take(tmp_path)
    with open_stage_dir(tmp_path, force=False), pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        take(tmp_path)


@pytest.mark.parametrize(
    "words", ["", "\n", "one", "a b c d", f"{HERE} \N{ARABIC-INDIC DIGIT TWO}x", "x" * 10_000, "\0\xff"]
)
def test_words_that_are_no_lock_of_ours_are_nobodys(tmp_path, words):
    (tmp_path / ".lock").write_text(words, encoding="utf-8")
    assert take(tmp_path)
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("kind", ["link", "link to nothing", "hard link", "pipe", "folder"])
def test_what_is_no_lock_of_ours_is_neither_followed_nor_written_to(tmp_path, kind):
    secret, folder = tmp_path / "token", tmp_path / "latents"
    folder.mkdir()
    secret.write_text("mine")
    lock = folder / ".lock"
    make = {
        "link": lambda: lock.symlink_to(secret),
        "link to nothing": lambda: lock.symlink_to(tmp_path / "none"),
        "hard link": lambda: os.link(secret, lock),
        "pipe": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
    }
    make[kind]()
    with pytest.raises(UserError, match=r"latents/\.lock is a link.*, and no lock of lightdiff: remove it"):
        take(folder)
    assert secret.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents", "token"]


def test_a_full_disk_is_told_of(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lightdiff.runtime.lock.open_own", full)
    with pytest.raises(NoRoom, match=r"\.lock could not be written: No space left on device; .*make room"):
        take(tmp_path / "vae")
    monkeypatch.undo()
    assert take(tmp_path / "vae")


def test_whether_a_process_runs():
    assert process_runs(os.getpid())
    assert process_runs(os.getpid(), start_time(os.getpid()))
    assert process_runs(1)  # another user's, perhaps
    assert not process_runs(10**18)
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        ended.wait()
    assert not process_runs(ended.pid)


def test_a_lock_goes_with_its_process_even_if_a_child_lives_on(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(tmp_path / "vae")], stdout=subprocess.PIPE) as other:
        child = int(other.stdout.readline())
        with pytest.raises(UserError, match=rf"vae is in use by process {other.pid} on {HERE}: wait"):
            take(tmp_path / "vae")
        other.kill()
        other.wait()
        assert take(tmp_path / "vae")
        os.kill(child, signal.SIGKILL)


HOLD_LOCK = """
import os, sys, time
from pathlib import Path
from lightdiff.runtime.lock import open_stage_dir
with open_stage_dir(Path(sys.argv[1]), force=False):
    if os.fork() == 0:
        print(os.getpid(), flush=True)  # after the hooks that a fork runs in the child
        os.close(1)
        time.sleep(600)
        os._exit(0)
    time.sleep(600)
"""
