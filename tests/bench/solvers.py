"""How far samplers are from the exact solution of one trained network, by calls of it.

`python -m tests.bench.solvers RUN [--vae FILE] [--class NAME,...] [--guidance W] [--num-images N]` draws the same
images with each sampler and number of calls, and once with Heun's method in 200 steps, which stands for the exact
solution of the probability flow. The error is the root of the mean squared difference of x0, whose standard deviation
is about 1. `ddpm` draws noise of its own and has no solution to be near to; `euler` is `ddim`.
"""

import argparse
from pathlib import Path

from torch import Tensor

from lightdiff.data.latents import Scaling
from lightdiff.pipeline import Pipeline
from lightdiff.settings import SamplerName, SamplingSettings
from tests.bench.recipe_page import CALLS, by_calls, steps_for

EXACT = 200  # steps of Heun's method
SOLVERS: tuple[SamplerName, ...] = ("ddim", "dpm++2m", "heun")


def errors(
    pipeline: Pipeline, num_images: int, classes: tuple[str, ...] = (), guidance: float = 1.0, exact: int = EXACT
) -> dict[str, list[float]]:
    """The error of each sampler for each number of CALLS."""

    def draw(sampler: SamplerName, steps: int) -> Tensor:
        how = SamplingSettings(num_steps=steps, sampler=sampler, class_=classes, guidance=guidance)
        return Scaling.of(pipeline.settings.latent).to_x0(pipeline.sample(num_images, 0, how))

    solution = draw("heun", exact)

    def error(sampler: SamplerName, calls: int) -> float:
        return float((draw(sampler, steps_for(sampler, calls)) - solution).square().mean().sqrt())

    return {sampler: [error(sampler, calls) for calls in CALLS] for sampler in SOLVERS}


def main() -> None:
    """Print the table of one run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="of the U-Net")
    parser.add_argument("--vae", type=Path, help="if it is in another folder")
    parser.add_argument("--class", dest="classes", default="", help="classes to draw, in turns")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--num-images", type=int, default=16)
    chosen = parser.parse_args()
    classes = tuple(chosen.classes.split(",")) if chosen.classes else ()
    print(by_calls(errors(Pipeline.load(chosen.run, vae=chosen.vae), chosen.num_images, classes, chosen.guidance)))


if __name__ == "__main__":
    main()
