"""What several processes exchange, through torch.distributed: NCCL between GPUs, gloo between CPUs."""

import itertools
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightdiff.errors import LightdiffError, RunError, UserError, from_os
from lightdiff.extras.several.worker import LostContact, end_with_parent
from lightdiff.runtime import DistEnv, restarted
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.resume import untouched
from lightdiff.settings import StageSettings, with_changes

T = TypeVar("T")
S = TypeVar("S", bound=StageSettings)
NO_TIMEOUT: list[Any] = []  # the group of all processes for waits without the usual time limit
RENDEZVOUS = itertools.count()  # how often this process has joined the others
LOST = ("gloo", "nccl", "c10d", "connection", "timed out", "timeout", "broken pipe", "socket", "peer")  # in errors


@dataclass(frozen=True)
class Group(Processes):
    """Several processes; `Processes` says what each method does."""

    def average_gradients(self, model: nn.Module) -> nn.Module:
        """By DistributedDataParallel."""
        return wrap_ddp(model)

    def no_sync(self, network: nn.Module) -> AbstractContextManager[None]:
        """DistributedDataParallel's own."""
        sync: AbstractContextManager[None] = network.no_sync()  # type: ignore[operator]
        return sync

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """A tensor may be on any device."""
        dist.all_reduce(value)
        return value

    def all_true(self, value: Tensor) -> Tensor:
        """As numbers, whose least is wanted."""
        number = value.float()
        dist.all_reduce(number, dist.ReduceOp.MIN)
        return number > 0

    def all_reduce_max(self, *numbers: int, patient: bool = False) -> list[int]:
        """As whole numbers on the CPU."""
        together = torch.tensor(numbers)
        dist.all_reduce(together, dist.ReduceOp.MAX, group=NO_TIMEOUT[0] if patient else None)
        return [int(n) for n in together]

    def run_on_main(self, work: Callable[[], T]) -> T:
        """What it returns, or an error of ours, travels to all."""
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
        """The main process first, then one of each machine that does not see its file, then the rest."""
        file = self.run_on_main(find)
        (missing,) = self.all_reduce_max(int(not file.is_file()))
        for turn in (0, 1) if missing else ():  # other machines have caches of their own
            if not file.is_file() and (DistEnv.from_env(os.environ).local_rank > 0) == bool(turn):
                file = find()
            self.all_reduce_max(turn)
        return file

    def check_same(self, what: str, value: object) -> None:
        """Compares what all have found, in each."""
        found: list[object] = [None] * self.world_size
        dist.all_gather_object(found, value)
        if any(other != found[0] for other in found):
            odd = next(rank for rank, other in enumerate(found) if other != found[0])
            raise UserError(
                f"process {odd} sees another {what} than process 0: all machines need the same files at the same paths"
            )

    def all_names(self, found: Iterable[str]) -> list[str]:
        """In the order of processes."""
        everywhere: list[list[str]] = [[]] * self.world_size
        dist.all_gather_object(everywhere, list(found))
        return list(dict.fromkeys(name for names in everywhere for name in names))


def wrap_ddp(model: nn.Module) -> DistributedDataParallel:
    """The network with gradients averaged over all processes; its buffers are constants, so they are not sent."""
    for p in model.parameters():  # DDP warns of other strides, even of sides of 1, where they mean nothing
        if p.requires_grad and p.shape[2:] == (1, 1):
            p.register_hook(partial(torch.as_strided, size=p.shape, stride=p.stride()))  # type: ignore[no-untyped-call]
    newer = "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters  # torch 2.14 and later
    options = {"gradient_as_bucket_view": True, "forward_sync_buffers" if newer else "broadcast_buffers": False}
    return DistributedDataParallel(model, **options)  # type: ignore[arg-type]


def init_distributed(device: torch.device, timeout: float) -> Group:
    """Join the other processes of this run.

    Args:
        device: Where this process computes.
        timeout: Seconds after which a process that does not answer is given up.

    Raises:
        UserError: If the launcher's variables make no sense.
    """
    env = DistEnv.from_env(os.environ)
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
    return Group(env.rank, env.world_size)


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
def distributed(device: torch.device, settings: StageSettings) -> Iterator[Group]:
    """The processes of a run, joined until its end; a stage within another one leaves that to it.

    After an error they stay joined, as the others may wait for what will not come: the process is to end.
    """
    inner = dist.is_available() and dist.is_initialized()
    with explain_lost_contact(settings):
        yield init_distributed(device, settings.job.timeout)
        if not inner:
            shutdown()


@contextmanager
def explain_lost_contact(settings: StageSettings) -> Iterator[None]:
    """Turn what torch raises when another process is gone into an error that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in LOST):
            raise
        reason = re.sub(r"^\[.*?\] ", "", str(error).strip().splitlines()[0])  # without a place in C++
        lost = f"process {DistEnv.from_env(os.environ).rank} has lost contact with the others ({reason})"
        raise LostContact(f"{lost}; {untouched(settings)}") from error


def for_this_start(settings: S, once: str) -> S:
    """What a process of an elastic agent runs: after a restart, without the flags `once`, for a run's first start.

    Raises:
        UserError: If agents on several machines may restart it: each counts for itself, so processes could disagree.
    """
    elsewhere = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    if elsewhere and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise UserError(f"{once} would be repeated by torchrun's --max-restarts: start once without that")
    unset = {
        name: type(settings).model_fields[name].default for name in ("restart", "from_step") if hasattr(settings, name)
    }
    return with_changes(settings, **unset) if restarted() else settings
