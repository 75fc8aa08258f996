"""Pictures that a report draws: reconstructions with their errors, sampling trajectories, nearest neighbours."""

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.files import list_images, lookers
from lightdiff.data.images import to_float
from lightdiff.data.latents import LatentSet, Scaling
from lightdiff.errors import UserError, shorten
from lightdiff.extras.evidence import held_out, load_images
from lightdiff.extras.latent_facts import evenly
from lightdiff.extras.trajectory import TrajectoryStep, trajectory
from lightdiff.pictures import grid, opened
from lightdiff.pipeline import Pipeline, default_sampling, load_vae
from lightdiff.run_folder import StageFolder
from lightdiff.runtime.progress import console
from lightdiff.settings import ImageSettings

SHOWN = 8  # images in a row
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


def encode_picture(image: Image.Image | Path, alt: str) -> Picture:
    """A picture as a data URL: WebP, or PNG where it is too large for that."""
    if isinstance(image, Path):
        return encode_picture(opened(image), alt)
    stream, kind = io.BytesIO(), "webp" if max(image.size) <= MAX_WEBP else "png"
    image.save(stream, format=kind, quality=QUALITY, method=4)  # PNG ignores both
    text = base64.b64encode(stream.getvalue()).decode()
    return Picture(f"data:image/{kind};base64,{text}", alt, *image.size)


@torch.inference_mode()
def reconstructions(folder: StageFolder, device: torch.device) -> Picture:
    """Held-out images, their reconstructions, and the difference, each in a row.

    Raises:
        UserError: If the images have been moved or cannot be read.
    """
    saved = Checkpoint(folder.best if folder.best.is_file() else folder.last, "vae")
    images = saved.settings(ImageSettings, "images")
    try:
        lookers(images.data)
    except UserError as gone:
        raise UserError(f"the images are no longer where they were: {str(gone).removeprefix('--data: ')}") from None
    chosen = held_out(list_images(images, console))[:SHOWN]
    readable = load_images(chosen, images)
    if not readable:
        raise UserError(f"none of the images to show can be read, the first is {chosen[0].path}")
    x = to_float(torch.stack(readable)).to(device)
    vae, _ = load_vae(saved, device)
    x_hat = vae.decoder(vae.encoder(x).mu).clamp(-1, 1)
    error = ((x_hat - x) * ERROR_GAIN).clamp(-1, 1)
    worst = float((x_hat - x).square().mean((1, 2, 3)).max().sqrt())
    alt = (
        f"Three rows: held-out images, their reconstructions, and the difference around grey, "
        f"{ERROR_GAIN}x amplified. The largest RMS error of an image is {worst / 2 * 255:.0f} of 255 levels."
    )
    return encode_picture(grid(torch.cat([x, x_hat, error]), len(x)), alt)


def samples(pipeline: Pipeline) -> Picture:
    """New images of seed 0, sampled as by default, and in words how."""
    how = default_sampling(pipeline.settings)
    alt = f"{2 * SHOWN} samples of seed {SEED}: {how.sampler}, {how.num_steps} steps, guidance {how.guidance:g}"
    alt += f"; classes in turn: {shorten(', '.join(how.class_))}" if how.class_ else ""
    return encode_picture(grid(pipeline.decode(pipeline.sample(2 * SHOWN, SEED, how)), SHOWN), alt)


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
