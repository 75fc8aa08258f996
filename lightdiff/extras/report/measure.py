"""Pictures that a report makes itself: reconstructions with their errors, the way from noise, nearest neighbours."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.files import list_images
from lightdiff.data.images import to_float
from lightdiff.data.latents import LatentSet, Scaling
from lightdiff.data.loading import ImageDataset
from lightdiff.errors import UserError
from lightdiff.extras.latent_facts import evenly
from lightdiff.extras.trajectory import TrajectoryStep, trajectory
from lightdiff.pictures import grid, opened
from lightdiff.pipeline import Pipeline, load_vae
from lightdiff.run_folder import StageFolder
from lightdiff.runtime.progress import console
from lightdiff.settings import ImageSettings, SamplingSettings

SHOWN = 8  # images in a row
ENLARGED = 4  # how much errors are
STEPS = 20  # of a trajectory
NEAREST = 3
MOST_NUMBERS = 100_000_000  # of the latents that neighbours are looked for in
QUALITY = 90
MOST_WEBP = 16_383  # pixels a side


@dataclass(frozen=True)
class Picture:
    """A picture within the page."""

    src: str
    alt: str
    width: int
    height: int


def encoded(image: Image.Image | Path, alt: str) -> Picture:
    """A picture as a data address (WebP)."""
    if isinstance(image, Path):
        return encoded(opened(image), alt)
    stream, kind = io.BytesIO(), "webp" if max(image.size) <= MOST_WEBP else "png"
    image.save(stream, format=kind, quality=QUALITY, method=4)  # PNG takes no notice of both
    text = base64.b64encode(stream.getvalue()).decode()
    return Picture(f"data:image/{kind};base64,{text}", alt, *image.size)


@torch.inference_mode()
def reconstructions(folder: StageFolder, device: torch.device) -> Picture:
    """Held-out images, their reconstructions, and the difference, each in a row.

    Raises:
        UserError: If the images are not there any more.
    """
    saved = Checkpoint(folder.best if folder.best.is_file() else folder.last, "vae")
    images = ImageSettings.model_validate(saved.metadata.settings["images"])
    if gone := [str(d) for d in images.data if not d.exists()]:
        raise UserError(f"the images are not where they were: {', '.join(gone)}")
    files = list_images(images, console)
    chosen = ([f for f in files if f.split == "val"] or files)[:SHOWN]
    dataset = ImageDataset(chosen, images, seed=0, train=False)
    items = [dataset[0, i].x for i in range(len(chosen))]
    readable = [item for item in items if item is not None]
    if not readable:
        raise UserError(f"none of the images can be read that would be shown, the first is {chosen[0].path}")
    x = to_float(torch.stack(readable)).to(device)
    vae, _ = load_vae(saved, device)
    x_hat = vae.decoder(vae.encoder(x).mu).clamp(-1, 1)
    error = ((x_hat - x) * ENLARGED).clamp(-1, 1)
    worst = float((x_hat - x).square().mean((1, 2, 3)).max().sqrt())
    alt = (
        f"Three rows: held-out images, their reconstructions, and the difference, {ENLARGED} times as strong around "
        f"grey. The worst of them is off by {worst / 2 * 255:.0f} of 255 levels (root mean square)."
    )
    return encoded(grid(torch.cat([x, x_hat, error]), len(x)), alt)


def trajectory_pictures(pipeline: Pipeline) -> list[tuple[str, Picture]]:
    """x_t above the estimate of x0 at each call of the network, with the level in words."""
    steps = trajectory(pipeline, SHOWN, sampling=SamplingSettings(num_steps=STEPS))
    return [pictured(i, step) for i, step in enumerate(steps)]


def pictured(call: int, step: TrajectoryStep) -> tuple[str, Picture]:
    """One step."""
    level = step.level
    words = f"call {call + 1} of {STEPS}: signal {level.alpha:.3f}, noise {level.sigma:.3f}"
    alt = f"Two rows at {words}: what the noisy latents look like, and what the network takes to be behind them"
    return words, encoded(grid(torch.cat([step.x_t, step.x0]), SHOWN), alt)


@torch.inference_mode()
def nearest(pipeline: Pipeline, folder: Path) -> tuple[Picture, str]:
    """Samples beside the training images nearest to them, as the VAE sees them, and how near that is.

    Distances are those of clean latents (mu, scaled), so that no other network and no image file is needed.

    Raises:
        UserError: If the latents are not whole.
    """
    latents, scaling = LatentSet(folder), Scaling.of(pipeline.settings.latent)
    numbers = latents.index.shape[0] * latents.index.shape[1] * latents.index.shape[2]
    positions = [latents.train[i] for i in evenly(len(latents.train), max(1, MOST_NUMBERS // numbers))]
    mu = torch.cat([latents.gather(positions, torch.full((len(positions),), s))[0] for s in sides(latents)])
    known = scaling.to_x0(mu).flatten(1)
    z = pipeline.sample(SHOWN).cpu()
    distance, which = torch.cdist(scaling.to_x0(z).flatten(1), known).topk(min(NEAREST, len(known)), largest=False)
    columns = [z, *(mu[which[:, i]] for i in range(which.shape[1]))]
    rows = torch.stack([pipeline.decode(column) for column in columns])  # (1 + n, SHOWN, 3, h, w)
    said = f"Median distance of these samples to the nearest training image: {float(distance[:, 0].median()):.1f}"
    if held_out := [latents.val[i] for i in evenly(len(latents.val), 200)]:
        new = scaling.to_x0(latents.gather(held_out)[0]).flatten(1)
        usual = float(torch.cdist(new, known).amin(1).median())
        said += f"; that of {len(held_out)} held-out images: {usual:.1f}. Copies would lie far nearer than those"
    alt = "The first row are samples; below each, the training images nearest to it, as the VAE decodes them."
    return encoded(grid(rows.flatten(0, 1), SHOWN), alt), said + "."


def sides(latents: LatentSet) -> tuple[int, ...]:
    """Each image, and its mirror image where that is kept."""
    return (0, 1) if latents.index.mirrored else (0,)
