"""presets: the packaged sets of architecture settings, with parameters and memory."""

import torch
from rich.table import Table
from torch import Tensor, nn

from lightdiff.extras.gpu_memory import activation_bytes
from lightdiff.extras.tables import print_table
from lightdiff.models.unet import build_unet
from lightdiff.models.vae import build_vae
from lightdiff.options import PRESETS, build, preset_layer
from lightdiff.runtime.progress import SafeConsole
from lightdiff.settings import Architecture, LoopSettings, Size, TrainUNetSettings, TrainVAESettings
from lightdiff.training.optimizers import optimizer_state_bytes

BYTES_A_PARAMETER = 12  # float32 weights, gradients, averaged weights


def show_presets(resolution: Size) -> None:
    """Print each preset's networks for images of a size: parameters, and memory to train them in float32."""
    table = Table(
        title=f"Presets at {resolution} px: memory to train in fp32 = fixed part + so much an image of a micro-batch"
    )
    for heading in ("preset", "network", "widths", "parameters", "fixed", "an image"):
        table.add_column(heading, justify="left" if heading in ("preset", "network", "widths") else "right")
    for name in PRESETS:
        vae_settings = build(TrainVAESettings, [preset_layer("vae", name)])
        vae = vae_settings.model.resolved(min(resolution))
        if resolution.height % vae.factor or resolution.width % vae.factor:
            table.add_row(name, "VAE", widths_of(vae), f"needs images divisible by {vae.factor}", "", "")
            continue
        size = resolution.divided(vae.factor)
        unet_settings = build(TrainUNetSettings, [preset_layer("unet", name)])
        unet = unet_settings.model.resolved(min(size))
        with torch.device("meta"):  # shapes alone: no memory, no time
            image = torch.zeros(1, 3, *resolution)
            latent = torch.zeros(1, vae.latent_channels, *size)
            add_row(table, name, "VAE", widths_of(vae), build_vae(vae), (image, latent), vae_settings.loop)
            if size[0] % unet.factor or size[1] % unet.factor:
                table.add_row("", "U-Net", widths_of(unet), f"needs latents divisible by {unet.factor}", "", "")
            else:
                t = torch.zeros(1, dtype=torch.long)
                network = build_unet(unet, vae.latent_channels)
                add_row(table, "", "U-Net", widths_of(unet), network, (latent, t), unet_settings.loop)
    print_table(SafeConsole(), table)


def add_row(
    table: Table,
    name: str,
    network: str,
    widths: str,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    loop: LoopSettings,
) -> None:
    """Add one network's row."""
    parameters = sum(p.numel() for p in model.parameters())
    fixed = parameters * BYTES_A_PARAMETER + optimizer_state_bytes(model, loop)
    image = activation_bytes(model, inputs)
    table.add_row(
        name,
        network,
        widths,
        f"{parameters / 1e6:.2f} M",
        f"{fixed / 1e6:.0f} MB",
        f"{image / 1e6:.1f} MB",
    )


def widths_of(model: Architecture) -> str:
    """An architecture's widths as one types them: the VAE's encoder's | decoder's, the U-Net's."""
    names = ("encoder_channels", "decoder_channels", "channels")
    return " | ".join(",".join(map(str, getattr(model, name))) for name in names if hasattr(model, name))
