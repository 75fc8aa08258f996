"""Two machines, for once for real: two network namespaces joined by a cable, which is pulled out in mid-run.

    nox -s two_machines                    # needs root and iproute2

One of torch's agents in each namespace, rendezvous over the link. First a run to its end, compared with one process;
then the same with the link cut, which must end both sides with a message and without a hang; then the same command
again, which must go on to the same result.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.toy_faces import draw_dataset
from lightdiff.run_folder import RunFolder

NAMES = ("lightdiff-a", "lightdiff-b")
ADDRESSES = ("10.231.77.1", "10.231.77.2")
CABLE = ("ldcable-a", "ldcable-b")
TIMEOUT = 20  # seconds that a process waits for the other one


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
    """Take it all away."""
    for name in NAMES:
        ip("netns", "del", name, check=False)


def cut(down: bool) -> None:
    """Pull the cable out, or put it in again."""
    ip("-n", NAMES[0], "link", "set", CABLE[0], "down" if down else "up")


def command(home: Path, run: str, steps: int) -> list[str]:
    """The training that all of them run."""
    words = f"""-m lightdiff train-vae --data {home / "faces"} --run {home / run} --resolution 16 --preset tiny
    --lpips-gamma 0 --batch-size 6 --workers 0 --precision fp32 --steps {steps} --save-every 20 --val-every 0
    --log-every 5 --timeout {TIMEOUT}"""
    return words.split()


def start(home: Path, run: str, steps: int, port: int) -> list[subprocess.Popen[str]]:
    """One agent in each namespace."""
    agents = []
    for number, (name, address, end) in enumerate(zip(NAMES, ADDRESSES, CABLE, strict=True)):
        agent = f"""ip netns exec {name} {sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1
        --node-rank {number} --rdzv-backend c10d --rdzv-endpoint {ADDRESSES[0]}:{port} --rdzv-id {run}-{port}
        --rdzv-conf timeout=60,is_host={int(number == 0)} --local-addr {address}"""
        agents.append(
            subprocess.Popen(
                [*agent.split(), *command(home, run, steps)],
                env=os.environ | {"GLOO_SOCKET_IFNAME": end, "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return agents


def wait(agents: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    """Wait for both, and return what they said; a hang ends the script."""
    said = []
    for number, agent in enumerate(agents):
        try:
            said.append(agent.communicate(timeout=seconds)[1])
        except subprocess.TimeoutExpired:
            for other in agents:
                other.kill()
            sys.exit(f"machine {number} hangs:\n{agent.communicate()[1]}")
    return said


def difference(a: Path, b: Path) -> float:
    """The largest difference between the weights of two runs."""
    left, right = (Checkpoint(RunFolder(run).vae.last).weights(ema=False) for run in (a, b))
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def step_of(run: Path) -> int:
    """The step that a run has saved."""
    last = RunFolder(run).vae.last
    return Checkpoint(last).document.step if last.is_file() else 0


def main() -> None:
    """Print what happened; exit code 1 if it is not what is promised."""
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
            agents = start(home, "whole", steps, 29611)
            said = wait(agents, 120)
            assert [agent.returncode for agent in agents] == [0, 0], said
            apart = difference(home / "alone", home / "whole")
            print(f"two machines, {steps} steps: both ended with 0 after {time.monotonic() - began:.0f} s; ", end="")
            print(f"weights differ from one process's by {apart:.1e} at most")

            agents = start(home, "cut", 100 * steps, 29612)
            while step_of(home / "cut") < 20 and all(agent.poll() is None for agent in agents):
                time.sleep(0.1)
            cut(down=True)
            began = time.monotonic()
            said = wait(agents, 6 * TIMEOUT)
            took = time.monotonic() - began
            codes = [agent.returncode for agent in agents]
            reached = step_of(home / "cut")
            words = [line for text in said for line in text.splitlines() if "has lost contact" in line]
            print(f"link cut at step {reached} or a little later: ended with {codes} after {took:.0f} s, saying")
            print("\n".join(words))
            assert all(codes), "a side ended as if all were well"
            assert words, said

            cut(down=False)
            agents = start(home, "cut", reached + steps, 29613)
            said = wait(agents, 120)
            assert [agent.returncode for agent in agents] == [0, 0], said
            assert f"going on from step {reached} of {reached + steps}" in said[0], said[0]
            print(f"link up again: went on from step {reached} to {step_of(home / 'cut')}")
        finally:
            demolish()


if __name__ == "__main__":
    main()
