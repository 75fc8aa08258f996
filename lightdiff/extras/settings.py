"""Settings of the extras' commands. Nothing here imports torch, so that `--help` does not either."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from lightdiff.settings import (
    NOISY,
    ComputeSettings,
    Device,
    GenerateSettings,
    LPIPSNet,
    Settings,
    StageSettings,
    parse_numbers,
)

Integers = Annotated[tuple[int, ...], BeforeValidator(parse_numbers)]


class DemoSettings(Settings):
    """Draw a data set of faces, then run all five stages on it: some four minutes on two cores."""

    run: Path = Field(Path("runs/demo"), description="run folder")
    resolution: int = Field(32, ge=16, le=256, multiple_of=8, description="side of the images, in pixels")
    count: int = Field(4000, ge=16, description="faces to draw")
    vae_steps: int = Field(450, ge=1, description="optimizer steps of the VAE")
    unet_steps: int = Field(750, ge=1, description="optimizer steps of the U-Net")
    seed: int = Field(0, ge=0, description="seed of the drawing, the training and the samples")
    device: Device = Field("auto", description="where to compute; auto: the first available of cuda, mps, cpu")


class EvaluateSettings(StageSettings):
    """Measure reconstructions and samples: PSNR, SSIM, LPIPS, FID, KID, precision, recall, copies."""

    NO_FLAG: ClassVar = frozenset({"compute.compile", "job.max_time"})

    of: Literal["all", "vae", "unet"] = Field("all", description="what to measure")
    unet: Path | None = Field(None, description="U-Net: a checkpoint or a run folder; default: this run's last")
    vae: Path | None = Field(None, description="VAE: a checkpoint or a run folder; default: the one behind the latents")
    samples: Path | None = Field(None, description="folder of samples; default: generated with the defaults")
    data: tuple[Path, ...] = Field(
        (), json_schema_extra={"repeated": "FOLDER"}, description="folder of images; default: the VAE's training images"
    )
    num_images: int = Field(2000, ge=2, description="number of samples")
    ema: float | None = Field(
        None, ge=0, lt=1, description="decay of the EMA weights to draw samples with, as generate"
    )
    compare_ema: bool = Field(False, description="measure every EMA and the raw weights, and say which is best")
    guide_with: Path | None = Field(None, description="worse U-Net that --guidance leads away from, as generate")
    guidance: float = Field(1.0, ge=0, description="guidance away from it, or from the run's early steps; 1 is none")
    num_reference: int = Field(10_000, ge=0, description="training images to compare with; 0: all")
    weights: Path | None = Field(None, description="copy of Inception's published weights; default: fetched once")
    features: Path | None = Field(
        None,
        json_schema_extra={"replaces": "weights"},
        description="other weights of Inception; the numbers are then named after them",
    )
    lpips_net: LPIPSNet | None = Field(None, description="network behind LPIPS; default: the one the VAE trained with")
    lpips_weights: Path | None = Field(None, description="file with that network's ImageNet weights")
    batch_size: int = Field(50, ge=1, description="images per forward pass")
    compute: ComputeSettings = Field(ComputeSettings(), title="Compute")

    @model_validator(mode="after")
    def _draws_as_asked(self) -> Self:
        drawing = {"ema": self.ema is not None, "guide-with": self.guide_with, "guidance": self.guidance != 1}
        for name, given in drawing.items():
            if given and self.samples:
                raise ValueError(f"--{name} is for samples to be drawn, not for those of --samples")
        if self.compare_ema and (self.samples or self.ema is not None):
            raise ValueError("--compare-ema draws with each: leave out --ema and --samples")
        return self


class SweepSettings(StageSettings):
    """Vary one or two settings of a run, and show side by side what they do."""

    NO_FLAG: ClassVar = frozenset({"job.nproc_per_node", "job.max_restarts", "job.timeout"})
    REQUIRED: ClassVar = frozenset({"vary"})
    SHORT: ClassVar = True  # a dry run prints no defaults

    run: Path = Field(Path("runs/default"), description="run folder whose settings are used, except what is varied")
    vary: tuple[str, ...] = Field(
        (),
        validate_default=True,
        json_schema_extra={"repeated": "NAME=..."},
        description="a flag of any stage and its values: kl-beta=1e-4,1e-2; once, or twice for rows and columns",
    )
    set_: tuple[str, ...] = Field(
        (),
        json_schema_extra={"repeated": "NAME=..."},
        description="a flag of any stage and one value for all cells: eta=1",
    )
    vae_steps: int = Field(0, ge=0, description="optimizer steps of each VAE; 0: as many as the run's")
    unet_steps: int = Field(0, ge=0, description="optimizer steps of each U-Net; 0: as many as the run's")
    until: Literal["vae", "images"] = Field("images", description="end with reconstructions, or with samples too")
    num_images: int = Field(8, ge=1, le=64, description="images per cell")

    @field_validator("vary")
    @classmethod
    def _one_or_two(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) not in (1, 2):
            raise ValueError("one setting or two can be varied, each as in --vary kl-beta=1e-4,1e-2")
        return value


class EditSettings(GenerateSettings):
    """Generate variations of an image, or inpaint a part of it."""

    NOT_IN_IMAGES: ClassVar = GenerateSettings.NOT_IN_IMAGES | {"from_", "mask", "trajectory"}
    REQUIRED: ClassVar = frozenset({"from"})

    from_: Path | None = Field(None, description="image to start from")
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the noise levels that is added to the image; default: 0.6, with a mask 1",
    )
    mask: Path | None = Field(None, description="image that is white where to inpaint")
    trajectory: bool = Field(False, description="show how the first images come out of noise, too")

    @model_validator(mode="after")
    def _has_an_image(self) -> "EditSettings":
        if self.from_ is None:
            raise ValueError("--from: give the image to start from: --from IMAGE")
        return self


class WalkSettings(GenerateSettings):
    """Interpolate between images of a seed: generate the images between them, and an animation."""

    NO_FLAG: ClassVar = GenerateSettings.NO_FLAG | {"num_images"}  # it follows from the two below
    REQUIRED: ClassVar = frozenset({"between"})

    between: Integers = Field((), description="numbers of images of this seed to walk between")
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
    """Generate images, and show how the first of them come out of noise."""

    num_images: int = Field(4, ge=1, description="number of images")
