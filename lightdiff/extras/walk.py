"""walk: the images between images of a seed."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lightdiff.data.latents import async_copy
from lightdiff.data.order import item_noise
from lightdiff.diffusion.objectives import Denoise, Latents
from lightdiff.diffusion.schedules import Level
from lightdiff.extras.animation import save_animation
from lightdiff.extras.settings import WalkSettings
from lightdiff.pictures import opened
from lightdiff.pipeline import from_noise
from lightdiff.settings import with_changes
from lightdiff.stages.generate import open_samples


def run(settings: WalkSettings) -> Path:
    """Generate a walk and return the folder it is in."""
    count = (len(settings.between) - 1) * (settings.frames - 1) + 1
    with open_samples(with_changes(settings, num_images=count)) as samples:
        pipeline = samples.pipeline
        shape = (pipeline.settings.latent.channels, *samples.size)
        walk = noise_between(shape, settings.between, settings.frames, settings.seed)

        def images(items: range) -> Float[Tensor, "b 3 h w"]:
            frames = async_copy(walk[[min(i, count - 1) for i in items]], pipeline.device)

            def start(denoise: Denoise, level: Level, noise: Latents) -> tuple[Denoise, Latents]:
                return from_noise(denoise, level, frames)

            z = pipeline.sample(items, settings.seed, settings.sampling, samples.size, start=start)
            return pipeline.decode(z)

        samples.draw(images)
        return samples.finish("walk.webp", save_walk)


def noise_between(shape: tuple[int, ...], ends: Sequence[int], frames: int, seed: int) -> Float[Tensor, "n c h w"]:
    """Starting noise on the way between images of a seed, both ends included, `frames` from each to the next.

    Spherical interpolation (Shoemake 1985): what lies between keeps the length that noise has.
    """
    noise = item_noise(shape, list(ends), seed, "start")
    found: list[Tensor] = []
    for a, b in pairwise(noise):
        angle = torch.acos(torch.clamp((a * b).sum() / (a.norm() * b.norm()), -1, 1))
        for share in torch.linspace(0, 1, frames)[1 if found else 0 :].tolist():
            found.append(a if share == 0 else b if share == 1 else slerp(a, b, angle, share))
    return torch.stack(found)


def slerp(a: Tensor, b: Tensor, angle: Tensor, share: float) -> Tensor:
    """The point at a share of the way from a to b, on the arc between them."""
    if angle < 1e-4:  # a and b are the same
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def save_walk(path: Path, images: Sequence[Path]) -> None:
    """Save images as an animation from the first to the last and back."""
    save_animation(path, [opened(p) for p in [*images, *images[-2:0:-1]]])
