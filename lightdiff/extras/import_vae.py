"""import: a VAE that others have trained -> the VAE of a run.

Read are folders of diffusers (AutoencoderKL and AutoencoderTiny, alone or in a pipeline's folder, whole or in shards)
and single files: AutoencoderKL in diffusers' names, or in those of latent diffusion's scripts, alone or with the rest
of a model. Tensors keep their dtype and stay in their file until they are written.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightdiff.checkpoint import DTYPES, Metadata, check_fit
from lightdiff.data.index import Statistics
from lightdiff.errors import UserError, shorten
from lightdiff.extras.hub import local_copy
from lightdiff.extras.import_original import check_size, first_problem, import_content, is_plain, read, write
from lightdiff.extras.taesd import TinyVAESettings
from lightdiff.models.kl import KLVAESettings
from lightdiff.models.vae import build_vae
from lightdiff.run_folder import RunFolder, open_regular, read_json
from lightdiff.runtime.progress import console, print_note
from lightdiff.settings import ImageSettings, TrainVAESettings, VAEArchitecture

WEIGHTS = "diffusion_pytorch_model"
NAMES = (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.fp16.safetensors", "model.safetensors", f"{WEIGHTS}.bin")
PICKLES = {".bin", ".ckpt", ".pt", ".pth"}
MAX_CONFIG = 1 << 20  # bytes; real ones have some thousand
NO_VAE = "{} holds {}, not a VAE that can be imported: AutoencoderKL or AutoencoderTiny"


class Lazy(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Weights = dict[str, Lazy]


def shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: lazy.shape for name, lazy in weights.items()}


def import_model(source: str, run: Path, resolution: int) -> Path:
    """Write what a path or an address holds as a checkpoint into a run folder and return that.

    Raises:
        UserError: If it holds nothing that can be imported, or there is a VAE already.
    """
    path = local_copy(source)
    if path.is_dir():
        return import_folder(path, run, resolution)
    if path.suffix in PICKLES:
        content = read(path, "checkpoint")
        if isinstance(content, dict) and {"VAE_CFG", "UNET_CFG"} & content.keys():
            return import_content(path, content, run, resolution)
        weights = of_pickle(path, content)
    else:
        weights = of_safetensors(path)
    weights = renamed(first_stage(path, weights))
    model = guessed(path, weights)
    return finish(path, model, weights, {"source": path.name}, run, resolution)


# --- configurations -----------------------------------------------------------------------------------------------


class Factors(BaseModel):
    """What a configuration says of the latents' scale: diffusion's x0 is (z - shift_factor) * scaling_factor."""

    scaling_factor: float | None = None
    shift_factor: float | None = None
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None


class KLConfig(Factors):
    """AutoencoderKL's configuration, with its defaults; an option that is not known is refused."""

    model_config = ConfigDict(extra="forbid")

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: list[str] = ["DownEncoderBlock2D"]
    up_block_types: list[str] = ["UpDecoderBlock2D"]
    block_out_channels: list[int] = [64]
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    sample_size: Any = None  # of diffusers' tiles
    force_upcast: Any = None  # to float32, in which we compute anyway

    def settings(self) -> VAEArchitecture:
        """The same in our words."""
        one_of("act_fn", self.act_fn, "silu", "swish")
        for types, known in ((self.down_block_types, "DownEncoderBlock2D"), (self.up_block_types, "UpDecoderBlock2D")):
            for kind in types:
                one_of("block types", kind, known)
        if len(self.down_block_types) != len(self.block_out_channels):
            raise ValueError("block_out_channels and down_block_types differ in length")
        return KLVAESettings(
            latent_channels=self.latent_channels,
            channels=tuple(self.block_out_channels),
            blocks=self.layers_per_block,
            groups=self.norm_num_groups,
            mid_attention=self.mid_block_add_attention,
            quant_conv=self.use_quant_conv,
            post_quant_conv=self.use_post_quant_conv,
        )


class TinyConfig(Factors):
    """AutoencoderTiny's configuration."""

    model_config = ConfigDict(extra="forbid")

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: list[int] = [64, 64, 64, 64]
    decoder_block_out_channels: list[int] = [64, 64, 64, 64]
    act_fn: str = "relu"
    upsample_fn: str = "nearest"
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: list[int] = [1, 3, 3, 3]
    num_decoder_blocks: list[int] = [3, 3, 3, 1]
    latent_magnitude: Any = None  # of its bytes
    latent_shift: Any = None
    block_out_channels: Any = None  # the decoder's again
    force_upcast: Any = None

    def settings(self) -> VAEArchitecture:
        """The same in our words."""
        one_of("act_fn", self.act_fn, "relu")
        one_of("upsample_fn", self.upsample_fn, "nearest")
        one_of("upsampling_scaling_factor", self.upsampling_scaling_factor, 2)
        widths = {*self.encoder_block_out_channels, *self.decoder_block_out_channels}
        if len(widths) != 1:
            raise ValueError(f"its levels have different widths: {sorted(widths)}")
        if len(self.num_encoder_blocks) != len(self.num_decoder_blocks):
            raise ValueError("num_encoder_blocks and num_decoder_blocks differ in length")
        return TinyVAESettings(
            latent_channels=self.latent_channels,
            width=widths.pop(),
            encoder_blocks=tuple(self.num_encoder_blocks),
            decoder_blocks=tuple(self.num_decoder_blocks),
        )


CONFIGS: dict[str, type[KLConfig | TinyConfig]] = {"AutoencoderKL": KLConfig, "AutoencoderTiny": TinyConfig}


def one_of(name: str, value: object, *known: object) -> None:
    """Refuse an option's value that we do not have."""
    if value not in known:
        raise ValueError(f"{name}: there is no {shorten(value)} here, only {' or '.join(map(str, known))}")


def import_folder(folder: Path, run: Path, resolution: int) -> Path:
    """Import a folder of diffusers: of a VAE, or of a pipeline that has one."""
    home = folder
    if (index := folder / "model_index.json").is_file():
        parts = small_json(index)
        home = next((folder / name for name in ("vae", "vqvae") if (folder / name / "config.json").is_file()), folder)
        if home == folder:
            raise UserError(f"{folder} is a pipeline without a VAE: it has no folder vae")
        left = "needs text, and lightdiff's has no such input" if "text_encoder" in parts else "has another layout"
        if "unet" in parts or "transformer" in parts:
            print_note(f"only the VAE of this pipeline is imported: its denoiser {left}")
    if not (home / "config.json").is_file():
        raise UserError(f"{folder} has neither model_index.json nor config.json: it is no folder of diffusers")
    config = small_json(home / "config.json")
    kind = config.get("_class_name")
    if kind not in CONFIGS:
        other = config.get("architectures") or config.get("model_type")
        what = shorten(kind) if kind else f"{shorten(other)} of transformers" if other else "an unknown kind of network"
        raise UserError(NO_VAE.format(home, what))
    plain = {name: value for name, value in config.items() if not name.startswith("_") and value is not None}
    try:
        found = CONFIGS[kind].model_validate(plain)
        one_of("in_channels", found.in_channels, 3)
        one_of("out_channels", found.out_channels, 3)
        model = found.settings()
    except ValidationError as error:
        name, why, kind_of_problem = first_problem(error)
        why = f"the option {name} is not known here" if kind_of_problem == "extra_forbidden" else f"{name}: {why}"
        raise UserError(f"{home / 'config.json'}: {shorten(why)}") from None
    except ValueError as error:
        raise UserError(f"{home / 'config.json'}: {shorten(error)}") from None
    factors = {name: value for name, value in found.model_dump(include={*Factors.model_fields}).items() if value}
    return finish(home, model, renamed(of_folder(home)), {"source": folder.name, **factors}, run, resolution)


def small_json(path: Path) -> dict[str, Any]:
    """A configuration.

    Raises:
        UserError: If it is larger than any.
    """
    if path.stat().st_size > MAX_CONFIG:
        raise UserError(f"{path} has {path.stat().st_size / 1e6:.0f} MB: it is no configuration")
    return read_json(path)


# --- weights ------------------------------------------------------------------------------------------------------


def of_folder(folder: Path) -> Weights:
    """The weights in a folder of diffusers, which may be cut into shards."""
    if (index := folder / f"{WEIGHTS}.safetensors.index.json").is_file():
        shards = small_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(n, str) and Path(n).name == n for n in shards.values()):
            raise UserError(f"{index} names no files of this folder")
        found = {
            name: lazy
            for shard in sorted(set(shards.values()))
            for name, lazy in of_safetensors(folder / shard).items()
        }
        if lost := sorted(set(shards) - set(found)):
            raise UserError(f"{index}: {len(lost)} tensors are in none of its files, {shorten(lost[0])} first")
        return found
    for name in NAMES:
        if (path := folder / name).is_file():
            return of_pickle(path, read(path, "checkpoint")) if path.suffix in PICKLES else of_safetensors(path)
    raise UserError(f"{folder} holds no weights: it has none of {', '.join(NAMES)}")


def of_safetensors(path: Path) -> Weights:
    """The tensors of a .safetensors file.

    Raises:
        UserError: If it is none.
    """
    try:
        open_regular(path).close()
        file: Any = safe_open(path, framework="pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or no .safetensors file: {shorten(error)}") from None
    return {name: Lazy(shape, lambda name=name: file.get_tensor(name)) for name, shape in shapes.items()}  # type: ignore[misc]


def of_pickle(path: Path, content: Any) -> Weights:
    """The tensors of a pickle, which torch.load has opened with weights_only.

    Raises:
        UserError: If they are none, or larger than the file.
    """
    found = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(found, Mapping):
        raise UserError(f"{path} holds no weights by name")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors or not all(map(is_plain, tensors.values())):
        raise UserError(f"{path} holds no weights that can be read")
    if sum(tensor.nbytes for tensor in tensors.values()) > path.stat().st_size:
        raise UserError(f"{path} claims to hold more weights than its size explains: it is damaged, or made to harm")
    return {name: Lazy(tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}  # type: ignore[misc]


def first_stage(path: Path, weights: Weights) -> Weights:
    """The tensors of the VAE, without their prefix, among those of a whole model.

    Raises:
        UserError: If there are none.
    """
    prefixes = [prefix for prefix in ("first_stage_model.", "vae.") if f"{prefix}encoder.conv_in.weight" in weights]
    prefix = prefixes[0] if prefixes else ""
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    inside = {name.removeprefix(prefix): lazy for name, lazy in weights.items() if name.startswith(prefix)}
    found = {name: lazy for name, lazy in inside.items() if name.startswith(parts)}
    if any(name.startswith("quantize.") for name in inside):
        raise UserError(NO_VAE.format(path, "a VQ model, whose latents are entries of a codebook"))
    if "encoder.conv_in.weight" not in found or "decoder.conv_out.weight" not in found:
        names = ", ".join(sorted({name.split(".")[0] for name in weights})[:5])
        raise UserError(NO_VAE.format(path, f"tensors of other names ({shorten(names)}, ...)"))
    return found


OLD_NAMES = [  # of latent diffusion's scripts, and of diffusers before 0.15
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(\w+)\.norm_out\.", r"\1.conv_norm_out."),
    (r"\.(?:q|query)\.(\w+)$", r".to_q.\1"),
    (r"\.(?:k|key)\.(\w+)$", r".to_k.\1"),
    (r"\.(?:v|value)\.(\w+)$", r".to_v.\1"),
    (r"\.(?:proj_out|proj_attn)\.(\w+)$", r".to_out.0.\1"),
    (r"^quant_conv\.", "encoder.quant_conv."),
    (r"^post_quant_conv\.", "decoder.post_quant_conv."),
]


def renamed(weights: Weights) -> Weights:
    """Tensors by our names. The scripts count a decoder's levels from the image, and project by 1 x 1 convolutions."""
    levels = [int(found[1]) for name in weights if (found := re.match(r"decoder\.up\.(\d+)\.", name))]
    result: Weights = {}
    for name, lazy in weights.items():
        ours = name
        for pattern, by in OLD_NAMES:
            ours = re.sub(pattern, by, ours)
        if levels and (found := re.match(r"decoder\.up_blocks\.(\d+)(.*)", ours)):
            ours = f"decoder.up_blocks.{max(levels) - int(found[1])}{found[2]}"
        if ".attentions." in ours and len(lazy.shape) == 4 and lazy.shape[2:] == (1, 1):
            lazy = Lazy(lazy.shape[:2], lambda lazy=lazy: lazy.read().flatten(1))  # type: ignore[misc]
        result[ours] = lazy
    return result


def guessed(path: Path, weights: Weights) -> VAEArchitecture:
    """The settings that weights without a configuration are of, but for the groups, which are 32 as they always are.

    Raises:
        UserError: If they are of no AutoencoderKL.
    """

    def count(pattern: str) -> int:
        return len({found[1] for name in weights if (found := re.match(pattern, name))})

    levels, blocks = count(r"encoder\.down_blocks\.(\d+)\."), count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    try:
        widths = [weights[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)]
        return KLVAESettings(
            latent_channels=weights["encoder.conv_out.weight"].shape[0] // 2,
            channels=tuple(widths),
            blocks=blocks,
            mid_attention="encoder.mid_block.attentions.0.to_q.weight" in weights,
            quant_conv="encoder.quant_conv.weight" in weights,
            post_quant_conv="decoder.post_quant_conv.weight" in weights,
        )
    except (KeyError, IndexError, ValidationError):
        raise UserError(NO_VAE.format(path, "an autoencoder of another layout")) from None


def finish(
    path: Path, model: VAEArchitecture, weights: Weights, about: dict[str, Any], run: Path, resolution: int
) -> Path:
    """Check weights against the network of their settings, and write them as the run's best and last checkpoint.

    Raises:
        UserError: If one is missing, left over, of another shape, no number or not finite.
    """
    check_size(resolution, model.factor)
    with torch.device("meta"):  # in no memory, whatever sizes the configuration claims
        check_fit(f"{path}: its weights do not fit its configuration", build_vae(model), shapes(weights))
    tensors: dict[str, Tensor] = {}
    for name, lazy in weights.items():
        tensor = lazy.read()
        if not tensor.dtype.is_floating_point or not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds what is no finite number")
        tensors[f"model.{name}"] = tensor if tensor.dtype in DTYPES else tensor.float()
    here = RunFolder(run)
    settings = TrainVAESettings(run=run, images=ImageSettings(resolution=resolution), model=model)
    metadata = Metadata(stage="vae", settings=settings.model_dump(mode="json"), extra={"imported": about})
    return write(here.vae.best, here.vae.last, tensors, metadata)


def compare_factors(s: Statistics, imported: Any) -> None:
    """Say how an imported VAE's own factors, by which its makers scaled latents, compare with those measured here."""
    factors = imported if isinstance(imported, dict) else {}
    factor, shift = (factors.get(name) or 0.0 for name in ("scaling_factor", "shift_factor"))
    if isinstance(factor, float) and isinstance(shift, float) and factor:
        measured = f"scaling factor {1 / max(s.std, 1e-6):.4f}, shift {s.mean:.4f}"
        console.print(f"The VAE came with scaling factor {factor:g}, shift {shift:g}; these latents have {measured}.")
        console.print("What is measured is used; where it is far from that, these images are unlike the VAE's.")
