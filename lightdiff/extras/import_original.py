"""import: a checkpoint of the original scripts (.pth) -> one of lightdiff.

The originals are pickles with the fields model_state_dict, ema_state_dict (U-Net), VAE_CFG or UNET_CFG, and args.
They are opened with weights_only=True, so that no code in them runs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightdiff import checkpoint
from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.errors import UserError
from lightdiff.models.unet import UNet
from lightdiff.models.vae import VAE
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
    UNetSettings,
    VAELossSettings,
    VAESettings,
)

Weights = dict[str, Tensor]


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
    model = VAESettings(
        latent_channels=config["latent_channels"],
        encoder_channels=tuple(config["enc_channel_args"]),
        decoder_channels=tuple(config["dec_channel_args"]),
        encoder_blocks=tuple(config["num_conv_per_enc_block"]),
        decoder_blocks=tuple(config["num_conv_per_dec_block"]),
        mid_blocks=0,
        block="plain",
        down_kernel=4,
        upsample="transposed",
        norm="group",
        groups=8,
        output=config["final_activation"],
    )
    settings = TrainVAESettings(
        run=run.path,
        images=ImageSettings(resolution=resolution),
        loss=VAELossSettings(kl_beta=args.get("kl_beta", 1e-3), lpips_gamma=args.get("lpips_gamma", 0.5)),
        loop=loop_settings(args, ema_decay=0.0),
        model=model,
    )
    check_size(resolution, model.factor)
    # The original's modules stand in the same order as ours, so that their weights pair up one by one.
    expected, theirs = VAE(model).state_dict(), content["model_state_dict"]
    if len(theirs) != len(expected):
        raise UserError(f"{file}: {len(theirs)} tensors, but its configuration asks for {len(expected)}")
    weights = renamed(file, theirs, zip(theirs, expected, strict=True))
    check_fit(file, weights, expected)
    metadata = Metadata(stage="vae", settings=settings.model_dump(mode="json"), step=content.get("global_step", 0))
    return write(run.vae.best, run.vae.last, {f"model.{n}": w for n, w in weights.items()}, metadata)


def import_unet(file: Path, content: dict[str, Any], run: RunFolder, resolution: int) -> Path:
    """Write the U-Net, bound to the VAE imported into the same run, as the run's last checkpoint."""
    if not run.vae.best.is_file():
        raise UserError(
            f"{run.vae.best} is missing: import the VAE that this U-Net belongs to first, into the same --run"
        )
    vae = Checkpoint(run.vae.best, "vae")
    factor = vae.settings(VAESettings, "model").factor
    config, args = content["UNET_CFG"], content["args"]
    channels, blocks = tuple(config["down_channel_args"]), config["num_res_blocks_per_level"]
    if tuple(config["up_channel_args"]) != channels[::-1]:
        raise UserError(
            f"{file}: its up_channel_args are not its down_channel_args reversed; lightdiff has no such U-Net"
        )
    model = UNetSettings(
        channels=channels,
        blocks=blocks,
        attend_levels=(),
        mid_attention=True,
        heads=4,
        time_dim=config["time_dim"],
        groups=32,
        group_width=4,
        down_kernel=4,
        zero_init=False,
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
    expected = UNet(model, config["latent_channels"]).state_dict()
    tensors: Weights = {}
    for prefix, field in (("model.", "model_state_dict"), ("ema.", "ema_state_dict")):
        if content.get(field):
            weights = renamed(file, content[field], unet_names(len(channels) - 1, blocks, content[field]))
            check_fit(file, weights, expected)
            tensors |= {prefix + name: weight for name, weight in weights.items()}
    metadata = Metadata(
        stage="unet",
        settings=settings.model_dump(mode="json"),
        step=content.get("global_step", 0),
        lineage={"vae": vae_digest(vae)},
    )
    return write(run.unet.last, None, tensors, metadata)


def unet_names(levels: int, blocks: int, theirs: Weights) -> Iterator[tuple[str, str]]:
    """Pairs (their name, ours) of the U-Net's tensors."""
    modules = {
        "time_embedding.1": "time.linear1",
        "time_embedding.3": "time.linear2",
        "latent_to_unet_input": "stem",
        "mid_block1": "mid1.block",
        "mid_attn.norm": "mid1.attention.norm",
        "mid_attn.attention.out_proj": "mid1.attention.proj",
        "mid_block2": "mid2.block",
        "final_norm": "norm",
        "final_conv": "out",
    }
    for level in range(levels):
        first = level * (blocks + 1)
        modules[f"down.{first + blocks}.conv"] = f"down.{level}.resize"
        modules[f"up.{first}.conv"] = f"up.{level}.resize.conv"
        for block in range(blocks):
            modules[f"down.{first + block}"] = f"down.{level}.stages.{block}.block"
            modules[f"up.{first + block + 1}"] = f"up.{level}.stages.{block}.block"
    for name in theirs:
        if name.startswith("mid_attn.attention.in_proj_"):
            yield name, name.replace("mid_attn.attention.in_proj_", "mid1.attention.qkv.")
            continue
        module = next((m for m in modules if name.startswith(f"{m}.")), None)
        if module is not None:
            yield name, modules[module] + name.removeprefix(module).replace("time_proj.1", "time")


def renamed(file: Path, theirs: Weights, names: Iterator[tuple[str, str]]) -> Weights:
    """Their tensors under our names, as float32."""
    if not all(isinstance(value, Tensor) for value in theirs.values()):
        raise UserError(f"{file} is no checkpoint of the original scripts: its weights are no tensors")
    return {ours: theirs[name].float().clone() for name, ours in names}


def check_fit(file: Path, weights: Weights, expected: Weights) -> None:
    """See that every tensor of the network is there, in its shape."""
    wrong = [n for n in expected if n not in weights or weights[n].shape != expected[n].shape]
    if wrong:
        raise UserError(
            f"{file}: its weights do not fit its configuration: {len(wrong)} tensors differ, {wrong[0]} first"
        )


def check_size(resolution: int, factor: int) -> None:
    """See that images of this size fit the networks."""
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


def write(path: Path, also: Path | None, tensors: Weights, metadata: Metadata) -> Path:
    """Publish a checkpoint where none is yet."""
    ensure_writable(path.parent)
    if path.exists():
        raise UserError(f"{path} is there already: choose another --run")
    checkpoint.save(path, tensors, metadata)
    if also is not None:
        atomic_link(also, path)
    return path
