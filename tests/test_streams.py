"""Streams whose reader goes away: messages end nothing, results that cannot be written are told of."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")

TALK = """
import os, sys, warnings
from rich.console import Console
from lightdiff.runtime import outlive_readers
outlive_readers()
sys.stdin.readline()
for n in range(3):
    print("message", n, file=sys.stderr)
    Console(stderr=True).print("message of rich", n)
    warnings.warn("a warning", stacklevel=1)
    os.write(2, b"a message of a library in C\\n")
print("result")
with open(sys.argv[1], "w") as done:
    done.write("done")
"""


def talk(done: Path, **streams: object) -> tuple[subprocess.Popen, int]:
    words = [sys.executable, "-c", TALK, str(done)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(words, stdin=subprocess.PIPE, env=environment, **streams)


@pytest.mark.parametrize("gone", [("stderr",), ("stdout",), ("stdout", "stderr")])
def test_a_reader_that_goes_away_ends_nothing(tmp_path, gone):
    process = talk(tmp_path / "done", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for name in gone:
        getattr(process, name).close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(30) == 0
    assert (tmp_path / "done").read_text() == "done"
    if "stdout" not in gone:
        assert process.stdout.read() == b"result\n"
    for stream in (process.stdout, process.stderr):
        stream.close()


def test_both_in_one_pipe(tmp_path):
    process = talk(tmp_path / "done", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.close()
    process.communicate(b"\n", timeout=600)
    assert (tmp_path / "done").read_text() == "done"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_log_on_a_full_disk_ends_nothing_but_results_are_not_lost_in_silence(tmp_path):
    with open("/dev/full", "w") as full:
        process = talk(tmp_path / "done", stdout=subprocess.DEVNULL, stderr=full)
        process.communicate(b"\n", timeout=600)
        assert process.returncode == 0
        assert (tmp_path / "done").read_text() == "done"
        words = [sys.executable, "-m", "lightdiff", "presets"]
        told = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert told.returncode != 0
    assert "No space left on device" in told.stderr
    assert "should not happen" not in told.stderr


def test_closed_streams_do_not_become_files(tmp_path):
    """The next file that is opened would get their numbers, and the messages."""
    shell = f'exec "$0" -c "$1" "{tmp_path}/done" <<< "" >&- 2>&-'
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(["bash", "-c", shell, sys.executable, TALK], env=environment, check=False, timeout=600)
    assert done.returncode == 0
    assert (tmp_path / "done").read_text() == "done"
