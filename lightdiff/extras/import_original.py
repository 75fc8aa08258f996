"""import: a checkpoint of the original scripts (.pth) -> one of lightdiff.

The originals are pickles with the fields model_state_dict, ema_state_dict (U-Net), VAE_CFG or UNET_CFG, and args.
They are opened with weights_only=True, so that no code in them runs, and take no more memory than the file's size.
"""

import argparse
import pathlib
import re
import types
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.serialization import safe_globals

from lightdiff import checkpoint
from lightdiff.checkpoint import Checkpoint, Metadata, check_fit
from lightdiff.errors import UserError, shorten
from lightdiff.models.original import OriginalUNetSettings, OriginalVAESettings
from lightdiff.models.unet import build_unet
from lightdiff.models.vae import build_vae
from lightdiff.pipeline import vae_digest
from lightdiff.run_folder import RunFolder, atomic_link, ensure_writable, open_regular
from lightdiff.settings import (
    ImageSettings,
    LatentsSettings,
    LevelSettings,
    LoopSettings,
    ObjectiveSettings,
    ScheduleSettings,
    TrainUNetSettings,
    TrainVAESettings,
    VAEArchitecture,
    VAELossSettings,
)

WRAPPERS = ("module", "_orig_mod")  # parts of names that DistributedDataParallel, SWA and torch.compile add


def import_checkpoint(file: Path, run: Path, resolution: int) -> Path:
    """Write the lightdiff form of an original checkpoint into a run folder and return its path.

    Raises:
        UserError: If the file is none, a network of that kind is there already, or a U-Net comes without its VAE.
    """
    content = read(file)
    if not isinstance(content, dict) or not isinstance(content.get("model_state_dict"), dict):
        raise UserError(f"{file} is no checkpoint of the original scripts: it has no model_state_dict")
    return import_content(file, content, run, resolution)


def import_content(file: Path, content: dict[str, Any], run: Path, resolution: int) -> Path:
    """The same for a file's content."""
    kinds = {"VAE_CFG": import_vae, "UNET_CFG": import_unet}
    kind = next((name for name in kinds if isinstance(content.get(name), (dict, argparse.Namespace))), None)
    if kind is None:
        raise UserError(f"{file} is no checkpoint of the original scripts: it has neither VAE_CFG nor UNET_CFG")
    try:
        content |= {name: plain_dict(content.get(name) or {}) for name in (kind, "args")}
        content["global_step"] = int(content.get("global_step", 0))
        return kinds[kind](file, content, RunFolder(run), resolution)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RuntimeError, RecursionError) as error:
        if isinstance(error, ValidationError):
            name, problem, _ = first_problem(error)
            error = ValueError(f"{name}: {problem}")
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{file}: its {kind} or args are not those of the original scripts: {shorten(why)}") from None


def first_problem(error: ValidationError) -> tuple[str, str, str]:
    """The first field that is wrong, why, and pydantic's kind; not its value, whose text may be larger than a file."""
    first = error.errors(include_input=False, include_context=False)[0]
    return ".".join(map(str, first["loc"])), first["msg"], first["type"]


def plain_dict(value: Any) -> dict[str, Any]:
    """A configuration as a dictionary of Python's own numbers."""
    found = vars(value) if isinstance(value, argparse.Namespace) else dict(value)
    return {name: one.item() if isinstance(one, (np.generic, Tensor)) else one for name, one in found.items()}


def harmless() -> list[Any]:
    """What a checkpoint may hold beside tensors and plain values: making one of these runs no code of the file's."""
    dtypes = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdgFD"}
    scalar = np.float64(0).__reduce__()[0]
    names: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # NumPy 1 and 2
    for module in ("pathlib", "pathlib._local"):  # _local: Python 3.13
        for kind, flavour in (("Posix", pathlib.PurePosixPath), ("Windows", pathlib.PureWindowsPath)):
            names += [(flavour, f"{module}.{kind}Path"), (flavour, f"{module}.Pure{kind}Path")]
    names += [(empty_dict, "collections.defaultdict")]  # torch fills no other dictionaries than plain ones
    return [argparse.Namespace, types.SimpleNamespace, list, dict, int, float, np.dtype, *dtypes, *names]


def empty_dict(*factory: Any) -> dict[Any, Any]:
    """What a defaultdict begins as."""
    return {}


def read(file: Path, kind: str = "checkpoint of the original scripts") -> Any:
    """The content of a pickle of some kind, whose tensors stay in the file until they are used.

    Raises:
        UserError: If it cannot be read, or would run code.
    """
    try:
        with open_regular(file) as stream:
            size, zipped = file.stat().st_size, zipfile.is_zipfile(stream)
            members = zipfile.ZipFile(stream).infolist() if zipped else []
            if any(member.compress_type != zipfile.ZIP_STORED or member.file_size > size for member in members):
                raise UserError(f"{file} is compressed, which torch.save does not do: unpack it, and save it again")
        with safe_globals(harmless()):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file") from None
    except Exception as error:  # torch.load raises whatever a broken zip or pickle provokes
        if found := re.search(r"GLOBAL ([\w.]+) ", str(error)):  # torch's own words advise to load it unsafely
            raise UserError(f"{file} holds a {found[1]}, which could run code: save it anew without that") from None
        what = type(error).__name__
        raise UserError(f"{file} is damaged or no {kind}: {what} in reading it") from None


def import_vae(file: Path, content: dict[str, Any], run: RunFolder, resolution: int) -> Path:
    """Write the VAE as the run's best and last checkpoint."""
    config, args = content["VAE_CFG"], content["args"]
    model = OriginalVAESettings(
        latent_channels=config["latent_channels"],
        encoder_channels=tuple(config["enc_channel_args"]),
        decoder_channels=tuple(config["dec_channel_args"]),
        encoder_blocks=tuple(config["num_conv_per_enc_block"]),
        decoder_blocks=tuple(config["num_conv_per_dec_block"]),
        output=config["final_activation"],
    )
    check_size(resolution, model.factor)
    settings = TrainVAESettings(
        run=run.path,
        images=ImageSettings(resolution=resolution),
        loss=VAELossSettings(kl_beta=args.get("kl_beta", 1e-3), lpips_gamma=args.get("lpips_gamma", 0.5)),
        loop=loop_settings(args, ema_decay=()),
        model=model,
    )
    weights = weights_of(file, content["model_state_dict"], partial(build_vae, model))
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    metadata = Metadata(stage="vae", settings=settings.model_dump(mode="json"), step=content["global_step"])
    return write(run.vae.best, run.vae.last, tensors, metadata)


def import_unet(file: Path, content: dict[str, Any], run: RunFolder, resolution: int) -> Path:
    """Write the U-Net, bound to the VAE imported into the same run, as the run's last checkpoint."""
    if not run.vae.best.is_file():
        raise UserError(
            f"{run.vae.best} is missing: import the VAE that this U-Net belongs to first, into the same --run"
        )
    vae = Checkpoint(run.vae.best, "vae")
    factor = vae.settings(VAEArchitecture, "model").factor
    config, args = content["UNET_CFG"], content["args"]
    channels = tuple(config["down_channel_args"])
    if tuple(config["up_channel_args"]) != channels[::-1]:
        raise UserError(
            f"{file}: its up_channel_args are not its down_channel_args reversed; lightdiff has no such U-Net"
        )
    model = OriginalUNetSettings(
        channels=channels, blocks=config["num_res_blocks_per_level"], time_dim=config["time_dim"]
    )
    check_size(resolution, factor * model.factor)
    side = resolution // factor
    settings = TrainUNetSettings(
        run=run.path,
        loop=loop_settings(args, ema_decay=(args.get("decay", 0.999),)),
        target=ObjectiveSettings(objective="eps", loss_weight="none"),
        levels=LevelSettings(density="uniform", stratified=False),
        noise=ScheduleSettings(
            schedule=args.get("noise_scheduler_type", "cosine"), timesteps=args.get("total_timesteps", 1000)
        ),
        model=model,
        latent=LatentsSettings(
            channels=config["latent_channels"],
            height=side,
            width=side,
            scale=(args.get("scaling_factor", 1.0),),
            only_mu=True,
        ),
    )
    build, tensors = partial(build_unet, model, config["latent_channels"]), dict[str, Tensor]()
    for prefix, field in (("model.", "model_state_dict"), ("ema.", "ema_state_dict")):
        if content.get(field):
            tensors |= {prefix + n: w for n, w in weights_of(file, content[field], build).items()}
    metadata = Metadata(
        stage="unet",
        settings=settings.model_dump(mode="json"),
        step=content["global_step"],
        lineage={"vae": vae_digest(vae)},
    )
    return write(run.unet.last, None, tensors, metadata)


def weights_of(file: Path, theirs: Any, build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The tensors of the network, in float32; names may come from DistributedDataParallel or torch.compile.

    Raises:
        UserError: If one is missing, of another shape, or not a tensor; or if they are larger than the file.
    """
    if not isinstance(theirs, Mapping) or not all(map(is_plain, theirs.values())):
        raise UserError(f"{file} is no checkpoint of the original scripts: its weights are no tensors")
    if sum(tensor.numel() * tensor.element_size() for tensor in theirs.values()) > file.stat().st_size:
        raise UserError(f"{file} claims to hold more weights than its size explains: it is damaged, or made to harm")
    parts = {name: [part for part in str(name).split(".") if part not in WRAPPERS] for name in theirs}
    found = {".".join(parts[name]): tensor for name, tensor in theirs.items() if name != "n_averaged"}
    shapes = {name: tensor.shape for name, tensor in found.items()}
    with torch.device("meta"):  # in no memory, whatever sizes the configuration claims
        check_fit(f"{file}: its weights do not fit its configuration", build(), shapes)
    return {name: tensor.float().clone() for name, tensor in found.items()}


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor of real numbers that lie in the file."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_meta or value.is_complex())


def check_size(resolution: int, factor: int) -> None:
    """Check that images of this size fit the networks."""
    if resolution < factor or resolution % factor:
        raise UserError(f"--resolution: {resolution} is not divisible by {factor}, as these networks need")


def loop_settings(args: dict[str, Any], ema_decay: tuple[float, ...]) -> LoopSettings:
    """What the original's arguments say of its loop, in our words."""
    size, accumulated = int(args.get("batch_size", 1)), int(args.get("accum_grad_after_k_steps", 1))
    return LoopSettings(
        batch_size=size * accumulated,
        micro_batch=size,
        optimizer="adamw",
        lr=args.get("lr", 1e-4),
        lr_schedule="constant",
        warmup_steps=0,
        ema_decay=ema_decay,
        seed=args.get("random_seed", 0),
        precision="fp32",
    )


def write(path: Path, also: Path | None, tensors: dict[str, Tensor], metadata: Metadata) -> Path:
    """Write a checkpoint where none is yet."""
    ensure_writable(path.parent)
    if path.exists():
        raise UserError(f"{path} is there already: choose another --run")
    checkpoint.save(path, tensors, metadata)
    if also is not None:
        atomic_link(also, path)
    return path
