"""This process and the others of its run: device, precision, rank, share of the work, what all of them agree on.

Between processes everything goes through torch.distributed: NCCL between GPUs, gloo between CPUs.
"""

import ctypes
import itertools
import os
import re
import socket
import time
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightdiff.errors import LightdiffError, LostContact, RunError, UserError, from_os
from lightdiff.runtime import DistEnv, end_with_parent
from lightdiff.settings import Device, Precision

T = TypeVar("T")
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # of glibc's mallopt
NO_TIMEOUT: list[Any] = []  # the group of all processes for waits without the usual time limit
RENDEZVOUS = itertools.count()  # how often this process has joined the others


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
    """Whether this CPU does, measured once: on a busy machine, another measurement may find something else."""
    products = [partial(torch.mm, a, a) for a in (torch.ones(768, 768), torch.ones(768, 768, dtype=torch.bfloat16))]
    fp32, bf16 = (min(timeit.repeat(product, number=1, repeat=8)) for product in products)
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
    """All processes of a run, seen from one of them. With a single process every method is trivial."""

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

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def all_true(self, value: Tensor) -> Tensor:
        """Whether a flag is set in every process; on a GPU nothing waits for the answer."""
        if self.world_size == 1:
            return value
        number = value.float()
        dist.all_reduce(number, dist.ReduceOp.MIN)
        return number > 0

    def all_reduce_max(self, *numbers: int, patient: bool = False) -> list[int]:
        """The maximum of each number over all processes; waits for them, but for no GPU.

        `patient` waits for days, where one process may have much more to do than another; a dead one is noticed at
        once.
        """
        if self.world_size == 1:
            return list(numbers)
        together = torch.tensor(numbers)
        dist.all_reduce(together, dist.ReduceOp.MAX, group=NO_TIMEOUT[0] if patient else None)
        return [int(n) for n in together]

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Let the main process do something while the others wait; all return, or raise, what it does."""
        if self.world_size == 1:
            return work()
        outcome: list[tuple[T | None, LightdiffError | None]] = [(None, None)]
        if self.is_main:
            try:
                outcome = [(work(), None)]
            except LightdiffError as error:
                outcome = [(None, error)]
            except OSError as error:
                outcome = [(None, from_os(error))]
            except Exception as error:  # the others must not wait for what will not come
                outcome = [(None, RunError(f"{type(error).__name__}: {error}"))]
        dist.broadcast_object_list(outcome, 0, device=torch.device("cpu"))
        result, problem = outcome[0]
        if problem is not None:
            raise problem
        return result  # type: ignore[return-value]

    def fetch(self, find: Callable[[], Path]) -> Path:
        """The file that `find` finds or downloads: one process of each machine first, so that none does it twice."""
        file = self.run_on_main(find)
        (missing,) = self.all_reduce_max(int(not file.is_file()))
        for turn in (0, 1) if missing else ():  # other machines have caches of their own
            if not file.is_file() and (DistEnv.from_env(os.environ).local_rank > 0) == bool(turn):
                file = find()
            self.all_reduce_max(turn)
        return file

    def check_same(self, what: str, value: object) -> None:
        """Check that all processes found the same.

        Raises:
            UserError: In every process, if one of them did not.
        """
        if self.world_size == 1:
            return
        found: list[object] = [None] * self.world_size
        dist.all_gather_object(found, value)
        if any(other != found[0] for other in found):
            odd = next(rank for rank, other in enumerate(found) if other != found[0])
            raise UserError(
                f"process {odd} sees another {what} than process 0: all machines need the same files at the same paths"
            )

    def all_names(self, found: Iterable[str]) -> list[str]:
        """Every name that any process found, the same list in all."""
        if self.world_size == 1:
            return list(found)
        everywhere: list[list[str]] = [[]] * self.world_size
        dist.all_gather_object(everywhere, list(found))
        return list(dict.fromkeys(name for names in everywhere for name in names))


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


def init_distributed(device: torch.device, timeout: float) -> Processes:
    """Join the other processes of this run, if a launcher has started several.

    Args:
        device: Where this process computes.
        timeout: Seconds after which a process that does not answer is given up.

    Raises:
        UserError: If the launcher's variables make no sense.
    """
    env = DistEnv.from_env(os.environ)
    if env.world_size == 1:
        return Processes()
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # some builds of torch have none
    from torch.distributed.rendezvous import rendezvous

    if not dist.is_initialized():
        end_with_parent()
        check_env(env)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        method = "env://" if "RANK" in os.environ else f"tcp://{env.address}:{env.port}"
        began, wait = time.monotonic(), timedelta(seconds=timeout)
        try:
            store, _, _ = next(rendezvous(method, env.rank, env.world_size, timeout=wait))
            store = PrefixStore(f"{attempt(os.environ)}-{next(RENDEZVOUS)}", store)  # it has those of the last stage
            dist.init_process_group(backend, timeout=wait, world_size=env.world_size, rank=env.rank, store=store)
            NO_TIMEOUT[:] = [dist.new_group(backend="gloo", timeout=timedelta(days=7))]
        except (ValueError, OSError, RuntimeError) as error:
            raise LostContact(no_meeting(env, time.monotonic() - began, str(error))) from error
    return Processes(env.rank, env.world_size)


def attempt(environment: Mapping[str, str]) -> str:
    """Which attempt of torch's agent this is, where its store still has the addresses of the last one; else 0.

    Agents on several machines count differently: one that is told to start again by another one does not count that.
    """
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return environment.get("TORCHELASTIC_RESTART_COUNT", "0") if shared else "0"


def check_env(env: DistEnv) -> None:
    """Check that a launcher's variables make sense.

    Raises:
        UserError: If not; some are set by others under the same names.
    """
    if not (re.fullmatch(r"[0-9]{1,5}", env.port) and 0 < int(env.port) < 1 << 16):
        raise UserError(f"MASTER_PORT={env.port[:100]} is no port: all processes need the same number up to 65535")
    if env.rank >= env.world_size:
        raise UserError(f"process number {env.rank} of {env.world_size}: RANK has to be less than WORLD_SIZE")


def no_meeting(env: DistEnv, seconds: float, error: str) -> str:
    """Why the processes of a run have not met, and by which variables this one looked for others."""
    if "EADDRINUSE" in error or "address already in use" in error.lower():
        return f"MASTER_PORT={env.port} is taken on this machine: choose another one, the same for all processes"
    try:
        socket.getaddrinfo(env.address, None)
    except OSError:
        return f"MASTER_ADDR={env.address}: this machine knows no host of that name"
    names = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "MASTER_ADDR", "MASTER_PORT")
    found = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    reason = re.split(r"\n|Exception raised from|\. C\+\+", error.strip())[0].strip(" .(")
    return (
        f"the processes of this run have not met within {seconds:.0f} s ({reason}): by {found}, this is process "
        f"{env.rank} of {env.world_size}. If there is only this one, those are left over from another job: "
        "unset RANK WORLD_SIZE; if not, start the others, too, where they reach that address"
    )


def shutdown() -> None:
    """Leave the process group, with all its threads."""
    if dist.is_available() and dist.is_initialized():
        NO_TIMEOUT.clear()
        dist.destroy_process_group()


@contextmanager
def distributed(device: torch.device, timeout: float) -> Iterator[Processes]:
    """The processes of a run, joined until its end; a stage within another one leaves that to it.

    After an error they stay joined, as the others may wait for what will not come: the process is to end.
    """
    inner = dist.is_available() and dist.is_initialized()
    yield init_distributed(device, timeout)
    if not inner:
        shutdown()
