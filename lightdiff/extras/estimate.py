"""--dry-run of a training: what it will take, found by building the network and timing a few steps of made-up data."""

import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightdiff.data.loading import Batch as ImageBatch
from lightdiff.errors import UserError
from lightdiff.extras.presets import activation_bytes
from lightdiff.models.perceptual import TRUNKS, cached
from lightdiff.models.vae import Posterior
from lightdiff.settings import TrainUNetSettings, TrainVAESettings, with_changes
from lightdiff.stages import train_unet, train_vae
from lightdiff.training.compute import pick_device, pick_precision
from lightdiff.training.loop import Trainer
from lightdiff.training.progress import console
from lightdiff.training.ranks import Ranks

WARM_UP, TIMED, ENOUGH_SECONDS = 1, 5, 10.0
CPU_IMAGES = 4  # in a timed step: on a CPU an image takes as long in any batch


def estimate(settings: TrainVAESettings | TrainUNetSettings) -> None:
    """Print parameters, FLOPs and memory an image, the size of latents, and the time that the training will take."""
    device = pick_device(settings.loop.device)
    precision = pick_precision(settings.loop.precision, device)
    size = settings.loop.batch_size if device.type == "cuda" else min(settings.loop.batch_size, CPU_IMAGES)
    micro = min(settings.loop.micro, size)
    loop = with_changes(settings.loop, precision=precision, compile="off", batch_size=size, micro_batch=micro)
    ready = with_changes(settings, loop=loop)
    if isinstance(ready, TrainVAESettings):
        task, batch, inputs = made_up_images(ready, device)
    else:
        task, batch, inputs = made_up_latents(ready, device)
    parameters = sum(p.numel() for p in task.model.parameters())
    with FlopCounterMode(display=False) as flops:
        task.model(*inputs)
    activations = activation_bytes(task.model, inputs)
    trainer = Trainer(task, ready.loop, precision)
    speed = size / timed(trainer, batch)
    console.print(
        f"{task.stage}: {parameters / 1e6:.2f} M parameters; {shape(inputs[0])} an image"
        + (f" -> latents of {shape(inputs[1])}" if isinstance(ready, TrainVAESettings) else ""),
        f"an image: {flops.get_total_flops() / 1e9:.3g} GFLOP forward, {activations / 1e6:.1f} MB for the way back",
        f"weights, gradients, optimizer and average: {(trainer.nbytes + 4 * parameters) / 1e6:.0f} MB; a checkpoint: "
        f"{trainer.nbytes / 1e6:.0f} MB",
        sep="\n",
        soft_wrap=True,
    )
    batch_size, steps = settings.loop.batch_size, settings.loop.steps
    if loop.epochs:
        duration = "how long an epoch takes depends on the number of images"
    else:
        duration = f"{steps} steps of {batch_size} take {words(steps * batch_size / speed)}"
    console.print(
        f"{speed:.3g} images/s on {device.type} in {precision}, without loading and validation: {duration}",
        soft_wrap=True,
    )


def made_up_images(settings: TrainVAESettings, device: torch.device) -> tuple[Any, Any, tuple[Tensor, ...]]:
    """The VAE's task, a batch of noise for it, and one image with the noise of its latent."""
    s = train_vae.resolve(settings)
    lpips = None
    if s.loss.lpips_gamma and (s.loss.lpips_weights or cached(TRUNKS[s.loss.lpips_net].url).is_file()):
        lpips = train_vae.perceptual(s.loss, device, Ranks())
    elif s.loss.lpips_gamma:
        console.print(f"LPIPS is left out of this: its weights are not there yet ({TRUNKS[s.loss.lpips_net].url})")
        s = with_changes(s, loss=with_changes(s.loss, lpips_gamma=0))
    task = train_vae.VAETask(s, [], device, lpips, None, Ranks())  # type: ignore[arg-type]  # no file is read
    side, count = s.images.resolution, s.loop.batch_size
    pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    batch = ImageBatch(pixels, torch.arange(count), [], 0)
    return (
        task,
        batch,
        (torch.zeros(1, 3, side, side, device=device), torch.zeros(1, *task.latent_shape, device=device)),
    )


def made_up_latents(settings: TrainUNetSettings, device: torch.device) -> tuple[Any, Any, tuple[Tensor, ...]]:
    """The U-Net's task, a batch of noise for it, and one latent with its level."""
    s = train_unet.resolve(settings)
    latents: Any = SimpleNamespace(
        index=SimpleNamespace(classes=lambda label, values: torch.zeros(1, dtype=torch.long))
    )
    task = train_unet.UNetTask(s, latents, device, Ranks())
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
            trainer.train_step(batch, 1000)
            if trainer.task.device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
    except torch.OutOfMemoryError:
        raise UserError("the GPU's memory does not suffice for a step: try a smaller --micro-batch") from None
    return min(taken[WARM_UP:])


def shape(x: Tensor) -> str:
    """A shape as people write it, without the batch."""
    return " x ".join(map(str, x.shape[1:]))


def words(seconds: float) -> str:
    """A duration in words."""
    for limit, unit, name in ((120, 1, "seconds"), (7200, 60, "minutes"), (172_800, 3600, "hours")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.1f} days"
