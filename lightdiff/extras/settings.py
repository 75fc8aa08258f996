"""Settings of the commands that draw images from something else than noise, or show how. No torch here."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from lightdiff.settings import NOISY, GenerateSettings


class EditSettings(GenerateSettings):
    """Draw variations of an image, or redraw a part of it."""

    NOT_IN_IMAGES: ClassVar = GenerateSettings.NOT_IN_IMAGES | {"from_", "mask", "trajectory"}

    from_: Path | None = Field(None, description="image to start from; required")
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the noise levels that is added to the image; default: 0.6, with a mask 1",
    )
    mask: Path | None = Field(None, description="image that is white where to redraw")
    trajectory: bool = Field(False, description="show how the first images come out of noise, too")

    @model_validator(mode="after")
    def _has_an_image(self) -> "EditSettings":
        if self.from_ is None:
            raise ValueError("--from: give the image to start from: --from IMAGE")
        return self


class WalkSettings(GenerateSettings):
    """Draw a walk: the images between images of a seed, and an animation of them."""

    NO_FLAG: ClassVar = GenerateSettings.NO_FLAG | {"num_images"}  # it follows from the two below

    between: tuple[int, ...] = Field((), description="numbers of images of this seed to walk between; required")
    frames: int = Field(24, ge=2, description="images from one of these to the next")

    @model_validator(mode="after")
    def _can_walk(self) -> "WalkSettings":
        sampling = self.sampling
        if len(self.between) < 2 or min(self.between) < 0:
            raise ValueError("--between: two numbers of images or more, from 0 on")
        if sampling.eta or sampling.sampler in NOISY:
            raise ValueError(f"a walk needs a sampler without noise of its own: no --eta, not {', '.join(NOISY)}")
        if len(sampling.class_) > 1:
            raise ValueError("a walk stays within one --class: between two, every other image would be of each")
        return self


class TrajectorySettings(GenerateSettings):
    """Draw new images, and show how the first of them come out of noise."""

    num_images: int = Field(4, ge=1, description="images to draw")
