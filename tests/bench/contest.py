"""Contenders side by side: each in a process of its own, one round each in turn, so that all meet the same machine."""

import gc
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

PATIENCE = 900  # seconds that a round may take


@dataclass(frozen=True)
class Work:
    """The work of one contender in one round."""

    round: Callable[[], object]
    images: int
    flops: float = 0.0  # of a round, in its networks; a multiplication and an addition are two
    parameters: int = 0
    precision: str = "fp32"


Prepare = Callable[[str, torch.device], Work]


@dataclass(frozen=True)
class Case:
    """A comparison: who competes at what, and the ratio to reach against each peer."""

    title: str
    contenders: tuple[str, ...]
    prepare: Prepare
    wanted: dict[str, float] = field(default_factory=dict)
    rounds: int = 7
    unit: str = "images"


@dataclass
class Row:
    """The measurements of one contender."""

    contender: str
    seconds: list[float]  # of each round
    images: int  # a round
    flops: float
    parameters: int
    precision: str
    memory: int  # peak bytes: of the GPU's allocator, or of the process
    memory_before: int  # of the process, after its imports

    @property
    def speed(self) -> float:
        """Images per second, in the median round."""
        return self.images / statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """The row as it stands in the results file."""
        return asdict(self)


def ratio(ours: Row, peer: Row) -> float:
    """Our images per second over the peer's: the median over pairs of rounds that ran one after the other."""
    pairs = zip(ours.seconds, peer.seconds, strict=True)
    return statistics.median(p / o for o, p in pairs) * ours.images / peer.images


def compete(case: Case, name: str, device: torch.device, rounds: int = 0) -> list[Row]:
    """Run a case: A B C A B C ... after one round each to warm up."""
    context = multiprocessing.get_context("spawn")
    ends: list[Connection] = []
    processes = []
    for contender in case.contenders:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(name, contender, device.type, theirs))
        process.start()
        ends.append(ours)
        processes.append(process)
        about = answer(ours, contender)  # one after the other: building and warming up is work, too
        ours.about = about  # type: ignore[attr-defined]
    seconds: list[list[float]] = [[] for _ in ends]
    for _ in range(rounds or case.rounds):
        for end, taken, contender in zip(ends, seconds, case.contenders, strict=True):
            end.send("round")
            taken.append(answer(end, contender))
    rows = []
    for end, taken, contender in zip(ends, seconds, case.contenders, strict=True):
        end.send("end")
        memory = answer(end, contender)
        rows.append(Row(contender, taken, memory=memory, **end.about))  # type: ignore[attr-defined]
    for process in processes:
        process.join(60)
    return rows


def answer(end: Connection, contender: str) -> Any:
    """A contender's answer; its error is raised."""
    if not end.poll(PATIENCE):
        raise TimeoutError(f"{contender} does not answer")
    try:
        said = end.recv()
    except EOFError:
        raise RuntimeError(f"{contender} has died") from None
    if isinstance(said, Exception):
        raise said
    return said


def serve(name: str, contender: str, device_name: str, end: Connection) -> None:
    """A contender's process."""
    from tests.bench.cases import CASES

    try:
        device = torch.device(device_name)
        before = resident("VmRSS")
        work = CASES[name].prepare(contender, device)
        timed(work.round, device)
        about = {"images": work.images, "flops": work.flops, "parameters": work.parameters}
        end.send(about | {"precision": work.precision, "memory_before": before})
        while end.recv() == "round":  # EOFError once the one who asks is gone
            end.send(timed(work.round, device))
        end.send(torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM"))
    except Exception as error:
        end.send(RuntimeError(f"{contender}: {type(error).__name__}: {error}"))


def timed(what: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, with the device's work finished."""
    gc.collect()
    synchronize(device)
    began = time.perf_counter()
    what()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def resident(what: str) -> int:
    """This process's memory in bytes: VmRSS now, VmHWM at its peak. (ru_maxrss begins with the parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def flops_of(network: Callable[..., object], *inputs: object, backward: bool = False) -> float:
    """Floating point operations of a call, and of its backward pass where asked: twice as many again."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return counter.get_total_flops() * (3.0 if backward else 1.0)


def parameters_of(model: nn.Module) -> int:
    """Number of weights of a network."""
    return sum(p.numel() for p in model.parameters())


def peak(device: torch.device) -> dict[str, float]:
    """Peak FLOP/s of this machine, measured: matrix products and convolutions, in both precisions."""
    side = 8192 if device.type == "cuda" else 2048
    found = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(side, side, device=device, dtype=dtype)
        conv = nn.Conv2d(256, 256, 3, padding=1).to(device, dtype)
        images = torch.randn(8 if device.type == "cpu" else 128, 256, 32, 32, device=device, dtype=dtype)
        if device.type == "cuda":
            conv, images = conv.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
        with torch.inference_mode():
            found[f"matmul {precision}"] = best(lambda a=a: a @ a, 2 * side**3, device)
            count = 2 * 256 * 256 * 9 * 32 * 32 * len(images)
            found[f"convolution {precision}"] = best(lambda conv=conv, images=images: conv(images), count, device)
    return found


def best(what: Callable[[], object], flops: float, device: torch.device) -> float:
    """FLOP/s of the fastest of eight calls."""
    timed(what, device)
    return flops / min(timed(what, device) for _ in range(8))


def machine(device: torch.device) -> dict[str, str]:
    """The hardware and versions that a measurement ran on."""
    import platform
    from importlib.metadata import version

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()}, {len(os.sched_getaffinity(0))} cores"
    packages: Sequence[str] = ("torch", "torchvision", "diffusers", "pillow")
    return {"machine": name, "python": platform.python_version()} | {name: version(name) for name in packages}


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, and whether it has instructions for matrices in bf16 (AMX): steps are much faster then."""
    lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
    about = {name.strip(): value.strip() for name, _, value in lines}
    name = re.sub(r"\(R\)|\(TM\)| Processor", "", about.get("model name", "CPU"))
    return name + (", AMX" if "amx_bf16" in about.get("flags", "").split() else "")
