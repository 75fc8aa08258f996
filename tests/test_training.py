"""The loop: accumulation, resume, learning rate, checkpoints, failures. On a small task, and on both real ones."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import train_in, training_stage
from pydantic import ValidationError
from torch import nn

from lightdiff import checkpoint, run_folder
from lightdiff.checkpoint import Checkpoint
from lightdiff.data.order import generator
from lightdiff.errors import RunError, Stopped, UserError
from lightdiff.extras.toy_faces import draw_dataset
from lightdiff.pictures import save_grid
from lightdiff.run_folder import RunFolder, StageFolder
from lightdiff.runtime import stage as stage_module
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.stage import open_stage, signal_handler
from lightdiff.settings import (
    EncodeSettings,
    ImageSettings,
    JobSettings,
    LoopSettings,
    ScaleSettings,
    TrainUNetSettings,
    TrainVAESettings,
    UNetSettings,
    VAELossSettings,
    VAESettings,
    with_changes,
)
from lightdiff.stages import encode, scale, train_unet, train_vae
from lightdiff.training.loop import Trainer
from lightdiff.training.optimizers import learning_rate
from lightdiff.training.saving import SnapshotWriter
from lightdiff.training.timing import SAVING, Stopwatch

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


# --- the loop on a small task ---------------------------------------------------------------------------------------


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


def test_files_and_intervals(tmp_path):
    task = Regression()
    _, stage = fit(tmp_path, steps=23, task=task, keep=2)
    assert [path.name for path in stage.steps()] == ["step-00000015.safetensors", "step-00000020.safetensors"]
    assert Checkpoint(stage.last).metadata.step == 23
    assert task.validations == 3  # at 10, at 20, and at the last step
    assert sorted(path.name for path in stage.images.iterdir()) == [f"step-{n:08d}.png" for n in (10, 20, 23)]
    assert [row["step"] for row in lines(stage.metrics)] == list(range(1, 24))


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


@pytest.mark.parametrize("stop_at", [1, 5, 7, 10, 13])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch, stop_at):
    averages = (0.9, 0.5, 0.99)
    fit(tmp_path / "straight", micro_batch=4, ema_decay=averages)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", stopping_at(stop_at))
        with pytest.raises(Stopped, match=rf"^after step {stop_at} of 20") as stopped:
            fit(tmp_path / "stopped", micro_batch=4, ema_decay=averages)
    assert stopped.value.exit_code == 143
    saved = Checkpoint(StageFolder(tmp_path / "stopped").last)
    assert saved.metadata.step == stop_at
    fit(tmp_path / "stopped", micro_batch=4, ema_decay=averages, saved=saved)
    straight, again = StageFolder(tmp_path / "straight"), StageFolder(tmp_path / "stopped")
    assert_same_files(straight.last, again.last)
    assert_same_files(straight.best, again.best)
    assert without_timing(lines(straight.metrics)) == without_timing(lines(again.metrics))


def test_it_goes_on_from_a_step_file(tmp_path):
    _, straight = fit(tmp_path / "a", steps=20, keep=10)
    fit(tmp_path / "b", steps=20, saved=Checkpoint(straight.step(10)))
    assert_same_files(straight.last, StageFolder(tmp_path / "b").last)


def test_best_cannot_be_resumed(tmp_path):
    _, stage = fit(tmp_path)
    with pytest.raises(UserError, match="holds no optimizer state; use last or step"):
        fit(tmp_path, saved=Checkpoint(stage.best))


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


@pytest.mark.parametrize("kind", [Regression, Wide])
def test_a_run_with_skipped_steps_goes_on_bit_for_bit(tmp_path, kind):
    def poisoned():
        task = kind()
        task.poison = (2, 12)
        return task

    _, straight = fit(tmp_path / "a", steps=20, task=poisoned(), skip_nonfinite=2)
    fit(tmp_path / "b", steps=20, task=poisoned(), skip_nonfinite=2, saved=Checkpoint(straight.step(15)))
    assert_same_files(straight.last, StageFolder(tmp_path / "b").last)


def test_muon_keeps_one_average_a_matrix_and_adamw_two(tmp_path):
    trainer, stage = fit(tmp_path, task=Wide())
    assert len(trainer.optimizers) == 2
    kept = {name for name in tensors(stage.last) if "exp_avg_sq" in name}
    assert "optimizer.exp_avg_sq.2.bias" in kept
    assert "optimizer.exp_avg_sq.2.weight" not in kept
    assert trainer.snapshot_bytes == sum(t.nbytes for t in tensors(stage.last).values())


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_full_disk_says_so_and_spares_the_checkpoint(tmp_path, monkeypatch):
    fit(tmp_path, steps=5)
    before = tensors(StageFolder(tmp_path).last)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match="No space left on device; what was saved before is untouched"):
        fit(tmp_path, steps=20, saved=Checkpoint(StageFolder(tmp_path).last))
    after = tensors(StageFolder(tmp_path).last)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(StageFolder(tmp_path).checkpoints.glob(".*"))


# --- while a snapshot is written ------------------------------------------------------------------------------------


@pytest.fixture
def held(monkeypatch):
    """Holds each write of the snapshot of step 5 up, until the test lets go of it."""
    release, save = threading.Event(), checkpoint.save

    def holding(path, tensors, metadata, *more):
        if metadata.step == 5:
            assert release.wait(60)
        return save(path, tensors, metadata, *more)

    monkeypatch.setattr(checkpoint, "save", holding)
    return release


def test_training_goes_on_while_a_snapshot_is_written(tmp_path, monkeypatch, held):
    """The write of step 5 ends after step 8, and what it holds is of step 5."""
    stage, found = StageFolder(tmp_path / "held"), []

    def let_go():
        found.append(stage.last.exists())
        held.set()

    changes = {"save_every": 5, "val_every": 5, "lr_schedule": "constant"}
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", at_step(8, let_go))
        fit(tmp_path / "held", steps=9, **changes)
    assert found == [False]
    fit(tmp_path / "straight", steps=9, **changes)
    same_runs(tmp_path / "straight", tmp_path / "held")
    _, short = fit(tmp_path / "short", steps=5, **changes)
    assert_same_files(short.step(5), stage.step(5))


def test_memory_for_copies_is_found_once():
    writer, state, seen = SnapshotWriter(torch.device("cpu")), {"a": torch.zeros(3)}, []
    for value in (1.0, 2.0):
        state["a"].fill_(value)
        writer.start(state, lambda copies: seen.append((copies["a"].data_ptr(), copies["a"].tolist())))
        writer.wait()
    assert seen == [(seen[0][0], [1.0] * 3), (seen[0][0], [2.0] * 3)]
    assert seen[0][0] != state["a"].data_ptr()


def test_a_signal_while_a_snapshot_is_written(tmp_path, monkeypatch, held):
    def stop_then_let_go():
        os.kill(os.getpid(), signal.SIGTERM)
        held.set()

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", at_step(7, stop_then_let_go))
        with pytest.raises(Stopped, match=r"^after step 7 of 20, saved to"):
            fit(tmp_path / "stopped")
    saved = Checkpoint(StageFolder(tmp_path / "stopped").last).verify()
    assert saved.metadata.step == 7
    assert Checkpoint(StageFolder(tmp_path / "stopped").step(5)).verify().metadata.step == 5
    fit(tmp_path / "stopped", saved=saved)
    fit(tmp_path / "straight")
    same_runs(tmp_path / "straight", tmp_path / "stopped")


def test_an_error_while_a_snapshot_is_written_waits_for_it(tmp_path, monkeypatch, held):
    def let_go_and_fail():
        held.set()
        raise RuntimeError("no colours left")

    monkeypatch.setattr(Trainer, "train_step", at_step(7, let_go_and_fail))
    with pytest.raises(RuntimeError, match="no colours left"):
        fit(tmp_path)
    assert Checkpoint(StageFolder(tmp_path).last).verify().metadata.step == 5


def test_a_write_that_fails_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    """The write of step 10 fails before step 11 is made; the run then ends with its error, and resumes from step 5."""
    made, train_step, save_file = [], Trainer.train_step, checkpoint.save_file

    def stepping(self, batch):
        if self.step == 9:
            monkeypatch.setattr(checkpoint, "save_file", full)
        if self.step == 10:
            while not self.writer.failed:
                time.sleep(0.001)
        made.append(self.step + 1)
        return train_step(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", stepping)
        with pytest.raises(RunError, match="could not be written: No space left on device; what was saved before is"):
            fit(tmp_path / "failed", log_every=7)
    assert made == list(range(1, 12))
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    folder = StageFolder(tmp_path / "failed")
    assert not list(folder.checkpoints.glob(".*"))
    saved = Checkpoint(folder.last).verify()
    assert saved.metadata.step == 5
    fit(tmp_path / "failed", saved=saved, log_every=7)
    fit(tmp_path / "straight", log_every=7)
    same_runs(tmp_path / "straight", tmp_path / "failed")


def test_a_write_that_fails_is_told_beside_another_error(tmp_path, monkeypatch, held, capsys):
    """Which is what the run ends with, be it a signal that leaves at once."""

    def let_go_and_fail():
        held.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train_step", at_step(7, let_go_and_fail))
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert "note: " in said
    assert "could not be written: No space left on device; what was saved before is untouched" in said


def test_the_last_write_may_fail(tmp_path, monkeypatch):
    """Nothing follows it: neither the end of the run nor `stopped ..., saved to` is said."""
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match="No space left on device"):
        fit(tmp_path / "ended", steps=4)
    monkeypatch.setattr(Trainer, "train_step", stopping_at(3))
    with pytest.raises(RunError, match="No space left on device"):
        fit(tmp_path / "stopped")


def test_best_and_last_of_a_step_are_of_one_digest_that_is_computed_once(tmp_path, monkeypatch):
    computed, digest = [], checkpoint.tensor_digest
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "tensor_digest", lambda tensor: computed.append(tensor.shape) or digest(tensor))
        _, stage = fit(tmp_path, steps=10, save_every=10, ema_decay=(0.9,))
    best, last = (Checkpoint(path).verify().metadata for path in (stage.best, stage.last))
    assert best.step == last.step == 10
    weights = {name: found for name, found in last.digests.items() if not name.startswith("optimizer.")}
    assert best.digests == weights
    assert best.weights_digest("ema.") == last.weights_digest("ema.")
    assert len(computed) == len(last.digests)


# --- signals, limits, intervals -------------------------------------------------------------------------------------


def test_a_second_signal_leaves_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    stage = training_stage(tmp_path, loop())
    stage.defer_signals = True
    with signal_handler(stage.on_signal):
        assert stage.poll() == (0, False)
        os.kill(os.getpid(), signal.SIGINT)
        assert stage.poll() == (130, False)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_sigterm_changes_nothing(tmp_path):
    """A cluster sends it to each process, and so does a launcher."""
    stage = training_stage(tmp_path, loop())
    stage.defer_signals = True
    with signal_handler(stage.on_signal):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stage.poll() == (143, False)


@pytest.mark.parametrize(
    ("number", "said", "code"),
    [
        (signal.SIGINT, "interrupted; what was saved is untouched: run the same command again to resume", 130),
        (signal.SIGTERM, "what was saved is untouched: run the same command again to resume", 143),
        (signal.SIGHUP, "what was saved is untouched: run the same command again to resume", 129),
        (signal.SIGXCPU, "what was saved is untouched: run the same command again to resume", 152),
    ],
)
def test_outside_the_loop_a_signal_leaves_at_once(tmp_path, number, said, code):
    if number == signal.SIGHUP:  # which is ignored in tests that run under nohup
        signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, open_stage(ScaleSettings(run=tmp_path), "latents"):
        os.kill(os.getpid(), number)
    assert (str(stopped.value), stopped.value.exit_code) == (said, code)
    assert signal.getsignal(number) is before
    again = EncodeSettings(run=tmp_path, restart=True)  # would start over again
    with pytest.raises(Stopped) as stopped, open_stage(again, "latents"):
        os.kill(os.getpid(), number)
    assert str(stopped.value) == f"{said}, without --restart"


def test_sigusr1_outside_the_loop_waits_for_it(tmp_path):
    stage = training_stage(tmp_path, loop())
    with signal_handler(stage.on_signal):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert [stage.poll(), stage.poll()] == [(0, True), (0, False)]


def test_sigusr1_saves_and_the_run_goes_on(tmp_path, monkeypatch):
    step = Trainer.train_step
    saved = []

    def asking(self, batch):
        if self.step == 7:
            self.writer.wait()
            saved.append(Checkpoint(StageFolder(tmp_path).last).metadata.step)
        losses = step(self, batch)
        if self.step == 7:
            os.kill(os.getpid(), signal.SIGUSR1)
        return losses

    monkeypatch.setattr(Trainer, "train_step", asking)
    trainer, _ = fit(tmp_path, steps=20)
    assert saved == [7]
    assert trainer.step == 20


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [(1e-4, [1, 65, 100, 164]), (0.025, [1, 41, 81, 100, 140, 180]), (10, [*range(1, 151)])],
)
def test_several_processes_agree_about_once_a_second_and_stop_after_the_same_step(
    tmp_path, monkeypatch, seconds, rounds
):
    """Process 1 is the slower one, and alone receives SIGTERM, in step 150. A process that agreed alone would wait."""
    clock, meet, said = threading.local(), threading.Barrier(2), [[], []]
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)

    class Two(Processes):
        def all_reduce_max(self, *numbers, patient=False):
            said[self.rank] = numbers
            meet.wait(10)
            together = [*map(max, *said)]
            meet.wait(10)
            agreed_at[self.rank].append(step_of[self.rank])
            return together

    agreed_at, step_of = ([], []), [0, 0]

    def run(rank):
        clock.now = 0.0
        stage = training_stage(tmp_path / str(rank), loop())
        stage.processes, stage.defer_signals, stage._last = Two(rank, 2), True, 0.0
        for step in range(1, 201):
            step_of[rank] = step
            clock.now += seconds * (1 if rank else 0.5)
            if rank and step == 150:
                stage.on_signal(signal.SIGTERM, None)
            code, _ = stage.poll(due=step == 100)
            if code:
                return step, code
        return None

    with ThreadPoolExecutor(2) as pool:
        stopped = list(pool.map(run, (0, 1)))
    assert stopped == [(rounds[-1], 143)] * 2
    assert agreed_at == (rounds, rounds)


def test_a_time_limit_stops_in_time_with_its_own_exit_code(tmp_path, monkeypatch):
    clock = [float(int(time.monotonic()))]  # about when the stages below are made
    monkeypatch.setattr(stage_module, "STARTED", clock[0])
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    unlimited, stage = (training_stage(tmp_path, loop(), job=JobSettings(max_time=minutes)) for minutes in (0, 1))
    for _ in range(8):  # steps of 5 s; after 40 s, two more of them and the reserve would reach 60 s
        clock[0] += 5
        assert not stage.out_of_time(reserve=10)
    clock[0] += 5
    assert stage.out_of_time(reserve=10)
    assert stage.poll(reserve=10) == (75, False)
    assert not unlimited.out_of_time()
    stage.finish_together(False)
    with pytest.raises(Stopped, match=r"what is done is saved \(--max-time 1 minutes\); run the same") as stopped:
        stage.finish_together(True)
    assert stopped.value.exit_code == 75


def test_max_time_ends_a_training_that_can_go_on(tmp_path):
    with pytest.raises(Stopped, match=r"after step 1 of 20 \(--max-time 1e-06 minutes\), saved to") as stopped:
        fit(tmp_path, job=JobSettings(max_time=1e-6))
    assert stopped.value.exit_code == 75
    assert Checkpoint(StageFolder(tmp_path).last).metadata.step == 1


def test_keep_every_keeps_for_good(tmp_path):
    _, stage = fit(tmp_path, steps=35, keep=1, keep_every=15)
    assert [StageFolder.step_of(path) for path in stage.steps()] == [15, 30, 35]


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


@pytest.mark.parametrize("part", ["validate", "picture"])
@pytest.mark.parametrize("step", [10, 20])
def test_what_fails_in_a_validation_costs_no_steps_and_is_done_again(tmp_path, part, step):
    """Also at the last step; the run that resumes ends as one that has never failed."""
    fit(tmp_path / "straight", val_every=5, save_every=4)
    task = Regression()
    sound, stage = getattr(task, part), training_stage(tmp_path / "failed", loop(val_every=5, save_every=4))

    def failing(*arguments):
        if len(lines(stage.folder.metrics)) >= step - 1:
            raise RuntimeError("no colours left")
        return sound(*arguments)

    setattr(task, part, failing)
    with pytest.raises(RuntimeError, match="no colours left"):
        train_in(stage, task)
    saved = Checkpoint(stage.folder.last)
    assert saved.metadata.step == step
    fit(tmp_path / "failed", saved=saved, val_every=5, save_every=4)
    same_runs(tmp_path / "straight", tmp_path / "failed")


def same_runs(a: Path, b: Path) -> None:
    """Whether two runs have ended alike: snapshots with all they say of themselves, pictures, metrics."""
    left, right = StageFolder(a), StageFolder(b)
    names = [sorted(p.name for p in f.checkpoints.glob("*.safetensors")) for f in (left, right)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (left.checkpoints / name).read_bytes() == (right.checkpoints / name).read_bytes(), name
    assert sorted(p.name for p in left.images.iterdir()) == sorted(p.name for p in right.images.iterdir())
    assert without_timing(lines(left.metrics)) == without_timing(lines(right.metrics))


@pytest.mark.parametrize("step", [9, 10, 20])
def test_a_signal_in_a_step_that_is_validated_saves_first(tmp_path, monkeypatch, step):
    fit(tmp_path / "straight", val_every=5)
    task = Regression()
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", stopping_at(step))
        with pytest.raises(Stopped, match=rf"^after step {step} of 20, saved to"):
            fit(tmp_path / "stopped", task=task, val_every=5)
    assert task.validations == (step - 1) // 5
    saved = Checkpoint(StageFolder(tmp_path / "stopped").last)
    assert saved.metadata.step == step
    fit(tmp_path / "stopped", saved=saved, val_every=5)
    same_runs(tmp_path / "straight", tmp_path / "stopped")


def test_a_run_stopped_in_its_last_step_is_finished_by_the_next_start(tmp_path, faces, monkeypatch):
    settings = vae_settings(tmp_path, faces)
    stopped_at(monkeypatch, 8, train_vae.run, settings)
    assert not lines(tmp_path / "vae/metrics.jsonl")[7:]
    train_vae.run(settings)
    assert "val_loss" in lines(tmp_path / "vae/metrics.jsonl")[7]
    assert Checkpoint(tmp_path / "vae/checkpoints/last.safetensors").metadata.metrics


def test_what_fails_before_anything_is_saved_points_to_no_state(tmp_path, faces, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    settings = vae_settings(tmp_path, faces)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", full)
        with pytest.raises(RunError, match=r"; nothing was saved yet: the same command starts from the beginning$"):
            train_vae.run(settings)
    task = Regression()
    task.poison = (2,)
    with pytest.raises(RunError, match=r"Nothing was saved yet\. Look at those images"):
        fit(tmp_path / "nan", task=task)
    train_vae.run(settings)
    monkeypatch.setattr(Trainer, "train_step", full)
    with pytest.raises(RunError, match=r"; what was saved is untouched: run the same command again to resume$"):
        train_vae.run(with_changes(settings, loop=with_changes(settings.loop, steps=9)))


def test_a_warm_up_that_is_longer_than_the_run_is_told(tmp_path, faces, capsys):
    train_vae.run(vae_settings(tmp_path / "a", faces, steps=2, warmup_steps=8))
    said = " ".join(capsys.readouterr().err.split())
    assert "note: --warmup-steps 8 is longer than this run of 2 steps: the learning rate ends at 0.00025, not" in said
    train_vae.run(vae_settings(tmp_path / "b", faces, steps=2, warmup_steps=2))
    assert "warmup" not in capsys.readouterr().err


def test_the_first_lines_tell_passes_and_where_pictures_will_be(tmp_path, faces, capsys):
    settings = vae_settings(tmp_path / "run", faces, steps=4)
    train_vae.run(settings)
    said = capsys.readouterr().err
    images = int(re.search(r"(\d+) training", said)[1])
    passes = f"{4 * settings.loop.batch_size / images:.3g} passes over the data"
    assert f"4 steps, batch size {settings.loop.batch_size}: {passes}; cpu, fp32" in said
    assert f"pictures: {tmp_path / 'run/vae/images'}\n" in said
    assert "val_kl " in said
    assert "kl_sum" not in said, "the same number, times the size of a latent"


def test_missing_room_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(RunError, match=r"has 0.00 GB left, but the next checkpoint needs 0.01 GB"):
        fit(tmp_path)
    assert not StageFolder(tmp_path).last.exists()


# --- both trainings -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    draw_dataset(folder, 24, 0, 16)
    return folder


def vae_settings(run, faces, **changes):
    settings = TrainVAESettings(
        run=run,
        images=ImageSettings(data=(faces,), resolution=16, val_share=0.2),
        loss=VAELossSettings(lpips_gamma=0),
        loop=loop(steps=8, batch_size=6, micro_batch=4, val_every=4, save_every=4, workers=0, lr=1e-3),
        model=VAESettings(encoder_width=8, decoder_width=8, encoder_blocks=(1,), decoder_blocks=(1,)),
    )
    return with_changes(settings, loop=with_changes(settings.loop, **changes))


def unet_settings(run, **changes):
    settings = TrainUNetSettings.model_validate(
        {
            "run": run,
            "loop": loop(steps=8, batch_size=6, micro_batch=4, val_every=4, save_every=4, lr=1e-3),
            "model": UNetSettings(width=8, blocks=1, time_dim=16),
            **train_unet.inherited(run, None),
        }
    )
    return with_changes(settings, loop=with_changes(settings.loop, **changes))


def stopped_at(monkeypatch, step_number, run, settings):
    step = Trainer.train_step

    def stopping(self, batch):
        losses = step(self, batch)
        if self.step == step_number:
            os.kill(os.getpid(), signal.SIGINT)
        return losses

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", stopping)
        with pytest.raises(Stopped) as stopped:
            run(settings)
    assert stopped.value.exit_code == 130


def test_both_trainings_stopped_and_gone_on_equal_those_never_stopped(tmp_path, faces, monkeypatch):
    for name in ("straight", "stopped"):
        settings = vae_settings(tmp_path / name, faces)
        if name == "stopped":
            stopped_at(monkeypatch, 5, train_vae.run, settings)
        train_vae.run(settings)
    assert_same_files(
        tmp_path / "straight/vae/checkpoints/last.safetensors", tmp_path / "stopped/vae/checkpoints/last.safetensors"
    )
    for name in ("straight", "stopped"):
        run = tmp_path / name
        fp32 = {"compute": {"precision": "fp32"}}  # what is faster may differ from one measurement to the next
        encode.run(EncodeSettings.model_validate({"run": run, **fp32, **encode.inherited(run, None)}))
        scale.run(ScaleSettings(run=run))
        settings = unet_settings(run)
        if name == "stopped":
            stopped_at(monkeypatch, 3, train_unet.run, settings)
        train_unet.run(settings)
    for stage in ("vae", "unet"):
        straight, stopped = (tmp_path / name / stage for name in ("straight", "stopped"))
        assert_same_files(straight / "checkpoints/last.safetensors", stopped / "checkpoints/last.safetensors")
        assert without_timing(lines(straight / "metrics.jsonl")) == without_timing(lines(stopped / "metrics.jsonl"))
        picture = "images/step-00000008.png"
        assert (straight / picture).read_bytes() == (stopped / picture).read_bytes()


def test_a_finished_run_says_so_and_more_steps_go_on(tmp_path, faces, capsys):
    train_vae.run(vae_settings(tmp_path, faces))
    train_vae.run(vae_settings(tmp_path, faces))
    assert "has its 8 steps already; give more --steps to train on" in " ".join(capsys.readouterr().err.split())
    train_vae.run(vae_settings(tmp_path, faces, steps=7))
    assert "vae is past 7: it has 8 steps already" in " ".join(capsys.readouterr().err.split())
    train_vae.run(vae_settings(tmp_path, faces, steps=10, lr=5e-4))
    metadata = Checkpoint(tmp_path / "vae/checkpoints/last.safetensors").metadata
    assert metadata.step == 10
    assert metadata.extra["history"] == [{"step": 8, "changed": {"loop.steps": [8, 10], "loop.lr": [1e-3, 5e-4]}}]


def test_a_run_of_other_settings_is_refused_and_restart_keeps_it_aside(tmp_path, faces):
    train_vae.run(vae_settings(tmp_path, faces))
    other = with_changes(vae_settings(tmp_path, faces), model=VAESettings(encoder_width=16, decoder_width=8))
    with pytest.raises(UserError, match=r"--model.encoder-channels \[8, 8\], not \[16, 16\].*another --run"):
        train_vae.run(other)
    with pytest.raises(UserError, match="--seed 0, not 1"):
        train_vae.run(vae_settings(tmp_path, faces, seed=1))
    with pytest.raises(UserError, match="--optimizer muon, not adamw: choose another --run"):
        train_vae.run(vae_settings(tmp_path, faces, optimizer="adamw"))
    train_vae.run(with_changes(other, restart=True))
    assert (tmp_path / "vae.old-1/checkpoints/last.safetensors").is_file()
    assert "restart" not in json.loads((tmp_path / "vae/settings.json").read_text())


def test_a_setting_that_is_newer_than_a_checkpoint_has_its_default_there(tmp_path, faces, capsys):
    train_vae.run(vae_settings(tmp_path, faces))
    last = tmp_path / "vae/checkpoints/last.safetensors"
    saved = Checkpoint(last)
    tensors, metadata = saved.tensors(""), saved.metadata
    saved.close()
    del metadata.settings["loss"]["reconstruction"]
    checkpoint.save(last, tensors, metadata)
    settings = vae_settings(tmp_path, faces)
    with pytest.raises(UserError, match="--reconstruction mse, not l1"):
        train_vae.run(with_changes(settings, loss=with_changes(settings.loss, reconstruction="l1")))
    train_vae.run(vae_settings(tmp_path, faces, steps=9))
    assert "resuming from step 8 of 9" in capsys.readouterr().err


def test_automatic_precision_stays_what_it_was(tmp_path, faces, monkeypatch):
    train_vae.run(vae_settings(tmp_path, faces, precision="bf16"))
    monkeypatch.setattr(stage_module, "pick_precision", lambda name, _: "fp32" if name == "auto" else name)
    train_vae.run(vae_settings(tmp_path, faces, precision="auto", steps=10))
    saved = Checkpoint(tmp_path / "vae/checkpoints/last.safetensors").metadata.settings
    assert (saved["loop"]["precision"], saved["loop"]["steps"]) == ("bf16", 10)


def test_a_damaged_state_is_told_and_an_older_one_taken(tmp_path, faces, capsys):
    for name in ("whole", "damaged"):
        train_vae.run(vae_settings(tmp_path / name, faces))
    stage = RunFolder(tmp_path / "damaged").vae
    for path in (stage.last, stage.step(8)):  # one file under two names, or two copies of it
        flip_bit(path, -100)
    capsys.readouterr()
    train_vae.run(vae_settings(tmp_path / "damaged", faces))
    said = " ".join(capsys.readouterr().err.split())
    assert "last.safetensors is damaged" in said
    assert "step-00000004.safetensors is used instead" in said
    assert "resuming from step 4 of 8" in said
    assert_same_files(RunFolder(tmp_path / "whole").vae.last, stage.last)
    for path in stage.resumable():
        flip_bit(path, 20)
    with pytest.raises(UserError, match="there is no whole state to resume from: --restart starts over"):
        train_vae.run(vae_settings(tmp_path / "damaged", faces))


def flip_bit(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.unlink()
    path.write_bytes(data)


def test_from_step_goes_back_and_keeps_what_was_newer_aside(tmp_path, faces, capsys):
    train_vae.run(vae_settings(tmp_path / "straight", faces))
    train_vae.run(vae_settings(tmp_path / "back", faces))
    stage = RunFolder(tmp_path / "back").vae
    back = with_changes(vae_settings(tmp_path / "back", faces), from_step=4)
    train_vae.run(back)
    assert "resuming from step 4 of 8" in " ".join(capsys.readouterr().err.split())
    aside = stage.checkpoints / "after-step-4.old-1"
    assert (aside / "step-00000008.safetensors").is_file()
    assert Checkpoint(aside / "last.safetensors").metadata.step == 8
    assert stage.best.is_file()
    assert_same_files(RunFolder(tmp_path / "straight").vae.last, stage.last)
    with pytest.raises(UserError, match="--seed 0, not 1"):  # refused before anything is moved
        train_vae.run(with_changes(vae_settings(tmp_path / "back", faces, seed=1), from_step=4))
    assert not (stage.checkpoints / "after-step-4.old-2").exists()
    with pytest.raises(UserError, match=r"--from-step 5: .* has no such step file; there are: 4, 8"):
        train_vae.run(with_changes(back, from_step=5))


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture(scope="module")
def gone_back(tmp_path_factory, faces):
    """A run whose best is its last, and the same after it has gone back to train on otherwise, with its settings."""
    home = tmp_path_factory.mktemp("back")
    begun = vae_settings(home / "run", faces, val_every=2, save_every=2, keep=9, lr=2e-2, lr_schedule="constant")
    train_vae.run(begun)
    shutil.copytree(begun.run, home / "begun")
    loop = with_changes(begun.loop, lr=0.3, steps=6, save_every=5)
    train_vae.run(back := with_changes(begun, loop=loop, from_step=4))
    return home / "begun", begun.run.rename(home / "straight"), back


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("moment", range(8))
def test_going_back_may_be_killed_at_any_moment(gone_back, monkeypatch, moment, again):
    """All that was newer is still there, and the run ends, `best` included, as if it had not been killed."""
    begun, straight, killed = gone_back
    shutil.rmtree(killed.run, ignore_errors=True)
    shutil.copytree(begun, killed.run)
    count, stage = itertools.count(), RunFolder(killed.run).vae
    newer = {path.name: path.read_bytes() for path in [stage.step(6), stage.step(8), stage.last]}

    def killing(work):
        def killed_instead(*arguments, **more):
            if next(count) == moment:
                raise Killed
            return work(*arguments, **more)

        return killed_instead

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killing(Path.rename))
        patched.setattr(run_folder.os, "replace", killing(os.replace))
        patched.setattr(Trainer, "train_step", killing(Trainer.train_step))
        with pytest.raises(Killed):
            train_vae.run(killed)
    begins_again = again or Checkpoint(stage.last).metadata.step > 4
    train_vae.run(killed if begins_again else with_changes(killed, from_step=0))
    same_runs(straight / "vae", stage.path)
    kept = {path.name: path.read_bytes() for path in stage.checkpoints.glob("after-step-4.old-*/*")}
    assert newer.items() <= kept.items()


def test_a_run_folder_that_another_host_has_locked(tmp_path, faces):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/.lock").write_text("elsewhere 17\n")
    settings = vae_settings(tmp_path, faces)
    with pytest.raises(UserError, match=r"was locked by process 17 on elsewhere.*--force-unlock"):
        train_vae.run(settings)
    train_vae.run(with_changes(settings, job=JobSettings(force_unlock=True)))


def test_a_refused_start_leaves_no_empty_folder(tmp_path, faces):
    settings = vae_settings(tmp_path / "new" / "run", faces)
    refused = (
        with_changes(settings, images=with_changes(settings.images, data=(tmp_path / "none",))),
        with_changes(settings, freeze_encoder=True),
        with_changes(settings, init_from=tmp_path / "none.safetensors"),
        with_changes(settings, from_step=3),
    )
    for wrong in refused:
        with pytest.raises(UserError):
            train_vae.run(wrong)
        assert not (tmp_path / "new").exists()
    with pytest.raises(UserError):
        encode.run(EncodeSettings(run=tmp_path / "new" / "run"))
    assert not (tmp_path / "new").exists()


def test_a_stage_within_another_ones(tmp_path, faces):
    """Each has its own folder, and gives signals back to the outer one."""
    outer_settings = vae_settings(tmp_path / "outer", faces)
    before = signal.getsignal(signal.SIGTERM)
    with open_stage(outer_settings, "vae") as outer:
        train_vae.run(vae_settings(tmp_path / "inner", faces, steps=1))
        assert signal.getsignal(signal.SIGTERM) == outer.on_signal
        assert (outer.path / ".lock").is_file()
        with pytest.raises(UserError, match=f"outer/vae is in use by process {os.getpid()} on"):
            train_vae.run(outer_settings)
        outer.defer_signals = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer.poll() == (143, False)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "outer").exists()
    assert not (tmp_path / "inner/vae/.lock").exists()


def test_another_preset_is_refused_on_a_run_that_exists(tmp_path, faces, cli):
    start = ["train-vae", "--data", faces, "--run", tmp_path / "run", "--resolution", 16, "--lpips-gamma", 0]
    start += ["--workers", 0, "--batch-size", 4, "--preset", "tiny"]
    assert cli(*start, "--steps", 1).code == 0
    assert cli(*start, "--steps", 2).code == 0
    refused = cli(*start, "--steps", 3, "--preset", "small")
    assert refused.code == 2
    assert "--preset small: this run holds another architecture" in refused.err


def test_init_from_starts_at_another_runs_weights(tmp_path, faces):
    train_vae.run(vae_settings(tmp_path / "first", faces, ema_decay=()))
    more = with_changes(
        vae_settings(tmp_path / "second", faces, ema_decay=(), steps=1, lr=1e-12), init_from=tmp_path / "first"
    )
    train_vae.run(more)
    old, new = (
        Checkpoint(tmp_path / name / "vae/checkpoints/last.safetensors").weights() for name in ("first", "second")
    )
    for name in old:
        torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-6)
    misfit = with_changes(
        vae_settings(tmp_path / "third", faces), model=VAESettings(encoder_width=16), init_from=tmp_path / "first"
    )
    with pytest.raises(UserError, match="does not fit this architecture"):
        train_vae.run(misfit)


def test_images_that_vanish_or_break_in_mid_run(tmp_path, faces, monkeypatch):
    """Below --max-bad others stand in for them and the report names them; above it, the run stops."""
    step = Trainer.train_step

    def harming(folder):
        files = sorted(folder.rglob("*.png"))

        def stepping(self, batch):
            if self.step == 2:
                files[0].unlink()
                files[1].write_bytes(b"no picture any more")
                files[2].write_bytes(files[3].read_bytes())  # changed, but an image
            return step(self, batch)

        return stepping

    for name in ("tolerated", "stopped"):
        shutil.copytree(faces, tmp_path / name)
    tolerant = vae_settings(tmp_path / "a", tmp_path / "tolerated", steps=20)
    tolerant = with_changes(tolerant, images=with_changes(tolerant.images, max_bad=0.2))
    monkeypatch.setattr(Trainer, "train_step", harming(tmp_path / "tolerated"))
    train_vae.run(tolerant)
    report = (tmp_path / "a/vae/bad-files.txt").read_text().splitlines()
    assert len(report) == 2
    monkeypatch.setattr(Trainer, "train_step", harming(tmp_path / "stopped"))
    with pytest.raises(RunError, match=r"of 24 images .* cannot be read, more than --max-bad 0.01"):
        train_vae.run(vae_settings(tmp_path / "b", tmp_path / "stopped", steps=20))


def test_epochs_count_passes_over_the_training_images(tmp_path, faces):
    train_vae.run(vae_settings(tmp_path, faces, epochs=2))
    metadata = Checkpoint(tmp_path / "vae/checkpoints/last.safetensors").metadata
    trained = sum(1 for _ in faces.rglob("*.png")) - round_val(faces)
    assert metadata.step == max(1, round(2 * trained / 6))


def round_val(faces):
    from lightdiff.data.files import scan

    return sum(f.split == "val" for f in scan((faces,), 0.2))


def test_an_empty_validation_set_makes_best_the_last(tmp_path, faces):
    settings = vae_settings(tmp_path, faces, steps=4)
    settings = with_changes(settings, images=with_changes(settings.images, val_share=0))
    train_vae.run(settings)
    last, best = (Checkpoint(tmp_path / f"vae/checkpoints/{name}.safetensors") for name in ("last", "best"))
    assert best.metadata.step == last.metadata.step == 4
    assert best.weights().keys() == last.weights().keys()
    assert all(torch.equal(w, last.weights()[n]) for n, w in best.weights().items())


@pytest.mark.slow
def test_a_vae_learns_eight_faces_by_heart(tmp_path, faces):
    settings = vae_settings(
        tmp_path, faces, steps=250, batch_size=8, micro_batch=0, val_every=0, save_every=250, lr=3e-3
    )
    few = tmp_path / "few"
    draw_dataset(few, 8, 0, 16)
    images = ImageSettings(data=(few,), resolution=16, val_share=0, random_crop=1, flip=False)
    model = VAESettings(encoder_width=16, decoder_width=16, latent_channels=8)
    train_vae.run(with_changes(settings, images=images, model=model, loss=VAELossSettings(lpips_gamma=0, kl_beta=0)))
    rows = lines(tmp_path / "vae/metrics.jsonl")
    assert rows[-1]["mse"] < 0.1 * rows[0]["mse"]
