"""Training on two machines: two network namespaces joined by a virtual cable, which is pulled out in mid-run.

    nox -s two_machines    # needs root and iproute2

Each namespace runs one of torch's agents; they rendezvous over the link. Four runs:

1. Undisturbed; its weights are compared with those of a single process.
2. One process is killed: torch's agents must restart both.
3. The link is cut: the processes on both sides must end with a message and must not hang. (torch's own agent may wait
   for its rendezvous long after its process has ended; it is killed then, as a job queue would do.)
4. The same command again, with the link restored: it must resume.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

import torch

from lightdiff.checkpoint import Checkpoint
from lightdiff.extras.toy_faces import draw_dataset
from lightdiff.run_folder import RunFolder

NAMES = ("lightdiff-a", "lightdiff-b")
ADDRESSES = ("10.231.77.1", "10.231.77.2")
CABLE = ("ldcable-a", "ldcable-b")
APART = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # each attempt to meet gets a store of its own
TIMEOUT = 20  # seconds that a process waits for the other one
PATIENCE = 900  # seconds after which a run that should have ended hangs, on a busy machine, too


def ip(*arguments: str, check: bool = True) -> None:
    """Call iproute2."""
    subprocess.run(["ip", *arguments], check=check, stderr=None if check else subprocess.DEVNULL)


def build() -> None:
    """Lay the cable."""
    demolish()
    ip("link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1])
    for name, address, end in zip(NAMES, ADDRESSES, CABLE, strict=True):
        ip("netns", "add", name)
        ip("link", "set", end, "netns", name)
        ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", end, "up")


def demolish() -> None:
    """Remove both namespaces, and the cable with them."""
    for name in NAMES:
        ip("netns", "del", name, check=False)


def cut(down: bool) -> None:
    """Pull the cable out, or plug it in again."""
    ip("-n", NAMES[0], "link", "set", CABLE[0], "down" if down else "up")


def command(home: Path, run: str, steps: int, separator: str = "") -> list[str]:
    """The training command of every run. torchrun takes --run for its own --run-path unless -- comes before."""
    words = f"""-m{separator} lightdiff train-vae --data {home / "faces"} --run {home / run} --resolution 16
    --preset tiny --lpips-gamma 0 --batch-size 6 --workers 0 --precision fp32 --steps {steps} --save-every 20
    --val-every 0 --log-every 5 --timeout {TIMEOUT}"""
    return words.split()


class Machine:
    """An agent in its namespace, and the output of it and its process."""

    def __init__(self, agent: list[str], log: Path, cable: str) -> None:
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                agent, env=os.environ | {"GLOO_SOCKET_IFNAME": cable, "OMP_NUM_THREADS": "1"} | APART, stderr=stream
            )

    @property
    def said(self) -> str:
        """All output so far."""
        return self.log.read_text()

    def kill_worker(self) -> None:
        """Kill its training process, and leave its agent."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)

    def ended(self) -> bool:
        """Whether its training process has ended."""
        return self.process.poll() is not None or "error:" in self.said


def start(home: Path, run: str, steps: int, port: int, restarts: int = 0) -> list[Machine]:
    """One agent in each namespace."""
    machines = []
    for number, (name, address, end) in enumerate(zip(NAMES, ADDRESSES, CABLE, strict=True)):
        agent = f"""ip netns exec {name} {sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1
        --node-rank {number} --rdzv-backend c10d --rdzv-endpoint {ADDRESSES[0]}:{port} --rdzv-id {run}-{port}
        --rdzv-conf timeout={TIMEOUT},is_host={int(number == 0)} --local-addr {address}
        --max-restarts {restarts}"""
        log = home / f"{run}-{number}-{port}.err"
        machines.append(Machine([*agent.split(), *command(home, run, steps, separator=" --")], log, end))
    return machines


def wait_for_step(run: Path, step: int, machines: list[Machine]) -> None:
    """Wait until a step is saved or a machine has ended."""
    while step_of(run) < step and not any(machine.ended() for machine in machines):
        time.sleep(0.1)


def wait(machines: list[Machine], seconds: float) -> float:
    """Wait until both processes have ended, and return how long that took; a hang ends the script."""
    began = time.monotonic()
    while not all(machine.ended() for machine in machines):
        if time.monotonic() - began > seconds:
            hangs(machines)
        time.sleep(0.2)
    return time.monotonic() - began


def finished(machines: list[Machine]) -> None:
    """Wait until both agents have ended, with exit code 0; the first of their processes may have ended in an error."""
    until = time.monotonic() + PATIENCE
    try:
        codes = [machine.process.wait(until - time.monotonic()) for machine in machines]
    except subprocess.TimeoutExpired:
        hangs(machines)
    assert codes == [0, 0], "\n".join(machine.said for machine in machines)


def hangs(machines: list[Machine]) -> NoReturn:
    """End the script, and what it has started."""
    for machine in machines:
        machine.process.kill()
    sys.exit("a machine hangs:\n" + "\n".join(machine.said for machine in machines))


def difference(a: Path, b: Path) -> float:
    """The largest difference between the weights of two runs."""
    left, right = (Checkpoint(RunFolder(run).vae.last).weights(ema=0) for run in (a, b))
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def step_of(run: Path) -> int:
    """The last step that a run has saved."""
    last = RunFolder(run).vae.last
    return Checkpoint(last).metadata.step if last.is_file() else 0


def main() -> None:
    """Print what happened; exit with code 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lightdiff-two-") as name:
        home = Path(name)
        draw_dataset(home / "faces", 24, 0, 16)
        subprocess.run([sys.executable, *command(home, "alone", steps)], check=True, capture_output=True)
        build()
        try:
            began = time.monotonic()
            finished(start(home, "whole", steps, 29611))
            apart = difference(home / "alone", home / "whole")
            print(f"two machines, {steps} steps: both ended with 0 after {time.monotonic() - began:.0f} s; ", end="")
            print(f"weights differ from one process's by {apart:.1e} at most")

            machines = start(home, "killed", steps, 29614, restarts=3)
            wait_for_step(home / "killed", 20, machines)
            machines[1].kill_worker()
            finished(machines)
            assert "resuming from step" in machines[0].said, machines[0].said
            apart = difference(home / "alone", home / "killed")
            print("process of machine 1 killed: torch's agents restarted both; ", end="")
            print(f"both ended with 0, weights differ from one process's by {apart:.1e} at most")

            machines = start(home, "cut", 100 * steps, 29612)
            wait_for_step(home / "cut", 20, machines)
            cut(down=True)
            took = wait(machines, 6 * TIMEOUT)
            reached = step_of(home / "cut")
            print(f"link cut after step {reached} was saved; {took:.0f} s later both processes had ended:")
            for number, machine in enumerate(machines):
                words = [line for line in machine.said.splitlines() if "has lost contact" in line]
                assert words, machine.said
                print(f"  machine {number}: {words[0]}")
            time.sleep(TIMEOUT)
            waiting = [number for number, machine in enumerate(machines) if machine.process.poll() is None]
            for number in waiting:
                machines[number].process.kill()
            print(f"  torch's agents still waiting {TIMEOUT} s after that, and killed: {waiting or 'none'}")

            cut(down=False)
            machines = start(home, "cut", reached + steps, 29613)
            finished(machines)
            assert any(f"resuming from step {reached} of {reached + steps}" in machine.said for machine in machines)
            print(f"link up again: resumed from step {reached} to {step_of(home / 'cut')}")
        finally:
            demolish()


if __name__ == "__main__":
    main()
