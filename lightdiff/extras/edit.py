"""edit: begin with an image instead of noise (SDEdit, Meng et al. 2022, arXiv:2108.01073), or inpaint a part of it."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from lightdiff.data.images import BadImage, frame, load_image, to_float
from lightdiff.diffusion.objectives import Denoise, Latents, eps_from_x0
from lightdiff.diffusion.schedules import Level
from lightdiff.errors import UserError
from lightdiff.extras.settings import EditSettings
from lightdiff.extras.sheet import Heading, contact_sheet
from lightdiff.extras.trajectory import save_trajectory
from lightdiff.pictures import GRID_IMAGES, grid, opened, save_png
from lightdiff.pipeline import Pipeline, Start
from lightdiff.settings import ImageSettings, Size
from lightdiff.stages.generate import open_samples

STRENGTH = 0.6
ACROSS = 8  # images in a row of the sheet


def run(settings: EditSettings) -> Path:
    """Generate variations of an image and return the folder they are in."""
    with open_samples(settings) as samples:
        pipeline = samples.pipeline
        source = Source.of(settings, pipeline, samples.size)
        start = source.start(pipeline)

        def images(items: range) -> Float[Tensor, "b 3 h w"]:
            z = pipeline.sample(items, settings.seed, settings.sampling, samples.size, source.strength, start)
            return source.pasted(pipeline.decode(z))

        samples.draw(images, source.strength, from_=source.digest)
        if settings.trajectory:
            save_trajectory(samples, source.strength, start)
        return samples.finish(save=source.save_sheet)


@dataclass(frozen=True)
class Source:
    """The image to start from, and where it may change."""

    x: Float[Tensor, "1 3 m n"]
    mask: Float[Tensor, "1 1 m n"] | None  # 1 where it is redrawn, 0 where it stays; None: all of it changes
    strength: float  # share of the noise levels, above which none is visited
    digest: str

    @classmethod
    def of(cls, settings: EditSettings, pipeline: Pipeline, size: tuple[int, int]) -> "Source":
        """Read and frame the image, and the mask if there is one.

        Raises:
            UserError: If one cannot be read.
        """
        assert settings.from_ is not None
        resolution = Size(*(side * pipeline.vae_settings.factor for side in size))
        saved, background = pipeline.checkpoints["vae"], "white"
        if "images" in saved.metadata.settings:  # an imported VAE was trained elsewhere
            background = saved.settings(ImageSettings, "images").background
        pixels = framed(settings.from_, resolution, "--from", background)
        digest, mask = hashlib.sha256(pixels.numpy().tobytes()), None
        if settings.mask:
            check_shape(settings.mask, settings.from_, resolution)
            white = framed(settings.mask, resolution, "--mask", "black").float().mean(0) > 127
            if not white.any():
                raise UserError(
                    f"--mask: {settings.mask} has no white in the part that is drawn, so nothing would be redrawn: "
                    "paint white what is to change (transparent counts as black)"
                )
            digest.update(white.numpy().tobytes())
            mask = white.float()[None, None]
        strength = settings.strength or (STRENGTH if mask is None else 1.0)
        return cls(to_float(pixels)[None], mask, strength, digest.hexdigest())

    def start(self, pipeline: Pipeline) -> Start:
        """Sampling that begins with this image."""
        z = pipeline.encode(self.x)
        # A latent that the mask touches at all is redrawn
        mask = None if self.mask is None else F.adaptive_max_pool2d(self.mask, z.shape[-2:]).to(z)
        return from_latent(pipeline.scaling.to_x0(z), mask)

    def save_sheet(self, path: Path, images: Sequence[Path]) -> None:
        """Save the source, and the mask if there is one, above what was made of it."""
        first = [self.x] + ([] if self.mask is None else [self.mask.expand_as(self.x) * 2 - 1])
        made = [opened(image) for image in images[:GRID_IMAGES]]
        rows = [made[i : i + ACROSS] for i in range(0, len(made), ACROSS)]
        labels = ["source" if self.mask is None else "source, mask", "variations", *[""] * (len(rows) - 1)]
        cells = [[[grid(x, 1) for x in first]], *([row] for row in rows)]
        save_png(path, contact_sheet("", Heading("", labels), Heading("", [""]), cells, ACROSS))

    def pasted(self, x: Float[Tensor, "b 3 m n"]) -> Float[Tensor, "b 3 m n"]:
        """Drawn images, with the source's own pixels where they were to stay."""
        return x if self.mask is None else torch.lerp(self.x, x, self.mask)


def from_latent(x0: Float[Tensor, "1 c h w"], mask: Float[Tensor, "1 1 h w"] | None = None) -> Start:
    """Start from a clean latent with noise added; where the mask is 0, it stays as it is."""

    def start(denoise: Denoise, level: Level, noise: Latents) -> tuple[Denoise, Latents]:
        known = x0.expand_as(noise)
        if mask is not None:
            denoise = inpainting(denoise, known, mask.expand(len(noise), -1, -1, -1))
        return denoise, level.alpha * known + level.sigma * noise

    return start


def inpainting(denoise: Denoise, known: Latents, mask: Float[Tensor, "b 1 h w"]) -> Denoise:
    """A denoiser that is certain of `known` where the mask is 0, so that every sampler draws the rest to fit it."""

    def certain(x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        x0 = torch.lerp(known, denoise(x_t, level)[0], mask)
        return x0, eps_from_x0(x_t, x0, level)

    return certain


def framed(path: Path, resolution: Size, flag: str, background: str) -> UInt8[Tensor, "3 m n"]:
    """An image's centre, in the shape of what is drawn."""
    try:
        return frame(load_image(path, ImageSettings(background=background, resolution=resolution)), resolution)
    except BadImage as error:
        raise UserError(f"{flag}: {path} cannot be read: {error}") from None


def check_shape(mask: Path, source: Path, size: Size) -> None:
    """Check that a mask lies on the image it belongs to: of its shape, or of that of what is drawn.

    Raises:
        UserError: If it is neither.
    """
    with suppress(BadImage):  # reported where they are read
        (width, height), (w, h) = load_image(source).size, load_image(mask).size
        if w * size.height != h * size.width and abs(w * height - h * width) > max(w * height, h * width) / 50:
            raise UserError(f"--mask: {mask} has {w} x {h} pixels, {source} {width} x {height}: not the same shape")
