"""What the loop saves and when, while it trains on; what fails in a write or in a validation costs no steps."""

import os
import shutil
import signal
import threading
import time

import pytest
import torch
from conftest import train_in, training_stage
from small_training import (
    Regression,
    assert_same_files,
    at_step,
    fit,
    lines,
    loop,
    same_runs,
    stopping_at,
    tensors,
    vae_settings,
)

from lightdiff import checkpoint
from lightdiff.checkpoint import Checkpoint
from lightdiff.errors import RunError, Stopped
from lightdiff.run_folder import StageFolder
from lightdiff.settings import with_changes
from lightdiff.stages import train_vae
from lightdiff.training.loop import Trainer
from lightdiff.training.saving import SnapshotWriter


def test_files_and_intervals(tmp_path):
    task = Regression()
    _, stage = fit(tmp_path, steps=23, task=task, keep=2)
    assert [path.name for path in stage.steps()] == ["step-00000015.safetensors", "step-00000020.safetensors"]
    assert Checkpoint(stage.last).metadata.step == 23
    assert task.validations == 3  # at 10, at 20, and at the last step
    assert sorted(path.name for path in stage.images.iterdir()) == [f"step-{n:08d}.png" for n in (10, 20, 23)]
    assert [row["step"] for row in lines(stage.metrics)] == list(range(1, 24))


def test_keep_every_keeps_for_good(tmp_path):
    _, stage = fit(tmp_path, steps=35, keep=1, keep_every=15)
    assert [StageFolder.step_of(path) for path in stage.steps()] == [15, 30, 35]


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


def test_missing_room_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(RunError, match=r"has 0.00 GB left, but the next checkpoint needs 0.01 GB"):
        fit(tmp_path)
    assert not StageFolder(tmp_path).last.exists()


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


# --- while a snapshot is written ----------------------------------------------------------------------------------


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
