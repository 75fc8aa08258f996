"""Stopped and resumed equals never stopped, bit for bit; from which state, with which settings, and going back."""

import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from small_training import (
    Regression,
    Wide,
    assert_same_files,
    fit,
    lines,
    loop,
    same_runs,
    stopping_at,
    vae_settings,
    without_timing,
)

from lightdiff import checkpoint, run_folder
from lightdiff.checkpoint import Checkpoint
from lightdiff.errors import Stopped, UserError
from lightdiff.run_folder import RunFolder, StageFolder
from lightdiff.runtime import stage as stage_module
from lightdiff.settings import EncodeSettings, ScaleSettings, TrainUNetSettings, UNetSettings, VAESettings, with_changes
from lightdiff.stages import encode, scale, train_unet, train_vae
from lightdiff.training.loop import Trainer


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


@pytest.mark.parametrize("kind", [Regression, Wide])
def test_a_run_with_skipped_steps_goes_on_bit_for_bit(tmp_path, kind):
    def poisoned():
        task = kind()
        task.poison = (2, 12)
        return task

    _, straight = fit(tmp_path / "a", steps=20, task=poisoned(), skip_nonfinite=2)
    fit(tmp_path / "b", steps=20, task=poisoned(), skip_nonfinite=2, saved=Checkpoint(straight.step(15)))
    assert_same_files(straight.last, StageFolder(tmp_path / "b").last)


# --- both trainings -----------------------------------------------------------------------------------------------


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


def test_a_run_stopped_in_its_last_step_is_finished_by_the_next_start(tmp_path, faces, monkeypatch):
    settings = vae_settings(tmp_path, faces)
    stopped_at(monkeypatch, 8, train_vae.run, settings)
    assert not lines(tmp_path / "vae/metrics.jsonl")[7:]
    train_vae.run(settings)
    assert "val_loss" in lines(tmp_path / "vae/metrics.jsonl")[7]
    assert Checkpoint(tmp_path / "vae/checkpoints/last.safetensors").metadata.metrics


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


def flip_bit(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.unlink()
    path.write_bytes(data)


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


# --- with which settings ------------------------------------------------------------------------------------------


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


def test_another_preset_is_refused_on_a_run_that_exists(tmp_path, faces, cli):
    start = ["train-vae", "--data", faces, "--run", tmp_path / "run", "--resolution", 16, "--lpips-gamma", 0]
    start += ["--workers", 0, "--batch-size", 4, "--preset", "tiny"]
    assert cli(*start, "--steps", 1).code == 0
    assert cli(*start, "--steps", 2).code == 0
    refused = cli(*start, "--steps", 3, "--preset", "small")
    assert refused.code == 2
    assert "--preset small: this run holds another architecture" in refused.err


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


# --- going back ---------------------------------------------------------------------------------------------------


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
