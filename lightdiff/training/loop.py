"""The one training loop: accumulate, clip, step, average, validate, save. What is trained is a `Task`."""

import copy
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightdiff.checkpoint import Checkpoint, ema_prefixes, load_weights
from lightdiff.data.order import generator
from lightdiff.errors import NoRoom, RunError, Stopped, UserError
from lightdiff.on_demand import on_demand
from lightdiff.runtime.processes import autocast
from lightdiff.runtime.progress import Reporter, trending
from lightdiff.runtime.stage import OUT_OF_TIME, Stage, Trainable
from lightdiff.settings import LoopSettings, is_due
from lightdiff.training import optimizers
from lightdiff.training.ema import EMA
from lightdiff.training.saving import Progress, SnapshotWriter, Tensors, write_snapshots
from lightdiff.training.timing import FIRST, SAVING, VALIDATION, Stopwatch, memory_in_use

SLOW_DISK = 50e6  # bytes a second that a save is sure to manage, for --max-time
SMALL_FILES = 10_000_000  # bytes of metrics and pictures beside a checkpoint


class Task(Trainable, Protocol):
    """What the loop trains: data, a loss, and how to judge and picture the network.

    Of each batch, a process loads and prepares its share (`Processes.share`); of an empty one, the first item.
    """

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The networks to compile: each alone, as each is called with fewer shapes than all of them together."""

    def batches(self, start: int, steps: int) -> Iterator[Any]:
        """This process's share of `steps` batches, the first of which begins after `start` images."""

    def prepare(self, batch: Any, rng: torch.Generator) -> Tensors:
        """The share of an optimizer step on the device; `rng` draws for the whole batch, of which this is a slice."""

    def loss(self, model: nn.Module, batch: Tensors) -> Tensors:
        """`loss` and what it is a sum of, each a mean over the batch."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """`loss` and more, over the whole validation set, shared among all processes; empty if that is."""

    def picture(self, model: nn.Module, path: Path) -> None:
        """Save a picture of what the network can do."""

    def names(self, start: int) -> list[str]:
        """The items of the whole batch that begins after `start` images."""


class Trainer:
    """A task's state between optimizer steps: weights, their average, optimizers, progress."""

    def __init__(self, task: Task, stage: Stage[Any]) -> None:
        """Begin at step 0 with the task's network, as it is."""
        self.task, self.stage, self.model = task, stage, task.model
        loop: LoopSettings = stage.settings.loop
        self.loop, self.processes = loop, stage.processes
        self.emas = [EMA(copy.deepcopy(self.model).requires_grad_(False).eval(), decay) for decay in loop.ema_decay]
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizers = optimizers.make_optimizers(self.model, loop, self.processes)
        self.step, self.images_seen, self.lr, self.best = 0, 0, loop.lr, math.inf
        self.skipped = 0  # steps without an update, as something was not finite
        self.unvalidated: dict[str, float] = {}  # the numbers of a step that was saved before it could be validated
        self.writer = SnapshotWriter(stage.device)
        self._finite: list[Tensor] = []  # of each step since the last sync, whether all was finite
        self.graphs = 0  # compiled so far
        if loop.compile == "on":
            on_demand("compile:compile_training")(stage, task)
        if loop.checkpoint_activations:
            on_demand("compile:enable_activation_checkpointing")(self.model)
        self.network = self.processes.average_gradients(self.model)

    @property
    def averaged(self) -> nn.Module:
        """The first averaged network where there is one, else the network itself."""
        return self.emas[0].model if self.emas else self.model

    def train_step(self, batch: Any) -> Tensors:
        """One optimizer step; losses of this process's share stay on the device, so that nothing waits for them.

        The gradient is that of the mean over the whole batch, however it is divided among processes and micro-batches.
        """
        loop, processes, device = self.loop, self.processes, self.stage.device
        rng = generator(device, loop.seed, self.stage.name, "noise", self.step)
        whole = self.task.prepare(batch, rng)
        size = len(next(iter(whole.values())))
        counts = bool(processes.share(loop.batch_size))  # an empty share borrows an item, which does not count
        sums: Tensors = {}
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        for first in range(0, size, loop.micro):
            micro_batch = {name: value[first : first + loop.micro] for name, value in whole.items()}
            weight = counts * len(next(iter(micro_batch.values()))) / loop.batch_size
            if loop.compile == "on":  # what a CUDA graph has returned may be overwritten now
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            more = first + loop.micro < size
            with processes.no_sync(self.network) if more else nullcontext():
                with autocast(device, loop.precision):
                    losses = self.task.loss(self.network, micro_batch)
                (losses["loss"] * (weight * processes.world_size)).backward()  # type: ignore[no-untyped-call]
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() * weight
        norm = nn.utils.clip_grad_norm_(self.trained.values(), loop.clip or math.inf)
        self._update(processes.all_true(norm.isfinite() & sums["loss"].isfinite()))
        self.images_seen += loop.batch_size
        for ema in self.emas:
            ema.update(self.model, self.step)
        return sums | {"grad_norm": norm / processes.world_size}  # the same in all processes, and sums are summed up

    def _update(self, finite: Tensor) -> None:
        """Let the optimizers step, or change nothing if not all is finite: on the device, without waiting for it."""
        self.lr = optimizers.learning_rate(self.loop, self.step, self.stage.total_steps)
        masking = self.stage.device.type in optimizers.MASKING
        if masking or finite:  # without masks, this waits for the device
            for optimizer in self.optimizers:
                optimizer.param_groups[0]["lr"] = self.lr
                if masking:  # in the terms of torch.amp.GradScaler
                    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
                optimizer.step()
        self._finite.append(finite)
        self.step += 1

    def sync_metrics(self, losses: Tensors) -> tuple[dict[str, float], list[int]]:
        """The last step's numbers over all processes, and the steps skipped since the last sync. Waits for the device.

        Numbers that are not finite are left out.
        """
        finite = torch.stack(self._finite).tolist()
        first = self.step - len(finite) + 1
        skipped = [first + i for i, good in enumerate(finite) if not good]
        self._finite = []
        self.skipped += len(skipped)
        kind = losses["grad_norm"].dtype
        values = self.processes.all_reduce_sum(torch.stack([value.to(kind) for value in losses.values()])).tolist()
        return {name: value for name, value in zip(losses, values, strict=True) if math.isfinite(value)}, skipped

    @property
    def snapshot_bytes(self) -> int:
        """Size of a resumable snapshot, about."""
        weights = sum(p.nbytes for p in self.model.parameters())
        return (1 + len(self.emas)) * weights + optimizers.optimizer_state_bytes(self.model, self.loop)

    def check_room(self) -> None:
        """Check that the disk has room for the next save: the new file lies beside the old ones until it is whole.

        Raises:
            NoRoom: If not, with both numbers.
        """
        folder, needed = self.stage.folder.checkpoints, self.snapshot_bytes + SMALL_FILES
        if (free := shutil.disk_usage(folder).free) < needed:
            room = f"{free / 1e9:.2f} GB left, but the next checkpoint needs {needed / 1e9:.2f} GB"
            raise NoRoom(f"the disk of {folder} has {room}: make room, or lower --keep")

    def optimizer_state(self) -> Tensors:
        """What the optimizers keep of each parameter, by kind and name."""
        known: dict[Any, Tensors] = {}
        for optimizer in self.optimizers:
            known |= optimizer.state
        return {
            f"{kind}.{name}": known[parameter][kind]
            for name, parameter in self.trained.items()
            for kind in optimizers.STATE_KEYS
            if kind in known.get(parameter, ())
        }

    def state(self) -> Tensors:
        """All tensors of a resumable snapshot."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for prefix, ema in zip(ema_prefixes(self.loop.ema_decay), self.emas, strict=True):
            tensors |= {f"{prefix}{name}": value for name, value in ema.model.state_dict().items()}
        return tensors | {f"optimizer.{name}": value for name, value in self.optimizer_state().items()}

    def save(self, metrics: dict[str, float], keep_step: bool, validated: bool) -> None:
        """Begin to write `last`, a step file if wanted, and `best` if the validation of this step found it to be that.

        `writer.wait` returns when they are there; in between, training may go on.

        Raises:
            RunError: If the disk is too full, or the last save has failed; what was saved before is untouched.
        """
        loss = metrics.get("val_loss")
        best = validated and (loss is None or loss < self.best)
        self.best = loss if best and loss is not None else self.best
        self.processes.run_on_main(partial(self._write, metrics, keep_step, best))

    def save_unvalidated(self, metrics: dict[str, float], row: dict[str, float]) -> None:
        """Write `last` in the main process, whatever the others do; a resumed run validates this step first.

        Args:
            metrics: Those of the last validation.
            row: What is known of this step, for metrics.jsonl.
        """
        if self.processes.is_main:
            self._write(metrics, keep_step=False, best=False, unvalidated=row)
            self.writer.wait()

    def _write(self, metrics: dict[str, float], keep_step: bool, best: bool, **about: dict[str, float]) -> None:
        folder, total = self.stage.folder, self.stage.total_steps
        extra = self.stage.metadata.extra | ({"best": self.best} if math.isfinite(self.best) else {})
        extra |= ({"skipped": self.skipped} if self.skipped else {}) | about
        progress = {"step": self.step, "images_seen": self.images_seen, "metrics": metrics, "extra": extra}
        metadata = self.stage.metadata.model_copy(update=progress)
        self.writer.wait()  # what it still writes takes room
        self.check_room()
        early = keep_step and self.stage.name == "unet" and total // 10 <= self.step <= total // 5
        also = [folder.best] * best + [folder.early] * (early and not folder.early.is_file())
        self.writer.start(self.state(), partial(write_snapshots, folder, metadata, self.loop, keep_step, also))

    def restore(self, saved: Checkpoint) -> None:
        """Resume from a snapshot.

        Raises:
            UserError: If it cannot be resumed, or does not fit the network.
        """
        state = saved.tensors("optimizer.")
        if not state:
            raise UserError(f"{saved.path} cannot be resumed: it holds no optimizer state; use last or step-*")
        load_weights(self.model, saved, "model.")
        for prefix, ema in zip(ema_prefixes(self.loop.ema_decay), self.emas, strict=True):
            load_weights(ema.model, saved, prefix)
        self.step, self.images_seen = saved.metadata.step, saved.metadata.images_seen
        progress = Progress.of(saved)
        self.best, self.skipped, self.unvalidated = progress.best, progress.skipped, progress.unvalidated
        self.stage.metadata.extra.pop("unvalidated", None)
        for optimizer in self.optimizers:
            if isinstance(optimizer, optimizers.Muon):
                optimizer.init_state()
            else:
                self._init_adamw(optimizer)
        for name, kept in self.optimizer_state().items():
            kept.copy_(state[name])
        saved.close()

    def _init_adamw(self, adamw: torch.optim.Optimizer) -> None:
        """Give AdamW the state that it makes at its first step."""
        on_device = self.stage.device.type in optimizers.MASKING  # that is where it counts its steps
        for parameter in adamw.param_groups[0]["params"]:
            count = torch.tensor(float(self.step - self.skipped), device=self.stage.device if on_device else "cpu")
            averages = {kind: torch.empty_like(parameter) for kind in optimizers.STATE_KEYS}
            adamw.state[parameter] = {"step": count, **averages}


# --- the loop -----------------------------------------------------------------------------------------------------


def train(task: Task, stage: Stage[Any]) -> Trainer:
    """Train up to the stage's `total_steps`, validating, drawing and saving on the way.

    Raises:
        Stopped: If a signal or the time limit asked for it; the state is saved.
        RunError: If the loss is not finite, or the disk is full.
    """
    loop, folder, total, processes = stage.settings.loop, stage.folder, stage.total_steps, stage.processes
    trainer = Trainer(task, stage)
    if stage.saved is not None:
        trainer.restore(stage.saved)
    processes.run_on_main(trainer.check_room)
    metrics = dict(stage.saved.metadata.metrics) if stage.saved else {}
    reserve = 2 * trainer.snapshot_bytes / SLOW_DISK  # seconds for the last save
    watch, writer, images_before, exit_code = Stopwatch(), trainer.writer, trainer.images_seen, 0
    metrics_file = folder.metrics if processes.is_main else None
    stage.defer_signals = True
    start = trainer.step - bool(trainer.unvalidated)
    with Reporter(stage.name, total, start, metrics_file, stage.metadata.settings, loop.track) as reporter, writer:
        writer.on_written = partial(reporter.saved, folder.last)
        if trainer.unvalidated:
            validating = is_validated(loop, trainer.step, total)
            with watch.measure(VALIDATION):
                metrics = finish_step(trainer, reporter, trainer.unvalidated, metrics, validating)
            with watch.measure(SAVING):
                trainer.save(metrics, is_due(loop.save_every, trainer.step), validating)
        for batch in watch.waiting(task.batches(trainer.images_seen, total - trainer.step)):
            with watch.measure(FIRST, trainer.images_seen == images_before):
                losses = trainer.train_step(batch)
            step = trainer.step
            if step == start + 1 and processes.is_main:  # the first, after which optimizers have a state
                writer.prepare(trainer.state())
            validating = is_validated(loop, step, total)
            # A write that has failed is a reason to save: all processes meet its error there.
            exit_code, save_wanted = stage.poll(reserve + 2 * writer.longest, due=validating, save=writer.failed)
            keep_step = is_due(loop.save_every, step)
            saving = validating or keep_step or exit_code or save_wanted
            logging = validating or step % loop.log_every == 0
            if not (saving or logging):
                reporter.advance(step)
                continue
            if loop.compile == "on":
                trainer.graphs = on_demand("compile:note_recompiled")(trainer.graphs)
            values, skipped = trainer.sync_metrics(losses)
            if skipped:
                on_demand("nonfinite:report_skipped")(trainer, skipped, reporter)
            speed = watch.speed(trainer.images_seen - images_before, loop.batch_size)
            row = {"step": step, "images_seen": trainer.images_seen, **values}
            row |= {"skipped": trainer.skipped} if trainer.skipped else {}
            row |= {"lr": trainer.lr, "images_per_s": round(speed, 2)}
            row |= {"memory_mb": round(memory_in_use(stage.device) / 1e6), "time": round(time.time(), 3)}
            if exit_code and validating:  # which may take longer than a cluster waits
                with watch.measure(SAVING):
                    reporter.flush()
                    trainer.save_unvalidated(metrics, row)
            else:
                with watch.measure(VALIDATION, validating):
                    metrics = finish_step(trainer, reporter, row, metrics, validating) if logging else metrics
                reporter.advance(step, values, {"img/s": speed, "GB": row["memory_mb"] / 1000})
                if saving:  # last: what a kill cuts off before is done again
                    with watch.measure(SAVING):
                        reporter.flush()
                        trainer.save(metrics, keep_step, validating)
            if exit_code:
                break
        with watch.measure(SAVING):
            processes.run_on_main(writer.wait)
        reporter.note(watch.shares())
    if exit_code:
        limit = f" (--max-time {stage.settings.job.max_time:g} minutes)" if exit_code == OUT_OF_TIME else ""
        said = f"after step {trainer.step} of {total}{limit}, saved to {folder.last}; {stage.again}"
        raise Stopped(said, exit_code)
    return trainer


def is_validated(loop: LoopSettings, step: int, total: int) -> bool:
    """Whether there is a validation after this step."""
    return step == total or is_due(loop.val_every, step)


def finish_step(
    trainer: Trainer, reporter: Reporter, row: dict[str, float], metrics: dict[str, float], validating: bool
) -> dict[str, float]:
    """Validate and draw, if it is time, and record the step's numbers; the metrics of the last validation.

    What fails in it costs no steps: what has failed is done again by the run that resumes. Nothing is compiled for it.
    """
    task, stage, step, before = trainer.task, trainer.stage, trainer.step, metrics
    try:
        with torch.compiler.set_stance("force_eager") if trainer.loop.compile == "on" else nullcontext():
            if validating:
                metrics = {f"val_{name}": value for name, value in task.validate(trainer.averaged).items()}
            reporter.record(row | metrics if validating else row)
            if validating:
                picture = stage.folder.images / f"step-{step:08d}.png"
                trainer.processes.run_on_main(partial(task.picture, trainer.averaged, picture))
                reporter.picture(picture, step)
                numbers = [f"{name} {value:.4g}" for name, value in trending(metrics).items()]
                reporter.note("  ".join([f"{stage.name} step {step}", *numbers, str(picture)]))
    except Exception:
        with suppress(RunError):  # as on the disk that has failed already
            trainer.save_unvalidated(before, row)
        raise
    return metrics
