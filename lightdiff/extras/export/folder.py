"""An exported model as a folder: what it is, in lightdiff.json, and its weights as .safetensors; written and read.

Two forms: for diffusers, with `model_index.json` and code of its own where diffusers has none of our networks; and
plain, with two files of weights.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import nn

from lightdiff import __version__
from lightdiff.checkpoint import check_fit
from lightdiff.errors import UserError, shorten
from lightdiff.extras.export.bundle import bundle
from lightdiff.extras.hub import local_copy
from lightdiff.extras.import_original import first_problem
from lightdiff.extras.import_vae import Weights, of_safetensors, renamed, shapes, small_json
from lightdiff.models.kl import KLVAESettings
from lightdiff.models.unet import build_unet
from lightdiff.models.vae import build_vae
from lightdiff.pipeline import EXPORTED, Pipeline, cast_weights
from lightdiff.run_folder import atomic_write, atomic_write_text
from lightdiff.runtime.processes import pick_device, pick_precision, to_device
from lightdiff.settings import (
    EARLY,
    Architecture,
    Device,
    Precision,
    TrainUNetSettings,
    UNetArchitecture,
    VAEArchitecture,
)

PLAIN = {name: f"{name}.safetensors" for name in ("vae", "unet", "guide")}
FOR_DIFFUSERS = {name: f"{name}/diffusion_pytorch_model.safetensors" for name in PLAIN}
TEMPLATES = Path(__file__).parent / "templates"
INSIDE = "network."  # what the names of an own network's tensors begin with in a folder of diffusers
FORMAT = 1


class About(BaseModel):
    """What an exported folder says of its model."""

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    lightdiff: str = __version__
    vae: dict[str, Any]  # the architecture
    unet: dict[str, Any]  # what it was trained with, as far as it matters for use
    guide: dict[str, Any] | None = None  # the architecture of the worse U-Net of autoguidance, where there is one


def about(pipeline: Pipeline) -> About:
    """What there is to say of a model; no path, nothing of the machine it was trained on."""
    s = pipeline.settings
    known = s.model_dump(mode="json", include={"model", "target", "noise", "latent", "label", "label_dropout"})
    known["latent"]["labels"] = {s.label: list(s.classes)} if s.label else {}
    vae, guide = pipeline.vae_settings.model_dump(mode="json"), guide_architecture(pipeline)
    return About(vae=vae, unet=known, guide=guide and guide.model_dump(mode="json"))


def guide_architecture(pipeline: Pipeline) -> UNetArchitecture | None:
    """The architecture of the worse U-Net that a model was loaded with."""
    saved = pipeline.checkpoints.get("guide")
    return saved.settings(TrainUNetSettings).model if saved else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    atomic_write_text(path, json.dumps(content, indent=2) + "\n")


def write_weights(path: Path, network: nn.Module, prefix: str = "", names: Mapping[str, str] | None = None) -> None:
    """Write a network's tensors, with a prefix, or under other names."""
    tensors = {
        prefix + (names or {}).get(name, name): tensor.detach().cpu().contiguous()
        for name, tensor in network.state_dict().items()
    }
    metadata = {"format": "pt"}  # without which diffusers and transformers refuse the file
    atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def diffusers_names(vae: nn.Module) -> dict[str, str]:
    """Our names of AutoencoderKL's tensors -> those of diffusers, where they differ."""
    parts = ("encoder.quant_conv.", "decoder.post_quant_conv.")
    return {name: name.partition(".")[2] for name in vae.state_dict() if name.startswith(parts)}


def write_plain(pipeline: Pipeline, folder: Path) -> None:
    """Write the weights as two files; those of AutoencoderKL in the names of diffusers, as other programs read them."""
    names = diffusers_names(pipeline.vae) if isinstance(pipeline.vae_settings, KLVAESettings) else {}
    write_weights(folder / PLAIN["vae"], pipeline.vae, names=names)
    write_weights(folder / PLAIN["unet"], pipeline.unet)
    if pipeline.weak is not None:
        write_weights(folder / PLAIN["guide"], pipeline.weak)


def write_diffusers(pipeline: Pipeline, folder: Path) -> None:
    """Write a folder that diffusers loads, with its own classes where it has one for a network."""
    s, settings = pipeline.settings, pipeline.vae_settings
    latent = s.latent.model_dump(mode="json", exclude={"labels"})
    training = {
        "objective": s.target.objective,
        "noise": s.noise.model_dump(mode="json"),
        "latent": latent,
        "classes": list(s.classes),
    }
    vae_code = ""
    if isinstance(settings, KLVAESettings):
        vae = kl_config(settings, latent, list(pipeline.resolution))
        write_weights(folder / FOR_DIFFUSERS["vae"], pipeline.vae, names=diffusers_names(pipeline.vae))
    else:
        vae = {"_class_name": "LightdiffVAE", "architecture": resolved_settings(settings)}
        write_weights(folder / FOR_DIFFUSERS["vae"], pipeline.vae, INSIDE)
        vae_code = write_code(folder / "vae", "vae", settings.NETWORK)
    write_json(folder / "vae/config.json", vae)
    guide = guide_architecture(pipeline)
    unets = {"unet": (s.model, pipeline.unet)}
    if guide and pipeline.weak:
        unets["guide"] = guide, pipeline.weak
    code = {}
    for name, (model, network) in unets.items():
        unet = {
            "_class_name": "LightdiffUNet",
            "architecture": resolved_settings(model),
            "latent_channels": s.latent.channels,
            "num_classes": len(s.classes),
            "trained": training,
        }
        write_weights(folder / FOR_DIFFUSERS[name], network, INSIDE)
        write_json(folder / name / "config.json", unet)
        code[name] = [write_code(folder / name, "unet", model.NETWORK), "LightdiffUNet"]
    index = {
        "_class_name": [write_code(folder, "pipeline"), "LightdiffPipeline"],
        "vae": [vae_code, "LightdiffVAE"] if vae_code else ["diffusers", "AutoencoderKL"],
        **code,
    }
    write_json(folder / "model_index.json", index)


def resolved_settings(model: Architecture) -> dict[str, Any]:
    """What a network is built from, where there is no class of settings."""
    return model.model_dump(mode="json") | {"factor": model.factor}


def write_code(folder: Path, template: str, network: str = "") -> str:
    """Write a Python file and return its module's name: one of its own, as diffusers keeps those of all folders in one.

    In one process, the code of two models would otherwise be mixed up.
    """
    source = bundle(TEMPLATES / f"{template}.py", network)
    name = f"{template}_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    atomic_write_text(folder / f"{name}.py", source)
    return name


def kl_config(s: KLVAESettings, latent: Mapping[str, Any], resolution: list[int]) -> dict[str, Any]:
    """Settings of AutoencoderKL as diffusers writes them; x0 = (z - mean) / std where a channel has its own."""
    several = max(len(latent["shift"]), len(latent["scale"])) > 1
    factors: dict[str, Any] = {"scaling_factor": latent["scale"][0], "shift_factor": latent["shift"][0]}
    if several:
        mean, scale = (latent[name] * (s.latent_channels // len(latent[name])) for name in ("shift", "scale"))
        factors = {"scaling_factor": 1.0, "latents_mean": mean, "latents_std": [1 / value for value in scale]}
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(s.channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(s.channels),
        "block_out_channels": list(s.channels),
        "layers_per_block": s.blocks,
        "act_fn": "silu",
        "latent_channels": s.latent_channels,
        "norm_num_groups": s.groups,
        "sample_size": resolution,
        "mid_block_add_attention": s.mid_attention,
        "use_quant_conv": s.quant_conv,
        "use_post_quant_conv": s.post_quant_conv,
        **factors,
    }


# --- reading ------------------------------------------------------------------------------------------------------


def load_exported(
    place: str, device: Device = "auto", precision: Precision = "fp32", chosen: Mapping[str, Any] | None = None
) -> Pipeline:
    """The model of an exported folder, or of one at hf://owner/name.

    `chosen` are arguments that choose among networks of a run; here, only guide_with=Path("early") can be met: by the
    worse U-Net that the folder was exported with.

    Raises:
        UserError: If it is none, or its weights are not here or do not fit, or for another choice.
    """
    wanted = {name: value for name, value in (chosen or {}).items() if value is not None}
    for name, value in wanted.items():
        if (name, value) != ("guide_with", EARLY):
            raise UserError(f"{name}={value}: {place} is an exported folder, which holds one model; leave this out")
    folder = local_copy(place)
    if not (folder / EXPORTED).is_file():
        raise UserError(f"{place} has no {EXPORTED}: it was not exported by lightdiff")
    try:
        known = About.model_validate(small_json(folder / EXPORTED))
        model, s = VAEArchitecture.model_validate(known.vae), TrainUNetSettings.model_validate(known.unet)
        weak = known.guide and UNetArchitecture.model_validate(known.guide)
    except ValidationError as error:
        where, why, _ = first_problem(error)
        raise UserError(f"{folder / EXPORTED} cannot be read by lightdiff {__version__}: {where}: {why}") from None
    files = next((f for f in (PLAIN, FOR_DIFFUSERS) if all((folder / f[n]).is_file() for n in ("vae", "unet"))), None)
    if files is None:
        raise UserError(f"{folder} holds no weights as .safetensors: those of onnx and web cannot be loaded again")
    if wanted and not weak:
        raise UserError(
            f"guide_with={EARLY}: {place} was exported without a worse U-Net to guide away from; "
            "export the run again with --guide-with early"
        )
    architectures = {"unet": s.model, "guide": weak if wanted else None}
    builds: dict[str, Any] = {"vae": partial(build_vae, model)} | {
        name: partial(build_unet, architecture, s.latent.channels, len(s.classes))
        for name, architecture in architectures.items()
        if architecture
    }
    networks = {name: filled(folder / files[name], build) for name, build in builds.items()}
    on = pick_device(device)
    numbers = pick_precision(precision, on)
    for network in networks.values():
        to_device(cast_weights(network, numbers), on)
    vae = networks["vae"].to(memory_format=torch.channels_last)
    return Pipeline(vae, model, networks["unet"], s, on, numbers, weak=networks.get("guide"))


def filled(path: Path, build: Any) -> Any:
    """A network with the weights of a file, ready for use.

    Raises:
        UserError: If they are not its own.
    """
    found: Weights = {n.removeprefix(INSIDE): lazy for n, lazy in renamed(of_safetensors(path)).items()}
    try:
        with torch.device("meta"):  # in no memory, whatever sizes it claims
            check_fit(f"{path} does not fit its settings", build(), shapes(found))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path.parent}: its settings make no network: {shorten(error)}") from None
    network = build().requires_grad_(False).eval()
    network.load_state_dict({name: lazy.read() for name, lazy in found.items()})
    return network
