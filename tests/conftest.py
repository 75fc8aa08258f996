"""What several tests share: the command line called in this process, and one tiny run that went through all stages."""

import io
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest

if TYPE_CHECKING:  # nothing here imports torch before it is needed
    from lightdiff.checkpoint import Checkpoint
    from lightdiff.runtime.stage import Stage
    from lightdiff.settings import JobSettings, LoopSettings, TrainVAESettings
    from lightdiff.training.loop import Task, Trainer

WIDE = {"COLUMNS": "400", "LINES": "100", "TERM": "xterm", "NO_COLOR": "1"}  # messages on one line, without colours
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
FRAMES = re.compile(r"[│╭╮╰╯─]+")

VAE_FLAGS = (
    "--resolution 16 --preset tiny --steps 3 --batch-size 6 --workers 0 --lpips-gamma 0 --val-every 2 --save-every 2 "
    "--val-share 0.2 --precision fp32 --device cpu --kl-beta 0.003"
).split()
UNET_FLAGS = "--preset tiny --steps 3 --batch-size 6 --val-every 2 --save-every 2 --precision fp32 --device cpu".split()


@dataclass(frozen=True)
class Result:
    """How a command ended. `out` and `err` are without frames, and with every white space as one blank."""

    code: int
    stdout: str
    stderr: str

    @property
    def out(self) -> str:
        return normalised(self.stdout)

    @property
    def err(self) -> str:
        return normalised(self.stderr)


def normalised(text: str) -> str:
    return " ".join(FRAMES.sub(" ", ESCAPES.sub("", text)).split())


def call(*args: object, **environment: str) -> Result:
    """`lightdiff ARGS` in this process."""
    from lightdiff.cli import main

    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        patch.object(sys, "argv", ["lightdiff", *map(str, args)]),
        patch.dict(os.environ, WIDE | environment),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    return Result(0 if code is None else int(str(code)), out.getvalue(), err.getvalue())


def succeed(*args: object) -> Result:
    """The same, where anything but success is a failure of the test."""
    result = call(*args)
    assert result.code == 0, result.stderr
    return result


def training_stage(
    folder: Path,
    loop: "LoopSettings",
    total_steps: int = 20,
    saved: "Checkpoint | None" = None,
    job: "JobSettings | None" = None,
) -> "Stage[TrainVAESettings]":
    """A training stage in this process alone, for a task that no command trains."""
    import torch

    from lightdiff.checkpoint import Metadata
    from lightdiff.runtime.processes import Processes
    from lightdiff.runtime.stage import Stage
    from lightdiff.settings import JobSettings, TrainVAESettings

    settings = TrainVAESettings(loop=loop, job=job or JobSettings())
    metadata = Metadata(stage="vae", settings=settings.to_save())
    cpu = torch.device("cpu")
    return Stage("vae", settings, cpu, Processes(), folder, saved=saved, metadata=metadata, total_steps=total_steps)


def train_in(stage: "Stage[TrainVAESettings]", task: "Task") -> "Trainer":
    """Train a task in a stage, with signals and errors handled as `open_stage` does it."""
    from lightdiff.runtime.stage import signal_handler, translate_errors
    from lightdiff.training.loop import train

    stage.folder.checkpoints.mkdir(parents=True, exist_ok=True)
    with translate_errors(stage.settings), signal_handler(stage.on_signal):
        return train(task, stage)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small networks are fastest on one thread, and two test processes do not fight for cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A command that was stopped hears no further signal, as its process ends: that of the tests goes on, and hears."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGXCPU") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


@pytest.fixture
def cli() -> Callable[..., Result]:
    """Call the command line: `cli("show", run)` -> Result."""
    return call


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 faces of 16 pixels. Not to be written to."""
    from lightdiff.extras.toy_faces import draw_dataset

    folder = tmp_path_factory.mktemp("data") / "faces"
    draw_dataset(folder, count=24, seed=0, size=16)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, faces: Path) -> Path:
    """A run that went through all five stages. Not to be written to: see `run`."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    succeed("train-vae", "--run", folder, "--data", faces, *VAE_FLAGS)
    succeed("encode", "--run", folder, "--workers", 0, "--device", "cpu")
    succeed("scale", "--run", folder)
    succeed("train-unet", "--run", folder, *UNET_FLAGS)
    succeed("generate", "--run", folder, "--num-images", 2, "--num-steps", 2, "--device", "cpu")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be changed at will."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="session")
def faces_32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 faces of 32 pixels. Not to be written to."""
    from lightdiff.extras.toy_faces import draw_dataset

    folder = tmp_path_factory.mktemp("data") / "faces"
    draw_dataset(folder, count=40, seed=0, size=32)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, faces_32: Path) -> Path:
    """A run by the functions of the first four stages; three shards, in float32. Not to be written to: see `copy`."""
    from small_run import encode_all, train_first, train_second

    from lightdiff.settings import ScaleSettings
    from lightdiff.stages import scale

    folder = tmp_path_factory.mktemp("finished") / "run"
    train_first(folder, faces_32)
    encode_all(folder, shard_size=16, dtype="float32")
    scale.run(ScaleSettings(run=folder, only_mu=False))  # after four steps, mu varies far less than sigma
    train_second(folder)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be changed at will."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception up to Mixed_6e with random weights."""
    import safetensors.torch
    import torch

    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("weights") / "made-up.safetensors"
    kind = type("Empty", (module.FeatureExtractorInceptionV3,), {"load_state_dict": lambda self, found: None})
    empty = path.with_suffix(".pth")
    torch.save({}, empty)
    torch.manual_seed(0)
    state = kind("empty", ["768"], feature_extractor_weights_path=empty).state_dict()
    kept = {n: t.contiguous() for n, t in state.items() if not n.startswith(("Mixed_7", "fc")) and "num_b" not in n}
    safetensors.torch.save_file(kept, path)
    return path
