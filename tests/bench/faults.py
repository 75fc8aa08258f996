"""Stop all stages again and again, at any moment and by any signal, and check that they end as if nothing had happened.

    nox -s faults                             # 100 stops in all
    python -m tests.bench.faults --kills 7    # the short form, which the test suite runs

Each start is the real command, in a child forked from a process that has imported everything and computed nothing, so
that a start takes a fraction of a second. Half of the stops fall at random times, the other half while a file is being
written: when a temporary file shows up, after a random fraction of a moment.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from lightdiff import cli
from lightdiff.checkpoint import Checkpoint
from lightdiff.extras import edit, walk  # noqa: F401, imported before any fork
from lightdiff.extras.toy_faces import draw_dataset
from lightdiff.run_folder import RunFolder, StageFolder, temporaries
from lightdiff.stages import encode, generate, scale, train_unet, train_vae  # noqa: F401, the same

TIMING = ("time", "images_per_s", "memory_mb")
STEPS = 160
LOOP = ["--steps", STEPS, "--batch-size", 6, "--micro-batch", 4, "--warmup-steps", 20, "--device", "cpu"]
LOOP += ["--save-every", 7, "--val-every", 20, "--log-every", 3, "--precision", "fp32", "--keep", 2]
STOPS = {  # what is sent, and the exit codes that may follow: as handled, or before and after that is done
    "SIGKILL": ([signal.SIGKILL], ()),
    "SIGTERM": ([signal.SIGTERM], (143,)),
    "SIGTERM twice": ([signal.SIGTERM, signal.SIGTERM], (143,)),
    "SIGHUP": ([signal.SIGHUP], (129,)),
}
MOST = 8  # stops of one run, until it may finish


class Stage(NamedTuple):
    """A command, the folder that it makes or changes, and its share of the stops."""

    name: str
    folder: Path
    flags: list[object]
    share: int


def stages(home: Path) -> list[Stage]:
    """All stages, on small drawn faces."""
    run, draw = RunFolder(home / "run"), ["--num-steps", 3, "--precision", "fp32", "--device", "cpu"]
    data = ["--data", home / "faces", "--resolution", 16, "--lpips-gamma", 0, "--workers", 0]
    vae = [*data, "--model.encoder-width", 8, "--model.decoder-width", 8, *LOOP]
    unet = ["--model.width", 8, "--model.blocks", 1, "--model.time-dim", 16, *LOOP]
    shards = ["--shard-size", 3, "--batch-size", 3, "--workers", 0, "--precision", "fp32", "--device", "cpu"]
    few = ["--num-images", 12, "--batch-size", 2, *draw]
    out = {name: run.samples / name for name in ("generate", "edit", "walk")}
    picture = sorted((home / "faces").rglob("*.png"))[0]
    return [
        Stage("train-vae", run.vae.path, vae, 28),
        Stage("encode", run.latents, shards, 12),
        Stage("scale", run.latents, [], 6),
        Stage("train-unet", run.unet.path, unet, 28),
        Stage("generate", out["generate"], ["--out", out["generate"], *few], 10),
        Stage("edit", out["edit"], ["--from", picture, "--out", out["edit"], *few], 8),
        Stage("walk", out["walk"], ["--between", "0,1", "--frames", 12, "--out", out["walk"], *few[2:]], 8),
    ]


def start(arguments: list[object], log: Path) -> int:
    """Fork a child that runs the command line; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        import torch

        torch.set_num_threads(1)
        sys.argv = ["lightdiff", *map(str, arguments)]
        cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        os._exit(code)


def finish(arguments: list[object], log: Path) -> None:
    """Run a command to its end."""
    _, status = os.waitpid(start(arguments, log), 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{arguments[0]} ended with {code}:\n{log.read_text()[-3000:]}")


def stop(pid: int, stage: Stage, seconds: float, rng: random.Random, log: Path) -> tuple[str, bool] | None:
    """Stop a child at a moment drawn by `rng`: how, and whether a file was cut off. None if it had ended before."""
    at_write, how = rng.random() < 0.5, rng.choice(list(STOPS))
    moment = time.monotonic() + rng.uniform(0, seconds / 2)
    while time.monotonic() < moment or (at_write and not any(temporaries(stage.folder))):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status):
                raise SystemExit(f"{stage.name} ended by itself, with an error:\n{log.read_text()[-3000:]}")
            return None
        time.sleep(0.0005)
    numbers, codes = STOPS[how]
    for number in numbers:
        time.sleep(rng.uniform(0, 0.002 if at_write else 0.05))
        os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -numbers[0], *codes):
        raise SystemExit(f"{stage.name}: {how} ended it with {code}:\n{log.read_text()[-3000:]}")
    check_saved(stage, log.read_text())
    return None if code == 0 else (how, any(temporaries(stage.folder)))


def check_saved(stage: Stage, said: str) -> None:
    """Check that a training that says at which step it has stopped has saved that."""
    _, _, after = said.partition("stopped: after step ")
    if after:
        step = Checkpoint(StageFolder(stage.folder).last).verify().metadata.step
        if step != int(after.split()[0]):
            raise SystemExit(f"{stage.name} has saved step {step}, but says: {said[-300:]}")


def contents(folder: Path) -> dict[str, object]:
    """What a stage has made, but for what is measured in seconds or bytes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "tensorboard"]
    return {str(p.relative_to(folder)): rows(p) if p.suffix == ".jsonl" else p.read_bytes() for p in files}


def rows(metrics: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl without timing."""
    lines = map(json.loads, metrics.read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def restore(kept: Path, folder: Path) -> None:
    """Make a folder what it was before its stage."""
    shutil.rmtree(folder, ignore_errors=True)
    if kept.is_dir():
        shutil.copytree(kept, folder)


def disturb(stage: Stage, home: Path, kills: int, rng: random.Random) -> Iterator[tuple[list[tuple[str, bool]], str]]:
    """Run a stage undisturbed, then again and again with stops until there were enough.

    Yields the stops of each run, and the first difference between it and the undisturbed one.
    """
    log, kept = home / f"{stage.name}.log", home / f"before-{stage.name}"
    command = [stage.name, "--run", home / "run", *stage.flags]
    if stage.folder.is_dir():
        shutil.copytree(stage.folder, kept)
    began = time.monotonic()
    finish(command, log)
    seconds, straight = time.monotonic() - began, contents(stage.folder)
    while kills > 0:
        restore(kept, stage.folder)
        stops: list[tuple[str, bool]] = []
        while len(stops) < min(MOST, kills) and (cut := stop(start(command, log), stage, seconds, rng, log)):
            stops.append(cut)
        finish(command, log)
        kills -= len(stops)
        disturbed = contents(stage.folder)
        differ = [n for n in sorted(straight.keys() | disturbed.keys()) if straight.get(n) != disturbed.get(n)]
        yield stops, f"{stage.name}: {differ[0]} differs, after {stops}" if differ else ""


def main() -> None:
    """Print the table; exit code 1 if any run differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="stops in all")
    parser.add_argument("--only", help="stop this stage alone")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    rng, console, problems = random.Random(chosen.seed), Console(width=140), list[str]()
    table = Table(title=f"stages stopped by {', '.join(STOPS)}")
    for heading in ("stage", "stops", *STOPS, "while writing", "runs", "equal bit for bit", "seconds"):
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory(prefix="lightdiff-faults-") as name:
        home = Path(name)
        finish_drawing(home)
        whole = stages(home)
        for stage in whole:
            share = stage.share / sum(other.share for other in whole)
            kills = (
                chosen.kills if chosen.only == stage.name else 0 if chosen.only else round(chosen.kills * share) or 1
            )
            began, runs = time.monotonic(), list(disturb(stage, home, kills, rng))
            stops, wrong = [stop for found, _ in runs for stop in found], [problem for _, problem in runs if problem]
            how = [sum(kind == name for kind, _ in stops) for name in STOPS]
            numbers = (len(stops), *how, sum(cut for _, cut in stops), len(runs), len(runs) - len(wrong))
            table.add_row(stage.name, *map(str, numbers), f"{time.monotonic() - began:.0f}")
            console.print(f"{stage.name}: {len(stops)} stops, {len(runs) - len(wrong)} of {len(runs)} runs equal")
            problems += wrong
    console.print(table, *problems, sep="\n")
    sys.exit(1 if problems else 0)


def finish_drawing(home: Path) -> None:
    """Draw the images in a child, so that this process never starts torch's threads."""
    pid = os.fork()
    if not pid:
        draw_dataset(home / "faces", 40, 0, 16)
        os._exit(0)
    os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
