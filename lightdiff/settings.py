"""All settings but the architectures', on one page: noise schedule, sampling, data, loop, and one model a stage.

Each field is described here once; the command line's help, the settings saved with a checkpoint and the reference
page are made from it. What a field says beyond that (`json_schema_extra`) is for `options.py`, and explained there:
`needs`, `replaces`, `prefix`, `kind`, `repeated`, `panel`. Nothing here imports torch.
"""

import re
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator
from pydantic.config import JsonDict

from lightdiff.architectures import (
    AbsolutePath,
    Architecture,
    Counts,
    Layer,
    Names,
    Numbers,
    Resolution,
    Settings,
    Size,
    SizeOrZero,
    UNetArchitecture,
    UNetSettings,
    VAEArchitecture,
    VAESettings,
    Width,
    flat,
    parse_names,
    parse_numbers,
    with_changes,
)
from lightdiff.errors import UserError
from lightdiff.loops import Compile, ComputeSettings, Device, JobSettings, LoopSettings, Precision, is_due

__all__ = ["Compile", "ComputeSettings", "Device", "JobSettings", "LoopSettings", "Precision", "is_due"]
__all__ += ["Architecture", "Counts", "Layer", "Settings", "Size", "UNetArchitecture", "UNetSettings"]
__all__ += ["VAEArchitecture", "VAESettings", "Width", "flat", "parse_names", "parse_numbers", "with_changes"]

LPIPSNet = Literal["vgg", "alex", "squeeze"]
Objective = Literal["eps", "x0", "v", "flow"]
LossWeight = Literal["none", "min-snr"]
ScheduleName = Literal["auto", "linear", "scaled-linear", "cosine", "flow"]
Density = Literal["uniform", "logit-normal"]
SamplerName = Literal["ddim", "ddpm", "dpm++2m", "heun", "euler"]
NOISY: frozenset[SamplerName] = frozenset({"ddpm"})  # samplers that add noise of their own at each step
WITH_ETA: frozenset[SamplerName] = frozenset({"ddim"})  # those that add as much as --eta says
Spacing = Literal["trailing", "uniform", "karras", "quadratic"]
EPS_MIN_ALPHA_BAR = 3e-3  # below it, errors of eps_hat grow into x0 more than 18-fold
ENCODED_PIXELS = 64 * 128 * 128  # at a time
GRID = (8, 4)  # columns and rows of the grids drawn while training
LINEAR: JsonDict = {"needs": "schedule=linear|scaled-linear"}
LOGIT_NORMAL: JsonDict = {"needs": "density=logit-normal"}
MIN_SNR: JsonDict = {"needs": "loss_weight=min-snr"}
WEIGHTED = re.compile(r"(.+)=(\d+(?:\.\d+)?)")  # a source and how often it is drawn
NETWORK: JsonDict = {"prefix": True, "kind": "architecture"}
ALLOW_MISSING: Any = Field(False, description="resume although more images than --max-bad are gone")


class ScheduleSettings(Settings):
    """The noise schedule: how much signal is left at each level."""

    schedule: ScheduleName = Field("auto", description="noise schedule; auto: flow for rectified flow, else cosine")
    timesteps: int = Field(1000, ge=2, le=1_000_000, description="number of noise levels T")
    beta_start: float = Field(1e-4, gt=0, lt=1, json_schema_extra=LINEAR, description="first beta, if linear")
    beta_end: float = Field(0.02, gt=0, lt=1, json_schema_extra=LINEAR, description="last beta, if linear")
    zero_terminal_snr: bool = Field(False, description="rescale the schedule so that its last level is pure noise")

    def resolved(self, objective: Objective) -> Self:
        """The same settings with `auto` decided."""
        fitting = "flow" if objective == "flow" else "cosine"
        return with_changes(self, schedule=fitting) if self.schedule == "auto" else self


class ObjectiveSettings(Settings):
    """What the U-Net learns to predict, and how its error is weighted."""

    objective: Objective = Field("flow", description="what is predicted: noise, clean latent, v, or rectified flow")
    loss_weight: LossWeight = Field("none", description="weight of the loss at each noise level")
    min_snr_gamma: float = Field(5.0, gt=0, json_schema_extra=MIN_SNR, description="SNR at which the weight is clipped")


class LevelSettings(Settings):
    """Which noise levels the U-Net is trained at."""

    density: Density = Field("logit-normal", description="density of the training levels")
    density_mean: float = Field(0.0, json_schema_extra=LOGIT_NORMAL, description="mean logit; above 0: noisier")
    density_std: float = Field(1.0, gt=0, json_schema_extra=LOGIT_NORMAL, description="standard deviation of the logit")
    stratified: bool = Field(True, description="stratify the levels over the batch, instead of independent draws")


# --- sampling -----------------------------------------------------------------------------------------------------


EARLY = Path("early")  # of a U-Net's run: as it was after a tenth of its steps


class SamplingSettings(Settings):
    """How to sample latents: sampler, steps, classes, guidance."""

    sampler: SamplerName = Field("dpm++2m", description="sampling method")
    num_steps: int = Field(20, ge=1, description="steps, each one call of the U-Net; two with heun")
    spacing: Spacing = Field("trailing", description="which levels of noise the steps visit")
    eta: float = Field(0.0, ge=0, le=1, description="noise that ddim adds at each step: 1 is as much as ddpm")
    class_: Names = Field((), description="classes to sample, the images taking turns; empty: any")
    guidance: float = Field(
        1.0, ge=0, description="guidance to --class; without one, away from the run's early steps; 1: none"
    )
    guidance_interval: Numbers = Field(
        (0.0, 1.0), description="share of noise levels to guide at: from, to; 0 is clean"
    )
    clamp: float = Field(0.0, ge=0, description="limit on |x0| at each step, eps re-derived; 0: none")
    min_alpha_bar: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="start at the noisiest level with at least this much signal; default: 0.003 for eps, else 0",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        interval = self.guidance_interval
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError("--guidance-interval: two numbers from 0 to 1, the smaller one first")
        if interval != (0, 1) and self.guidance == 1:
            raise ValueError("--guidance-interval does nothing at --guidance 1")
        if "" in self.class_:  # no class is called that, and it does not mean any
            raise ValueError("--class: a name is empty; to sample any class, leave it out")
        if self.eta and self.sampler not in WITH_ETA:
            raise ValueError(f"--eta belongs to --sampler {' or '.join(sorted(WITH_ETA))}, not to {self.sampler}")
        return self


# --- data ---------------------------------------------------------------------------------------------------------


class ImageSettings(Settings):
    """Which images, and how each becomes a tensor of one size."""

    data: tuple[AbsolutePath, ...] = Field(
        (),
        json_schema_extra={"repeated": "FOLDER"},
        description="folder of images, .zip or .tar file of them, or a pattern: 'shards/*.tar'; can be repeated",
    )
    resolution: Resolution = Field(
        Size(64, 64), description="side of square images in pixels, or height x width: 192x256"
    )
    data_weights: Numbers = Field(
        (),
        description="how often each --data is drawn, or --data A=2 --data B=1; empty: each image as often",
    )
    background: str = Field("white", description="colour behind transparent pixels: a name or #rrggbb")
    flip: bool = Field(True, description="mirror half of the training images, and cache a second latent of each")
    random_crop: float = Field(0.9, gt=0, le=1, description="smallest random crop, as a share of the frame; 1: no crop")
    labels: AbsolutePath | None = Field(
        None, description="CSV file with a column 'file' and one column per label, or StyleGAN's dataset.json"
    )
    val_share: float = Field(0.05, ge=0, lt=1, description="share of images held out for validation")
    max_bad: float = Field(0.01, ge=0, le=1, description="share of unreadable images above which the run stops")
    max_megapixels: float = Field(256.0, gt=0, le=1e5, description="largest image to read, in millions of pixels")
    integer_white: float = Field(0.0, ge=0, le=1e9, description="value of white in 16-bit images; 0: found in a sample")
    float_white: float = Field(0.0, ge=0, le=1e9, description="value of white in float images; 0: found in a sample")

    @model_validator(mode="before")
    @classmethod
    def _weights_of_data(cls, values: Any) -> Any:
        """Take weights from what `--data` names, as in A=2, where no file is called that."""
        data = values.get("data") if isinstance(values, dict) else None
        named = [str(one) for one in data] if isinstance(data, (list, tuple)) else []
        found = [None if Path(name).exists() else WEIGHTED.fullmatch(name) for name in named]
        if not any(found):
            return values
        paths = [match[1] if match else name for name, match in zip(named, found, strict=True)]
        return {**values, "data": paths, "data_weights": [float(match[2]) if match else 1.0 for match in found]}

    def check_weights(self) -> None:
        """Check that there is a weight for each source.

        Raises:
            UserError: If not.
        """
        if self.data_weights and (len(self.data_weights) != len(self.data) or min(self.data_weights) <= 0):
            raise UserError("--data-weights: give a number above 0 for each --data")


class LatentsSettings(Settings):
    """What a U-Net must know of the latents it was trained on. Filled in from the latents, not set by the user."""

    channels: int = Field(4, ge=1, description="channels of a latent")
    height: int = Field(16, ge=1, description="height of a latent")
    width: int = Field(16, ge=1, description="width of a latent")
    shift: Numbers = Field((0.0,), description="subtracted from z, one number or one a channel")
    scale: Numbers = Field((1.0,), description="then multiplied with, one number or one a channel")
    only_mu: bool = Field(True, description="train on mu alone instead of draws of the posterior")
    labels: dict[str, tuple[str, ...]] = Field({}, description="names of the labels, each with the values it takes")

    @model_validator(mode="after")
    def _fit_channels(self) -> Self:
        if not {len(self.shift), len(self.scale)} <= {1, self.channels}:
            raise ValueError(f"shift and scale need one number, or one for each of {self.channels} channels")
        return self


# --- the VAE's loss, and stages ---------------------------------------------------------------------------------------


class VAELossSettings(Settings):
    """reconstruction + kl-beta KL + lpips-gamma LPIPS."""

    reconstruction: Literal["mse", "l1"] = Field("mse", description="error of the pixels, in [-1, 1]")
    kl_beta: float = Field(
        3e-3, ge=0, description="weight of the KL divergence, a mean over latent elements; default: by compression"
    )
    lpips_gamma: float = Field(0.1, ge=0, description="weight of LPIPS; 0 turns it off and needs no weights")
    lpips_net: LPIPSNet = Field("vgg", description="network behind LPIPS")
    lpips_weights: Path | None = Field(None, description="file with that network's ImageNet weights")
    equivariance: float = Field(0.0, ge=0, le=1, description="share of steps that scale and rotate latents and images")


AnyVAE = SerializeAsAny[VAEArchitecture]  # saved with all fields of the architecture it is of
AnyUNet = SerializeAsAny[UNetArchitecture]


class StageSettings(Settings):
    """Base of all stages."""

    NOT_SAVED: ClassVar = frozenset({"job", "restart", "from_step", "allow_missing"})  # for one start of the command
    compute_section: ClassVar[str] = "compute"  # the field that holds device and precision

    run: Path = Field(Path("runs/default"), description="run folder")
    job: JobSettings = Field(JobSettings(), title="Processes and time")

    def to_save(self) -> dict[str, Any]:
        """What is saved with a checkpoint, as JSON."""
        return self.model_dump(mode="json", exclude=set(self.NOT_SAVED))

    def resolved(self) -> Self:
        """The same settings with all that follows from others filled in."""
        return self


class TrainingSettings(StageSettings):
    """Base of the two trainings."""

    compute_section: ClassVar[str] = "loop"

    preset: str = Field("", description="the preset that these settings began with")
    restart: bool = Field(False, description="start over; the old run is renamed")
    from_step: int = Field(0, ge=0, description="go back to this step's file; newer ones are renamed; 0: the last")
    init_from: Path | None = Field(None, description="checkpoint whose weights to start from")
    loop: LoopSettings = Field(LoopSettings(), title="Training")


class TrainVAESettings(TrainingSettings):
    """Train the VAE on a folder of images."""

    NO_FLAG: ClassVar = frozenset({"preset", "model.architecture"})  # a preset or a file names it
    REQUIRED: ClassVar = frozenset({"data"})  # flags that help marks

    allow_missing: bool = ALLOW_MISSING
    freeze_encoder: bool = Field(False, description="with --init-from: train only the decoder; latents stay valid")
    images: ImageSettings = Field(ImageSettings(), title="Images")
    loss: VAELossSettings = Field(VAELossSettings(), title="Loss")
    model: AnyVAE = Field(VAESettings(), title="Architecture (VAE)", json_schema_extra=NETWORK)

    def resolved(self) -> Self:
        """The same settings with the network's empty sizes filled in; UserError if the resolution does not fit it."""
        model = self.model.resolved(min(self.images.resolution))
        self.images.resolution.divided(model.factor)
        self.images.check_weights()
        return with_changes(self, model=model)


class EncodeSettings(StageSettings):
    """Encode every image, and its mirror image, to mu and logvar."""

    NO_FLAG: ClassVar = frozenset({"compute.compile"})  # loading images takes longer

    restart: bool = Field(False, description="start over; the old run is renamed")
    allow_missing: bool = ALLOW_MISSING
    vae: Path | None = Field(None, description="VAE: a checkpoint or a run folder; default: this run's best")
    batch_size: int = Field(0, ge=0, description="images per forward pass of each process; 0: 64, fewer above 128 px")
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="dtype of the stored latents")
    logvar: bool = Field(True, description="store logvar, too; without it, half of the disk, and scale has --only-mu")
    shard_size: int = Field(2048, ge=1, description="images per shard file")
    images: ImageSettings = Field(ImageSettings(), title="Images (read from the VAE)")
    compute: ComputeSettings = Field(ComputeSettings(), title="Compute")

    def resolved(self) -> Self:
        """The same settings with a batch of as many pixels at any resolution: 64 images of 128 px, 16 of 256."""
        height, width = self.images.resolution
        fitting = max(1, min(64, ENCODED_PIXELS // (height * width)))
        return with_changes(self, batch_size=self.batch_size or fitting)


class ScaleSettings(StageSettings):
    """Compute mean, std and scaling factor of the latents."""

    NO_FLAG: ClassVar = frozenset({"job.max_time"})  # it takes seconds

    latents: Path | None = Field(None, description="latents: a folder or a run folder; default: this run's")
    only_mu: bool = Field(True, description="train the U-Net on mu, or else on samples of the posterior")
    normalize: Literal["channel", "global"] = Field("channel", description="shift and scale each channel, or scale all")
    scaling_factor: float = Field(0.0, ge=0, le=1e6, description="fixed scaling factor; 0: computed")


class TrainUNetSettings(TrainingSettings):
    """Train the diffusion U-Net on cached latents."""

    # Named by a preset or a file; read from the latents; there are no images to load
    NO_FLAG: ClassVar = frozenset({"preset", "model.architecture", "latent", "loop.workers"})
    NO_FILE: ClassVar = frozenset({"latent"})  # a saved settings.json may be of other latents

    latents: AbsolutePath | None = Field(None, description="latents: a folder or a run folder; default: this run's")
    label: str = Field("", description="label to condition on; empty: unconditional")
    label_dropout: float = Field(
        0.1, ge=0, le=1, json_schema_extra={"needs": "label"}, description="label dropout probability"
    )
    loop: LoopSettings = Field(LoopSettings(steps=50_000, batch_size=32), title="Training")
    target: ObjectiveSettings = Field(ObjectiveSettings(), title="Objective")
    levels: LevelSettings = Field(LevelSettings(), title="Objective")
    noise: ScheduleSettings = Field(ScheduleSettings(), title="Noise schedule")
    model: AnyUNet = Field(UNetSettings(), title="Architecture (U-Net)", json_schema_extra=NETWORK)
    latent: LatentsSettings = Field(LatentsSettings(), title="Latents (read from the latents)")

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        objective, schedule = self.target.objective, self.noise.resolved(self.target.objective).schedule
        if (objective == "flow") != (schedule == "flow") and objective != "x0":
            pairs = "rectified flow and its schedule belong together, eps and v to the others, only x0 goes with all"
            raise ValueError(f"--objective {objective} does not go with --schedule {schedule}: {pairs}")
        if self.noise.zero_terminal_snr and schedule == "flow":
            raise ValueError("--zero-terminal-snr: the flow schedule ends with pure noise anyway")
        if self.noise.zero_terminal_snr and objective == "eps":
            raise ValueError("--zero-terminal-snr needs --objective v or x0: predicting pure noise teaches nothing")
        if self.label and self.label not in self.latent.labels:
            raise ValueError(f"--label {self.label}: the latents have {', '.join(self.latent.labels) or 'no labels'}")
        return self

    @property
    def classes(self) -> tuple[str, ...]:
        """The values that the label takes, in the order that the U-Net counts them."""
        return self.latent.labels[self.label] if self.label else ()

    def resolved(self) -> Self:
        """The same settings with the network's empty sizes and the schedule filled in; UserError if they do not fit."""
        if self.label and self.label_dropout == 1:
            raise UserError("--label-dropout 1 hides every label from the network: try 0.1, or leave --label out")
        height, width = self.latent.height, self.latent.width
        model = self.model.resolved(min(height, width))
        if height % model.factor or width % model.factor:
            levels = f"{model.factor.bit_length() - 1} levels need latents divisible by {model.factor}"
            raise UserError(f"--model.channels: {levels}, but these are {height} x {width}; give fewer widths")
        return with_changes(self, model=model, noise=self.noise.resolved(self.target.objective))


class GenerateSettings(StageSettings):
    """Generate new images."""

    NO_FLAG: ClassVar = frozenset({"compute.workers"})  # there are no images to load
    # An image says all else of itself
    NOT_IN_IMAGES: ClassVar = frozenset("run job unet vae guide_with out name num_images batch_size compute".split())

    unet: Path | None = Field(None, description="U-Net: a checkpoint or a run folder; default: this run's last")
    vae: Path | None = Field(None, description="VAE: a checkpoint or a run folder; default: the one behind the latents")
    guide_with: Path | None = Field(
        None, description="worse U-Net, for --guidance: early or step-N beside the other, a checkpoint, or a run"
    )
    num_images: int = Field(16, ge=1, description="number of images")
    seed: int = Field(0, ge=0, description="seed; image i of a seed is the same whatever the batch")
    batch_size: int = Field(32, ge=1, description="images generated at a time by each process")
    out: Path | None = Field(None, description="folder for the images; default: a new one below samples/")
    name: str = Field("", pattern=r"^[^/\\]*$", description="prefix of the file names: NAME-00000.png")
    resolution: SizeOrZero = Field(
        Size(0, 0), description="side of square images in pixels, or height x width; 0: the size trained on"
    )
    ema: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="decay of the EMA weights to use; 0: the raw ones; default: the first trained with",
    )
    sampling: SamplingSettings = Field(SamplingSettings(), title="Sampling")
    compute: ComputeSettings = Field(ComputeSettings(), title="Compute")

    @property
    def guide(self) -> Path | None:
        """The worse U-Net that guidance leads away from; guidance to a class needs none."""
        return self.guide_with or (EARLY if self.sampling.guidance != 1 and not self.sampling.class_ else None)
