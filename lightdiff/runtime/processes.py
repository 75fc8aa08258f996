"""This process and the others of its run: device, precision, rank, share of the work, what all of them agree on."""

import ctypes
import os
import time
import timeit
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from lightdiff.errors import UserError
from lightdiff.runtime import DistEnv
from lightdiff.settings import Device, Precision

T = TypeVar("T")
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # of glibc's mallopt


# --- the device ---------------------------------------------------------------------------------------------------


def pick_device(name: Device) -> torch.device:
    """The device of this name, with its number; `auto` takes cuda, mps or cpu, the first there is.

    Raises:
        UserError: If it is asked for and absent.
    """
    env = DistEnv.from_env(os.environ)
    mps = torch.backends.mps.is_available() and env.world_size == 1  # gloo knows no tensors of MPS
    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * mps + ["cpu"]
    chosen = available[0] if name == "auto" else name
    if chosen not in available:
        raise UserError(f"--device {name}: torch {torch.__version__} finds no such device here; try --device cpu")
    if chosen == "cpu":
        keep_memory()
    if chosen == "cuda":
        number, count = env.local_rank, torch.cuda.device_count()
        if count == 1 and "SLURM_PROCID" in os.environ:
            number = 0  # Slurm shows each task its own GPU alone
        if number >= count:
            raise UserError(f"{number + 1} processes were started here, but there are {count} GPUs: start one for each")
        torch.cuda.set_device(number)
        torch.backends.cudnn.benchmark = True  # the fastest way of each convolution is looked for once: shapes recur
        torch.backends.cudnn.allow_tf32 = False  # fp32 is float32 in convolutions, as it is in matrix products
        return torch.device("cuda", number)
    return torch.device(chosen)


def pick_precision(name: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """fp32 or bf16; `auto` takes bf16 where this hardware multiplies it faster, measured for some milliseconds."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "mps":
        return "fp32"
    return "bf16" if multiplies_bf16_faster() else "fp32"


@cache
def multiplies_bf16_faster() -> bool:
    """Whether this CPU does, measured once, in processor time, which other work on the machine changes little."""
    products = [partial(torch.mm, a, a) for a in (torch.ones(768, 768), torch.ones(768, 768, dtype=torch.bfloat16))]
    fp32, bf16 = (min(timeit.repeat(product, timer=time.process_time, number=1, repeat=8)) for product in products)
    return bf16 < 0.8 * fp32


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """A context that computes in bf16 where that is the precision; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def to_device(model: nn.Module, device: torch.device) -> None:
    """Put a network on a device, in the memory format that suits it.

    channels_last for CUDA's tensor cores, and on a CPU for networks without GroupNorm, whose backward pass is several
    times slower in it there.
    """
    model.to(device)
    if device.type == "cuda" or not any(isinstance(module, nn.GroupNorm) for module in model.modules()):
        model.to(memory_format=torch.channels_last)


def keep_memory() -> None:
    """Let glibc keep memory that tensors free for the next ones, where that is the C library.

    It returns large blocks to the system at once, which then has to clear every page again: a fifth of a training
    step on a CPU. Or, by its own rules for what is large, it keeps them in pieces that fit nothing, and grows.
    """
    with suppress(AttributeError, OSError, TypeError):  # macOS, musl, Windows
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_workers(asked: int, device: torch.device) -> int:
    """Worker processes that load images: as asked, or as many as there are cores that no network computes on."""
    if asked >= 0:
        return asked
    cores = usable_cores() // DistEnv.from_env(os.environ).local_world_size
    return min(16, cores) if device.type == "cuda" else min(4, cores // 4)


# --- all processes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Processes:
    """All processes of a run, seen from one of them: alone, as here, or several, as in `extras/several/group.py`."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's contiguous share of `count` items; shares differ by one item at most and may be empty."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def batch_slice(self, count: int) -> slice:
        """The same as a slice of a training batch, where no share may be empty: an empty one borrows the first item."""
        share = self.share(count) or range(1)
        return slice(share.start, share.stop)

    def strided(self, items: Sequence[T]) -> Sequence[T]:
        """Every world_size-th item, from the rank-th on."""
        return items[self.rank :: self.world_size]

    def average_gradients(self, model: nn.Module) -> nn.Module:
        """The network with gradients averaged over all processes; its buffers are constants, so they are not sent."""
        return model

    def no_sync(self, network: nn.Module) -> AbstractContextManager[None]:
        """A context in which gradients stay in this process, while more of the same step come."""
        return nullcontext()

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        return value

    def all_true(self, value: Tensor) -> Tensor:
        """Whether a flag is set in every process; on a GPU nothing waits for the answer."""
        return value

    def all_reduce_max(self, *numbers: int, patient: bool = False) -> list[int]:
        """The maximum of each number over all processes; waits for them, but for no GPU.

        `patient` waits for days, where one process may have much more to do than another; a dead one is noticed at
        once.
        """
        return list(numbers)

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Let the main process do something while the others wait; all return, or raise, what it does."""
        return work()

    def fetch(self, find: Callable[[], Path]) -> Path:
        """The file that `find` finds or downloads: one process of each machine first, so that none does it twice."""
        return find()

    def check_same(self, what: str, value: object) -> None:
        """Check that all processes found the same.

        Raises:
            UserError: In every process, if one of them did not.
        """

    def all_names(self, found: Iterable[str]) -> list[str]:
        """Every name that any process found, the same list in all."""
        return list(found)


class Means:
    """Means over items that come in batches and are shared among processes, summed in float64."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._batches: list[Tensor] = []  # on the device, so that nothing waits for them
        self._counts: list[int] = []

    def add(self, means: Mapping[str, Tensor], count: int) -> None:
        """Add the means over `count` items, the same names each time."""
        self._names = list(means)
        self._batches.append(torch.stack(list(means.values())))
        self._counts.append(count)

    def over(self, processes: Processes) -> dict[str, float]:
        """The means over all items of all processes; empty where there are none. Waits for the device."""
        names, counts = processes.all_names(self._names), torch.tensor(self._counts, dtype=torch.float64)
        batches = torch.stack(self._batches).cpu().double() if self._batches else torch.zeros(0, len(names)).double()
        numbers = torch.cat([counts @ batches, counts.sum()[None]])
        *sums, count = processes.all_reduce_sum(numbers).tolist()
        return {name: value / count for name, value in zip(names, sums, strict=True)} if count else {}
