"""What a report measures and draws with the networks: reconstructions, samples, their way out of noise, neighbours."""

import base64
import io
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import stdev

import torch
from PIL import Image
from torch import Tensor

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.files import list_images
from lightdiff.data.images import to_float
from lightdiff.data.latents import LatentSet, Scaling
from lightdiff.data.order import item_noise, key
from lightdiff.diffusion.objectives import target
from lightdiff.diffusion.schedules import Schedule
from lightdiff.errors import UserError, shorten
from lightdiff.extras.evidence import held_out, load_images
from lightdiff.extras.latent_facts import evenly
from lightdiff.extras.trajectory import TrajectoryStep, trajectory
from lightdiff.losses import psnr
from lightdiff.pictures import grid, opened
from lightdiff.pipeline import Pipeline, default_sampling, load_vae
from lightdiff.run_folder import StageFolder
from lightdiff.runtime.progress import console
from lightdiff.settings import ImageSettings, with_changes
from lightdiff.stages.train_unet import BANDS

SHOWN = 8  # images in a row
MEASURED = 64  # held-out images
MAX_CLASSES = 12  # shown
ERROR_GAIN = 4  # factor by which differences are amplified
SEED = 0  # of the samples
NEAREST = 3
MAX_ELEMENTS = 100_000_000  # of the latents searched for neighbours
QUALITY = 90
MAX_WEBP = 16_383  # pixels per side


@dataclass(frozen=True)
class Picture:
    """A picture embedded in the page."""

    src: str
    alt: str
    width: int
    height: int


@lru_cache(maxsize=64)  # a live page shows most files again at every update
def encode_file(path: Path, changed: int, alt: str) -> Picture:
    """A picture from a file, last changed at this time, as a data URL."""
    return encode_picture(opened(path), alt)


def encode_picture(image: Image.Image, alt: str) -> Picture:
    """A picture as a data URL: WebP, or PNG where it is too large for that."""
    stream, kind = io.BytesIO(), "webp" if max(image.size) <= MAX_WEBP else "png"
    image.save(stream, format=kind, quality=QUALITY, method=4)  # PNG ignores both
    text = base64.b64encode(stream.getvalue()).decode()
    return Picture(f"data:image/{kind};base64,{text}", alt, *image.size)


@dataclass(frozen=True)
class Reconstructions:
    """How held-out images come through the VAE."""

    first: Picture  # some of them, their reconstructions, and the difference
    worst: Picture | None  # those with the largest error, if more were measured than are shown
    psnr: list[float]  # of each image measured, dB
    baseline: float  # PSNR of their mean image in place of each, dB

    @property
    def spread(self) -> float:
        """Standard deviation of an image's PSNR, dB; 0 for one image."""
        return stdev(self.psnr) if len(self.psnr) > 1 else 0.0


@torch.inference_mode()
def reconstructions(folder: StageFolder, device: torch.device) -> Reconstructions:
    """Up to MEASURED held-out images through the VAE, by their posteriors' means.

    Raises:
        UserError: If the images have been moved or cannot be read.
    """
    saved = Checkpoint(folder.best if folder.best.is_file() else folder.last, "vae")
    images = saved.settings(ImageSettings, "images")
    try:
        files = held_out(list_images(images, console))
    except UserError as gone:
        raise UserError(f"the images are no longer where they were: {str(gone).removeprefix('--data: ')}") from None
    chosen = [files[i] for i in evenly(len(files), MEASURED)]
    readable = load_images(chosen, images)
    if not readable:
        raise UserError(f"none of the images to show can be read, the first is {chosen[0].path}")
    x = to_float(torch.stack(readable))
    vae, _ = load_vae(saved, device)
    parts = [vae.decoder(vae.encoder(part.to(device)).mu).clamp(-1, 1).cpu() for part in torch.split(x, SHOWN)]
    x_hat = torch.cat(parts)
    quality = psnr(x, x_hat)
    kind = "held-out images" if chosen[0].split == "val" else "training images (none are held out)"
    worst = quality.argsort()[:SHOWN] if len(x) > SHOWN else None
    return Reconstructions(
        draw_errors(x[:SHOWN], x_hat[:SHOWN], f"{min(SHOWN, len(x))} of {len(x)} {kind}"),
        None if worst is None else draw_errors(x[worst], x_hat[worst], f"The worst {SHOWN} of {len(x)} {kind}"),
        quality.tolist(),
        float(psnr(x, x.mean(0, keepdim=True).expand_as(x)).mean()),
    )


def draw_errors(x: Tensor, x_hat: Tensor, which: str) -> Picture:
    """Images, their reconstructions, and the difference, each in a row."""
    error = ((x_hat - x) * ERROR_GAIN).clamp(-1, 1)
    each = ", ".join(f"{value:.1f}" for value in psnr(x, x_hat).tolist())
    alt = f"{which}, their reconstructions, and the difference around grey, {ERROR_GAIN}x amplified. PSNR {each} dB."
    return encode_picture(grid(torch.cat([x, x_hat, error]), len(x)), alt)


def samples(pipeline: Pipeline) -> Picture:
    """New images of seed 0, sampled as by default, and in words how."""
    how = default_sampling(pipeline.settings)
    alt = f"{2 * SHOWN} samples of seed {SEED}: {how.sampler}, {how.num_steps} steps, guidance {how.guidance:g}"
    alt += f"; classes in turn: {shorten(', '.join(how.class_))}" if how.class_ else ""
    return encode_picture(grid(pipeline.decode(pipeline.sample(2 * SHOWN, SEED, how)), SHOWN), alt)


def samples_by_class(pipeline: Pipeline) -> list[tuple[str, Picture]]:
    """A row of samples for each of the first classes, from the same noise in every row."""
    how, rows = default_sampling(pipeline.settings), []
    for name in pipeline.settings.classes[:MAX_CLASSES]:
        drawn = pipeline.decode(pipeline.sample(SHOWN, SEED, with_changes(how, class_=(name,))))
        rows.append((name, encode_picture(grid(drawn, SHOWN), f"{SHOWN} samples of class {shorten(name)}")))
    return rows


@torch.inference_mode()
def loss_spread(pipeline: Pipeline, folder: Path) -> float:
    """Standard deviation, over held-out images, of the loss of one: its mean over a level of each band.

    Raises:
        UserError: If fewer than two latents are held out, or they are damaged.
    """
    latents, s = LatentSet(folder), pipeline.settings
    schedule = Schedule.of(s.noise.resolved(s.target.objective)).to(pipeline.device)
    classes = latents.index.classes(s.label, s.classes) if s.label else None
    chosen = [latents.val[i] for i in evenly(len(latents.val), MEASURED)]
    if len(chosen) < 2:
        raise UserError(f"{len(chosen)} latents are held out: too few to know how much their loss varies")
    x0 = pipeline.scaling.to_x0(latents.gather(chosen, device=pipeline.device)[0])
    label = [] if classes is None else [classes[chosen].to(pipeline.device)]
    errors = []
    for band in range(BANDS):
        shares = torch.tensor([key(SEED, "report level", band, i) % 4096 + 0.5 for i in chosen]) / 4096
        t = ((band + shares) * len(schedule) / BANDS).long().to(pipeline.device)
        eps = item_noise(tuple(x0.shape[1:]), chosen, SEED, f"report {band}").to(pipeline.device)
        wanted = target(s.target.objective, x0, eps, *schedule.at(t))
        errors.append((pipeline.unet(schedule.q_sample(x0, eps, t), t, *label) - wanted).square().mean((1, 2, 3)))
    return float(torch.stack(errors).mean(0).std())


def trajectory_pictures(pipeline: Pipeline) -> list[tuple[str, Picture]]:
    """A label and a picture for each call of the network: x_t above the estimate of x0."""
    steps = trajectory(pipeline, SHOWN, SEED, default_sampling(pipeline.settings))
    return [draw_step(i, len(steps), step) for i, step in enumerate(steps)]


def draw_step(call: int, calls: int, step: TrajectoryStep) -> tuple[str, Picture]:
    """The label and the picture of one sampling step."""
    label = f"call {call + 1} of {calls}: alpha {step.level.alpha:.3f}, sigma {step.level.sigma:.3f}"
    alt = f"Two rows at {label}: the noisy latents, decoded, and the network's estimate of the clean ones"
    return label, encode_picture(grid(torch.cat([step.x_t, step.x0]), SHOWN), alt)


@torch.inference_mode()
def nearest(pipeline: Pipeline, folder: Path) -> tuple[Picture, str]:
    """Samples above the training images nearest to them in latent space, and the distances as text.

    Distances are between clean latents (scaled mu), so no other network and no image file is needed.

    Raises:
        UserError: If the latents are incomplete or damaged.
    """
    latents, scaling = LatentSet(folder), Scaling.of(pipeline.settings.latent)
    max_images = max(1, MAX_ELEMENTS // math.prod(latents.index.shape))
    positions = [latents.train[i] for i in evenly(len(latents.train), max_images)]
    sides = (0, 1) if latents.index.mirrored else (0,)  # mirror images count as well
    mu = torch.cat([latents.gather(positions, torch.full((len(positions),), side))[0] for side in sides])
    known = scaling.to_x0(mu).flatten(1)
    z = pipeline.sample(SHOWN, SEED, default_sampling(pipeline.settings)).cpu()
    distance, which = torch.cdist(scaling.to_x0(z).flatten(1), known).topk(min(NEAREST, len(known)), largest=False)
    columns = [z, *(mu[which[:, i]] for i in range(which.shape[1]))]
    rows = torch.stack([pipeline.decode(column) for column in columns])  # (1 + n, SHOWN, 3, h, w)
    text = f"Median distance of these samples to the nearest training image: {float(distance[:, 0].median()):.1f}"
    if val := [latents.val[i] for i in evenly(len(latents.val), 200)]:
        new = scaling.to_x0(latents.gather(val)[0]).flatten(1)
        usual = float(torch.cdist(new, known).amin(1).median())
        text += f"; that of {len(val)} held-out images: {usual:.1f}. Copies would lie much nearer than those"
    alt = "The first row shows samples; below each, the training images nearest to it, decoded by the VAE."
    return encode_picture(grid(rows.flatten(0, 1), SHOWN), alt), text + "."
