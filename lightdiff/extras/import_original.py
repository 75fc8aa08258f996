"""import: a checkpoint of the original scripts (.pth) -> one of lightdiff.

The originals are pickles with the fields model_state_dict, ema_state_dict (U-Net), VAE_CFG or UNET_CFG, and args.
They are opened with weights_only=True, so that no code in them runs.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightdiff import checkpoint
from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.errors import UserError
from lightdiff.models.original import OriginalUNetSettings, OriginalVAESettings
from lightdiff.models.unet import build_unet
from lightdiff.models.vae import build_vae
from lightdiff.pipeline import vae_digest
from lightdiff.run_folder import RunFolder, atomic_link, ensure_writable
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


def import_checkpoint(file: Path, run: Path, resolution: int) -> Path:
    """Write the lightdiff form of an original checkpoint into a run folder and return its path.

    Raises:
        UserError: If the file is none, a network of that kind is there already, or a U-Net comes without its VAE.
    """
    content = read(file)
    kinds = {"VAE_CFG": import_vae, "UNET_CFG": import_unet}
    kind = next((name for name in kinds if isinstance(content.get(name), dict)), None)
    if kind is None:
        raise UserError(f"{file} is no checkpoint of the original scripts: it has neither VAE_CFG nor UNET_CFG")
    content["args"] = content.get("args") or {}
    try:
        return kinds[kind](file, content, RunFolder(run), resolution)
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # ValueError: pydantic's too
        why = str(error).replace("\n", " ")
        raise UserError(f"{file}: its {kind} or args are not those of the original scripts: {why}") from None


def read(file: Path) -> dict[str, Any]:
    """The content of an original checkpoint.

    Raises:
        UserError: If it cannot be read, or would run code.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file") from None
    except Exception as error:  # torch.load raises whatever a broken zip or pickle provokes
        what = type(error).__name__  # torch's own words advise to load it unsafely
        raise UserError(f"{file} is damaged or no checkpoint of the original scripts: {what} in reading it") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_state_dict"), dict):
        raise UserError(f"{file} is no checkpoint of the original scripts: it has no model_state_dict")
    return content


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
        loop=loop_settings(args, ema_decay=0.0),
        model=model,
    )
    tensors = {f"model.{n}": w for n, w in weights_of(file, content["model_state_dict"], build_vae(model)).items()}
    metadata = Metadata(stage="vae", settings=settings.model_dump(mode="json"), step=content.get("global_step", 0))
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
        loop=loop_settings(args, ema_decay=args.get("decay", 0.999)),
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
    network, tensors = build_unet(model, config["latent_channels"]), dict[str, Tensor]()
    for prefix, field in (("model.", "model_state_dict"), ("ema.", "ema_state_dict")):
        if content.get(field):
            tensors |= {prefix + n: w for n, w in weights_of(file, content[field], network).items()}
    metadata = Metadata(
        stage="unet",
        settings=settings.model_dump(mode="json"),
        step=content.get("global_step", 0),
        lineage={"vae": vae_digest(vae)},
    )
    return write(run.unet.last, None, tensors, metadata)


def weights_of(file: Path, theirs: dict[str, Any], network: nn.Module) -> dict[str, Tensor]:
    """The tensors of the network, in float32.

    Raises:
        UserError: If one is missing, of another shape, or not a tensor.
    """
    if not all(isinstance(value, Tensor) for value in theirs.values()):
        raise UserError(f"{file} is no checkpoint of the original scripts: its weights are no tensors")
    expected = network.state_dict()
    wrong = [n for n in expected if n not in theirs or theirs[n].shape != expected[n].shape]
    wrong += [n for n in theirs if n not in expected]
    if wrong:
        raise UserError(
            f"{file}: its weights do not fit its configuration: {len(wrong)} tensors differ, {wrong[0]} first"
        )
    return {name: theirs[name].float().clone() for name in expected}


def check_size(resolution: int, factor: int) -> None:
    """Check that images of this size fit the networks."""
    if resolution < factor or resolution % factor:
        raise UserError(f"--resolution: {resolution} is not divisible by {factor}, as these networks need")


def loop_settings(args: dict[str, Any], ema_decay: float) -> LoopSettings:
    """What the original's arguments say of its loop, in our words."""
    size, accumulated = args.get("batch_size", 1), args.get("accum_grad_after_k_steps", 1)
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
