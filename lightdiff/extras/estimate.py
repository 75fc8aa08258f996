"""--dry-run of a training: what it will take, found by building the network and timing a few steps of made-up data."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightdiff.data.files import list_images
from lightdiff.data.latents import read_index
from lightdiff.data.loading import ImageBatch
from lightdiff.errors import UserError
from lightdiff.extras.presets import activation_bytes
from lightdiff.models.lpips import TRUNKS, cached
from lightdiff.models.vae import Posterior
from lightdiff.run_folder import RunFolder, find_latents
from lightdiff.runtime.processes import Processes, pick_device, pick_precision
from lightdiff.runtime.progress import console, shape_words
from lightdiff.runtime.stage import Stage
from lightdiff.settings import TrainUNetSettings, TrainVAESettings, with_changes
from lightdiff.stages import train_unet, train_vae
from lightdiff.training.loop import Trainer

WARM_UP, TIMED, ENOUGH_SECONDS = 1, 5, 10.0
CPU_IMAGES = 4  # in the first timed steps on a CPU, where the whole batch may take minutes
CPU_SECONDS = 3.0  # that the whole batch may take to be timed itself


def estimate(settings: TrainVAESettings | TrainUNetSettings) -> None:
    """Print parameters, FLOPs and memory an image, the size of latents, and the time that the training will take."""
    device = pick_device(settings.loop.device)
    precision = pick_precision(settings.loop.precision, device)
    whole = settings.loop.batch_size
    settings = without_missing_lpips(settings)

    def ready(size: int) -> tuple[Trainer, Any, tuple[Tensor, ...]]:
        micro = min(settings.loop.micro, size)
        loop = with_changes(settings.loop, precision=precision, compile="off", batch_size=size, micro_batch=micro)
        s = with_changes(settings, loop=loop)
        name = "vae" if isinstance(s, TrainVAESettings) else "unet"
        stage: Stage[Any] = Stage(name, s.resolved(), device, Processes(), Path(), total_steps=1000)
        task, batch, inputs = made_up_images(stage) if name == "vae" else made_up_latents(stage)
        return Trainer(task, stage), batch, inputs

    first = whole if device.type == "cuda" else min(whole, CPU_IMAGES)
    trainer, batch, inputs = ready(first)
    task = trainer.task
    parameters = sum(p.numel() for p in task.model.parameters())
    with FlopCounterMode(display=False) as flops:
        task.model(*inputs)
    activations = activation_bytes(task.model, inputs)
    seconds = of_whole_batch(first, whole, lambda size: timed(*ready(size)[:2]), timed(trainer, batch))
    console.print(
        f"{trainer.stage.name}: {parameters / 1e6:.2f} M parameters; {shape_words(inputs[0].shape[1:])} an image"
        + (f" -> latents of {shape_words(inputs[1].shape[1:])}" if isinstance(settings, TrainVAESettings) else ""),
        f"an image: {flops.get_total_flops() / 1e9:.3g} GFLOP forward, {activations / 1e6:.1f} MB for the way back",
        f"weights, gradients, optimizer and average: {(trainer.snapshot_bytes + 4 * parameters) / 1e6:.0f} MB; "
        f"a checkpoint: {trainer.snapshot_bytes / 1e6:.0f} MB",
        sep="\n",
        soft_wrap=True,
    )
    count = images_trained_on(settings) if settings.loop.epochs else 0
    if settings.loop.epochs and not count:
        duration = "how long an epoch takes depends on the number of images"
    else:
        steps = settings.loop.total_steps(count)
        duration = f"{steps} steps of {whole} take {words(steps * seconds)}"
    console.print(
        f"{whole / seconds:.3g} images/s on {device.type} in {precision}, without loading and validation: {duration}",
        soft_wrap=True,
    )


def of_whole_batch(first: int, whole: int, time_of: Callable[[int], float], seconds: float) -> float:
    """Seconds of a step of the whole batch, from those of the first few images.

    A step takes a while for itself, the optimizer's part, and a while for each image: where the whole batch would take
    too long to be timed, steps of two sizes tell them apart.
    """
    if first == whole:
        return seconds
    if 2 * first >= whole or seconds * whole / first < CPU_SECONDS:
        return time_of(whole)
    an_image = max(0.0, time_of(2 * first) - seconds) / first
    return seconds + an_image * (whole - first)


def images_trained_on(settings: TrainVAESettings | TrainUNetSettings) -> int:
    """How many there are; 0 where no folder has been named yet."""
    if isinstance(settings, TrainUNetSettings):
        return read_index(find_latents(settings.latents, RunFolder(settings.run))).splits.count("t")
    return sum(file.split == "train" for file in list_images(settings.images, console)) if settings.images.data else 0


def without_missing_lpips(settings: TrainVAESettings | TrainUNetSettings) -> TrainVAESettings | TrainUNetSettings:
    """The same settings, but for LPIPS where its weights would have to be fetched first."""
    if isinstance(settings, TrainUNetSettings) or not settings.loss.lpips_gamma or settings.loss.lpips_weights:
        return settings
    url = TRUNKS[settings.loss.lpips_net].url
    if cached(url).is_file():
        return settings
    console.print(f"LPIPS is left out of this: its weights are not there yet ({url})")
    return with_changes(settings, loss=with_changes(settings.loss, lpips_gamma=0))


def made_up_images(stage: Stage[TrainVAESettings]) -> tuple[Any, Any, tuple[Tensor, ...]]:
    """The VAE's task, a batch of noise for it, and one image with the noise of its latent."""
    s, device, task = stage.settings, stage.device, train_vae.VAETask(stage, [])
    side, count = s.images.resolution, s.loop.batch_size
    pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    batch = ImageBatch(pixels, torch.arange(count), [], 0)
    return (
        task,
        batch,
        (torch.zeros(1, 3, side, side, device=device), torch.zeros(1, *task.latent_shape, device=device)),
    )


def made_up_latents(stage: Stage[TrainUNetSettings]) -> tuple[Any, Any, tuple[Tensor, ...]]:
    """The U-Net's task, a batch of noise for it, and one latent with its level."""
    s, device = stage.settings, stage.device
    index = SimpleNamespace(classes=lambda label, values: torch.zeros(1, dtype=torch.long))
    latents: Any = SimpleNamespace(index=index, train=[])
    task = train_unet.UNetTask(stage, latents)
    whole = torch.randn(s.loop.batch_size, *task.shape, device=device)
    batch = Posterior(whole, whole), torch.zeros(len(whole), dtype=torch.long, device=device)
    return task, batch, (whole[:1], torch.zeros(1, device=device))


def timed(trainer: Trainer, batch: Any) -> float:
    """Seconds of a step, the shortest of a few.

    Raises:
        UserError: If the GPU's memory does not suffice.
    """
    taken: list[float] = []
    try:
        while (len(taken) < WARM_UP + TIMED and sum(taken) < ENOUGH_SECONDS) or len(taken) <= WARM_UP:
            began = time.perf_counter()
            trainer.train_step(batch)
            if trainer.stage.device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
    except torch.OutOfMemoryError:
        raise UserError("the GPU's memory does not suffice for a step: try a smaller --micro-batch") from None
    return min(taken[WARM_UP:])


def words(seconds: float) -> str:
    """A duration in words."""
    for limit, unit, name in ((120, 1, "seconds"), (7200, 60, "minutes"), (172_800, 3600, "hours")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.1f} days"
