"""trajectory: how images come out of noise, call by call of the network."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lightdiff.diffusion.objectives import Denoise, Latents
from lightdiff.diffusion.schedules import Level
from lightdiff.extras.animation import save_animation
from lightdiff.extras.settings import TrajectorySettings
from lightdiff.extras.sheet import Heading, contact_sheet
from lightdiff.pictures import grid, save_png
from lightdiff.pipeline import Pipeline, Start, from_noise
from lightdiff.runtime.progress import console
from lightdiff.settings import SamplingSettings
from lightdiff.stages.generate import Samples, open_samples

IMAGES = 4
LAST_MS = 1500  # that an animation rests at its end
STRIP = 10  # columns of a strip


@dataclass(frozen=True)
class TrajectoryStep:
    """One call of the network on the way from noise to images in [-1, 1], on the CPU."""

    level: Level
    x_t: Float[Tensor, "b 3 h w"]  # the noisy latent at unit variance, decoded as if it were clean
    x0: Float[Tensor, "b 3 h w"]  # the network's estimate of the clean one


def run(settings: TrajectorySettings) -> Path:
    """Generate images, save the trajectory of the first of them, and return the folder they are in."""
    with open_samples(settings) as samples:
        samples.draw(samples.images)
        save_trajectory(samples)
        return samples.finish()


def trajectory(
    pipeline: Pipeline,
    items: int | Sequence[int],
    seed: int = 0,
    sampling: SamplingSettings | None = None,
    size: tuple[int, int] | None = None,
    strength: float = 1.0,
    start: Start = from_noise,
) -> list[TrajectoryStep]:
    """What `pipeline.sample` passes through, a step for each call of the network; arguments as there."""
    steps = list[TrajectoryStep]()

    def see(level: Level, x_t: Tensor, x0: Tensor) -> None:
        noisy = pipeline.scaling.to_z(x_t / math.hypot(level.alpha, level.sigma))
        steps.append(TrajectoryStep(level, pipeline.decode(noisy), pipeline.decode(pipeline.scaling.to_z(x0))))

    pipeline.sample(items, seed, sampling, size, strength, with_callback(see, start))
    return steps


def with_callback(see: Callable[[Level, Latents, Latents], None], start: Start = from_noise) -> Start:
    """The same start, with a denoiser that passes the level, x_t and x0_hat of each call to `see`."""

    def begin(denoise: Denoise, level: Level, noise: Latents) -> tuple[Denoise, Latents]:
        denoise, x = start(denoise, level, noise)

        def seen(x_t: Latents, level: Level) -> tuple[Latents, Latents]:
            x0, eps = denoise(x_t, level)
            see(level, x_t, x0)
            return x0, eps

        return seen, x

    return begin


def save_trajectory(samples: Samples, strength: float = 1.0, start: Start = from_noise) -> None:
    """Save how the first images come out of noise: trajectory.webp, animated, and trajectory.png, some steps of it.

    Both show x_t above the estimate of x0; trajectory.png has the noise levels as labels.
    """
    if not samples.stage.processes.is_main:
        return
    s = samples.settings
    count = min(IMAGES, s.num_images)
    steps = trajectory(samples.pipeline, count, s.seed, s.sampling, samples.size, strength, start)
    frames = [grid(torch.cat([step.x_t, step.x0]), count) for step in steps]
    save_animation(samples.path("trajectory.webp"), frames, LAST_MS)
    columns = min(STRIP, len(steps))
    some = [steps[round(i * (len(steps) - 1) / max(1, columns - 1))] for i in range(columns)]
    rows = [(f"image {i}: {what}", what, i) for i in range(count) for what in ("x_t", "x0")]
    cells = [[[grid(getattr(step, what)[i : i + 1], 1)] for step in some] for _, what, i in rows]
    levels = Heading("noise sigma of x_t; below it, the estimate of x0", [f"{step.level.sigma:.2f}" for step in some])
    labels = Heading("", [label for label, *_ in rows])
    save_png(picture := samples.path("trajectory.png"), contact_sheet("From noise to images", labels, levels, cells))
    console.print(f"look at {picture}; trajectory.webp animates all {len(steps)} steps", soft_wrap=True)
