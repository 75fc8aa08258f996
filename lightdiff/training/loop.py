"""The one training loop: accumulate, clip, step, average, validate, save. What is trained is a `Task`."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightdiff import checkpoint
from lightdiff.checkpoint import Checkpoint, Metadata, load_weights
from lightdiff.data.order import generator
from lightdiff.errors import RunError, Stopped, UserError
from lightdiff.run_folder import StageFolder
from lightdiff.runtime.device import (
    autocast,
    compile_network,
    enable_activation_checkpointing,
    explain_out_of_memory,
    memory_in_use,
)
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.progress import Reporter
from lightdiff.runtime.signals import AGAIN, OUT_OF_TIME, SignalMonitor, TimeLimit
from lightdiff.settings import JobSettings, LoopSettings, flat
from lightdiff.training.ema import EMA
from lightdiff.training.optimizers import MASKING, STATE_KEYS, optimizer_state_bytes, optimizers_of

Batch = dict[str, Tensor]
SLOW_DISK = 50e6  # bytes a second that a save is sure to manage, for --max-time
SMALL_FILES = 10_000_000  # room for metrics and pictures beside a checkpoint
NAMES_SHOWN = 8


class Task(Protocol):
    """What the loop is handed: data, a loss, and how to judge and picture the network.

    Of each batch, a process loads and prepares its share (`ranks.share`); of an empty one, the first item.
    """

    stage: str
    model: nn.Module
    device: torch.device
    ranks: Processes

    def batches(self, start: int, steps: int) -> Iterator[Any]:
        """This process's share of `steps` batches, the first of which begins after `start` images."""

    def prepare(self, batch: Any, rng: torch.Generator) -> Batch:
        """The share of an optimizer step on the device; `rng` draws for the whole batch, of which this is a slice."""

    def loss(self, model: nn.Module, part: Batch) -> dict[str, Tensor]:
        """`loss` and its parts, each a mean over the part."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """`loss` and more, over the whole validation set, shared among all processes; empty where that is."""

    def picture(self, model: nn.Module, path: Path) -> None:
        """Save a picture of what the network can do."""

    def names(self, start: int) -> list[str]:
        """What the whole batch is made of that begins after `start` images."""


class Trainer:
    """A task's state between optimizer steps: weights, their average, the optimizer, how far it is."""

    def __init__(self, task: Task, loop: LoopSettings, precision: str) -> None:
        """Start at step 0 from the task's network."""
        self.task, self.loop, self.precision, self.ranks = task, loop, precision, task.ranks
        self.model = task.model
        self.ema = EMA(self.model, loop.ema_decay) if loop.ema_decay else None
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizers = optimizers_of(self.model, loop, precision)
        self.lr = loop.lr
        self.step = 0
        self.images_seen = 0
        self.best = math.inf
        self.skipped = 0  # steps without an update, as something was not finite
        self._sound: list[Tensor] = []  # of each step since the last look, whether all was finite
        if loop.checkpoint_activations:
            enable_activation_checkpointing(self.model)
        if loop.compile == "on":
            one_pass = self.ranks.world_size == 1 and loop.micro == loop.batch_size
            compile_network(self.model, task.device, graphs=one_pass)
        # As it is called in training: with several processes, it averages their gradients.
        self.network = wrap_ddp(self.model) if self.ranks.world_size > 1 else self.model

    @property
    def averaged(self) -> nn.Module:
        """The averaged network where there is one, else the network itself."""
        return self.ema.model if self.ema else self.model

    def train_step(self, batch: Any, total_steps: int) -> dict[str, Tensor]:
        """One optimizer step; losses of this process's share stay on the device, so that nothing waits for them.

        The gradient is that of the mean over the whole batch, however it is divided among processes and micro-batches.
        """
        loop, task, ranks = self.loop, self.task, self.ranks
        rng = generator(task.device, loop.seed, task.stage, "noise", self.step)
        whole = task.prepare(batch, rng)
        size = len(next(iter(whole.values())))
        weigh = bool(ranks.share(loop.batch_size))  # an empty share is lent an item, which does not count
        sums: dict[str, Tensor] = {}
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        for first in range(0, size, loop.micro):
            part = {name: value[first : first + loop.micro] for name, value in whole.items()}
            share = weigh * len(next(iter(part.values()))) / loop.batch_size
            if loop.compile == "on":  # what a CUDA graph has answered may be overwritten now
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            with self._quiet(first + loop.micro < size):
                with autocast(task.device, self.precision):
                    losses = task.loss(self.network, part)
                (losses["loss"] * (share * ranks.world_size)).backward()  # type: ignore[no-untyped-call]
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() * share
        limit = loop.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.trained.values(), limit)
        self._update(ranks.all_true(norm.isfinite() & sums["loss"].isfinite()), total_steps)
        self.images_seen += loop.batch_size
        if self.ema:
            self.ema.update(self.model, self.step)
        return sums | {"grad_norm": norm / ranks.world_size}  # it is the same in all processes, and sums are summed up

    def _quiet(self, more: bool) -> AbstractContextManager[None]:
        """Leave gradients where they are while more micro-batches of this step come."""
        network = self.network
        return network.no_sync() if more and isinstance(network, DistributedDataParallel) else nullcontext()

    def _update(self, sound: Tensor, total_steps: int) -> None:
        """Let the optimizer step, or on the device, without waiting for it, leave all as it is if not all is sound."""
        self.lr = learning_rate(self.loop, self.step, total_steps)
        masking = self.task.device.type in MASKING
        if masking or sound:  # without masks, this waits for the device
            for optimizer in self.optimizers:
                optimizer.param_groups[0]["lr"] = self.lr
                if masking:  # as torch.amp.GradScaler says it
                    optimizer.found_inf = (~sound).float()  # type: ignore[attr-defined]
                optimizer.step()
        self._sound.append(sound)
        self.step += 1

    def look(self, losses: dict[str, Tensor]) -> tuple[dict[str, float], list[int]]:
        """The last step's numbers over all processes, and the steps skipped since the last look. Waits for the device.

        Numbers that are not finite are left out.
        """
        sound = torch.stack(self._sound).tolist()
        first = self.step - len(self._sound) + 1
        skipped = [first + i for i, good in enumerate(sound) if not good]
        self._sound = []
        self.skipped += len(skipped)
        kind = losses["grad_norm"].dtype
        values = self.ranks.sum(torch.stack([value.to(kind) for value in losses.values()])).tolist()
        return {name: value for name, value in zip(losses, values, strict=True) if math.isfinite(value)}, skipped

    @property
    def nbytes(self) -> int:
        """Size of a resumable snapshot, about."""
        weights = sum(p.nbytes for p in self.model.parameters())
        return (2 if self.ema else 1) * weights + optimizer_state_bytes(self.model, self.loop)

    def moments(self) -> dict[str, Tensor]:
        """What the optimizers know of each parameter, by kind and name."""
        known: dict[Any, dict[str, Tensor]] = {}
        for optimizer in self.optimizers:
            known |= optimizer.state
        return {
            f"{kind}.{name}": known[parameter][kind]
            for name, parameter in self.trained.items()
            for kind in STATE_KEYS
            if kind in known[parameter]
        }

    def state(self, resumable: bool) -> dict[str, Tensor]:
        """All tensors of a snapshot."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.ema:
            tensors |= {f"ema.{name}": value for name, value in self.ema.model.state_dict().items()}
        if resumable:
            tensors |= {f"optimizer.{name}": value for name, value in self.moments().items()}
        return tensors

    def restore(self, saved: Checkpoint) -> None:
        """Go on from a resumable snapshot.

        Raises:
            UserError: If it cannot be resumed, or does not fit the network.
        """
        moments = saved.tensors("optimizer.")
        if not moments:
            raise UserError(f"{saved.path} cannot be resumed: it holds no optimizer state; use last or step-*")
        load_weights(self.model, saved, "model.")
        if self.ema:
            load_weights(self.ema.model, saved, saved.weights_prefix())
        self.step, self.images_seen = saved.metadata.step, saved.metadata.images_seen
        self.best = saved.metadata.extra.get("best", math.inf)
        self.skipped = saved.metadata.extra.get("skipped", 0)
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.AdamW):
                self._begin(optimizer)
        for name, kept in self.moments().items():
            kept.copy_(moments[name])

    def _begin(self, adamw: torch.optim.AdamW) -> None:
        """Give AdamW the state that it makes at its first step."""
        where = self.task.device if self.task.device.type in MASKING else "cpu"  # where it counts its steps
        for parameter in adamw.param_groups[0]["params"]:
            count = torch.tensor(float(self.step - self.skipped), device=where)
            adamw.state[parameter] = {"step": count, **{kind: torch.empty_like(parameter) for kind in STATE_KEYS}}


def wrap_ddp(model: nn.Module) -> DistributedDataParallel:
    """The network with gradients averaged over all processes; its buffers are constants, so they stay at home."""
    newer = "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters  # torch 2.14 and later
    options: dict[str, bool] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return DistributedDataParallel(model, **options)  # type: ignore[arg-type]


class Means:
    """Means over items that come in batches and are shared among processes, summed up in float64."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, means: Mapping[str, Tensor], count: int) -> None:
        """Take in the means over `count` items."""
        for name, value in means.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.item() * count
        self._count += count

    def over(self, ranks: Processes) -> dict[str, float]:
        """The means over all items of all processes; empty where there are none."""
        names = ranks.names(self._sums)
        numbers = torch.tensor([*(self._sums.get(name, 0.0) for name in names), self._count], dtype=torch.float64)
        *sums, count = ranks.sum(numbers).tolist()
        return {name: value / count for name, value in zip(names, sums, strict=True)} if count else {}


def learning_rate(loop: LoopSettings, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Linear from lr / warmup_steps to lr, then constant, or a half cosine that reaches 0 at the end
    (Loshchilov & Hutter 2017, arXiv:1608.03983, Eq. 5, without restarts).
    """
    if step < loop.warmup_steps:
        return loop.lr * (step + 1) / loop.warmup_steps
    if loop.lr_schedule == "constant":
        return loop.lr
    after = (step - loop.warmup_steps) / max(1, total_steps - loop.warmup_steps)
    return loop.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, after)))


def train(
    task: Task,
    loop: LoopSettings,
    folder: StageFolder,
    metadata: Metadata,
    total_steps: int,
    precision: str,
    resume: Checkpoint | None = None,
    job: JobSettings | None = None,
) -> Trainer:
    """Train up to `total_steps`, validating, drawing and saving on the way.

    Args:
        task: What to train.
        loop: How to train it.
        folder: Where its files go.
        metadata: What its checkpoints say of it; step, metrics and digests are filled in here.
        total_steps: Optimizer steps of the whole run.
        precision: fp32 or bf16.
        resume: The snapshot to go on from.
        job: Its time limit is kept.

    Raises:
        Stopped: If a signal or the time limit asked for it; the state is saved.
        RunError: If the loss is not finite, or the disk or the GPU's memory is full.
    """
    ranks = task.ranks
    pass_size = min(loop.micro, len(ranks.share(loop.batch_size)) or 1)
    with explain_out_of_memory("--micro-batch", pass_size):
        trainer = Trainer(task, loop, precision)
        if resume is not None:
            trainer.restore(resume)
            resume.close()
    limit = TimeLimit(job.max_time if job else 0, reserve=2 * trainer.nbytes / SLOW_DISK)
    ranks.run_on_main(lambda: checkpoint.check_room(folder.checkpoints, room_needed(trainer)))
    metrics: dict[str, float] = dict(resume.metadata.metrics) if resume else {}
    remaining = total_steps - trainer.step
    began, images_before = time.monotonic(), trainer.images_seen
    with (
        Reporter(task.stage, total_steps, trainer.step, folder.metrics if ranks.is_main else None) as reporter,
        SignalMonitor(ranks, limit) as watch,
        explain_out_of_memory("--micro-batch", pass_size),
    ):
        reporter.settings(flat(metadata.settings))
        for batch in task.batches(trainer.images_seen, remaining):
            losses = trainer.train_step(batch, total_steps)
            step = trainer.step
            wish = watch.poll()
            validating = step == total_steps or (loop.val_every > 0 and step % loop.val_every == 0)
            saving = step == total_steps or step % loop.save_every == 0 or wish.exit_code or wish.save or validating
            if saving or step % loop.log_every == 0:
                values, skipped = trainer.look(losses)
                check_nonfinite(trainer, skipped, folder, reporter)
                speed = (trainer.images_seen - images_before) / (time.monotonic() - began)
                row = {"step": step, "images_seen": trainer.images_seen, **values}
                row |= {"skipped": trainer.skipped} if trainer.skipped else {}
                row |= {"lr": trainer.lr, "images_per_s": round(speed, 2)}
                row |= {"memory_mb": round(memory_in_use(task.device) / 1e6), "time": round(time.time(), 3)}
                if validating:
                    found = {f"val_{name}": value for name, value in task.validate(trainer.averaged).items()}
                    row |= found
                    metrics = found
                if validating or step % loop.log_every == 0:
                    reporter.record(row)
                reporter.advance(step, values, {"img/s": speed, "GB": row["memory_mb"] / 1000})
            else:
                reporter.advance(step)
            if validating:
                picture = folder.images / f"step-{step:08d}.png"
                try:
                    ranks.run_on_main(partial(task.picture, trainer.averaged, picture))
                except Exception:
                    save(trainer, folder, metadata, metrics, keep_step=False, fresh=True)
                    raise
                reporter.picture(picture, step)
                said = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
                reporter.note(f"{task.stage} step {step}: {said}  {picture}")
            if saving:  # last: what a kill cuts off before it is made again
                reporter.settle()
                save(trainer, folder, metadata, metrics, keep_step=step % loop.save_every == 0, fresh=validating)
                reporter.saved(folder.last)
            if wish.exit_code and step < total_steps:
                why = f"--max-time {limit.minutes:g} minutes: " if wish.exit_code == OUT_OF_TIME else ""
                raise Stopped(
                    f"{why}stopped after step {step} of {total_steps}, saved to {folder.last}; {AGAIN}", wish.exit_code
                )
    return trainer


def save(
    trainer: Trainer, folder: StageFolder, metadata: Metadata, metrics: dict[str, float], keep_step: bool, fresh: bool
) -> None:
    """Publish `last`, a step file if wanted, and `best` where a fresh validation found it to be that."""
    loss = metrics.get("val_loss")
    better = fresh and (loss is None or loss < trainer.best)
    if better and loss is not None:
        trainer.best = loss
    extra = {"best": trainer.best} if math.isfinite(trainer.best) else {}
    extra |= {"skipped": trainer.skipped} if trainer.skipped else {}
    now = metadata.model_copy(
        update={
            "step": trainer.step,
            "images_seen": trainer.images_seen,
            "metrics": metrics,
            "extra": metadata.extra | extra,
        }
    )

    def atomic_write(path: Path, resumable: bool) -> None:
        checkpoint.check_room(folder.checkpoints, room_needed(trainer))
        checkpoint.save(path, trainer.state(resumable), now)

    def write() -> None:
        if better:
            atomic_write(folder.best, resumable=False)
        if not keep_step:
            atomic_write(folder.last, resumable=True)
            return
        kept = folder.step(trainer.step)
        atomic_write(kept, resumable=True)
        checkpoint.atomic_link(folder.last, kept)
        for old in removable(folder, trainer.loop, trainer.loop.keep):
            old.unlink()

    trainer.ranks.run_on_main(write)


def room_needed(trainer: Trainer) -> int:
    """Bytes that must be free for the next save: the new file lies beside the old ones until it is whole."""
    return trainer.nbytes + SMALL_FILES


def removable(folder: StageFolder, loop: LoopSettings, keep: int) -> list[Path]:
    """Step files but the newest `keep`, and but those of a step that `keep_every` divides; oldest first."""
    older = folder.steps()[:-keep]
    return [path for path in older if not (loop.keep_every and folder.step_of(path) % loop.keep_every == 0)]


def check_nonfinite(trainer: Trainer, skipped: list[int], folder: StageFolder, reporter: Reporter) -> None:
    """Tell which steps were skipped because something was not finite, and stop the run if they are too many.

    Raises:
        RunError: If they are more than tolerated.
    """
    if not skipped:
        return
    loop = trainer.loop
    step = skipped[0]
    before = trainer.images_seen - (trainer.step - step + 1) * loop.batch_size
    names = trainer.task.names(before)
    shown = "\n".join(f"  {name}" for name in names[:NAMES_SHOWN])
    more = f"\n  and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    what = f"step {step}: loss or gradient is not finite, so it changed nothing. Its batch:\n{shown}{more}"
    if trainer.skipped <= loop.skip_nonfinite:
        reporter.note(f"{what}\n{trainer.skipped} of at most {loop.skip_nonfinite} such steps (--skip-nonfinite)")
        return
    raise RunError(
        f"{what}\nThe last good state is in {folder.checkpoints}. Look at those images, try a lower --lr, a lower "
        "--clip or --precision fp32, or let some such steps pass with --skip-nonfinite"
    )
