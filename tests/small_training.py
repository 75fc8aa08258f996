"""Trainings small enough to repeat, and how two are compared: a task whose numbers are known, and a VAE of 16 px."""

import json
import math
import os
import signal
from pathlib import Path

import torch
from conftest import train_in, training_stage
from torch import nn

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.order import generator
from lightdiff.pictures import save_grid
from lightdiff.run_folder import StageFolder
from lightdiff.settings import ImageSettings, LoopSettings, TrainVAESettings, VAELossSettings, VAESettings, with_changes
from lightdiff.training.loop import Trainer

TIMING = ("time", "images_per_s", "memory_mb")


class Regression:
    """Fit y = x @ target with noise on x: a task whose every number can be checked."""

    train_items = 10
    val_items = 1

    def __init__(self, dtype=torch.float64):
        torch.manual_seed(0)
        self.model = nn.Linear(5, 3).to(dtype)
        self.target = torch.randn(5, 3, dtype=dtype)
        self.validations = 0
        self.poison = ()

    def batches(self, start, steps):
        for i in range(steps):
            yield start + 10 * i

    def prepare(self, batch, rng):
        x = torch.randn(10, 5, dtype=torch.float64, generator=generator("cpu", 0, "data", batch))
        noise = torch.randn(10, 5, dtype=torch.float64, generator=rng)
        x = x + 0.01 * noise
        if batch // 10 in self.poison:
            x[0, 0] = math.nan
        return {"x": x, "y": x @ self.target}

    def loss(self, model, part):
        return {"loss": (model(part["x"]) - part["y"]).square().mean()}

    def validate(self, model):
        self.validations += 1
        return {"loss": float((model.weight.T - self.target).square().mean().detach())}

    def names(self, start):
        return [f"item-{start + i}" for i in range(10)]

    def picture(self, model, path):
        save_grid(path, torch.zeros(1, 3, 4, 4), columns=1)


class Wide(Regression):
    """The same with a matrix large enough for Muon, and a bias that is left to AdamW."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(5, 24), nn.SiLU(), nn.Linear(24, 20), nn.SiLU(), nn.Linear(20, 3)).double()

    def validate(self, model):
        return {"loss": float(model[2].weight.square().mean().detach())}


def loop(**changes):
    base = {"batch_size": 10, "lr": 0.02, "warmup_steps": 3, "val_every": 10, "save_every": 5, "log_every": 1}
    return LoopSettings(**(base | {"precision": "fp32"} | changes))


def fit(folder, steps=20, task=None, saved=None, job=None, **changes):
    stage = training_stage(folder, loop(**changes), steps, saved, job)
    return train_in(stage, task or Regression()), stage.folder


def vae_settings(run, faces, **changes):
    """Eight steps of a VAE, of one block a side."""
    settings = TrainVAESettings(
        run=run,
        images=ImageSettings(data=(faces,), resolution=16, val_share=0.2),
        loss=VAELossSettings(lpips_gamma=0),
        loop=loop(steps=8, batch_size=6, micro_batch=4, val_every=4, save_every=4, workers=0, lr=1e-3),
        model=VAESettings(encoder_width=8, decoder_width=8, encoder_blocks=(1,), decoder_blocks=(1,)),
    )
    return with_changes(settings, loop=with_changes(settings.loop, **changes))


def at_step(step, do):
    """A training step that is followed by something, if it is this one."""
    train_step = Trainer.train_step

    def stepping(self, batch):
        losses = train_step(self, batch)
        if self.step == step:
            do()
        return losses

    return stepping


def stopping_at(step):
    """A training step that is followed by SIGTERM, if it is this one."""
    return at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_timing(rows):
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def tensors(path: Path):
    return Checkpoint(path).tensors("")


def assert_same_files(a: Path, b: Path):
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def same_runs(a: Path, b: Path) -> None:
    """Whether two runs have ended alike: snapshots with all they say of themselves, pictures, metrics."""
    left, right = StageFolder(a), StageFolder(b)
    names = [sorted(p.name for p in f.checkpoints.glob("*.safetensors")) for f in (left, right)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (left.checkpoints / name).read_bytes() == (right.checkpoints / name).read_bytes(), name
    assert sorted(p.name for p in left.images.iterdir()) == sorted(p.name for p in right.images.iterdir())
    assert without_timing(lines(left.metrics)) == without_timing(lines(right.metrics))
