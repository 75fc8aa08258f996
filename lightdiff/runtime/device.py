"""Where and how to compute: device, precision, memory format, worker processes."""

import ctypes
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightdiff.errors import RunError, UserError
from lightdiff.runtime.dist_env import DistEnv
from lightdiff.runtime.progress import console
from lightdiff.settings import Compile, Device, Precision

N = TypeVar("N", bound=nn.Module)
COMPILED_CALLS, COMPILED_CALLS_CPU = 2000, 5000  # of a network, that pay for compiling it
GRAPHED_PARAMETERS = 50e6
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # of glibc's mallopt


def pick_device(name: Device) -> torch.device:
    """The device of this name; `auto` takes cuda, mps or cpu, the first there is.

    Raises:
        UserError: If it is asked for and absent.
    """
    place = DistEnv.of(os.environ)
    mps = torch.backends.mps.is_available() and place.world_size == 1  # gloo knows no tensors of MPS
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if name == "auto":
        name = next(n for n in ("cuda", "mps", "cpu") if there[n])
    elif not there[name]:
        raise UserError(f"--device {name}: torch {torch.__version__} finds no such device here; try --device cpu")
    if name == "cuda":
        number, count = place.local_rank, torch.cuda.device_count()
        if count == 1 and "SLURM_PROCID" in os.environ:
            number = 0  # Slurm shows each task its own GPU alone
        if number >= count:
            raise UserError(f"{number + 1} processes were started here, but there are {count} GPUs: start one for each")
        torch.cuda.set_device(number)
    elif name == "cpu":
        keep_memory()
    return torch.device(name)


def as_begun(asked: str, before: object) -> Any:
    """What is asked for; `auto` is what was decided when the work that is gone on with was begun, if it was."""
    return before if asked == "auto" and before in ("fp32", "bf16", "on", "off") else asked


def pick_precision(name: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """fp32 or bf16; `auto` takes bf16 where this hardware multiplies it faster, found by trying for some ms."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "mps":
        return "fp32"
    wide = torch.ones(768, 768)
    narrow = wide.bfloat16()
    pairs = [(_seconds(wide), _seconds(narrow)) for _ in range(8)]  # in turn, so that other load hits both alike
    return "bf16" if min(b for _, b in pairs) < 0.8 * min(w for w, _ in pairs) else "fp32"


def _seconds(a: torch.Tensor) -> float:
    """How long one multiplication takes."""
    start = time.perf_counter()
    torch.mm(a, a)
    return time.perf_counter() - start


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """A context that computes in bf16 where that is the precision; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def pick_compile(name: Compile, device: torch.device, calls: int, training: bool = True) -> Literal["on", "off"]:
    """Whether to translate a network that will be called so often.

    `auto` does so where the minute or two that it takes are won back. On a CPU, training wins nothing: convolutions
    take most of its time, and stay as they are. Where there is no compiler, it is said, and not done.
    """
    enough = COMPILED_CALLS if device.type == "cuda" else math.inf if training else COMPILED_CALLS_CPU
    if name == "off" or (name == "auto" and calls < enough):
        return "off"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "lightdiff" / "compiled"))
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a Python it does not know: any number of kinds
        reason = str(error).strip().splitlines()[0]
        console.print(f"torch.compile does not work here, so the network runs as it is ({reason})", soft_wrap=True)
        return "off"
    return "on"


def compile_network(network: nn.Module, device: torch.device, training: bool = True, graphs: bool = True) -> None:
    """Let a network be compiled when it is first called; its tensors and their names stay as they are.

    A small network on a GPU spends its time on starting kernels: there they are recorded and replayed as CUDA graphs,
    if `graphs`: what one call makes is overwritten by the next, so that gradients cannot add up over several calls.
    On a CPU, where it is not trained, weights are laid out once as convolutions want them.
    """
    graphs = graphs and device.type == "cuda" and sum(p.numel() for p in network.parameters()) < GRAPHED_PARAMETERS
    if device.type == "cpu" and not training:
        from torch._inductor import config  # not before: it takes a second

        config.freezing = True  # as an option of this network alone it would not reach all places
    network.compile(mode="reduce-overhead" if graphs else None, dynamic=False)


def enable_activation_checkpointing(network: nn.Module) -> None:
    """Let each checkpointable block of a network keep its input alone, and compute the rest again on the way back.

    Memory for activations falls to a fraction; time grows by a forward pass (Chen et al. 2016, arXiv:1604.06174).
    """
    for block in network.modules():
        if getattr(block, "checkpointable", False):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def cast_weights(network: N, precision: str) -> N:
    """A network to be used, not trained, under autocast: weights that each call would convert are converted once."""
    if precision == "bf16":
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                module.bfloat16()
    return network


def keep_memory() -> None:
    """Let glibc keep the memory that tensors free for the next ones, where that is the C library.

    It gives large blocks back to the system at once, which then has to clear every page again: a fifth of a training
    step on a CPU. Or, by its own rules for what is large, it keeps them in pieces that fit nothing, and grows.
    """
    try:
        tune = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return
    tune(M_MMAP_MAX, 0)
    tune(M_TRIM_THRESHOLD, -1)


def pick_workers(asked: int, device: torch.device) -> int:
    """Processes that load images: as asked, or so many that on a CPU they do not fight the networks for cores."""
    if asked >= 0:
        return asked
    cores = usable_cores() // DistEnv.of(os.environ).local_world_size
    return min(8, cores) if device.type == "cuda" else min(4, cores // 4)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def explain_out_of_memory(flag: str, images: int) -> Iterator[None]:
    """Say what to lower, and by how much, when the GPU's memory does not suffice for `images` at a time.

    Raises:
        RunError: Instead of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = torch.cuda.mem_get_info()[1] / 1e9 if torch.cuda.is_available() else 0.0
        advice = f"try {flag} {images // 2}" if images > 1 else "a smaller network or --resolution is needed"
        what = f"the GPU's memory ({size:.0f} GB) does not suffice for {images} images at a time"
        raise RunError(f"{what}: {advice}; what was saved is untouched") from error


def place(model: nn.Module, device: torch.device) -> None:
    """Put a network on a device, in the memory format that suits it.

    channels_last for CUDA's tensor cores. Not on a CPU: there GroupNorm's backward is several times slower in it.
    """
    model.to(device)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)


def memory_in_use(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
