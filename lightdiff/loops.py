"""Settings of where and how long to compute: device, training loop, processes. `settings.py` has all others.

Nothing here imports torch.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic.config import JsonDict

from lightdiff.architectures import Decays, Settings, parse_numbers

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["auto", "on", "off"]
Tracker = Literal["wandb", "trackio", "mlflow"]
Trackers = Annotated[tuple[Tracker, ...], BeforeValidator(parse_numbers)]
STEPS: JsonDict = {"replaces": "steps"}
MEMORY: JsonDict = {"panel": "Memory"}


class ComputeSettings(Settings):
    """Where and how to compute."""

    device: Device = Field("auto", description="where to compute; auto: the first available of cuda, mps, cpu")
    precision: Precision = Field("auto", description="fp32, or bf16 autocast; auto: bf16 where it is faster")
    workers: int = Field(-1, ge=-1, description="worker processes that load images; -1: as the cores allow")
    compile: Compile = Field("auto", description="torch.compile the network; auto: on a GPU, for long enough runs")


class LoopSettings(ComputeSettings):
    """The training loop. Every interval counts optimizer steps."""

    steps: int = Field(20_000, ge=1, description="optimizer steps")
    max_passes: float = Field(
        0.0,
        ge=0,
        json_schema_extra=STEPS,
        description="most passes over the images where no --steps are given; 300 in the commands; 0: any",
    )
    epochs: float = Field(0.0, ge=0, json_schema_extra=STEPS, description="passes over the images; 0: off")
    batch_size: int = Field(16, ge=1, description="images per optimizer step, over all processes")
    micro_batch: int = Field(0, ge=0, json_schema_extra=MEMORY, description="images per forward pass; 0: batch-size")
    checkpoint_activations: bool = Field(
        False, json_schema_extra=MEMORY, description="recompute activations: a third slower"
    )
    optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="Muon, with AdamW for norms, biases and end layers; or AdamW alone"
    )
    lr: float = Field(2e-3, gt=0, description="peak learning rate; default: less for wider networks")
    lr_schedule: Literal["constant", "cosine"] = Field("cosine", description="learning rate after the warm-up")
    warmup_steps: int | None = Field(
        None, ge=0, description="optimizer steps of linear warm-up; default: 100, or a tenth of fewer than 1,000"
    )
    weight_decay: float = Field(0.01, ge=0, description="weight decay, decoupled: times lr at each step")
    beta2: float = Field(0.99, gt=0, lt=1, description="AdamW's beta2")
    clip: float = Field(1.0, ge=0, description="gradient norm to clip at; 0 turns clipping off")
    ema_decay: Decays = Field((0.9999,), description="decays of EMA weights, warmed up; the first is used; 0: none")
    val_every: int | None = Field(
        None, ge=0, description="optimizer steps between validations; 0: only at the end; default: 1,000, or a tenth"
    )
    save_every: int | None = Field(
        None, ge=1, description="optimizer steps between checkpoints; default: 1,000, or a tenth of fewer than 10,000"
    )
    keep: int = Field(2, ge=1, description="newest step files to keep")
    keep_every: int = Field(0, ge=0, description="keep the step files of every this many steps for good; 0: none")
    skip_nonfinite: int = Field(0, ge=0, description="steps with a non-finite loss or gradient to skip before stopping")
    track: Trackers = Field((), description="trackers beside TensorBoard: wandb, trackio, mlflow; or several of them")
    log_every: int = Field(20, ge=1, description="optimizer steps between lines of metrics.jsonl")
    seed: int = Field(0, ge=0, description="seed of all random numbers")

    @property
    def micro(self) -> int:
        """Images per forward pass, with 0 resolved."""
        return min(self.micro_batch or self.batch_size, self.batch_size)

    def total_steps(self, train_items: int) -> int:
        """Optimizer steps of the whole run."""
        if self.epochs:
            return max(1, round(self.epochs * train_items / self.batch_size))
        most = max(1, int(self.max_passes * train_items / self.batch_size))
        return min(self.steps, most) if self.max_passes else self.steps


class JobSettings(Settings):
    """How many processes, and for how long. Not saved: may differ at each start."""

    nproc_per_node: int = Field(1, ge=1, description="processes to start on this machine, usually one per GPU")
    max_restarts: int = Field(0, ge=0, description="restarts of all processes after one of them dies")
    timeout: float = Field(600.0, gt=0, description="seconds to wait for a process that does not answer")
    max_time: float = Field(0.0, ge=0, description="minutes after which to save and exit with code 75; 0: no limit")
    quiet: bool = Field(False, description="print only results and errors")
    force_unlock: bool = Field(False, description="take over a run folder that another host has locked")


def is_due(interval: int | None, step: int) -> bool:
    """Whether a step ends an interval; without one, none does."""
    return bool(interval) and step % (interval or 1) == 0
