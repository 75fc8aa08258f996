"""Kill both trainings again and again, at any moment, and check that they end as if nothing had happened.

    nox -s faults                             # 100 kills each
    python -m tests.bench.faults --kills 5    # the short form, which the test suite runs

Each start is the real command, in a child forked from a process that has imported everything and computed nothing, so
that a start takes a fraction of a second. Half of the kills fall at random times, the other half while a file is
being saved: when a temporary file shows up in the checkpoints, after a random fraction of a moment.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightdiff import cli
from lightdiff.extras.toy_faces import draw_dataset
from lightdiff.run_folder import RunFolder, StageFolder
from lightdiff.stages import encode, scale, train_unet, train_vae  # noqa: F401, imported before any fork

TIMING = ("time", "images_per_s", "memory_mb")
STEPS = 240
LOOP = ["--steps", STEPS, "--batch-size", 6, "--micro-batch", 4, "--warmup-steps", 20]
LOOP += ["--save-every", 7, "--val-every", 30, "--log-every", 3, "--precision", "fp32", "--keep", 2]


def vae_command(home: Path) -> list[object]:
    """train-vae on small drawn faces."""
    images = ["--data", home / "faces", "--resolution", 16, "--lpips-gamma", 0, "--workers", 0]
    return ["train-vae", "--run", home / "run", *images, "--model.encoder-width", 8, "--model.decoder-width", 8, *LOOP]


def unet_command(home: Path) -> list[object]:
    """train-unet on their latents."""
    return ["train-unet", "--run", home / "run", "--model.width", 8, "--model.blocks", 1, "--model.time-dim", 16, *LOOP]


def start(arguments: list[object], log: Path) -> int:
    """Fork a child that runs the command line; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        import torch

        torch.set_num_threads(1)
        sys.argv = ["lightdiff", *map(str, arguments)]
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        os._exit(code)


def finish(arguments: list[object], log: Path) -> None:
    """Run a command to its end."""
    _, status = os.waitpid(start(arguments, log), 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise SystemExit(f"{arguments[0]} ended with {code}:\n{log.read_text()[-3000:]}")


def half_saved(folder: StageFolder) -> bool:
    """Whether a file is being saved right now."""
    return (
        any(name.endswith(".tmp") for name in os.listdir(folder.checkpoints)) if folder.checkpoints.is_dir() else False
    )


def kill(pid: int, folder: StageFolder, rng: random.Random, at_save: bool) -> bool | None:
    """Kill a child at a moment drawn by `rng`; whether a save was cut short, None if it had ended before."""
    moment = time.monotonic() + rng.uniform(0.1, 1.2)
    saves = rng.randint(1, 6)
    was = False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status):
                raise SystemExit("a start ended by itself, with an error")
            return None
        now = half_saved(folder)
        saves -= now and not was
        was = now
        if (at_save and saves <= 0 and now) or time.monotonic() > moment + (5 if at_save else 0):
            break
        time.sleep(0.0005)
    if at_save:
        time.sleep(rng.uniform(0, 0.002))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return half_saved(folder) if os.WIFSIGNALED(status) else None


def same(straight: StageFolder, disturbed: StageFolder) -> str:
    """The first difference between two finished runs; empty if there is none."""
    for name in ("last", "best"):
        left, right = getattr(straight, name), getattr(disturbed, name)
        if left.read_bytes() != right.read_bytes():
            return f"{name}.safetensors differs"
    left, right = ([without_timing(line) for line in f.metrics.read_text().splitlines()] for f in (straight, disturbed))
    if left != right:
        return "metrics.jsonl differs"
    pictures = {path.name: path.read_bytes() for path in straight.images.iterdir()}
    if pictures != {path.name: path.read_bytes() for path in disturbed.images.iterdir()}:
        return "a picture differs"
    return ""


def without_timing(line: str) -> dict[str, float]:
    """One line of metrics.jsonl without what is measured in seconds or bytes."""
    return {name: value for name, value in json.loads(line).items() if name not in TIMING}


def disturb(
    stage: str, command: list[object], home: Path, kills: int, rng: random.Random, say: Callable[[str], None]
) -> dict[str, object]:
    """Train once undisturbed, then run after run with kills until there were enough, and count the equal runs."""
    folder, log = getattr(RunFolder(home / "run"), stage), home / f"{stage}.log"
    finish(command, log)
    straight = StageFolder(home / f"{stage}-straight")
    folder.path.rename(straight.path)
    found = {"kills": 0, "while saving": 0, "runs": 0, "equal": 0, "problems": []}
    while found["kills"] < kills:
        while True:
            cut = kill(start(command, log), folder, rng, at_save=found["kills"] % 2 == 1)
            if cut is None:
                break
            found["kills"] += 1
            found["while saving"] += cut
            if found["kills"] >= kills:
                finish(command, log)
                break
        problem = same(straight, folder)
        found["runs"] += 1
        found["equal"] += not problem
        found["problems"] += [problem] if problem else []
        say(f"{stage}: {found['kills']} of {kills} kills, {found['equal']} of {found['runs']} runs equal")
        shutil.rmtree(folder.path)
    straight.path.rename(folder.path)  # for what comes after it
    return found


def main() -> None:
    """Print the table; exit code 1 if any run differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="kills for each training")
    parser.add_argument("--only", choices=["vae", "unet"], help="kill this training alone")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    rng = random.Random(chosen.seed)
    console = Console()
    table = Table(title=f"{chosen.kills} SIGKILLs each, in runs of {STEPS} steps that save every 7")
    for heading in ("training", "kills", "while saving", "runs finished", "equal bit for bit", "seconds"):
        table.add_column(heading, justify="right")
    bad = 0
    with tempfile.TemporaryDirectory(prefix="lightdiff-faults-") as name, contextlib.suppress(KeyboardInterrupt):
        home = Path(name)
        finish_drawing(home)
        for stage, command in (("vae", vae_command(home)), ("unet", unet_command(home))):
            began = time.monotonic()
            kills = chosen.kills if chosen.only in (None, stage) else 0
            found = disturb(stage, command, home, kills, rng, console.print)
            numbers = (found["kills"], found["while saving"], found["runs"], found["equal"])
            table.add_row(f"train-{stage}", *map(str, numbers), f"{time.monotonic() - began:.0f}")
            bad += found["runs"] - found["equal"]
            console.print(*found["problems"], sep="\n", end="\n" if found["problems"] else "")
            if stage == "vae":
                finish(["encode", "--run", home / "run"], home / "encode.log")
                finish(["scale", "--run", home / "run"], home / "scale.log")
    console.print(table)
    sys.exit(1 if bad else 0)


def finish_drawing(home: Path) -> None:
    """Draw the images in a child, so that this process never starts torch's threads."""
    pid = os.fork()
    if not pid:
        draw_dataset(home / "faces", 40, 0, 16)
        os._exit(0)
    os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
