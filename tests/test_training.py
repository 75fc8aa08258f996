"""The loop on a small task: accumulation, learning rate, averages, losses that are not finite, speed, memory."""

import itertools
import time
from contextlib import nullcontext

import pytest
import torch
from conftest import training_stage
from pydantic import ValidationError
from small_training import Regression, Wide, fit, lines, loop, stopping_at, tensors

from lightdiff.checkpoint import Checkpoint
from lightdiff.errors import RunError, Stopped, UserError
from lightdiff.run_folder import StageFolder
from lightdiff.settings import LoopSettings
from lightdiff.training.loop import Trainer
from lightdiff.training.optimizers import learning_rate
from lightdiff.training.timing import SAVING, Stopwatch


@pytest.mark.parametrize("micro", [1, 3, 5, 7])
def test_micro_batches_equal_one_batch(tmp_path, micro):
    whole, _ = fit(tmp_path / "whole")
    parts, _ = fit(tmp_path / "parts", micro_batch=micro)
    # float64: the two differ by the order of additions alone
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict(), rtol=1e-11, atol=1e-12)


def test_learning_rate_follows_its_formula():
    settings = loop(lr=1.0, warmup_steps=4, lr_schedule="cosine")
    rates = [learning_rate(settings, step, 24) for step in range(24)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[14] == pytest.approx(0.5)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    assert learning_rate(settings, 24, 24) == pytest.approx(0)
    constant = loop(lr=1.0, warmup_steps=4, lr_schedule="constant")
    assert [learning_rate(constant, step, 24) for step in (3, 4, 23, 1000)] == [1.0] * 4
    assert learning_rate(loop(lr=1.0, warmup_steps=0), 0, 10) == 1.0


@pytest.mark.parametrize("stop_at", [None, 12])
def test_images_a_second_are_those_of_steps_and_a_line_says_where_the_time_went(tmp_path, monkeypatch, capsys, stop_at):
    """Each batch takes half a second, a step 1 s (the first 9 s), a validation 20 s, its picture 10 s, a save 4 s."""
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def slow(method, seconds):
        def spend(self, *arguments, **named):
            clock[0] += seconds(self) if callable(seconds) else seconds
            return method(self, *arguments, **named)

        return spend

    class Slow(Regression):
        def batches(self, start, steps):
            for batch in super().batches(start, steps):
                clock[0] += 0.5
                yield batch

        validate, picture = slow(Regression.validate, 20), slow(Regression.picture, 10)

    step = stopping_at(stop_at)
    monkeypatch.setattr(Trainer, "train_step", slow(step, lambda trainer: 1 if trainer.step else 9))
    monkeypatch.setattr(Trainer, "save", slow(Trainer.save, 4))
    with nullcontext() if stop_at is None else pytest.raises(Stopped):
        fit(tmp_path, task=Slow())
    speeds = [row["images_per_s"] for row in lines(StageFolder(tmp_path).metrics)]
    assert speeds == [round(10 / 9.5, 2)] + [round(10 / 1.5, 2)] * ((stop_at or 20) - 1)
    # of 20 steps 19 + 9.5 + 9.5 + 2 x 30 + 4 x 4 = 114 s; of 12, 11 + 5.5 + 9.5 + 30 + 3 x 4 = 68 s
    shares = {
        None: "steps 17%, waiting for data 8%, validation and pictures 53%, saving 14%, "
        "first step (with loading and compiling) 8%",
        12: "steps 16%, waiting for data 8%, validation and pictures 44%, saving 18%, "
        "first step (with loading and compiling) 14%",
    }
    assert f"where the time went: {shares[stop_at]}\n" in capsys.readouterr().err


def test_parts_that_took_no_time_are_not_named(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    watch = Stopwatch()
    clock[0] = 199.2
    with watch.measure(SAVING):
        clock[0] = 200.0
    assert watch.shares() == "where the time went: steps 100%"


def test_clipping_limits_the_gradient(tmp_path):
    trainer = Trainer(Regression(), training_stage(tmp_path, loop(clip=1e-3)))
    losses = trainer.train_step(0)
    norm = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()
    assert losses["grad_norm"] > 1e-3
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    free = Trainer(Regression(), training_stage(tmp_path, loop(clip=0)))
    grad_norm = free.train_step(0)["grad_norm"]
    norm = torch.cat([p.grad.flatten() for p in free.model.parameters()]).norm()
    torch.testing.assert_close(norm, grad_norm)


def test_it_learns_and_best_is_the_lowest_validation(tmp_path):
    trainer, stage = fit(tmp_path, steps=300, ema_decay=(0.9,))
    rows = [row for row in lines(stage.metrics) if "val_loss" in row]
    assert rows[-1]["val_loss"] < 0.05 * rows[0]["val_loss"]
    best = Checkpoint(stage.best).metadata
    assert best.metrics["val_loss"] == min(row["val_loss"] for row in rows)
    assert not Checkpoint(stage.best).names("optimizer.")
    assert trainer.step == 300
    assert trainer.images_seen == 3000


def test_validation_looks_at_the_averaged_weights(tmp_path):
    trainer, stage = fit(tmp_path, steps=10, ema_decay=(0.9,))
    target = trainer.task.target
    averaged = float((trainer.emas[0].model.weight.T - target).square().mean())
    assert lines(stage.metrics)[-1]["val_loss"] == averaged
    assert averaged != float((trainer.model.weight.T - target).square().mean().detach())


def test_no_averaged_weights_when_turned_off(tmp_path):
    trainer, stage = fit(tmp_path, steps=5, ema_decay=())
    assert not trainer.emas
    assert not Checkpoint(stage.last).names("ema.")


def test_each_of_several_averages_is_what_it_is_alone(tmp_path):
    several, stage = fit(tmp_path / "several", ema_decay=(0.9, 0.5))
    saved = Checkpoint(stage.last)
    assert saved.weights_prefix() == saved.weights_prefix(0.9) == "ema."
    assert saved.weights_prefix(0.5) == "ema-0.5."
    assert saved.weights_prefix(0) == "model."
    for ema in several.emas:
        _, alone = fit(tmp_path / str(ema.decay), ema_decay=(ema.decay,))
        wanted = Checkpoint(alone.last).weights()
        for name, weights in saved.weights(ema.decay).items():
            assert torch.equal(weights, wanted[name]), (ema.decay, name)
    with pytest.raises(UserError, match=r"--ema 0.7: .*last.safetensors has 0.0, 0.9, 0.5 \(0: the raw weights\)"):
        saved.weights_prefix(0.7)


def test_decays_are_given_as_one_number_or_as_a_list_and_0_is_none():
    assert LoopSettings(ema_decay=0.9).ema_decay == LoopSettings(ema_decay="0.9").ema_decay == (0.9,)
    assert LoopSettings(ema_decay="0.99, 0.9").ema_decay == (0.99, 0.9)
    for none in (0, 0.0, "0.0", "none", ()):
        assert LoopSettings(ema_decay=none).ema_decay == ()
    for wrong in ("0.9,0.9", 1.0, -0.5, "much"):
        with pytest.raises(ValidationError):
            LoopSettings(ema_decay=wrong)


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path):
    task = Regression()
    task.poison = (7,)
    with pytest.raises(RunError, match=r"(?s)step 8: loss or gradient is not finite.*item-70.*and 2 more.*lower --lr"):
        fit(tmp_path, task=task)
    kept = Checkpoint(StageFolder(tmp_path).last)
    assert kept.metadata.step == 5
    assert all(torch.isfinite(t).all() for t in kept.tensors("").values())


def test_steps_that_are_not_finite_change_nothing_and_may_be_tolerated(tmp_path):
    """Skipping steps 3 and 4 of 6 leaves the optimizer as if they had not been; the log is looked at each 5 steps."""
    task = Regression()
    task.poison = (2, 3)
    skipping, stage = fit(tmp_path / "a", steps=6, task=task, skip_nonfinite=2, log_every=5, lr_schedule="constant")
    assert skipping.skipped == 2
    assert [row.get("skipped") for row in lines(stage.metrics)] == [2, 2]
    assert all(torch.isfinite(t).all() for t in tensors(stage.last).values())
    by_hand = Trainer(Regression(), training_stage(tmp_path, loop(lr_schedule="constant"), 6))
    for step in (0, 1, 4, 5):
        by_hand.step = step  # as the learning rate and the noise are functions of it
        by_hand.train_step(10 * step)
    torch.testing.assert_close(skipping.model.state_dict(), by_hand.model.state_dict(), rtol=0, atol=0)
    (adamw,) = skipping.optimizers
    assert {float(state["step"]) for state in adamw.state.values()} == {4.0}
    with pytest.raises(RunError, match="step 3: loss or gradient is not finite"):
        fit(tmp_path / "b", steps=6, task=task, skip_nonfinite=1, log_every=5)


def test_muon_keeps_one_average_a_matrix_and_adamw_two(tmp_path):
    trainer, stage = fit(tmp_path, task=Wide())
    assert len(trainer.optimizers) == 2
    kept = {name for name in tensors(stage.last) if "exp_avg_sq" in name}
    assert "optimizer.exp_avg_sq.2.bias" in kept
    assert "optimizer.exp_avg_sq.2.weight" not in kept
    assert trainer.snapshot_bytes == sum(t.nbytes for t in tensors(stage.last).values())


def test_out_of_memory_says_what_to_lower(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "train_step", full)
    with pytest.raises(RunError, match="for 10 images at a time: try --micro-batch 5; nothing was saved"):
        fit(tmp_path)
    with pytest.raises(RunError, match="for 1 images at a time: a smaller network"):
        fit(tmp_path, micro_batch=1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")  # and a batch of 10: a share of 4 at most
    with pytest.raises(RunError, match="for 4 images at a time: try --micro-batch 2"):
        fit(tmp_path)
    with pytest.raises(RunError, match="for 2 images at a time: try --micro-batch 1"):
        fit(tmp_path, micro_batch=2)
