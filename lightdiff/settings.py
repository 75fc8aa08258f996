"""Every knob, on one page: architecture, noise schedule, loop, and one model a stage that contains them.

Each field is described here once; the command line's help, the settings saved with a checkpoint and the reference
page are made from it. What a field says of itself beyond that (`json_schema_extra`) is for `options.py`:
`needs` and `replaces` name fields beside it, `prefix` puts the group's name into its flags, `repeated` makes a list a
flag that is given several times, `panel` is the panel of the help that it stands in. Nothing here imports torch.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from lightdiff.errors import UserError, not_divisible

AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["auto", "on", "off"]
LPIPSNet = Literal["vgg", "alex", "squeeze"]
LatentDtype = Literal["float16", "bfloat16", "float32"]
Objective = Literal["eps", "x0", "v", "flow"]
LossWeight = Literal["none", "min-snr"]
ScheduleName = Literal["auto", "linear", "scaled-linear", "cosine", "flow"]
Normalize = Literal["channel", "global"]
Optimizer = Literal["muon", "adamw"]
SamplerName = Literal["ddim", "ddpm", "dpm++2m", "heun", "euler"]
NOISY: frozenset[SamplerName] = frozenset({"ddpm"})  # samplers that add noise of their own at each step
WITH_ETA: frozenset[SamplerName] = frozenset({"ddim"})  # those that add as much as --eta says
Spacing = Literal["trailing", "uniform", "karras", "quadratic"]
EPS_MIN_ALPHA_BAR = 3e-3  # below it, errors of eps_hat grow into x0 more than 18-fold
GRID = (8, 4)  # columns and rows of the grids drawn while training
LINEAR: JsonDict = {"needs": "schedule=linear|scaled-linear"}
LOGIT_NORMAL: JsonDict = {"needs": "density=logit-normal"}
MIN_SNR: JsonDict = {"needs": "loss_weight=min-snr"}
MEMORY: JsonDict = {"panel": "Memory"}
REPEATED: JsonDict = {"repeated": "FOLDER"}
ARCHITECTURE: JsonDict = {"prefix": True, "kind": "architecture"}
S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown fields; a list may be given as one text, as a flag is: `64,128`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _split_lists(cls, said: Any) -> Any:
        if not isinstance(said, dict):
            return said
        return {name: parse_list(cls.model_fields.get(name), value) for name, value in said.items()}


def parse_list(field: FieldInfo | None, value: Any) -> Any:
    """A field's value, where a list is typed as one text, `64,128`, as its items; all others as they are.

    An item that has a comma itself is quoted, as in CSV. `none` is an empty list of numbers; a name may be called that.
    """
    kinds = (field.annotation, *get_args(field.annotation)) if field and isinstance(value, str) else ()
    kind = next((kind for kind in kinds if get_origin(kind) is tuple), None)
    if kind is None or (field and isinstance(field.json_schema_extra, dict) and "repeated" in field.json_schema_extra):
        return value
    if value.strip() in (("",) if str in get_args(kind) else ("", "none")):
        return []
    return [item.strip() for item in next(csv.reader([value], skipinitialspace=True))]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"loop.lr": 0.1, ...}."""
    rows: dict[str, Any] = {}
    for name, value in settings.items():
        rows |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return rows


def with_changes(settings: S, **changes: Any) -> S:
    """The same settings with some top-level fields replaced, validated again."""
    return type(settings).model_validate({**settings.model_dump(), **changes})


# --- networks -----------------------------------------------------------------------------------------------------


def stem_and_level(channels: tuple[int, ...]) -> tuple[int, ...]:
    """Refuse a single width."""
    if len(channels) == 1:
        raise ValueError("needs a stem and at least one level: two numbers or more")
    return channels


Width = Annotated[int, Field(ge=1, le=1 << 14)]  # bounds that no real network comes near: a file cannot ask for more
Widths = Annotated[tuple[Width, ...], Field(max_length=10), AfterValidator(stem_and_level)]
Counts = Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=10)]


class Architecture(Settings):
    """Base of a network's settings. Which architecture they are of stands in them, and so in every checkpoint.

    The two bases below have a table of architectures; validated as one of them, settings become what the table names.
    """

    ARCHITECTURES: ClassVar[Mapping[str, str]]  # name -> "module:settings class", imported when it is asked for
    NETWORK: ClassVar[str]  # "module:network class"

    architecture: str = "default"

    @model_validator(mode="wrap")
    @classmethod
    def _dispatch(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if "ARCHITECTURES" not in vars(cls) or not isinstance(value, Mapping):
            return handler(value)
        name = value.get("architecture", "default")
        if name not in list(cls.ARCHITECTURES):
            raise ValueError(f"architecture: there is no {name}; there are {', '.join(cls.ARCHITECTURES)}")
        settings: Self = resolve_name(cls.ARCHITECTURES[name]).model_validate(value)
        return settings


class VAEArchitecture(Architecture):
    """What all VAEs' settings have."""

    ARCHITECTURES: ClassVar = {
        "default": "lightdiff.settings:VAESettings",
        "original": "lightdiff.models.original:OriginalVAESettings",
    }

    latent_channels: Width = Field(4, description="channels of a latent")

    def resolved(self, resolution: int) -> Self:
        """The same settings with all that follows from the images' size (px) filled in."""
        return self

    @property
    def factor(self) -> int:
        """How many times smaller than the image a latent is, along each side."""
        raise NotImplementedError


class UNetArchitecture(Architecture):
    """What all U-Nets' settings have."""

    ARCHITECTURES: ClassVar = {
        "default": "lightdiff.settings:UNetSettings",
        "original": "lightdiff.models.original:OriginalUNetSettings",
    }

    def resolved(self, latent_size: int) -> Self:
        """The same settings with all that follows from the latents' size filled in."""
        return self

    @property
    def factor(self) -> int:
        """What a latent's sides must be divisible by."""
        return 1


def widths(width: int, multipliers: Sequence[int], levels: int) -> tuple[int, ...]:
    """Stem and level widths: width times each multiplier, the last one repeated, `levels` + 1 of them."""
    return tuple(width * multipliers[min(i, len(multipliers) - 1)] for i in range(levels + 1))


class VAESettings(VAEArchitecture):
    """Architecture of the VAE. Level i works at 1/2^i of the image's size and ends with a halving."""

    NETWORK: ClassVar = "lightdiff.models.vae:VAE"

    architecture: Literal["default"] = Field("default", description="architecture that these settings are of")
    encoder_channels: Widths = Field(
        (), description="encoder widths: stem, then each level; empty: encoder-width x 1, 1, 2, 4, as the size asks"
    )
    decoder_channels: Widths = Field(
        (), description="decoder widths from the latent outwards; empty: decoder-width x 4, 2, 1, as the size asks"
    )
    encoder_width: Width = Field(32, description="width that encoder-channels is made from when empty")
    decoder_width: Width = Field(32, description="width that decoder-channels is made from when empty")
    encoder_blocks: Counts = Field((1,), description="blocks a level; a short list repeats its last number")
    decoder_blocks: Counts = Field((2,), description="blocks a level; a short list repeats its last number")
    mid_blocks: int = Field(
        1, ge=0, le=64, description="residual blocks at the latent's size, in encoder and decoder each"
    )
    attention: bool = Field(False, description="self-attention at the latent's size, in encoder and decoder")
    norm: Literal["pixel", "group"] = Field(
        "pixel", description="LayerNorm of each pixel's channels, or GroupNorm, which can leave droplets in images"
    )
    output: Literal["tanh", "sigmoid", "none"] = Field("tanh", description="output activation")
    logvar_min: float = Field(-30.0, description="soft lower bound of the posterior's log variance")
    logvar_max: float = Field(20.0, description="soft upper bound of the posterior's log variance")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        encoder, decoder = len(self.encoder_channels), len(self.decoder_channels)
        if encoder and decoder and encoder != decoder:
            raise ValueError(f"{encoder} encoder_channels but {decoder} decoder_channels; both need the same count")
        if self.logvar_min >= self.logvar_max:
            raise ValueError(f"logvar_min {self.logvar_min} is not below logvar_max {self.logvar_max}")
        return self

    def resolved(self, resolution: int) -> Self:
        """The same settings with empty widths filled in for images of this size (px)."""
        given = len(self.encoder_channels or self.decoder_channels)
        levels = given - 1 if given else 1 if resolution < 32 else 2 if resolution < 192 else 3
        encoder = self.encoder_channels or widths(self.encoder_width, (1, 1, 2, 4), levels)
        decoder = self.decoder_channels or widths(self.decoder_width, (1, 2, 4), levels)[::-1]
        return with_changes(self, encoder_channels=encoder, decoder_channels=decoder)

    @property
    def factor(self) -> int:
        """How many times smaller than the image a latent is, along each side."""
        return int(2 ** (len(self.encoder_channels) - 1))


class UNetSettings(UNetArchitecture):
    """Architecture of the U-Net. Level i works at 1/2^i of the latent's size and ends with a halving."""

    NETWORK: ClassVar = "lightdiff.models.unet:UNet"

    architecture: Literal["default"] = Field("default", description="architecture that these settings are of")
    channels: Widths = Field(
        (), description="widths: stem, then each level; empty: width x 1, 1, 2, 3, 4, as the latent's size asks"
    )
    width: Width = Field(64, description="width that channels is made from when empty")
    blocks: int = Field(2, ge=1, le=64, description="residual blocks a level, going down and going up")
    attend_levels: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="levels with self-attention, 0 the finest; not given: those of 4 to 8 pixels; none: no level"
    )
    mid_attention: bool = Field(True, description="self-attention in the middle")
    heads: int = Field(4, ge=1, description="heads of each self-attention")
    time_dim: int = Field(256, ge=4, le=1 << 14, multiple_of=2, description="width of the time embedding")
    zero_init: bool = Field(True, description="residual branches and output start at zero")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if not self.channels:
            return self
        attended = self.attend_levels or ()
        if (last := max(attended, default=0)) > len(self.channels) - 2:
            raise ValueError(f"attend_levels: there is no level {last}; levels count from 0")
        with_heads = [self.channels[i + 1] for i in attended] + [self.channels[-1]] * self.mid_attention
        if odd := [width for width in with_heads if width % self.heads]:
            raise ValueError(f"heads: {self.heads} does not divide the width {odd[0]} of a level with attention")
        return self

    def resolved(self, latent_size: int) -> Self:
        """The same settings with empty widths and attention levels filled in for latents of this size."""
        halvings = (n for n in (3, 2, 1) if (latent_size % 2**n == 0 and latent_size >= 4 * 2**n) or n == 1)
        channels = self.channels or widths(self.width, (1, 1, 2, 3, 4), next(halvings))
        small = tuple(i for i in range(len(channels) - 1) if 4 <= latent_size // 2**i <= 8)
        attended = small if self.attend_levels is None else self.attend_levels
        return with_changes(self, channels=channels, attend_levels=attended)


class ScheduleSettings(Settings):
    """The noise schedule: how much signal is left at each level."""

    schedule: ScheduleName = Field("auto", description="noise schedule; auto: flow for rectified flow, else cosine")
    timesteps: int = Field(1000, ge=2, le=1_000_000, description="number of noise levels T")
    beta_start: float = Field(1e-4, gt=0, lt=1, json_schema_extra=LINEAR, description="first beta, if linear")
    beta_end: float = Field(0.02, gt=0, lt=1, json_schema_extra=LINEAR, description="last beta, if linear")
    zero_terminal_snr: bool = Field(False, description="rescale the schedule so that its last level is pure noise")

    def resolved(self, objective: Objective) -> "ScheduleSettings":
        """The same settings with `auto` decided."""
        if self.schedule != "auto":
            return self
        return with_changes(self, schedule="flow" if objective == "flow" else "cosine")


class ObjectiveSettings(Settings):
    """What the U-Net learns to predict, and how its error is weighted."""

    objective: Objective = Field("flow", description="what is predicted: noise, clean latent, v, or rectified flow")
    loss_weight: LossWeight = Field("none", description="weight of the loss at each noise level")
    min_snr_gamma: float = Field(5.0, gt=0, json_schema_extra=MIN_SNR, description="SNR at which the weight is clipped")


class LevelSettings(Settings):
    """Which noise levels the U-Net is trained at."""

    density: Literal["uniform", "logit-normal"] = Field("logit-normal", description="density of the training levels")
    density_mean: float = Field(0.0, json_schema_extra=LOGIT_NORMAL, description="mean logit; above 0: noisier")
    density_std: float = Field(1.0, gt=0, json_schema_extra=LOGIT_NORMAL, description="standard deviation of the logit")
    stratified: bool = Field(True, description="stratify the levels over the batch, instead of independent draws")


# --- sampling -----------------------------------------------------------------------------------------------------


class SamplingSettings(Settings):
    """How to get from noise to a latent: sampler, steps, classes, guidance."""

    sampler: SamplerName = Field("dpm++2m", description="how to get from noise to a picture")
    num_steps: int = Field(20, ge=1, description="steps, each one call of the U-Net; two with heun")
    spacing: Spacing = Field("trailing", description="which levels of noise the steps visit")
    eta: float = Field(0.0, ge=0, le=1, description="noise that ddim adds at each step: 1 is as much as ddpm")
    class_: tuple[str, ...] = Field((), description="classes to draw, the images taking turns; empty: any")
    guidance: float = Field(
        1.0, ge=0, description="classifier-free guidance: 1 is the class as learned, more makes it more typical"
    )
    guidance_interval: tuple[float, ...] = Field(
        (0.0, 1.0),
        json_schema_extra={"needs": "class_"},
        description="share of noise levels that guidance is used at: from, to; 0 is clean",
    )
    clamp: float = Field(0.0, ge=0, description="limit on |x0| at each step, eps re-derived; 0: none")
    min_alpha_bar: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="start at the noisiest level with at least this much signal; default: 0.003 for eps, else 0",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "SamplingSettings":
        interval = self.guidance_interval
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError("--guidance-interval: two numbers from 0 to 1, the smaller one first")
        if self.eta and self.sampler not in WITH_ETA:
            raise ValueError(f"--eta belongs to --sampler {' or '.join(sorted(WITH_ETA))}, not to {self.sampler}")
        return self


# --- data ---------------------------------------------------------------------------------------------------------


class ImageSettings(Settings):
    """Which images, and how each becomes a square tensor."""

    data: tuple[AbsolutePath, ...] = Field(
        (), json_schema_extra=REPEATED, description="folder of images; can be repeated"
    )
    resolution: int = Field(64, ge=8, description="side of the square images, in pixels")
    background: str = Field("white", description="colour behind transparent pixels: a name or #rrggbb")
    flip: bool = Field(True, description="mirror half of the training images, and cache a second latent of each")
    random_crop: float = Field(0.9, gt=0, le=1, description="smallest random crop, as a share of the frame; 1: no crop")
    labels: AbsolutePath | None = Field(None, description="CSV file with a column 'file' and one column per label")
    val_share: float = Field(0.05, ge=0, lt=1, description="share of images held out for validation")
    max_bad: float = Field(0.01, ge=0, le=1, description="share of unreadable images above which the run stops")


class LatentsSettings(Settings):
    """What a U-Net must know of the latents it was trained on. Filled in from the latents; nothing to type."""

    channels: int = Field(4, ge=1, description="channels of a latent")
    height: int = Field(16, ge=1, description="height of a latent")
    width: int = Field(16, ge=1, description="width of a latent")
    shift: tuple[float, ...] = Field((0.0,), description="subtracted from z, one number or one a channel")
    scale: tuple[float, ...] = Field((1.0,), description="then multiplied with, one number or one a channel")
    only_mu: bool = Field(True, description="train on mu alone instead of draws of the posterior")
    labels: dict[str, tuple[str, ...]] = Field({}, description="names of the labels, each with the values it takes")


# --- loops --------------------------------------------------------------------------------------------------------


class ComputeSettings(Settings):
    """Where and how to compute."""

    device: Device = Field("auto", description="where to compute; auto: the first available of cuda, mps, cpu")
    precision: Precision = Field("auto", description="fp32, or bf16 autocast; auto: bf16 where it is faster")
    workers: int = Field(-1, ge=-1, description="worker processes that load images; -1: as the cores allow")
    compile: Compile = Field("auto", description="torch.compile the network; auto: on a GPU, for long enough runs")


class LoopSettings(ComputeSettings):
    """The training loop. Every interval counts optimizer steps."""

    steps: int = Field(20_000, ge=1, description="optimizer steps")
    epochs: float = Field(
        0.0, ge=0, json_schema_extra={"replaces": "steps"}, description="passes over the images; 0: off"
    )
    batch_size: int = Field(16, ge=1, description="images per optimizer step")
    micro_batch: int = Field(0, ge=0, json_schema_extra=MEMORY, description="images per forward pass; 0: batch-size")
    checkpoint_activations: bool = Field(
        False, json_schema_extra=MEMORY, description="recompute activations: a third slower"
    )
    optimizer: Optimizer = Field("muon", description="muon, with AdamW for what is no matrix or kernel; or AdamW alone")
    lr: float = Field(2e-3, gt=0, description="peak learning rate")
    lr_schedule: Literal["constant", "cosine"] = Field("cosine", description="learning rate after the warm-up")
    warmup_steps: int = Field(100, ge=0, description="optimizer steps of linear warm-up")
    weight_decay: float = Field(0.01, ge=0, description="weight decay, decoupled: times lr at each step")
    beta2: float = Field(0.99, gt=0, lt=1, description="AdamW's beta2")
    clip: float = Field(1.0, ge=0, description="gradient norm to clip at; 0 turns clipping off")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="decay of the EMA weights, warmed up; 0 turns them off")
    val_every: int = Field(1000, ge=0, description="optimizer steps between validations; 0: only at the end")
    save_every: int = Field(1000, ge=1, description="optimizer steps between checkpoints")
    keep: int = Field(2, ge=1, description="newest step files to keep")
    keep_every: int = Field(0, ge=0, description="keep the step files of every this many steps for good; 0: none")
    skip_nonfinite: int = Field(0, ge=0, description="steps with a non-finite loss or gradient to skip before stopping")
    log_every: int = Field(20, ge=1, description="optimizer steps between lines of metrics.jsonl")
    seed: int = Field(0, ge=0, description="seed of all random numbers")

    @property
    def micro(self) -> int:
        """Images per forward pass, with 0 resolved."""
        return min(self.micro_batch or self.batch_size, self.batch_size)

    def total_steps(self, train_items: int) -> int:
        """Optimizer steps of the whole run."""
        return max(1, round(self.epochs * train_items / self.batch_size)) if self.epochs else self.steps


class JobSettings(Settings):
    """How many processes, and for how long. Not saved: may differ at each start."""

    nproc_per_node: int = Field(1, ge=1, description="processes to start on this machine, usually one per GPU")
    max_restarts: int = Field(0, ge=0, description="restarts of all processes after one of them dies")
    timeout: float = Field(600.0, gt=0, description="seconds to wait for a process that does not answer")
    max_time: float = Field(0.0, ge=0, description="minutes after which to save and exit with code 75; 0: no limit")
    quiet: bool = Field(False, description="print only results and errors")
    force_unlock: bool = Field(False, description="take over a run folder that another host has locked")


class VAELossSettings(Settings):
    """reconstruction + kl-beta KL + lpips-gamma LPIPS."""

    reconstruction: Literal["mse", "l1"] = Field("mse", description="error of the pixels, in [-1, 1]")
    kl_beta: float = Field(3e-3, ge=0, description="weight of the KL divergence, a mean over latent elements")
    lpips_gamma: float = Field(0.1, ge=0, description="weight of LPIPS; 0 turns it off and needs no weights")
    lpips_net: LPIPSNet = Field("vgg", description="network behind LPIPS")
    lpips_weights: Path | None = Field(None, description="file with that network's ImageNet weights")
    equivariance: float = Field(
        0.0, ge=0, le=1, description="share of steps with scaled and rotated latents and images"
    )


# --- stages -------------------------------------------------------------------------------------------------------


class StageSettings(Settings):
    """Base of all stages."""

    NOT_SAVED: ClassVar = frozenset({"job", "restart", "from_step"})  # for one start of the command
    compute_section: ClassVar[str] = "compute"  # the field that holds device and precision

    def to_save(self) -> dict[str, Any]:
        """What is saved with a checkpoint, as JSON."""
        return self.model_dump(mode="json", exclude=set(self.NOT_SAVED))

    def resolved(self) -> Self:
        """The same settings with all that follows from others filled in."""
        return self

    @property
    def images_at_once(self) -> tuple[str, int]:
        """The flag that says how many images memory must hold at a time, and its value."""
        return "--batch-size", getattr(self, "batch_size", 1)

    run: Path = Field(Path("runs/default"), description="run folder")
    job: JobSettings = Field(JobSettings(), title="Processes and time")


class TrainingSettings(StageSettings):
    """Base of the two trainings."""

    compute_section: ClassVar[str] = "loop"

    restart: bool = Field(False, description="start over; the old run is renamed")
    from_step: int = Field(0, ge=0, description="go back to this step's file; newer ones are renamed; 0: the last")
    init_from: Path | None = Field(None, description="checkpoint whose weights to start from")
    loop: LoopSettings = Field(LoopSettings(), title="Training")

    @property
    def images_at_once(self) -> tuple[str, int]:
        """The flag that says how many images memory must hold at a time, and its value."""
        return "--micro-batch", self.loop.micro


class TrainVAESettings(TrainingSettings):
    """Train the VAE on a folder of images."""

    NO_FLAG: ClassVar = frozenset({"model.architecture"})  # a preset or a file names it

    freeze_encoder: bool = Field(False, description="with --init-from: train only the decoder; latents stay valid")
    images: ImageSettings = Field(ImageSettings(), title="Images")
    loss: VAELossSettings = Field(VAELossSettings(), title="Loss")
    model: SerializeAsAny[VAEArchitecture] = Field(
        VAESettings(), title="Architecture (VAE)", json_schema_extra=ARCHITECTURE
    )

    def resolved(self) -> Self:
        """The same settings with the network's empty sizes filled in.

        Raises:
            UserError: If the resolution does not fit the architecture.
        """
        resolution, model = self.images.resolution, self.model.resolved(self.images.resolution)
        if resolution % model.factor:
            raise not_divisible(resolution, model.factor)
        return with_changes(self, model=model)


class EncodeSettings(StageSettings):
    """Encode every image, and its mirror image, to mu and logvar."""

    NO_FLAG: ClassVar = frozenset({"compute.compile"})  # loading images takes longer

    restart: bool = Field(False, description="start over; the old run is renamed")
    vae: Path | None = Field(None, description="VAE: a checkpoint or a run folder; default: this run's best")
    batch_size: int = Field(64, ge=1, description="images per forward pass")
    dtype: LatentDtype = Field("float16", description="dtype of the stored latents")
    shard_size: int = Field(2048, ge=1, description="images per shard file")
    images: ImageSettings = Field(ImageSettings(), title="Images (read from the VAE)")
    compute: ComputeSettings = Field(ComputeSettings(), title="Compute")


class ScaleSettings(StageSettings):
    """Compute mean, std and scaling factor of the latents."""

    NO_FLAG: ClassVar = frozenset({"job.max_time"})  # it takes seconds

    latents: Path | None = Field(None, description="latents: a folder or a run folder; default: this run's")
    only_mu: bool = Field(True, description="train the U-Net on mu, or else on samples of the posterior")
    normalize: Normalize = Field(
        "channel", description="one shift and scale per channel, or one scaling factor for all"
    )
    scaling_factor: float = Field(0.0, ge=0, description="fixed scaling factor; 0: computed")


class TrainUNetSettings(TrainingSettings):
    """Train the diffusion U-Net on cached latents."""

    # Named by a preset or a file; read from the latents; there are no images to load
    NO_FLAG: ClassVar = frozenset({"model.architecture", "latent", "loop.workers"})
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
    model: SerializeAsAny[UNetArchitecture] = Field(
        UNetSettings(), title="Architecture (U-Net)", json_schema_extra=ARCHITECTURE
    )
    latent: LatentsSettings = Field(LatentsSettings(), title="Latents (read from the latents)")

    @model_validator(mode="after")
    def _fit_together(self) -> "TrainUNetSettings":
        objective, noise = self.target.objective, self.noise.resolved(self.target.objective)
        if (objective == "flow") != (noise.schedule == "flow") and objective != "x0":
            raise ValueError(
                f"--objective {objective} does not go with --schedule {noise.schedule}: rectified flow and its "
                "schedule belong together, eps and v to the others, and only x0 goes with all"
            )
        if noise.zero_terminal_snr and noise.schedule == "flow":
            raise ValueError("--zero-terminal-snr: the flow schedule ends with pure noise anyway")
        if noise.zero_terminal_snr and objective == "eps":
            raise ValueError("--zero-terminal-snr needs --objective v or x0: predicting pure noise teaches nothing")
        if self.label and self.label not in self.latent.labels:
            raise ValueError(f"--label {self.label}: the latents have {', '.join(self.latent.labels) or 'no labels'}")
        return self

    @property
    def classes(self) -> tuple[str, ...]:
        """The values that the label takes, in the order that the U-Net counts them."""
        return self.latent.labels[self.label] if self.label else ()

    def resolved(self) -> Self:
        """The same settings with the network's empty sizes and the schedule filled in.

        Raises:
            UserError: If the latents' size does not fit the architecture.
        """
        latent = self.latent
        model = self.model.resolved(min(latent.height, latent.width))
        if latent.height % model.factor or latent.width % model.factor:
            raise UserError(
                f"--model.channels: {model.factor.bit_length() - 1} levels need latents divisible by {model.factor}, "
                f"but these are {latent.height} x {latent.width}; give fewer widths"
            )
        return with_changes(self, model=model, noise=self.noise.resolved(self.target.objective))


class GenerateSettings(StageSettings):
    """Draw new images."""

    NO_FLAG: ClassVar = frozenset({"compute.workers"})  # there are no images to load
    NOT_IN_IMAGES: ClassVar = frozenset(  # an image says all else of itself
        {"run", "job", "unet", "vae", "out", "name", "num_images", "batch_size", "compute"}
    )

    unet: Path | None = Field(None, description="U-Net: a checkpoint or a run folder; default: this run's last")
    vae: Path | None = Field(None, description="VAE: a checkpoint or a run folder; default: the one behind the latents")
    num_images: int = Field(16, ge=1, description="images to draw")
    seed: int = Field(0, ge=0, description="seed; image i of a seed is the same whatever the batch")
    batch_size: int = Field(32, ge=1, description="images drawn at a time")
    out: Path | None = Field(None, description="folder for the images; default: a new one below samples/")
    name: str = Field("", pattern=r"^[^/\\]*$", description="prefix of the file names: NAME-00000.png")
    resolution: int = Field(0, ge=0, description="side of the images, in pixels; 0: the size trained on")
    ema: bool = Field(True, description="draw with the averaged weights, or with the raw ones")
    sampling: SamplingSettings = Field(SamplingSettings(), title="Sampling")
    compute: ComputeSettings = Field(ComputeSettings(), title="Compute")
