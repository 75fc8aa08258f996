"""Signals and time limits: the loop saves first, what is outside it leaves at once, and several processes agree."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import training_stage
from small_training import fit, loop, vae_settings

from lightdiff.checkpoint import Checkpoint
from lightdiff.errors import Stopped, UserError
from lightdiff.run_folder import StageFolder
from lightdiff.runtime import stage as stage_module
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.stage import open_stage, signal_handler
from lightdiff.settings import EncodeSettings, JobSettings, ScaleSettings
from lightdiff.stages import train_vae
from lightdiff.training.loop import Trainer


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
