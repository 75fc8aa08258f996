"""`--nproc-per-node`, signals and kills, on the real command in real processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightdiff.checkpoint import Checkpoint
from lightdiff.extras.toy_faces import draw_dataset
from lightdiff.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")]
SECONDS = 300  # for what takes a few on a quiet machine


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    draw_dataset(folder, 24, 0, 16)
    return folder


class Command:
    """A training that runs until it is stopped."""

    def __init__(self, faces: Path, run: Path, *more: object, steps: int = 100_000, processes: int = 2) -> None:
        arguments = ["train-vae", "--data", faces, "--run", run, "--resolution", 16, "--steps", steps]
        arguments += ["--preset", "tiny", "--lpips-gamma", 0, "--batch-size", 4, "--workers", 0, "--precision", "fp32"]
        arguments += ["--save-every", 50, "--val-every", 0, "--log-every", 10, "--timeout", 30]
        arguments += ["--nproc-per-node", processes] if processes > 1 else []
        self.stage = RunFolder(run).vae
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lightdiff", *map(str, arguments), *map(str, more)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for_step(self, step: int) -> "Command":
        """Wait until metrics tell of a step."""
        for _ in range(SECONDS * 20):
            if self.stage.metrics.is_file():
                lines = self.stage.metrics.read_text().splitlines()
                if lines and json.loads(lines[-1])["step"] >= step:
                    return self
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError("\n".join(self.process.communicate()))

    def send(self, number: int) -> "Command":
        os.kill(self.process.pid, number)
        return self

    def end(self) -> tuple[int, str]:
        """Exit code and what was said."""
        out, err = self.process.communicate(timeout=SECONDS)
        assert "Traceback" not in err, err
        return self.process.returncode, " ".join((out + err).split())

    def workers(self) -> list[int]:
        """Pids of the processes it has started."""
        listed = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return sorted(int(pid) for path in listed for pid in path.read_text().split())


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def saved_step(command: Command) -> int:
    return Checkpoint(command.stage.last, "vae").verify().metadata.step


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGXCPU, 152)]
)
def test_a_signal_saves_says_how_to_go_on_and_exits(faces, tmp_path, number, code, processes):
    command = Command(faces, tmp_path, processes=processes).wait_for_step(20)
    found, said = command.send(number).end()
    assert found == code, said
    step = saved_step(command)
    assert f"stopped: after step {step} of 100000, saved to" in said
    assert said.count("run the same command again to resume") == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_signals_that_come_again_and_again_lose_no_save(faces, tmp_path, processes):
    """A cluster sends SIGTERM to each process, and a launcher once more; the terminal may be closed as well."""
    command = Command(faces, tmp_path, processes=processes).wait_for_step(20)
    workers = command.workers() if processes > 1 and sys.platform == "linux" else []
    for _ in range(20):
        for pid in [command.process.pid, *workers]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        command.send(signal.SIGHUP)
        time.sleep(0.02)
    code, said = command.end()
    assert code in (129, 143), said  # of signals that come together, a busy machine may hear the second one first
    assert said.count(f"stopped: after step {saved_step(command)} of 100000, saved to") == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_under_nohup_a_closed_terminal_stops_nothing(faces, tmp_path, processes):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        command = Command(faces, tmp_path, processes=processes).wait_for_step(10)
    finally:
        signal.signal(signal.SIGHUP, before)
    os.killpg(command.process.pid, signal.SIGHUP)
    command.wait_for_step(80)
    assert command.send(signal.SIGTERM).end()[0] == 143


def test_a_reader_that_goes_away_does_not_end_a_training(faces, tmp_path):
    command = Command(faces, tmp_path, "--val-every", 5, steps=60, processes=1).wait_for_step(10)
    command.process.stderr.close()
    command.process.stdout.close()
    assert command.process.wait(SECONDS) == 0
    assert saved_step(command) == 60


@pytest.mark.skipif(sys.platform != "linux", reason="finds workers below /proc")
@pytest.mark.parametrize("moment", [0.0, 0.3, 1.5])
def test_workers_leave_when_the_command_is_killed_while_they_import(faces, tmp_path, moment):
    command = Command(faces, tmp_path, "--timeout", 600)
    deadline = time.monotonic() + SECONDS
    while len(command.workers()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(moment)
    workers = command.workers()
    command.send(signal.SIGKILL)
    command.process.communicate()
    assert len(workers) == 2
    while not all(map(gone, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(map(gone, workers))


def test_sigusr1_saves_and_everything_goes_on(faces, tmp_path):
    command = Command(faces, tmp_path).wait_for_step(10)
    before = command.stage.last.stat().st_mtime if command.stage.last.exists() else 0
    command.send(signal.SIGUSR1).wait_for_step(90)
    assert command.stage.last.stat().st_mtime > before
    assert command.process.poll() is None
    assert command.send(signal.SIGTERM).end()[0] == 143


def test_a_second_ctrl_c_leaves_at_once(faces, tmp_path):
    command = Command(faces, tmp_path).wait_for_step(60)
    workers = command.workers()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # so that they cannot answer the first
    command.send(signal.SIGINT)
    time.sleep(0.5)
    assert command.process.poll() is None
    assert command.send(signal.SIGINT).end()[0] == 130
    time.sleep(1)
    assert all(map(gone, workers))
    assert saved_step(command) >= 50


def test_max_time_ends_with_its_own_exit_code(faces, tmp_path):
    command = Command(faces, tmp_path, "--max-time", 0.15)
    code, said = command.end()
    assert code == 75, said
    assert "(--max-time 0.15 minutes), saved to" in said


@pytest.mark.skipif(sys.platform != "linux", reason="finds workers below /proc")
def test_a_killed_process_ends_the_job_and_the_next_start_goes_on(faces, tmp_path):
    command = Command(faces, tmp_path).wait_for_step(60)
    workers = command.workers()
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    code, said = command.end()
    assert code == 1
    assert f"process 1 (pid {workers[1]}) was ended by SIGKILL" in said
    assert "what was saved is untouched: run the same command again to resume" in said
    assert all(map(gone, workers))
    step = saved_step(command)
    code, said = Command(faces, tmp_path, steps=step + 5).end()
    assert code == 0, said
    assert f"resuming from step {step} of {step + 5}" in said
    assert saved_step(command) == step + 5


@pytest.mark.skipif(sys.platform != "linux", reason="finds workers below /proc")
def test_a_process_that_does_not_answer_is_given_up(faces, tmp_path):
    command = Command(faces, tmp_path, "--timeout", 5).wait_for_step(60)
    speaking, silent = command.workers()
    os.kill(silent, signal.SIGSTOP)
    deadline = time.monotonic() + 30
    while not gone(speaking) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(silent, signal.SIGCONT)
    code, said = command.end()
    assert code == 1
    assert "process 0 has lost contact with the others" in said
    assert saved_step(command) >= 50


@pytest.mark.skipif(sys.platform != "linux", reason="finds workers below /proc")
def test_max_restarts_starts_again_by_itself(faces, tmp_path):
    command = Command(faces, tmp_path, "--max-restarts", 1, "--restart").wait_for_step(60)
    first = command.workers()
    os.kill(first[1], signal.SIGKILL)
    command.wait_for_step(150)
    assert not set(first) & set(command.workers())
    code, said = command.send(signal.SIGTERM).end()
    assert code == 143
    assert "resuming from step" in said  # --restart meant the first start
    assert not list(tmp_path.glob("vae.old*"))


def test_what_would_begin_anew_is_refused_where_several_machines_restart(faces, tmp_path, monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    code, said = Command(faces, tmp_path, "--restart", processes=1).end()
    assert code == 2
    assert "--restart would be repeated by torchrun's --max-restarts" in said


@pytest.mark.skipif(sys.platform != "linux", reason="finds workers below /proc")
def test_workers_leave_when_the_command_is_killed_and_a_restart_works_at_once(faces, tmp_path):
    command = Command(faces, tmp_path).wait_for_step(60)
    workers = command.workers()
    command.send(signal.SIGKILL)
    command.process.communicate()
    deadline = time.monotonic() + 10
    while not all(map(gone, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(map(gone, workers))
    step = saved_step(command)
    code, said = Command(faces, tmp_path, steps=step + 1, processes=1).end()
    assert code == 0, said


def test_a_mistake_is_told_once_and_not_tried_again(faces, tmp_path):
    command = Command(tmp_path / "nothing", tmp_path / "run", "--max-restarts", 3)
    code, said = command.end()
    assert code == 2
    assert said == f"error: --data: {tmp_path / 'nothing'} does not exist"


def test_threads_are_shared_out(faces, tmp_path):
    command = Command(faces, tmp_path).wait_for_step(10)
    cores = len(os.sched_getaffinity(0))
    environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in command.workers()]
    assert all(f"OMP_NUM_THREADS={max(1, cores // 2)}".encode() in text for text in environments)
    assert command.send(signal.SIGTERM).end()[0] == 143


def test_no_module_is_imported_from_the_current_folder(faces, tmp_path):
    """As `python -m` alone does, to a stranger's types.py that lies beside the images, or to one's own."""
    (tmp_path / "types.py").write_text("raise SystemExit('a stranger was here')")
    more = "--resolution 16 --preset tiny --lpips-gamma 0 --steps 1 --workers 0 --nproc-per-node 2".split()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lightdiff", "train-vae", "--data", faces, "--run", "run", *more],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert (done.returncode, "stranger" in done.stderr) == (0, False), done.stderr
