"""--dry-run of a training: its cost, measured by building the network and timing a few steps on random data.

For a GPU, what it will hold is worked out; on a machine without one, nothing is timed.
"""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightdiff.data.files import list_images
from lightdiff.data.index import read_index
from lightdiff.data.loading import ImageBatch
from lightdiff.data.table import ImageList, ImageTable
from lightdiff.errors import UserError
from lightdiff.extras.gpu_memory import activation_bytes, gpu_memory
from lightdiff.extras.presets import BACKWARD
from lightdiff.extras.settings_rows import format_duration
from lightdiff.models.lpips import TRUNKS, cached
from lightdiff.models.vae import Posterior
from lightdiff.run_folder import RunFolder, find_latents
from lightdiff.runtime.processes import Processes, keep_memory, pick_device, pick_precision
from lightdiff.runtime.progress import console, shape_words
from lightdiff.runtime.stage import Stage
from lightdiff.settings import ImageSettings, TrainUNetSettings, TrainVAESettings, with_changes
from lightdiff.stages import train_unet, train_vae
from lightdiff.training.loop import Trainer
from lightdiff.training.timing import memory_in_use

WARM_UP, TIMED, MAX_SECONDS = 1, 5, 10.0
CPU_IMAGES = 4  # in the first timed steps on a CPU, where the whole batch may take minutes
CPU_SECONDS = 3.0  # a whole batch is timed itself if a step takes less than this
ASSUMED_SPEED = 1e14  # FLOP/s of a GPU that is not here: a third of the 312 TFLOP/s in bf16 in an A100's data sheet


def estimate(settings: TrainVAESettings | TrainUNetSettings) -> None:
    """Print parameters, the shape of latents, FLOPs and memory per image, and how long the training will take."""
    absent = settings.loop.device == "cuda" and not torch.cuda.is_available()
    device = torch.device("meta") if absent else pick_device(settings.loop.device)
    asked = settings.loop.precision
    precision = pick_precision("bf16" if absent and asked == "auto" else asked, device)
    batch_size = settings.loop.batch_size
    settings = settings if absent else without_missing_lpips(settings)

    def prepare(size: int, device: torch.device = device) -> tuple[Trainer, Any, tuple[Tensor, ...]]:
        micro = min(settings.loop.micro, size)
        loop = with_changes(settings.loop, precision=precision, compile="off", batch_size=size, micro_batch=micro)
        s = with_changes(without_lpips(settings) if device.type == "meta" else settings, loop=loop)
        name = "vae" if isinstance(s, TrainVAESettings) else "unet"
        stage: Stage[Any] = Stage(name, s.resolved(), device, Processes(), Path(), total_steps=1000)
        task, batch, inputs = random_images(stage) if name == "vae" else random_latents(stage)
        return Trainer(task, stage), batch, inputs

    keep_memory()  # as in a training
    trainer, _, inputs = prepare(1, torch.device("meta"))  # else this pass would be in the peak of memory
    task = trainer.task
    parameters = sum(p.numel() for p in task.model.parameters())
    with FlopCounterMode(display=False) as flops:
        task.model(*inputs)
    on_gpu = device.type in ("cuda", "meta")
    activations = "" if on_gpu else f", {activation_bytes(task.model, inputs) / 1e6:.1f} MB of activations"
    console.print(
        f"{trainer.stage.name}: {parameters / 1e6:.2f} M parameters; an image of {shape_words(inputs[0].shape[1:])}"
        + (f" -> latents of {shape_words(inputs[1].shape[1:])}" if isinstance(settings, TrainVAESettings) else ""),
        f"per image: {flops.get_total_flops() / 1e9:.3g} GFLOP forward{activations}",
        f"weights, gradients, optimizer state and EMA: {(trainer.snapshot_bytes + 4 * parameters) / 1e6:.0f} MB; "
        f"a checkpoint: {trainer.snapshot_bytes / 1e6:.0f} MB, of which the host's memory holds a copy",
        sep="\n",
        soft_wrap=True,
    )
    if on_gpu:
        share = -(-batch_size // settings.job.nproc_per_node)  # of a GPU
        micro = min(settings.loop.micro, share)
        memory = gpu_memory(settings.resolved(), precision)
        memory.show(console, micro, micro < share, precision)
    steps, length = length_of(settings)
    if absent:
        an_image = flops.get_total_flops() * (BACKWARD + settings.loop.checkpoint_activations)
        hours = f"{steps * batch_size * an_image / ASSUMED_SPEED / 3600:.2g} GPU hours at 100 TFLOP/s, without "
        hours += "LPIPS, " * isinstance(settings, TrainVAESettings) + "data loading and validation"
        console.print(f"no GPU here: nothing is timed; {length}" + (f": {hours}" if steps else ""), soft_wrap=True)
        return
    peaks: dict[int, int] = {}

    def time_step(trainer: Trainer, batch: Any) -> float:
        seconds = step_seconds(trainer, batch)
        peaks[trainer.loop.micro] = memory_in_use(device)
        return seconds

    first, copy = batch_size if device.type == "cuda" else min(batch_size, CPU_IMAGES), trainer.snapshot_bytes
    seconds = time_step(*prepare(first)[:2])
    seconds = batch_seconds(first, batch_size, lambda size: time_step(*prepare(size)[:2]), seconds)
    if not on_gpu and all(peaks.values()):  # which Windows does not tell
        taken = process_memory(peaks, settings.loop.micro) + copy
        console.print(f"memory: {taken / 1e9:.3g} GB, without the processes that load images")
    console.print(
        f"{batch_size / seconds:.3g} images/s on {device.type} in {precision}, without data loading and validation: "
        + length
        + (f" take {format_duration(steps * seconds)}" if steps else ""),
        soft_wrap=True,
    )


def length_of(settings: TrainVAESettings | TrainUNetSettings) -> tuple[int, str]:
    """The optimizer steps of a training, and the same in words; 0 if they are so many epochs of an unknown number."""
    loop = settings.loop
    count = count_train_images(settings) if loop.epochs or loop.max_passes else 0
    if not count and loop.epochs:
        return 0, "how long an epoch takes depends on the number of images"
    steps = loop.total_steps(count) if count else loop.steps
    passes = f" ({steps * loop.batch_size / count:.3g} passes over {count} images)" if count else ""
    return steps, f"{steps} steps of {loop.batch_size} images{passes}"


def batch_seconds(first: int, batch_size: int, time_step: Callable[[int], float], seconds: float) -> float:
    """Seconds per step of the whole batch, from those of a step of the `first` few images.

    A step takes a constant time, the optimizer's, and a time per image: where timing the whole batch would take too
    long, steps of two sizes separate the two.
    """
    if first == batch_size:
        return seconds
    if 2 * first >= batch_size or seconds * batch_size / first < CPU_SECONDS:
        return time_step(batch_size)
    per_image = max(0.0, time_step(2 * first) - seconds) / first
    return seconds + per_image * (batch_size - first)


def process_memory(peaks: dict[int, int], images: int) -> float:
    """Peak bytes of a step with so many images at a time, from the peaks of steps with fewer: they rise evenly."""
    (few, least), (more, most) = min(peaks.items()), max(peaks.items())
    return most + (most - least) * (images - more) / max(1, more - few)


def count_train_images(settings: TrainVAESettings | TrainUNetSettings) -> int:
    """The number of training images; 0 if no folder has been given."""
    if isinstance(settings, TrainUNetSettings):
        return len(read_index(find_latents(settings.latents, RunFolder(settings.run))).positions("train"))
    return len(list_images(settings.images, console).of_split("train")) if settings.images.data else 0


def without_missing_lpips(settings: TrainVAESettings | TrainUNetSettings) -> TrainVAESettings | TrainUNetSettings:
    """The settings, without LPIPS if its weights would have to be downloaded first."""
    if isinstance(settings, TrainUNetSettings) or not settings.loss.lpips_gamma or settings.loss.lpips_weights:
        return settings
    url = TRUNKS[settings.loss.lpips_net].url
    if cached(url).is_file():
        return settings
    console.print(f"LPIPS is left out of the estimate: its weights have not been downloaded ({url})")
    return without_lpips(settings)


def without_lpips(settings: TrainVAESettings | TrainUNetSettings) -> TrainVAESettings | TrainUNetSettings:
    """The settings without LPIPS."""
    if isinstance(settings, TrainUNetSettings):
        return settings
    return with_changes(settings, loss=with_changes(settings.loss, lpips_gamma=0))


def random_images(stage: Stage[TrainVAESettings]) -> tuple[Any, Any, tuple[Tensor, ...]]:
    """The VAE's task, a random batch, and the network's inputs for one image: pixels and posterior noise."""
    s, task = stage.settings, train_vae.VAETask(stage, ImageList(ImageTable.of([])))
    count = s.loop.batch_size
    pixels = torch.randint(256, (count, 3, *s.images.resolution), dtype=torch.uint8)
    batch = ImageBatch(pixels, torch.arange(count), [], 0)
    return task, batch, task.example


def random_latents(stage: Stage[TrainUNetSettings]) -> tuple[Any, Any, tuple[Tensor, ...]]:
    """The U-Net's task, a random batch, and the network's inputs for one image: latent and level."""
    s, device = stage.settings, stage.device
    index = SimpleNamespace(images=ImageSettings(), classes=lambda label, values: torch.zeros(1, dtype=torch.long))
    latents: Any = SimpleNamespace(index=index, train=[], val=[])
    task = train_unet.UNetTask(stage, latents)
    mu = torch.randn(s.loop.batch_size, *task.shape, device=device)
    batch = Posterior(mu, mu), torch.zeros(len(mu), dtype=torch.long, device=device)
    return task, batch, task.example


def step_seconds(trainer: Trainer, batch: Any) -> float:
    """Seconds per step, the least of a few.

    Raises:
        UserError: If the GPU runs out of memory.
    """
    taken: list[float] = []
    try:
        while (len(taken) < WARM_UP + TIMED and sum(taken) < MAX_SECONDS) or len(taken) <= WARM_UP:
            start = time.perf_counter()
            trainer.train_step(batch)
            if trainer.stage.device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        raise UserError("the GPU runs out of memory in a step: try a smaller --micro-batch") from None
    return min(taken[WARM_UP:])
