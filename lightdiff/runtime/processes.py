"""Several processes as one: who takes which share of the work, and what they tell one another.

What travels between processes goes through torch.distributed: NCCL between GPUs, gloo between CPUs.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightdiff.errors import LightdiffError, LostContact, RunError, UserError
from lightdiff.runtime.dist_env import DistEnv
from lightdiff.runtime.progress import console

T = TypeVar("T")
PATIENT: list[Any] = []  # all processes, for a wait without the usual limit
ORPHAN_SECONDS = 0.5  # how often a process looks whether the one that started it is still there


@dataclass(frozen=True)
class Processes:
    """All processes of a run, seen from one of them. Alone, nothing here does anything."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's part of `count` items, in one piece; parts differ by one item at most and may be empty."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def batch_slice(self, count: int) -> slice:
        """The same as a slice for training, where nobody may have nothing: an empty share is lent the first item."""
        share = self.share(count) or range(1)
        return slice(share.start, share.stop)

    def strided(self, items: Sequence[T]) -> Sequence[T]:
        """Every size-th item, from the rank-th on."""
        return items[self.rank :: self.world_size]

    def sum(self, value: Tensor) -> Tensor:
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
        """The largest of each number over all processes; waits for them, but for no GPU.

        With `patient` for days, where one may have much more to do than another; one that is gone is noticed at once.
        """
        if self.world_size == 1:
            return list(numbers)
        together = torch.tensor(numbers)
        dist.all_reduce(together, dist.ReduceOp.MAX, group=PATIENT[0] if patient else None)
        return [int(n) for n in together]

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Let the first process do something while the others wait; what it returns or raises, all return or raise."""
        if self.world_size == 1:
            return work()
        said: list[tuple[T | None, LightdiffError | None]] = [(None, None)]
        if self.is_main:
            try:
                said = [(work(), None)]
            except LightdiffError as error:
                said = [(None, error)]
            except Exception as error:  # the others must not wait for what will not come
                said = [(None, RunError(f"{type(error).__name__}: {error}"))]
        dist.broadcast_object_list(said, 0, device=torch.device("cpu"))
        result, problem = said[0]
        if problem is not None:
            raise problem
        return result  # type: ignore[return-value]

    def fetch(self, find: Callable[[], Path]) -> Path:
        """The file that `find` finds or downloads: one process of each machine first, so that none does it twice."""
        file = self.run_on_main(find)
        (missing,) = self.all_reduce_max(int(not file.is_file()))
        for turn in (0, 1) if missing else ():  # other machines have caches of their own
            if not file.is_file() and (DistEnv.of(os.environ).local_rank > 0) == bool(turn):
                file = find()
            self.all_reduce_max(turn)
        return file

    def check_same(self, what: str, value: object) -> None:
        """See that all processes found the same.

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

    def names(self, found: Iterable[str]) -> list[str]:
        """Every name that any process found, the same list in all."""
        if self.world_size == 1:
            return list(found)
        everywhere: list[list[str]] = [[]] * self.world_size
        dist.all_gather_object(everywhere, list(found))
        return list(dict.fromkeys(name for names in everywhere for name in names))


def init_distributed(device: torch.device, timeout: float) -> Processes:
    """Meet the other processes of this run, if a launcher has started several.

    Args:
        device: Where this process computes.
        timeout: Seconds after which a process that does not answer is given up.

    Raises:
        LostContact: If they do not meet in time.
    """
    place = DistEnv.of(os.environ)
    if place.world_size == 1:
        return Processes()
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # some builds of torch have none
    from torch.distributed.rendezvous import rendezvous

    if not dist.is_initialized():
        end_with_parent()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        method = "env://" if "RANK" in os.environ else f"tcp://{place.address}:{place.port}"
        wait = timedelta(seconds=timeout)
        try:
            with explain_lost_contact(place.rank):
                store, _, _ = next(rendezvous(method, place.rank, place.world_size, timeout=wait))
                if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                    # After a restart the agent's store still has the addresses of processes that are dead.
                    store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
                dist.init_process_group(
                    backend, timeout=wait, world_size=place.world_size, rank=place.rank, store=store
                )
                PATIENT[:] = [dist.new_group(backend="gloo", timeout=timedelta(days=7))]
        except ValueError as error:
            raise UserError(f"what the launcher left in the environment makes no sense: {error}") from None
    console.quiet = console.quiet or place.rank > 0  # one speaks for all
    return Processes(place.rank, place.world_size)


def shutdown() -> None:
    """Part from the other processes, at the end of a run."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def end_with_parent() -> None:
    """End this process soon after the one that started it, so that no worker runs on without a launcher."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


SIGNS = ("gloo", "nccl", "c10d", "connection", "timed out", "timeout", "broken pipe", "socket", "peer")


@contextmanager
def explain_lost_contact(rank: int) -> Iterator[None]:
    """Turns what torch raises in a process when another one is gone into a sentence.

    Raises:
        LostContact: Instead of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in SIGNS):
            raise
        reason = str(error).strip().splitlines()[0]
        raise LostContact(
            f"process {rank} has lost contact with the others ({reason}); "
            "what was saved is untouched, and the same command goes on from there"
        ) from error
