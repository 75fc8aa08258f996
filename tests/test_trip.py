"""How much code there is to read: from a command to where its work begins, and in all. These figures may only fall."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import succeed

from lightdiff.extras.toy_faces import draw_dataset
from tests.bench.code_size import code_lines, in_core, sources

HOME = Path(__file__).parent.parent
SLACK = 0.05  # a bound further than this above its figure is to be lowered

# From a command to the first optimizer step, or to the first call of the U-Net.
TRIP = {
    "train-vae": {"lines": 898, "files": 32},
    "train-unet": {"lines": 789, "files": 28},
    "generate": {"lines": 616, "files": 23},
}
CORE_LINES = 5_718
FILE_LINES = 400  # of a core file, with docstrings and blank lines


def check(name: str, figure: int, bound: int) -> list[str]:
    """What is wrong with a figure, if anything."""
    if figure > bound:
        return [f"{name}: {figure:,}, at most {bound:,} allowed"]
    if figure < bound * (1 - SLACK):
        return [f"{name}: {figure:,}, well below {bound:,}: lower the bound, which may only fall"]
    return []


def trip(*arguments: object) -> dict[str, int]:
    """The figures of tests/bench/trip.py, in a process that no coverage traces and that finds no GPU."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.trip", *map(str, arguments)],
        cwd=HOME,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {"lines": found["lines"], "files": len(found["files"])}


@pytest.mark.slow
def test_the_trip_from_a_command_to_its_work(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "faces", 60, size=32)
    images = ["--data", tmp_path / "faces", "--resolution", "32", "--lpips-gamma", "0"]
    run = ["--run", tmp_path / "run"]
    short = ["--preset", "tiny", "--steps", "2", "--device", "cpu"]
    found = {"train-vae": trip("train-vae", "--run", tmp_path / "new", *images)}
    succeed("train-vae", *run, *images, *short)
    succeed("encode", *run, "--device", "cpu")
    succeed("scale", *run)
    found["train-unet"] = trip("train-unet", *run)
    succeed("train-unet", *run, *short, "--restart")
    found["generate"] = trip("generate", *run)
    problems = [
        problem
        for command, bounds in TRIP.items()
        for unit, bound in bounds.items()
        for problem in check(f"{unit} of {command}", found[command][unit], bound)
    ]
    assert not problems, "\n".join(problems)


def test_lines_of_code_in_the_core() -> None:
    count = sum(code_lines(source) for file, source in sources().items() if in_core(file))
    assert not check("lines of code", count, CORE_LINES)


def test_no_file_of_the_core_is_long() -> None:
    lengths = {file: len(source.splitlines()) for file, source in sources().items() if in_core(file)}
    assert {file: n for file, n in lengths.items() if n > FILE_LINES} == {}


def test_lines_without_docstrings_comments_and_blank_lines() -> None:
    source = '''"""A module
of two lines."""

# a comment
def f(x):
    """What f gives."""
    text = """a string
    that is code"""

    return x, text  # why
'''
    assert code_lines(source) == 4
