"""The one training loop: accumulate, clip, step, average, validate, save. What is trained is a `Task`."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightdiff import checkpoint
from lightdiff.checkpoint import Checkpoint, Document
from lightdiff.data.order import generator
from lightdiff.errors import RunError, Stopped, UserError
from lightdiff.run_folder import StageFolder
from lightdiff.settings import LoopSettings
from lightdiff.training.compute import autocast, memory_in_use
from lightdiff.training.ema import EMA
from lightdiff.training.progress import Reporter

Batch = dict[str, Tensor]


class Task(Protocol):
    """What the loop is handed: data, a loss, and how to judge and picture the network."""

    stage: str
    model: nn.Module
    device: torch.device

    def batches(self, start: int, steps: int) -> Iterator[Any]:
        """`steps` batches, the first one beginning after `start` images."""

    def prepare(self, batch: Any, rng: torch.Generator) -> Batch:
        """The whole batch of an optimizer step on the device, with everything random drawn."""

    def loss(self, model: nn.Module, part: Batch) -> dict[str, Tensor]:
        """`loss` and its parts, each a mean over the part."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """`loss` and more, over the whole validation set; empty where that is."""

    def picture(self, model: nn.Module, path: Path) -> None:
        """Save a picture of what the network can do."""


class Trainer:
    """A task's state between optimizer steps: weights, their average, the optimizer, how far it is."""

    def __init__(self, task: Task, loop: LoopSettings, precision: str) -> None:
        """Start at step 0 from the task's network."""
        self.task, self.loop, self.precision = task, loop, precision
        self.model = task.model
        self.ema = EMA(self.model, loop.ema_decay) if loop.ema_decay else None
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=loop.lr,
            betas=(0.9, loop.beta2),
            weight_decay=loop.weight_decay,
            fused=task.device.type in ("cuda", "cpu"),
        )
        self.step = 0
        self.images_seen = 0
        self.best = math.inf

    @property
    def averaged(self) -> nn.Module:
        """The averaged network where there is one, else the network itself."""
        return self.ema.model if self.ema else self.model

    def train_step(self, batch: Any, total_steps: int) -> dict[str, Tensor]:
        """One optimizer step; the losses stay on the device, so that nothing waits for them."""
        loop, task = self.loop, self.task
        rng = generator(task.device, loop.seed, task.stage, "noise", self.step)
        whole = task.prepare(batch, rng)
        size = len(next(iter(whole.values())))
        sums: dict[str, Tensor] = {}
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        for first in range(0, size, loop.micro):
            part = {name: value[first : first + loop.micro] for name, value in whole.items()}
            share = len(next(iter(part.values()))) / size  # of the batch: the last part may be smaller
            with autocast(task.device, self.precision):
                losses = task.loss(self.model, part)
            (losses["loss"] * share).backward()  # type: ignore[no-untyped-call]
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() * share
        limit = loop.clip or math.inf
        sums["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(loop, self.step, total_steps)
        self.optimizer.step()
        self.step += 1
        self.images_seen += size
        if self.ema:
            self.ema.update(self.model, self.step)
        return sums

    def state(self, resumable: bool) -> dict[str, Tensor]:
        """All tensors of a snapshot."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.ema:
            tensors |= {f"ema.{name}": value for name, value in self.ema.model.state_dict().items()}
        if resumable:
            for name, parameter in self.model.named_parameters():
                kept = self.optimizer.state[parameter]
                tensors[f"optimizer.exp_avg.{name}"] = kept["exp_avg"]
                tensors[f"optimizer.exp_avg_sq.{name}"] = kept["exp_avg_sq"]
        return tensors

    def restore(self, saved: Checkpoint) -> None:
        """Go on from a resumable snapshot.

        Raises:
            UserError: If it cannot be resumed, or does not fit the network.
        """
        averages, squares = saved.tensors("optimizer.exp_avg."), saved.tensors("optimizer.exp_avg_sq.")
        if not averages:
            raise UserError(f"{saved.path} cannot be resumed: it holds no optimizer state; use last or step-*")
        load_weights(self.model, saved, saved.tensors("model."))
        if self.ema:
            load_weights(self.ema.model, saved, saved.weights())
        self.step, self.images_seen = saved.document.step, saved.document.images_seen
        self.best = saved.document.facts.get("best", math.inf)
        where = self.task.device if self.task.device.type == "cuda" else "cpu"  # where fused AdamW counts its steps
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step), device=where),
                "exp_avg": torch.empty_like(parameter).copy_(averages[name]),
                "exp_avg_sq": torch.empty_like(parameter).copy_(squares[name]),
            }


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


def load_weights(model: nn.Module, source: Checkpoint, weights: dict[str, Tensor]) -> None:
    """Load a snapshot's weights into a network.

    Raises:
        UserError: If names or shapes differ, as after a change of architecture.
    """
    expected = model.state_dict()
    wrong = [n for n in expected if n not in weights or weights[n].shape != expected[n].shape]
    wrong += [n for n in weights if n not in expected]
    if wrong:
        raise UserError(f"{source.path} does not fit this architecture: {len(wrong)} tensors differ, {wrong[0]} first")
    model.load_state_dict(weights)


def train(
    task: Task,
    loop: LoopSettings,
    folder: StageFolder,
    document: Document,
    total_steps: int,
    precision: str,
    resume: Checkpoint | None = None,
) -> Trainer:
    """Train up to `total_steps`, validating, drawing and saving on the way.

    Args:
        task: What to train.
        loop: How to train it.
        folder: Where its files go.
        document: What its checkpoints say of it; step, metrics and digests are filled in here.
        total_steps: Optimizer steps of the whole run.
        precision: fp32 or bf16.
        resume: The snapshot to go on from.

    Raises:
        Stopped: If Ctrl-C or SIGTERM asked for it; the state is saved.
        RunError: If the loss is not finite, or the disk is full.
    """
    trainer = Trainer(task, loop, precision)
    if resume is not None:
        trainer.restore(resume)
    metrics: dict[str, float] = dict(resume.document.metrics) if resume else {}
    remaining = total_steps - trainer.step
    began, images_before = time.monotonic(), trainer.images_seen
    with Reporter(task.stage, total_steps, trainer.step, folder.metrics) as reporter, StopOnSignal() as stop:
        for batch in task.batches(trainer.images_seen, remaining):
            losses = trainer.train_step(batch, total_steps)
            step = trainer.step
            validating = step == total_steps or (loop.val_every > 0 and step % loop.val_every == 0)
            saving = step == total_steps or step % loop.save_every == 0 or stop.asked or validating
            if saving or step % loop.log_every == 0:
                values = {name: value.item() for name, value in losses.items()}  # waits for the device
                check_finite(values, step, folder)
                speed = (trainer.images_seen - images_before) / (time.monotonic() - began)
                row = {"step": step, "images_seen": trainer.images_seen, **values}
                row |= {"lr": trainer.optimizer.param_groups[0]["lr"], "images_per_s": round(speed, 2)}
                row |= {"memory_mb": round(memory_in_use(task.device) / 1e6), "time": round(time.time(), 3)}
                if validating:
                    found = {f"val_{name}": value for name, value in task.validate(trainer.averaged).items()}
                    row |= found
                    metrics = found
                if validating or step % loop.log_every == 0:
                    reporter.record(row)
                shown = {n: v for n, v in values.items() if n != "grad_norm"}
                extra = {"img/s": speed, "GB": row["memory_mb"] / 1000}
                reporter.advance(step, shown | extra)
            else:
                reporter.advance(step)
            if saving:
                save(trainer, folder, document, metrics, keep_step=step % loop.save_every == 0, fresh=validating)
            if validating:
                picture = folder.images / f"step-{step:08d}.png"
                task.picture(trainer.averaged, picture)
                reporter.picture(picture, step)
                said = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
                reporter.note(f"{task.stage} step {step}: {said}  {picture}")
            if stop.asked and step < total_steps:
                raise Stopped(
                    f"stopped after step {step} of {total_steps}, saved to {folder.last}; "
                    "run the same command again to go on",
                    stop.asked,
                )
    return trainer


def save(
    trainer: Trainer, folder: StageFolder, document: Document, metrics: dict[str, float], keep_step: bool, fresh: bool
) -> None:
    """Publish `last`, a step file if wanted, and `best` where a fresh validation found it to be that."""
    loss = metrics.get("val_loss")
    better = fresh and (loss is None or loss < trainer.best)
    if better and loss is not None:
        trainer.best = loss
    now = document.model_copy(
        update={
            "step": trainer.step,
            "images_seen": trainer.images_seen,
            "metrics": metrics,
            "facts": document.facts | ({"best": trainer.best} if math.isfinite(trainer.best) else {}),
        }
    )
    if better:
        checkpoint.save(folder.best, trainer.state(resumable=False), now)
    if not keep_step:
        checkpoint.save(folder.last, trainer.state(resumable=True), now)
        return
    kept = folder.step(trainer.step)
    checkpoint.save(kept, trainer.state(resumable=True), now)
    checkpoint.publish_link(folder.last, kept)
    for old in folder.steps()[: -trainer.loop.keep]:
        old.unlink()


def check_finite(values: dict[str, float], step: int, folder: StageFolder) -> None:
    """Stop a run whose loss or gradient is not a number, before it is saved.

    Raises:
        RunError: If one is not finite.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise RunError(
            f"step {step}: {', '.join(bad)} is not finite; the last good state is in {folder.checkpoints}. "
            "Try a lower --lr, a lower --clip, or --precision fp32"
        )


class StopOnSignal:
    """Turns Ctrl-C and SIGTERM into a wish that the loop reads between steps; a second one leaves at once."""

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        """Listen, if this is the main thread, the only one that may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Put the old handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
