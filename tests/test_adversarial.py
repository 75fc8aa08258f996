"""The trial of an adversarial loss: without weight it is the VAE's own training, with weight it moves the decoder."""

from pathlib import Path

import pytest
import torch

from lightdiff.data.table import ImageList, ImageTable
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.stage import Stage
from lightdiff.settings import TrainVAESettings
from lightdiff.stages.train_vae import VAETask
from lightdiff.training.loop import Trainer
from tests.bench.adversarial import AdversarialTask, discriminator

LEARNS = 30  # steps


def settings() -> TrainVAESettings:
    layer = {
        "images": {"resolution": 32},
        "loss": {"lpips_gamma": 0},
        "loop": {"batch_size": 8, "lr": 1e-3, "warmup_steps": 0, "lr_schedule": "constant", "precision": "fp32"},
        "model": {"encoder_width": 16, "decoder_width": 16},
        "freeze_encoder": True,
        "init_from": "vae.safetensors",  # whose weights are not needed here
    }
    return TrainVAESettings.model_validate(layer).resolved()


class Prepared:
    """A task that is handed its batches ready for use."""

    def prepare(self, batch, rng):
        return batch


class Plain(Prepared, VAETask):
    pass


class Opposed(Prepared, AdversarialTask):
    pass


def batch(step: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(step)
    x = torch.rand(8, 3, 1, 1, generator=rng).mul(2).sub(1).expand(-1, -1, 32, 32)
    stripes = torch.where(torch.arange(32) % 4 < 2, 0.3, -0.3)
    return {
        "x": (x + stripes).clamp(-1, 1),
        "noise": torch.randn(8, 4, 8, 8, generator=rng),
        "change": torch.tensor([[4, 0]]).expand(8, -1),
    }


def stage(steps: int) -> Stage[TrainVAESettings]:
    return Stage("vae", settings(), torch.device("cpu"), Processes(), Path(), total_steps=steps)


def trained(kind, weight=0.0, starts_at=0, steps=3):
    task = kind(stage(steps), ImageList(ImageTable.of([])))
    if kind is Opposed:
        task.oppose(weight, 1e-3, starts_at)
    trainer, said = Trainer(task, task.stage), []
    for step in range(steps):
        said.append(trainer.train_step(batch(step)))
    return task.model.state_dict(), said


def test_a_discriminator_judges_patches():
    assert discriminator()(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(("weight", "starts_at"), [(0.0, 0), (0.5, 3)])
def test_without_weight_or_before_its_start_the_training_is_the_vaes_own(weight, starts_at):
    plain, _ = trained(Plain)
    opposed, _ = trained(Opposed, weight, starts_at)
    for name, value in plain.items():
        torch.testing.assert_close(opposed[name], value, rtol=0, atol=1e-7, msg=name)


def test_with_weight_the_decoder_is_moved_and_the_frozen_encoder_is_not():
    plain, _ = trained(Plain)
    opposed, _ = trained(Opposed, 0.5)
    moved = {name for name, value in plain.items() if not torch.allclose(opposed[name], value, rtol=0, atol=1e-6)}
    assert moved
    assert all(name.startswith("decoder.") for name in moved)


def test_the_weight_is_adaptive():
    """The adversarial gradient at the last convolution is as long as the error's, times the weight."""
    task = Opposed(stage(1), ImageList(ImageTable.of([])))
    grown = []
    for weight in (0.0, 0.5):
        task.oppose(weight, 0.0, 0)
        last = task.model.decoder.body[-1].weight
        (gradient,) = torch.autograd.grad(task.loss(task.model, batch(0))["loss"], last)
        grown.append(gradient)
    ratio = (grown[1] - grown[0]).norm() / grown[0].norm()
    assert float(ratio) == pytest.approx(0.5, rel=0.02)  # 1e-4 keeps it from growing beyond all bounds


def test_the_discriminator_learns_to_tell_reconstructions_from_images():
    _, said = trained(Opposed, 0.5, starts_at=LEARNS, steps=LEARNS)
    assert float(said[0]["judged"]) == pytest.approx(1, abs=0.1)  # it has no opinion yet
    assert float(said[-1]["judged"]) < 0.5
