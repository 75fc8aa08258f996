"""Every knob, on one page: architecture, noise schedule, loop, and one model a stage that contains them.

Each field is described here once; the command line's help, the settings saved with a checkpoint and the reference
page are made from it. Nothing in this module imports torch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Width = Annotated[int, Field(ge=1, le=1 << 14)]  # bounds that no real network comes near: a file cannot ask for more
Widths = Annotated[tuple[Width, ...], Field(max_length=10)]
Counts = Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(max_length=10)]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["auto", "on", "off"]
LPIPSNet = Literal["vgg", "alex", "squeeze"]
LatentDtype = Literal["float16", "bfloat16", "float32"]
Objective = Literal["eps", "x0", "v", "flow"]
LossWeight = Literal["none", "min-snr"]
SamplerName = Literal["ddim", "ddpm", "dpm++2m", "heun", "euler"]
NOISY: frozenset[SamplerName] = frozenset({"ddpm"})  # samplers that add noise of their own at each step
WITH_ETA: frozenset[SamplerName] = frozenset({"ddim"})  # those that add as much as --eta says
Spacing = Literal["trailing", "uniform", "karras", "quadratic"]
EPS_MIN_ALPHA_BAR = 3e-3  # below it, errors of eps_hat grow into x0 more than 18-fold
GRID = (8, 4)  # columns and rows of the grids drawn while training


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


S = TypeVar("S", bound=Settings)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"loop.lr": 0.1, ...}."""
    rows: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows |= flat(value, f"{prefix}{name}.")
        else:
            rows[prefix + name] = value
    return rows


def with_changes(settings: S, **changes: Any) -> S:
    """The same settings with some top-level fields replaced, validated again."""
    return type(settings).model_validate({**settings.model_dump(), **changes})


def absolute(path: Path | None) -> Path | None:
    """A path that means the same from everywhere."""
    return path.expanduser().absolute() if path else None


# --- networks -----------------------------------------------------------------------------------------------------


def widths(width: int, multipliers: Sequence[int], levels: int) -> tuple[int, ...]:
    """Stem and level widths: width times each multiplier, the last one repeated, `levels` + 1 of them."""
    padded = [*multipliers, *[multipliers[-1]] * levels]
    return tuple(width * m for m in padded[: levels + 1])


class VAESettings(Settings):
    """Architecture of the VAE. Level i works at 1/2^i of the image's size and ends with a halving."""

    latent_channels: Width = Field(4, description="channels of a latent")
    image_channels: Literal[3] = Field(3, description="channels of an image (RGB)")
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
    block: Literal["residual", "plain"] = Field("residual", description="residual blocks, or plain conv-norm-act")
    down_kernel: Literal[3, 4] = Field(3, description="size of the strided convolution that halves")
    upsample: Literal["nearest", "transposed"] = Field(
        "nearest", description="nearest neighbour + convolution (no checkerboard), or a strided transposed one"
    )
    norm: Literal["pixel", "group"] = Field(
        "pixel", description="LayerNorm of each pixel's channels, or GroupNorm, which can leave droplets in images"
    )
    groups: int = Field(32, ge=1, description="groups of GroupNorm; a width it does not divide takes fewer")
    output: Literal["tanh", "sigmoid", "none"] = Field("tanh", description="output activation")
    logvar_min: float = Field(-30.0, description="soft lower bound of the posterior's log variance")
    logvar_max: float = Field(20.0, description="soft upper bound of the posterior's log variance")

    @model_validator(mode="after")
    def _consistent(self) -> "VAESettings":
        if not self.encoder_blocks or not self.decoder_blocks:
            raise ValueError("encoder_blocks and decoder_blocks need at least one number")
        encoder, decoder = len(self.encoder_channels), len(self.decoder_channels)
        if (encoder == 1) or (decoder == 1):
            raise ValueError("channels need a stem and at least one level: two numbers or more")
        if encoder and decoder and encoder != decoder:
            raise ValueError(f"{encoder} encoder_channels but {decoder} decoder_channels; both need the same count")
        if self.logvar_min >= self.logvar_max:
            raise ValueError(f"logvar_min {self.logvar_min} is not below logvar_max {self.logvar_max}")
        return self

    def resolved(self, resolution: int) -> "VAESettings":
        """The same settings with empty widths filled in for images of this size (px)."""
        levels = max(len(self.encoder_channels), len(self.decoder_channels)) - 1
        if levels < 1:
            levels = 1 if resolution < 32 else 2 if resolution < 192 else 3
        encoder = self.encoder_channels or widths(self.encoder_width, (1, 1, 2, 4), levels)
        decoder = self.decoder_channels or widths(self.decoder_width, (1, 2, 4), levels)[::-1]
        return with_changes(self, encoder_channels=encoder, decoder_channels=decoder)

    @property
    def factor(self) -> int:
        """How many times smaller than the image a latent is, along each side."""
        return int(2 ** (len(self.encoder_channels) - 1))


class UNetSettings(Settings):
    """Architecture of the U-Net. Level i works at 1/2^i of the latent's size and ends with a halving."""

    channels: Widths = Field(
        (), description="widths: stem, then each level; empty: width x 1, 1, 2, 3, 4, as the latent's size asks"
    )
    width: Width = Field(64, description="width that channels is made from when empty")
    blocks: int = Field(2, ge=1, le=64, description="residual blocks a level, going down and going up")
    attend_levels: tuple[int, ...] | None = Field(
        None, description="levels with self-attention, 0 the finest; not given: those of 4 to 8 pixels; none: no level"
    )
    mid_attention: bool = Field(True, description="self-attention in the middle")
    heads: int = Field(4, ge=1, description="heads of each self-attention")
    time_dim: int = Field(256, ge=4, le=1 << 14, multiple_of=2, description="width of the time embedding")
    groups: int = Field(32, ge=1, description="groups of GroupNorm; a width it does not divide takes fewer")
    group_width: int = Field(
        0, ge=0, description="channels a group in the blocks, instead of a number of groups; 0: off"
    )
    down_kernel: Literal[3, 4] = Field(3, description="size of the strided convolution that halves")
    zero_init: bool = Field(True, description="residual branches and output start at zero")

    @field_validator("channels")
    @classmethod
    def _two_or_more(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(value) == 1:
            raise ValueError("needs a stem and at least one level: two numbers or more")
        return value

    @model_validator(mode="after")
    def _heads_divide(self) -> "UNetSettings":
        for level in self.attend_levels or ():
            if level < 0 or (self.channels and level >= len(self.channels) - 1):
                raise ValueError(f"attend_levels: there is no level {level}; levels count from 0")
        attended = [self.channels[i + 1] for i in self.attend_levels or () if self.channels]
        if self.mid_attention and self.channels:
            attended.append(self.channels[-1])
        for width in attended:
            if width % self.heads:
                raise ValueError(f"heads: {self.heads} does not divide the width {width} of a level with attention")
        return self

    def resolved(self, latent_size: int) -> "UNetSettings":
        """The same settings with empty widths and attention levels filled in for latents of this size."""
        levels = len(self.channels) - 1
        if levels < 1:
            levels = next(n for n in (3, 2, 1) if (latent_size % 2**n == 0 and latent_size >= 4 * 2**n) or n == 1)
        channels = self.channels or widths(self.width, (1, 1, 2, 3, 4), levels)
        attended = self.attend_levels
        if attended is None:
            attended = tuple(i for i in range(levels) if 4 <= latent_size // 2**i <= 8)
        return with_changes(self, channels=channels, attend_levels=attended)

    @property
    def factor(self) -> int:
        """What a latent's side must be divisible by: with 3 x 3 halvings, which round up, any side will do."""
        return 1 if self.down_kernel == 3 else int(2 ** (len(self.channels) - 1))


class ScheduleSettings(Settings):
    """The noise schedule: how much signal is left at each level."""

    schedule: Literal["auto", "linear", "scaled-linear", "cosine", "flow"] = Field(
        "auto", description="noise schedule; auto: flow for rectified flow, else cosine"
    )
    timesteps: int = Field(1000, ge=2, le=1_000_000, description="levels T of the noise schedule")
    beta_start: float = Field(
        1e-4,
        gt=0,
        lt=1,
        json_schema_extra={"needs": "schedule=linear|scaled-linear"},
        description="first beta of the linear schedules",
    )
    beta_end: float = Field(
        0.02,
        gt=0,
        lt=1,
        json_schema_extra={"needs": "schedule=linear|scaled-linear"},
        description="last beta of the linear schedules",
    )
    zero_terminal_snr: bool = Field(False, description="stretch the schedule until its last level is noise alone")

    def resolved(self, objective: Objective) -> "ScheduleSettings":
        """The same settings with `auto` decided."""
        if self.schedule != "auto":
            return self
        return with_changes(self, schedule="flow" if objective == "flow" else "cosine")


class ObjectiveSettings(Settings):
    """What the U-Net learns to predict, and how its error is weighed."""

    objective: Objective = Field("flow", description="what is predicted: noise, clean latent, v, or rectified flow")
    loss_weight: LossWeight = Field("none", description="weight of the loss by level of noise")
    min_snr_gamma: float = Field(
        5.0,
        gt=0,
        json_schema_extra={"needs": "loss_weight=min-snr"},
        description="signal-to-noise ratio above which min-snr weighs no more",
    )


class LevelSettings(Settings):
    """Which levels of noise the U-Net is trained at."""

    density: Literal["uniform", "logit-normal"] = Field("logit-normal", description="density of the levels trained at")
    density_mean: float = Field(
        0.0,
        json_schema_extra={"needs": "density=logit-normal"},
        description="logit of the middle of logit-normal's density; above 0: noisier",
    )
    density_std: float = Field(
        1.0,
        gt=0,
        json_schema_extra={"needs": "density=logit-normal"},
        description="spread of logit-normal's density",
    )
    stratified: bool = Field(True, description="spread the levels of a batch evenly, instead of each by itself")


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

    data: tuple[Path, ...] = Field((), description="folder of images; give it several times to mix folders")
    resolution: int = Field(64, ge=8, description="side of the square images, in pixels")
    background: str = Field("white", description="colour behind transparent pixels: a name or #rrggbb")
    flip: bool = Field(True, description="mirror images: half of those trained on, and a second latent of each")
    random_crop: float = Field(
        0.9, gt=0, le=1, description="smallest side of training's random crop, as a share of the frame; 1 turns it off"
    )
    labels: Path | None = Field(None, description="CSV file with a column file and one for each label")
    val_share: float = Field(0.05, ge=0, lt=1, description="share of images held out for validation")
    max_bad: float = Field(0.01, ge=0, le=1, description="share of unreadable images above which the run stops")

    @field_validator("data")
    @classmethod
    def _absolute(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(Path(p).expanduser().absolute() for p in value)

    _absolute_labels = field_validator("labels")(absolute)


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

    device: Device = Field("auto", description="where to compute; auto: cuda, mps or cpu, the first there is")
    precision: Precision = Field("auto", description="fp32, or bf16 autocast; auto: bf16 where it is faster")
    workers: int = Field(-1, ge=-1, description="processes that load images; -1: chosen from the number of cores")
    compile: Compile = Field(
        "auto", description="translate the network with torch.compile; auto: on a GPU, if there is enough to do"
    )


class LoopSettings(ComputeSettings):
    """The training loop. Every interval counts optimizer steps."""

    steps: int = Field(20_000, ge=1, description="optimizer steps")
    epochs: float = Field(
        0.0,
        ge=0,
        json_schema_extra={"instead_of": "steps"},
        description="passes over the training images, instead of steps; 0: count steps",
    )
    batch_size: int = Field(16, ge=1, description="images an optimizer step")
    micro_batch: int = Field(
        0, ge=0, description="images a forward pass; 0: the whole batch", json_schema_extra={"panel": "Memory"}
    )
    checkpoint_activations: bool = Field(
        False,
        description="keep fewer activations and compute them again: about a third more time",
        json_schema_extra={"panel": "Memory"},
    )
    optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="muon: orthogonal updates for matrices and convolutions, AdamW for the rest; or AdamW alone"
    )
    lr: float = Field(2e-3, gt=0, description="peak learning rate")
    lr_schedule: Literal["constant", "cosine"] = Field("cosine", description="learning rate after the warm-up")
    warmup_steps: int = Field(100, ge=0, description="optimizer steps of linear warm-up")
    weight_decay: float = Field(0.01, ge=0, description="weight decay, as a share of lr a step")
    beta2: float = Field(0.99, gt=0, lt=1, description="AdamW's decay of squared gradients")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0 turns clipping off")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="decay of averaged weights, warmed up; 0 turns them off")
    val_every: int = Field(1000, ge=0, description="optimizer steps between validations; 0: only at the end")
    save_every: int = Field(1000, ge=1, description="optimizer steps between checkpoints")
    keep: int = Field(2, ge=1, description="step files kept; older ones are removed")
    keep_every: int = Field(
        0, ge=0, description="step files of a multiple of this many steps are kept for good; 0: none"
    )
    drop_oldest: bool = Field(False, description="remove the oldest step file when the disk is too full to save")
    skip_nonfinite: int = Field(
        0, ge=0, description="steps with a loss or gradient that is not finite that may be skipped before the run stops"
    )
    log_every: int = Field(20, ge=1, description="optimizer steps between lines of metrics.jsonl")
    seed: int = Field(0, ge=0, description="seed that every random number is a function of")

    @property
    def micro(self) -> int:
        """Images a forward pass, with 0 resolved."""
        return min(self.micro_batch or self.batch_size, self.batch_size)

    def total_steps(self, train_items: int) -> int:
        """Optimizer steps of the whole run."""
        return max(1, round(self.epochs * train_items / self.batch_size)) if self.epochs else self.steps


class JobSettings(Settings):
    """How many processes, and for how long. Not part of what is trained: may differ at each start."""

    nproc_per_node: int = Field(1, ge=1, description="processes to start on this machine, as a rule one for each GPU")
    max_restarts: int = Field(0, ge=0, description="times that all processes are started again when one of them dies")
    timeout: float = Field(600.0, gt=0, description="seconds that processes wait for one that does not answer")
    max_time: float = Field(0.0, ge=0, description="minutes after which to save and end with exit code 75; 0: no limit")
    quiet: bool = Field(False, description="say nothing but results, and what goes wrong")
    force_unlock: bool = Field(False, description="take over a run folder that another host has locked")


class VAELossSettings(Settings):
    """reconstruction + kl-beta KL + lpips-gamma LPIPS."""

    reconstruction: Literal["mse", "l1"] = Field("mse", description="error of the pixels, which lie in [-1, 1]")
    kl_beta: float = Field(3e-3, ge=0, description="weight of the KL divergence, a mean over latent elements")
    lpips_gamma: float = Field(0.1, ge=0, description="weight of LPIPS; 0 turns it off and needs no weights")
    lpips_net: LPIPSNet = Field("vgg", description="network behind LPIPS")
    lpips_weights: Path | None = Field(None, description="file with that network's ImageNet weights")
    equivariance: float = Field(
        0.0, ge=0, le=1, description="share of steps that decode shrunk and turned latents to images treated the same"
    )


# --- stages -------------------------------------------------------------------------------------------------------


class StageSettings(Settings):
    """Base of all stages."""

    NOT_SAVED: ClassVar = frozenset({"job", "restart", "from_step"})  # for one start of the command; not saved

    def to_save(self) -> dict[str, Any]:
        """What is saved with a checkpoint, as JSON."""
        return self.model_dump(mode="json", exclude=set(self.NOT_SAVED))

    run: Path = Field(Path("runs/default"), description="run folder")
    job: JobSettings = Field(JobSettings(), title="Processes and time")


class TrainVAESettings(StageSettings):
    """Train the VAE on a folder of images."""

    restart: bool = Field(False, description="begin anew; what is there is kept aside, under another name")
    from_step: int = Field(0, ge=0, description="go back to this step's file; what is newer is kept aside; 0: the last")
    init_from: Path | None = Field(None, description="checkpoint whose weights the training starts from")
    freeze_encoder: bool = Field(False, description="with --init-from: train the decoder alone; latents stay valid")
    images: ImageSettings = Field(ImageSettings(), title="Images")
    loss: VAELossSettings = Field(VAELossSettings(), title="Loss")
    loop: LoopSettings = Field(LoopSettings(), title="Training")
    model: VAESettings = Field(VAESettings(), title="Architecture (VAE)")


class EncodeSettings(StageSettings):
    """Encode every image, and its mirror image, to mu and logvar."""

    NO_FLAG: ClassVar = frozenset({"compute.compile"})  # loading images takes longer

    restart: bool = Field(False, description="begin anew; what is there is kept aside, under another name")
    vae: Path | None = Field(None, description="VAE: a checkpoint or a run folder; default: this run's best")
    batch_size: int = Field(64, ge=1, description="images a forward pass")
    dtype: LatentDtype = Field("float16", description="type the latents are stored in")
    shard_size: int = Field(2048, ge=1, description="images a shard file")
    images: ImageSettings = Field(ImageSettings(), title="Images (read from the VAE)")
    compute: ComputeSettings = Field(ComputeSettings(), title="Compute")


class ScaleSettings(StageSettings):
    """Compute mean, std and scaling factor of the latents."""

    NO_FLAG: ClassVar = frozenset({"job.max_time"})  # it takes seconds

    latents: Path | None = Field(None, description="latents: a folder or a run folder; default: this run's")
    only_mu: bool = Field(
        True, description="the U-Net learns mu alone; without, draws of the posterior, mu + sigma times noise"
    )
    normalize: Literal["channel", "global"] = Field(
        "channel", description="shift and scale each channel, or one scaling factor for all and no shift"
    )
    scaling_factor: float = Field(0.0, ge=0, description="scaling factor set by hand; 0: computed")


class TrainUNetSettings(StageSettings):
    """Train the U-Net on cached latents to tell signal from noise."""

    NO_FLAG: ClassVar = frozenset({"latent", "loop.workers"})  # read from the latents; there are no images to load
    NO_FILE: ClassVar = frozenset({"latent"})  # a saved settings.json may be of other latents

    restart: bool = Field(False, description="begin anew; what is there is kept aside, under another name")
    from_step: int = Field(0, ge=0, description="go back to this step's file; what is newer is kept aside; 0: the last")
    latents: Path | None = Field(None, description="latents: a folder or a run folder; default: this run's")
    init_from: Path | None = Field(None, description="checkpoint whose weights the training starts from")
    label: str = Field("", description="label that the U-Net is told, so that it draws what is asked for; empty: none")
    label_dropout: float = Field(
        0.1,
        ge=0,
        le=1,
        json_schema_extra={"needs": "label"},
        description="share of the images whose label it is not told, as guidance needs it",
    )
    loop: LoopSettings = Field(LoopSettings(steps=50_000, batch_size=32), title="Training")
    target: ObjectiveSettings = Field(ObjectiveSettings(), title="Objective")
    levels: LevelSettings = Field(LevelSettings(), title="Objective")
    noise: ScheduleSettings = Field(ScheduleSettings(), title="Noise schedule")
    model: UNetSettings = Field(UNetSettings(), title="Architecture (U-Net)")
    latent: LatentsSettings = Field(LatentsSettings(), title="Latents (read from the latents)")

    _absolute_latents = field_validator("latents")(absolute)

    @model_validator(mode="after")
    def _fit_together(self) -> "TrainUNetSettings":
        objective, noise = self.target.objective, self.noise.resolved(self.target.objective)
        if (objective == "flow") != (noise.schedule == "flow") and objective != "x0":
            raise ValueError(
                f"--objective {objective} does not go with --schedule {noise.schedule}: rectified flow and its "
                "schedule belong together, eps and v to the others, and only x0 goes with all"
            )
        if noise.zero_terminal_snr and noise.schedule == "flow":
            raise ValueError("--zero-terminal-snr: the flow schedule ends with noise alone anyway")
        if noise.zero_terminal_snr and objective == "eps":
            raise ValueError(
                "--zero-terminal-snr needs --objective v or x0: where there is noise alone, "
                "predicting it says nothing about the picture"
            )
        if self.label and self.label not in self.latent.labels:
            raise ValueError(f"--label {self.label}: the latents have {', '.join(self.latent.labels) or 'no labels'}")
        return self

    @property
    def classes(self) -> tuple[str, ...]:
        """The values that the label takes, in the order that the U-Net counts them."""
        return self.latent.labels[self.label] if self.label else ()

    def resolved(self) -> "TrainUNetSettings":
        """The same settings with all that follows from others filled in."""
        latent = self.latent
        model = self.model.resolved(min(latent.height, latent.width))
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


class EvaluateSettings(StageSettings):
    """Measure reconstructions and samples: PSNR, SSIM, LPIPS, FID, KID, precision, recall, copies."""

    NO_FLAG: ClassVar = frozenset({"compute.compile", "job.max_time"})

    of: Literal["all", "vae", "unet"] = Field("all", description="what to measure")
    unet: Path | None = Field(None, description="U-Net: a checkpoint or a run folder; default: this run's last")
    vae: Path | None = Field(None, description="VAE: a checkpoint or a run folder; default: the one behind the latents")
    samples: Path | None = Field(None, description="folder with samples; default: drawn with generate's defaults")
    data: tuple[Path, ...] = Field(
        (), description="folder of images, where it is not that the VAE learnt from any more"
    )
    num_images: int = Field(2000, ge=2, description="samples to draw")
    num_reference: int = Field(10_000, ge=0, description="training images to compare with; 0: all")
    weights: Path | None = Field(None, description="copy of Inception's published weights; default: fetched once")
    features: Path | None = Field(
        None,
        json_schema_extra={"instead_of": "weights"},
        description="other weights of Inception; the numbers are then named after them",
    )
    lpips_net: LPIPSNet | None = Field(None, description="network behind LPIPS; default: what the VAE learnt with")
    lpips_weights: Path | None = Field(None, description="file with that network's ImageNet weights")
    batch_size: int = Field(50, ge=1, description="images at a time")
    compute: ComputeSettings = Field(ComputeSettings(), title="Compute")


class DemoSettings(Settings):
    """Draw a data set of faces, then run all five stages on it: some four minutes on two cores."""

    run: Path = Field(Path("runs/demo"), description="run folder")
    resolution: int = Field(32, ge=16, le=256, multiple_of=8, description="side of the drawn images, in pixels")
    count: int = Field(4000, ge=16, description="faces to draw")
    vae_steps: int = Field(450, ge=1, description="optimizer steps of the VAE")
    unet_steps: int = Field(750, ge=1, description="optimizer steps of the U-Net")
    seed: int = Field(0, ge=0, description="seed of the drawing, the training and the samples")
    device: Device = Field("auto", description="where to compute; auto: cuda, mps or cpu, the first there is")


Assignment = Annotated[str, "repeated"]  # a list of them is a flag that is given several times


class SweepSettings(StageSettings):
    """Vary one or two settings of a run, and show side by side what they do."""

    NO_FLAG: ClassVar = frozenset({"job.nproc_per_node", "job.max_restarts", "job.timeout"})

    run: Path = Field(Path("runs/default"), description="run folder, whose settings are kept but for what is varied")
    vary: tuple[Assignment, ...] = Field(
        (), description="a flag of any stage and its values: kl-beta=1e-4,1e-2; once, or twice for rows and columns"
    )
    set_: tuple[Assignment, ...] = Field((), description="a flag of any stage and one value for all cells: eta=1")
    vae_steps: int = Field(0, ge=0, description="optimizer steps of each VAE; 0: as many as the run's")
    unet_steps: int = Field(0, ge=0, description="optimizer steps of each U-Net; 0: as many as the run's")
    until: Literal["vae", "images"] = Field("images", description="end with reconstructions, or with samples too")
    num_images: int = Field(8, ge=1, le=64, description="images a cell")

    @field_validator("vary")
    @classmethod
    def _one_or_two(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) not in (1, 2):
            raise ValueError("one setting or two can be varied, each as in --vary kl-beta=1e-4,1e-2")
        return value
