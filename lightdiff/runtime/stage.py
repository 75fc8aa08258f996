"""How every stage begins and ends: joins processes, locks the folder, resolves `auto`, handles signals and errors."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import nn

from lightdiff.checkpoint import Checkpoint, Metadata, check_own
from lightdiff.defaults import FEW, with_intervals
from lightdiff.errors import Stopped, from_os
from lightdiff.on_demand import on_demand
from lightdiff.run_folder import RunFolder, StageFolder, atomic_write_text, ensure_writable, remove_abandoned
from lightdiff.runtime import DistEnv, resume
from lightdiff.runtime.lock import open_stage_dir
from lightdiff.runtime.processes import Processes, pick_device, pick_precision, to_device
from lightdiff.runtime.progress import console, print_note
from lightdiff.runtime.resume import AGAIN, untouched
from lightdiff.settings import (
    Compile,
    ComputeSettings,
    LoopSettings,
    StageSettings,
    TrainingSettings,
    flat,
    with_changes,
)

S = TypeVar("S", bound=StageSettings)
ON_CPU = ComputeSettings(device="cpu", precision="fp32")
RESUME_ADVICE = "choose another --run, or leave that setting as it was"
AGREE_EVERY, AGREE_STEPS = 1.0, 64  # seconds, about, and steps at most until all processes agree again
OUT_OF_TIME = 75  # EX_TEMPFAIL, "try again later": a job script resubmits on it
SAVE, HANG_UP, OUT_OF_CPU = (getattr(signal, name, None) for name in ("SIGUSR1", "SIGHUP", "SIGXCPU"))  # not on Windows
SIGNALS = {number for number in (signal.SIGINT, signal.SIGTERM, SAVE, HANG_UP, OUT_OF_CPU) if number}
STARTED = float(os.environ.get("LIGHTDIFF_STARTED", time.time() - time.process_time()))  # the launcher knows better


class Trainable(Protocol):
    """What a stage needs to know of a training task to start or resume it."""

    model: nn.Module
    train_items: int  # in the training split
    val_items: int  # held out for validation

    @property
    def example(self) -> tuple[torch.Tensor, ...]:
        """What the network is called with for one image, on the device."""

    @property
    def summary(self) -> str:
        """What is trained on what."""


@dataclass
class Stage(Generic[S]):
    """A stage that is running: its resolved settings, where it computes, and the folder that it alone writes to."""

    name: str  # vae, latents, unet or samples
    settings: S
    device: torch.device
    processes: Processes
    path: Path
    started_with: Mapping[str, Any] = field(
        default_factory=dict
    )  # flat settings the folder's work was started with, if any
    again: str = AGAIN
    saved: Checkpoint | None = None  # the snapshot to resume from
    metadata: Metadata = field(default_factory=lambda: Metadata(stage=""))  # what snapshots say of this run
    total_steps: int = 0
    defer_signals: bool = False  # for `poll`; a second Ctrl-C still leaves at once
    _signal: int = 0
    _save: bool = False
    _steps_left: int = 0  # until all processes agree again
    _slowest: float = 0.0  # step since they last did, in seconds
    _longest: float = 0.0
    _last: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> StageFolder:
        """The files of a training stage."""
        return StageFolder(self.path)

    @property
    def loop(self) -> LoopSettings:
        """How a training stage trains."""
        return self.settings.loop  # type: ignore[attr-defined, no-any-return]

    # --- settings and networks ------------------------------------------------------------------------------------

    def resolve_auto(self, name: Literal["precision", "compile"], pick: Callable[[Any], str]) -> None:
        """Decide an `auto` of the compute settings once: as the work started, else by `pick` in the main process."""
        section = self.settings.compute_section
        compute = getattr(self.settings, section)
        asked, before = getattr(compute, name), self.started_with.get(f"{section}.{name}", "auto")
        chosen = self.processes.run_on_main(lambda: pick(before if asked == "auto" else asked))
        self.settings = with_changes(self.settings, **{section: with_changes(compute, **{name: chosen})})

    def check_unchanged(self, now: Mapping[str, Any], advice: str = RESUME_ADVICE) -> resume.Changes:
        """The settings that differ from those the folder's work was started with, and may.

        Raises:
            UserError: If one differs that shapes the result.
        """
        return resume.compare(self.started_with, flat(now), self.path, advice) if self.started_with else {}

    def new_network(self, build: Callable[[], nn.Module]) -> nn.Module:
        """A network with the initial weights of the training's seed, on the device.

        Raises:
            UserError: If the settings are not those of the run to resume, or not those of its tensors.
        """
        if self.saved is not None:
            self.check_unchanged(self.settings.to_save())
            check_own(build, self.saved, "model.")  # in no memory, whatever sizes a foreign file claims
        torch.manual_seed(self.loop.seed % (1 << 64))  # torch takes no more bits
        model = build()
        to_device(model, self.device)
        return model

    def start_or_resume(self, task: Trainable, lineage: dict[str, str]) -> bool:
        """Prepare a training: fresh, from another checkpoint's weights, or where it stopped; False if it is finished.

        Args:
            task: What is trained.
            lineage: Digests of what it is trained on; `data`, a list of images, may grow or shrink.

        Raises:
            UserError: If settings or data are not those of the run to resume, or the weights do not fit.
        """
        self.total_steps = self.loop.total_steps(task.train_items)
        self.resolve_auto("compile", partial(self.pick_compile, task))
        self.settings = with_changes(self.settings, loop=with_intervals(self.loop, self.total_steps, self.started_with))
        self.metadata = Metadata(stage=self.name, settings=self.settings.to_save(), lineage=lineage)
        if self.saved is not None:
            return self.resume(self.saved, task)
        if self.settings.init_from:  # type: ignore[attr-defined]
            resume.load_initial_weights(task.model, self.settings.init_from, self.name)  # type: ignore[attr-defined]
        self.processes.run_on_main(self.write_settings)
        self.announce(task)
        return True

    def pick_compile(self, task: Trainable, asked: Compile) -> str:
        """Whether to compile the network: `auto` never does on a CPU, where training gains nothing.

        Convolutions take most of its time there, and stay as they are.
        """
        if asked == "off" or (asked == "auto" and self.device.type != "cuda"):
            return "off"
        return str(on_demand("compile:pick_for_training")(asked, self, task))

    def announce(self, task: Trainable) -> None:
        """Print what is about to be trained, and how."""
        loop, total, warmup = self.loop, self.total_steps, self.loop.warmup_steps or 0
        passes = f"{total * loop.batch_size / task.train_items:.3g} passes over the data"
        on = f"{self.processes.world_size} processes on " * (self.processes.world_size > 1) + self.device.type
        how = f"{total} steps, batch size {loop.batch_size}: {passes}; {on}, {loop.precision}"
        console.print(task.summary, f"{how}; pictures: {self.folder.images}", sep="\n")
        chosen = [f"preset {preset}"] if (preset := getattr(self.settings, "preset", "")) else []
        chosen += [f"KL weight {loss.kl_beta:.3g}"] if (loss := getattr(self.settings, "loss", None)) else []
        chosen += [f"lr {loop.lr:.3g}", f"warm-up of {warmup} steps"]
        console.print(", ".join([*chosen, f"validated every {loop.val_every} steps, saved every {loop.save_every}"]))
        if task.train_items < FEW:
            better = "a smaller network (--preset tiny) or " * (preset != "tiny") + "--init-from a model of such images"
            print_note(f"{task.train_items} training images are few, and samples may be copies of them; {better} helps")
        if warmup > total:
            ends = f"the learning rate ends at {loop.lr * total / warmup:.2g}, not --lr {loop.lr:g}"
            console.print(f"note: --warmup-steps {warmup} is longer than this run of {total} steps: {ends}")
        if not task.val_items:
            newest = "best.safetensors is the newest state, not the best; a larger --val-share holds some images out"
            print_note(f"there are no validation images, so nothing is validated: {newest}")

    def resume(self, saved: Checkpoint, task: Trainable) -> bool:
        """Prepare to resume a training from a snapshot; False if it has all its steps.

        Raises:
            UserError: If settings or data are not those that it was started with.
        """
        changed = self.check_unchanged(self.settings.to_save())
        changed |= resume.compare_lineage(self.path, saved.metadata.lineage, self.metadata.lineage)
        if "labels of images" in changed:
            console.print("note: some images have another label now than when this run was started")
        step, total = saved.metadata.step, self.total_steps
        if step >= total and not (step == total and "unvalidated" in saved.metadata.extra):
            has = f"has its {total}" if step == total else f"is past {total}: it has {step}"
            console.print(f"{self.path} {has} steps already; give more --steps to train on", soft_wrap=True)
            return False
        going_back = self.settings.from_step > 0  # type: ignore[attr-defined]
        cut_off = self.folder.checkpoints.glob(f"after-step-{step}.old-*")  # going back, the last time
        if self.processes.run_on_main(lambda: going_back or any(cut_off)):  # not before all else has been checked
            set_newer_aside = on_demand("set_aside:set_newer_aside")
            self.processes.run_on_main(lambda: set_newer_aside(self.folder, saved, going_back))
        if not self.folder.best.is_file():
            saved.metadata.extra.pop("best", None)  # the search starts again
        self.metadata.extra = resume.history(saved, changed)
        self.processes.run_on_main(self.write_settings)
        console.print(f"resuming from step {step} of {total}")
        self.announce(task)
        return True

    def write_settings(self) -> None:
        """Leave the settings beside the checkpoints to come; with --restart, the old run is moved first."""
        if getattr(self.settings, "restart", False):
            on_demand("set_aside:start_over")(self.path)
        ensure_writable(self.folder.checkpoints)
        atomic_write_text(self.folder.settings, json.dumps(self.settings.to_save(), indent=2) + "\n")

    # --- signals and the time limit -------------------------------------------------------------------------------

    def poll(self, reserve: float = 0.0, due: bool = False, save: bool = False) -> tuple[int, bool]:
        """The exit code to stop with after this step (0: none) and whether to save, agreed among all processes.

        A signal may have reached only one of them. Called once a step; one process acts at each. Several wait for one
        another about once a second only, after as many steps as follow from the slowest: the same number in all.

        Args:
            reserve: Seconds that are kept free at the end.
            due: Whether they agree now in any case; the same in all processes.
            save: Whether this process has a reason to save.
        """
        several = self.processes.world_size > 1
        late = self.out_of_time(reserve + several * AGREE_EVERY)
        self._steps_left -= 1
        if self._steps_left > 0 and not due:
            return 0, False
        code = 128 + self._signal if self._signal else OUT_OF_TIME if late else 0
        save, self._save = save or self._save, False  # before all wait, as the next signal may come meanwhile
        slowest, self._slowest = max(1, round(1e6 * self._slowest)), 0.0  # microseconds: whole numbers are agreed on
        code, saving, slowest = self.processes.all_reduce_max(code, int(save), slowest)
        self._steps_left = several * min(AGREE_STEPS, int(1e6 * AGREE_EVERY) // slowest)
        return code, bool(saving)

    def out_of_time(self, reserve: float = 0.0) -> bool:
        """Whether `--max-time` would pass during what comes next: twice the longest time between two calls."""
        now, minutes = time.monotonic(), self.settings.job.max_time
        self._slowest, self._longest = (max(so_far, now - self._last) for so_far in (self._slowest, self._longest))
        self._last = now
        return minutes > 0 and time.time() - STARTED + 2 * self._longest + reserve > 60 * minutes

    def finish_together(self, unfinished: bool) -> None:
        """Wait for all processes, as long as it takes, and stop if any of them has not finished its share.

        Raises:
            Stopped: In all of them, with the exit code by which job scripts know to start again.
        """
        if any(self.processes.all_reduce_max(int(unfinished), patient=True)):
            minutes = self.settings.job.max_time
            raise Stopped(f"what is done is saved (--max-time {minutes:g} minutes); {self.again}", OUT_OF_TIME)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note a signal for `poll`, or leave at once where nothing polls."""
        if number == SAVE:
            self._save = True
        elif self.defer_signals and not (self._signal and number == signal.SIGINT):
            self._signal = number  # SIGTERM may come twice: a cluster sends it to each process, and so does a launcher
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise Stopped(untouched(self.settings, self.again), 128 + number)


@contextmanager
def open_stage(
    settings: S,
    name: str,
    folder: Callable[[], Path] | None = None,
    started_with: Callable[[Path], Mapping[str, Any]] = lambda path: {},
) -> Iterator[Stage[S]]:
    """A stage, ready to work: the one way in for all of them.

    Args:
        settings: The stage's settings; `auto` and what follows from other settings is resolved here.
        name: Its folder's name in the run.
        folder: Chooses another folder, in the main process.
        started_with: The flat settings that the folder's work was started with; trainings have theirs in snapshots.

    Raises:
        UserError: If another process writes to the folder, or there is a state to resume but none that is whole.
        Stopped: At a signal.
        RunError: Instead of what torch raises when memory runs out.
    """
    if "TORCHELASTIC_MAX_RESTARTS" in os.environ and (once := once_flags(settings)):
        settings = on_demand("several.group:for_this_start")(settings, once)
    settings = settings.resolved()
    device = pick_device(getattr(settings, settings.compute_section, ON_CPU).device)
    choose, quiet = folder or (lambda: settings.run / name), console.quiet
    with translate_errors(settings), ExitStack() as held:
        several = DistEnv.from_env(os.environ).world_size > 1
        join = on_demand("several.group:distributed") if several else lambda *_: nullcontext(Processes())
        processes: Processes = held.enter_context(join(device, settings))
        held.callback(setattr, console, "quiet", quiet)
        console.quiet = quiet or settings.job.quiet or not processes.is_main
        stage, force = Stage(name, settings, device, processes, settings.run / name), settings.job.force_unlock
        held.enter_context(signal_handler(stage.on_signal))  # before the lock, whose end a second signal may meet
        stage.path = processes.run_on_main(lambda: held.enter_context(open_stage_dir(choose(), force)))
        processes.run_on_main(lambda: remove_abandoned(RunFolder(settings.run)))
        if not getattr(settings, "restart", False):
            if not isinstance(settings, TrainingSettings):
                stage.started_with = started_with(stage.path)
            elif processes.run_on_main(lambda: settings.from_step > 0 or bool(stage.folder.resumable())):
                stage.saved = resume.find_saved(stage.folder, name, settings.from_step, processes)
                stage.started_with = flat(stage.saved.settings(type(settings)).to_save())
        if hasattr(settings, settings.compute_section):
            stage.resolve_auto("precision", lambda asked: pick_precision(asked, device))
        try:
            yield stage
        except KeyboardInterrupt:  # here, as Typer would leave without a word
            raise Stopped(f"interrupted; {untouched(settings, stage.again)}", 130) from None


def once_flags(settings: StageSettings) -> str:
    """The flags given that are for a run's first start alone, as typed."""
    return " and ".join(f"--{n.replace('_', '-')}" for n in ("restart", "from_step") if getattr(settings, n, 0))


@contextmanager
def signal_handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals to stop or save go to this handler, where this is the main thread, the only one that may set them.

    A closed terminal (SIGHUP) stops no process that was started with nohup.
    """
    main = threading.current_thread() is threading.main_thread()
    nohup = {HANG_UP} if HANG_UP and signal.getsignal(HANG_UP) == signal.SIG_IGN else set()
    before = {number: signal.signal(number, handler) for number in SIGNALS - nohup if main}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def translate_errors(settings: StageSettings) -> Iterator[None]:
    """Turn what is raised when memory or disk runs out into errors that say what to do."""
    try:
        yield
    except Stopped as stopped:
        once = once_flags(settings)
        raise Stopped(f"{stopped}{f', without {once}' if once else ''}", stopped.exit_code) from None
    except torch.OutOfMemoryError as error:
        raise on_demand("out_of_memory:out_of_memory")(settings) from error
    except OSError as error:
        raise from_os(error) from error
