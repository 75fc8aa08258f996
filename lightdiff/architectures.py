"""Settings of the networks. Which architecture a checkpoint holds stands in them. Nothing here imports torch.

An architecture is a file of `models/` and a row in a table here. The fields describe themselves, as all settings do:
see `settings.py`.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lightdiff.errors import not_divisible, shorten

S = TypeVar("S", bound="Settings")
Layer = dict[str, Any]  # settings, nested as in their models, that somebody or something has said
MAX_INTEGER = 1 << 53


def kinds_of(annotation: Any) -> set[Any]:
    """The types of a field, without what holds them; those of a list are `list`'s items and `...`."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return kinds_of(arguments[0])
    return set().union(*map(kinds_of, arguments)) if arguments else {annotation}


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_given(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would take for something else, and whole numbers that no machine counts to."""
        name = str(info.field_name)
        kinds = kinds_of(cls.model_fields[name].annotation)
        several = value if isinstance(value, (list, tuple)) else [value]
        numbers = [one for one in several if isinstance(one, (int, float))]
        if any(isinstance(one, bool) != (bool in kinds) for one in numbers):
            right = "Input should be a valid boolean: true or false"
            raise ValueError(right if bool in kinds else "true and false are no value of this setting")
        if isinstance(value, str) and kinds <= {int, float, NoneType}:
            raise ValueError("Input should be a valid number, without quotes")
        if name != "seed" and any(isinstance(one, int) and abs(one) > MAX_INTEGER for one in numbers):
            raise ValueError("the number is too large")
        return value


def with_changes(settings: S, **changes: Any) -> S:
    """The same settings with some top-level fields replaced, validated again."""
    return type(settings).model_validate({**settings.model_dump(), **changes})


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"loop.lr": 0.1, ...}."""
    rows: dict[str, Any] = {}
    for name, value in settings.items():
        rows |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return rows


def parse_names(value: Any) -> Any:
    """A list that may be given as one text, `cat,dog`, as its items; one with a comma in it is quoted, as in CSV."""
    if not isinstance(value, str):
        return value
    return [item.strip() for item in next(csv.reader([value.strip()], skipinitialspace=True)) or [""]]


def parse_numbers(value: Any) -> Any:
    """The same for numbers: `64,128`; `none`, or nothing, for an empty list (a name may be called that)."""
    return [] if isinstance(value, str) and value.strip() in ("", "none") else parse_names(value)


def absolute(path: Path) -> Path:
    """The whole path, with ~ replaced; hf://... is none, and stays."""
    try:
        return path if path.parts[:1] == ("hf:",) else path.expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{path.parts[0]}: there is no such user") from None


class Size(NamedTuple):
    """Height and width in pixels: `192x256`, or one number for a square."""

    height: int
    width: int

    def __str__(self) -> str:
        return str(self.height) if self.height == self.width else f"{self.height}x{self.width}"

    @classmethod
    def of(cls, value: "int | str | Size") -> "Size":
        """The size that a number, a text or a size says; ValueError if it says none."""
        return cls(*parse_size(value))

    @property
    def plain(self) -> int | str:
        """As it is saved: a square as one number."""
        return self.height if self.height == self.width else str(self)

    def divided(self, factor: int) -> tuple[int, int]:
        """Height and width of the latents of a VAE with this factor.

        Raises:
            UserError: If they are not divisible by it.
        """
        if self.height % factor or self.width % factor:
            raise not_divisible(self, factor)
        return self.height // factor, self.width // factor


def parse_size(value: Any) -> Any:
    """What was given for a size."""
    if isinstance(value, str) and (sides := re.fullmatch("([0-9]{1,5})(?:x([0-9]{1,5}))?", value.strip())):
        value = int(sides[1]), int(sides[2] or sides[1])
    if isinstance(value, int):
        return value, value
    if not isinstance(value, (tuple, list)):
        raise ValueError("a number of pixels, or height x width as in 192x256")
    return value


def check_size(size: Size) -> Size:
    """Refuse images that are too small for any network."""
    if min(size) < 8:
        raise ValueError("the sides of images are 8 pixels or more")
    return size


SizeOrZero = Annotated[Size, BeforeValidator(parse_size), PlainSerializer(lambda size: size.plain)]
Resolution = Annotated[SizeOrZero, AfterValidator(check_size)]
AbsolutePath = Annotated[Path, AfterValidator(absolute)]
Names = Annotated[tuple[str, ...], BeforeValidator(parse_names)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(parse_numbers)]


def parse_decays(value: Any) -> Any:
    """One decay, or several as any list of numbers."""
    return [value] if isinstance(value, (int, float)) else parse_numbers(value)


def some_decays(decays: tuple[float, ...]) -> tuple[float, ...]:
    """The decays without 0, which stands for no average; refuse one that is there twice."""
    if len(set(decays)) < len(decays):
        raise ValueError("each decay only once")
    return tuple(decay for decay in decays if decay)


Decay = Annotated[float, Field(ge=0, lt=1)]
Decays = Annotated[tuple[Decay, ...], Field(max_length=8), AfterValidator(some_decays), BeforeValidator(parse_decays)]


def stem_and_level(channels: tuple[int, ...]) -> tuple[int, ...]:
    """Refuse a single width."""
    if len(channels) == 1:
        raise ValueError("needs a stem and at least one level: two numbers or more")
    return channels


Width = Annotated[int, Field(ge=1, le=1 << 14)]  # bounds that no real network comes near: a file cannot ask for more
Widths = Annotated[
    tuple[Width, ...], Field(max_length=10), AfterValidator(stem_and_level), BeforeValidator(parse_numbers)
]
Count = Annotated[int, Field(ge=1, le=64)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1, max_length=10), BeforeValidator(parse_numbers)]
Levels = Annotated[tuple[Annotated[int, Field(ge=0)], ...] | None, BeforeValidator(parse_numbers)]


class Architecture(Settings):
    """Base of a network's settings. Which architecture they are of stands in them, and so in every checkpoint.

    The two bases below have a table of architectures; validated as one of them, settings become what the table names.
    """

    ARCHITECTURES: ClassVar[Mapping[str, str]]  # name -> "module:settings class", imported when it is asked for
    NETWORK: ClassVar[str]  # "module:network class"

    architecture: str = "default"

    @model_validator(mode="wrap")
    @classmethod
    def _dispatch(cls, value: Any, handler: Any) -> Any:
        if "ARCHITECTURES" not in vars(cls) or not isinstance(value, Mapping):
            return handler(value)
        name = value.get("architecture", "default")
        if name not in list(cls.ARCHITECTURES):
            raise ValueError(f"architecture: there is no {shorten(name)}; there are {', '.join(cls.ARCHITECTURES)}")
        return resolve_name(cls.ARCHITECTURES[name]).model_validate(value)

    def resolved(self, size: int) -> Self:
        """The same settings with all that follows from the size of images (px), or of latents, filled in."""
        return self

    @property
    def factor(self) -> int:
        """What the input's sides must be divisible by; a VAE's latents are so many times smaller."""
        return 1


class VAEArchitecture(Architecture):
    """What all VAEs' settings have."""

    ARCHITECTURES: ClassVar = {
        "default": "lightdiff.architectures:VAESettings",
        "original": "lightdiff.models.original:OriginalVAESettings",
        "kl": "lightdiff.models.kl:KLVAESettings",
        "taesd": "lightdiff.extras.taesd:TinyVAESettings",
    }

    latent_channels: Width = Field(4, description="channels of a latent")


class UNetArchitecture(Architecture):
    """What all U-Nets' settings have."""

    ARCHITECTURES: ClassVar = {
        "default": "lightdiff.architectures:UNetSettings",
        "original": "lightdiff.models.original:OriginalUNetSettings",
    }


def widths(width: int, multipliers: Sequence[int], count: int) -> tuple[int, ...]:
    """Widths of the stem and each level, `count` of them: width times each multiplier, the last one repeated."""
    return tuple(width * multipliers[min(i, len(multipliers) - 1)] for i in range(count))


class VAESettings(VAEArchitecture):
    """Architecture of the VAE. Level i works at 1/2^i of the image's size and ends with a halving."""

    NETWORK: ClassVar = "lightdiff.models.vae:VAE"

    architecture: Literal["default"] = Field("default", description="architecture that these settings are of")
    encoder_channels: Widths = Field((), description="encoder widths: stem, then each level; empty: by encoder-width")
    decoder_channels: Widths = Field((), description="decoder widths, latent outwards; empty: by decoder-width")
    encoder_width: Width = Field(32, description="encoder-channels, if empty, are this x 1, 1, 2, 4, as the size asks")
    decoder_width: Width = Field(32, description="decoder-channels, if empty, are this x 4, 2, 1, as the size asks")
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
        if self.encoder_channels and len(self.decoder_channels) not in (0, len(self.encoder_channels)):
            counts = f"{len(self.encoder_channels)} encoder_channels but {len(self.decoder_channels)} decoder_channels"
            raise ValueError(f"{counts}; both need the same count")
        if self.logvar_min >= self.logvar_max:
            raise ValueError(f"logvar_min {self.logvar_min} is not below logvar_max {self.logvar_max}")
        return self

    def resolved(self, size: int) -> Self:
        """The same settings with empty widths filled in for images of this size (px)."""
        count = len(self.encoder_channels or self.decoder_channels) or 2 + (size >= 32) + (size >= 192)
        encoder = self.encoder_channels or widths(self.encoder_width, (1, 1, 2, 4), count)
        decoder = self.decoder_channels or widths(self.decoder_width, (1, 2, 4), count)[::-1]
        return with_changes(self, encoder_channels=encoder, decoder_channels=decoder)

    @property
    def factor(self) -> int:
        """How many times smaller than the image a latent is, along each side."""
        return int(2 ** (len(self.encoder_channels) - 1))


class UNetSettings(UNetArchitecture):
    """Architecture of the U-Net. Level i works at 1/2^i of the latent's size and ends with a halving."""

    NETWORK: ClassVar = "lightdiff.models.unet:UNet"

    architecture: Literal["default"] = Field("default", description="architecture that these settings are of")
    channels: Widths = Field((), description="widths: stem, then each level; empty: by width")
    width: Width = Field(64, description="channels, if empty, are this x 1, 1, 2, 3, 4, as the latent's size asks")
    blocks: int = Field(2, ge=1, le=64, description="residual blocks a level, going down and going up")
    attend_levels: Levels = Field(
        None,
        description="levels with self-attention, 0 the finest; none: no level; not given: those of 4 to 8 pixels, and "
        "of up to 16 below finer ones",
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

    def resolved(self, size: int) -> Self:
        """The same settings with empty widths and attention levels filled in for latents of this size."""
        halvings = (n for n in (3, 2, 1) if (size % 2**n == 0 and size >= 4 * 2**n) or n == 1)
        channels = self.channels or widths(self.width, (1, 1, 2, 3, 4), next(halvings) + 1)
        largest = min(16, max(8, size // 2))
        small = tuple(i for i in range(len(channels) - 1) if 4 <= size // 2**i <= largest)
        attended = small if self.attend_levels is None else self.attend_levels
        return with_changes(self, channels=channels, attend_levels=attended)
