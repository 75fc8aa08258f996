"""How often networks are compiled: once for each shape that training sees, and for no last batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import VAE_FLAGS
from test_perceptual import made_up_state
from torch import nn

from lightdiff.extras.compile import note_recompiled

HOME = Path(__file__).parent.parent


def end_of(*command: object) -> str:
    """The last line of a command's messages: how many graphs were compiled, and whether the compiler was imported."""
    arguments = [sys.executable, "-m", "tests.compiled_graphs", *map(str, command)]
    done = subprocess.run(arguments, cwd=HOME, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.999, 0])
def test_sixteen_transforms_of_latents_have_four_shapes_and_validation_adds_none(
    tmp_path: Path, faces: Path, decay: float
) -> None:
    torch.save(made_up_state("squeeze"), weights := tmp_path / "squeeze.pth")
    flags = [*VAE_FLAGS, "--equivariance", 1, "--steps", 16, "--val-every", 8, "--ema-decay", decay, "--compile", "on"]
    flags += ["--lpips-gamma", 0.1, "--lpips-net", "squeeze", "--lpips-weights", weights]
    end = end_of("train-vae", "--run", tmp_path / "run", "--data", faces, *flags)
    assert end.startswith("9 graphs"), "one of the encoder; of the decoder and of LPIPS, one for each of four sizes"


@pytest.mark.slow
def test_a_last_batch_of_samples_is_as_large_as_the_others(run: Path, tmp_path: Path) -> None:
    flags = ["--num-images", 5, "--batch-size", 2, "--num-steps", 3, "--device", "cpu"]
    end = end_of("generate", "--run", run, "--out", tmp_path / "compiled", *flags, "--compile", "on")
    assert end == "1 graphs; compiler imported: True"
    end = end_of("generate", "--run", run, "--out", tmp_path / "plain", *flags)
    assert end == "0 graphs; compiler imported: False"


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_other_shapes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    network = torch.compile(nn.Linear(3, 2), backend="eager", dynamic=False)
    network(torch.ones(4, 3))
    known = note_recompiled(0)
    network(torch.ones(4, 3))
    assert note_recompiled(known) == known
    assert capsys.readouterr().err == ""
    network(torch.ones(5, 3))
    assert note_recompiled(known) == known + 1
    assert capsys.readouterr().err.strip() == f"note: 1 more compiled for shapes that are new: {known + 1} graphs"
