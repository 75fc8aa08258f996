"""generate: noise -> x0 -> z -> images."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lightdiff import __version__
from lightdiff.checkpoint import Checkpoint, publish
from lightdiff.data.images import to_uint8
from lightdiff.diffusion.schedules import alpha_bar_table, sampling_levels
from lightdiff.errors import UserError
from lightdiff.pipeline import Pipeline, Sampling, vae_behind
from lightdiff.run_folder import RunFolder, claim, find_unet
from lightdiff.settings import GenerateSettings
from lightdiff.training.compute import pick_device, pick_precision
from lightdiff.training.progress import Reporter, console, save_grid

GRID_IMAGES = 64
MACHINE_ONLY = {"run", "unet", "vae", "out", "name", "compute"}  # settings that a picture does not tell


def run(settings: GenerateSettings) -> Path:
    """Draw images and return the folder they are in."""
    # 1. The networks, and whether they can do what is asked
    device = pick_device(settings.compute.device)
    here = RunFolder(settings.run)
    unet = Checkpoint(find_unet(settings.unet, here), "unet")
    vae = Checkpoint(vae_behind(unet, settings.vae, here), "vae")
    pipeline = Pipeline(unet, vae, device, settings.ema)
    pipeline.precision = pick_precision(settings.compute.precision, device)
    size = latent_size(settings, pipeline)
    check_steps(settings, pipeline)
    out = settings.out or new_folder(here.samples)
    claim(out)
    names = [file_name(settings, i) for i in range(settings.num_images)]
    refuse_overwriting(out, names)

    # 2. Draw batch by batch
    sampling = Sampling(settings.num_steps, settings.eta, settings.clamp, settings.min_alpha_bar)
    shown: list[Tensor] = []
    with Reporter("generate", settings.num_images) as reporter:
        for items in batched(settings.num_images, settings.batch_size):
            z = pipeline.sample(items, settings.seed, sampling, size)
            x = pipeline.decode(z)
            for i, pixels in zip(items, to_uint8(x), strict=True):
                save_png(out / names[i], pixels, text_chunks(settings, pipeline, i))
            shown += x[: GRID_IMAGES - len(shown)].unbind() if len(shown) < GRID_IMAGES else []
            reporter.advance(items[-1] + 1, {})

    # 3. All of them at a glance
    grid = out / (f"{settings.name}-grid.png" if settings.name else "grid.png")
    save_grid(grid, torch.stack(shown), columns=max(1, min(8, round(len(shown) ** 0.5))))
    console.print(f"{settings.num_images} images and {grid.name} are in {out}", soft_wrap=True)
    return out


def latent_size(settings: GenerateSettings, pipeline: Pipeline) -> tuple[int, int]:
    """Height and width of the latents to draw.

    Raises:
        UserError: If the networks cannot make images of the size asked for.
    """
    latent = pipeline.settings.latent
    if not settings.resolution:
        return latent.height, latent.width
    step = pipeline.vae_settings.factor * pipeline.settings.model.factor
    if settings.resolution % step:
        below = settings.resolution // step * step
        fits = f"{below} or {below + step}" if below else str(step)
        raise UserError(f"--resolution: {settings.resolution} is not divisible by {step}; the nearest that fit: {fits}")
    side = settings.resolution // pipeline.vae_settings.factor
    return side, side


def check_steps(settings: GenerateSettings, pipeline: Pipeline) -> None:
    """See that the noise schedule has as many levels as steps are asked for.

    Raises:
        UserError: If not.
    """
    try:
        sampling_levels(alpha_bar_table(pipeline.settings.noise), settings.num_steps, settings.min_alpha_bar)
    except ValueError as error:
        raise UserError(f"--num-steps: {error}") from None


def new_folder(samples: Path) -> Path:
    """The next free folder below samples/: 0001, 0002, ..."""
    taken = [int(p.name) for p in samples.glob("[0-9]*") if p.name.isdigit()]
    return samples / f"{max(taken, default=0) + 1:04d}"


def file_name(settings: GenerateSettings, item: int) -> str:
    """The file name of image `item`."""
    return f"{settings.name}-{item:05d}.png" if settings.name else f"{item:05d}.png"


def refuse_overwriting(out: Path, names: list[str]) -> None:
    """See that no image is there already.

    Raises:
        UserError: If one is.
    """
    there = [name for name in names if (out / name).exists()]
    if there:
        raise UserError(f"{out} holds {there[0]} already: choose another --out, or a --name")


def batched(count: int, size: int) -> Iterator[range]:
    """The numbers 0 to count - 1 in ranges of at most `size`."""
    return (range(first, min(first + size, count)) for first in range(0, count, size))


def text_chunks(settings: GenerateSettings, pipeline: Pipeline, item: int) -> PngInfo:
    """What a picture says of its own making: seed, index, settings and models; no path of this machine."""
    chosen = settings.model_dump(mode="json", exclude=MACHINE_ONLY)
    info = PngInfo()
    info.add_text("Software", f"lightdiff {__version__}")
    info.add_text("seed", str(settings.seed))
    info.add_text("index", str(item))
    info.add_text("settings", json.dumps(chosen))
    info.add_text("unet", pipeline.unet_checkpoint.document.digest)
    info.add_text("vae", pipeline.vae_checkpoint.document.digest)
    return info


def save_png(path: Path, pixels: Tensor, info: PngInfo) -> None:
    """Publish one image (3, h, w), uint8, as a PNG with its text chunks."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    publish(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))
