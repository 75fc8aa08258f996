"""presets: the packaged sets of settings, with parameters, FLOPs, memory, images seen and hours."""

import time
from typing import TypeVar

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightdiff.defaults import preset_for
from lightdiff.extras.gpu_memory import activation_bytes
from lightdiff.extras.tables import print_table
from lightdiff.models.unet import build_unet
from lightdiff.models.vae import build_vae
from lightdiff.options import PRESETS, build, preset_layer
from lightdiff.runtime.processes import autocast, pick_device, pick_precision
from lightdiff.runtime.progress import SafeConsole
from lightdiff.settings import Architecture, LoopSettings, Size, TrainUNetSettings, TrainVAESettings
from lightdiff.training.optimizers import optimizer_state_bytes

T = TypeVar("T", TrainVAESettings, TrainUNetSettings)
BYTES_A_PARAMETER = 12  # float32 weights, gradients, averaged weights
BACKWARD = 3  # a training step's FLOPs over those of the forward pass
HEADINGS = ("preset", "network", "widths", "parameters", "GFLOP", "fixed", "an image", "images seen", "hours here")
EXPLAINED = (
    "GFLOP: forward, an image. Memory to train in fp32: a fixed part, and so much an image of a micro-batch. Images "
    "seen: unless --steps or --epochs is given, and at most 300 passes over the data. Hours: estimated, {backward} x "
    "GFLOP x images at the {speed:.3g} GFLOP/s that a convolution of {width} channels reaches on this {device} now; "
    "without LPIPS, loading and validation. With no --preset, a training takes {chosen}."
)
WIDTH, TRIES = 128, 3  # of the convolution


def show_presets(resolution: Size) -> None:
    """Print each preset's networks for images of a size: what they hold, and what training them takes."""
    device = pick_device("auto")
    speed = flops_a_second(device)
    table = Table(title=f"Presets at {resolution} px")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in HEADINGS[:3] else "right")
    for name in PRESETS:
        vae_settings = built(TrainVAESettings, "vae", name, resolution)
        vae = vae_settings.model.resolved(min(resolution))
        if resolution.height % vae.factor or resolution.width % vae.factor:
            table.add_row(name, "VAE", widths_of(vae), f"needs images divisible by {vae.factor}", *[""] * 5)
            continue
        size = resolution.divided(vae.factor)
        unet_settings = built(TrainUNetSettings, "unet", name, resolution)
        unet = unet_settings.model.resolved(min(size))
        with torch.device("meta"):  # shapes alone: no memory, no time
            image = torch.zeros(1, 3, *resolution)
            latent = torch.zeros(1, vae.latent_channels, *size)
            add_row(table, (name, "VAE", widths_of(vae)), build_vae(vae), (image, latent), vae_settings.loop, speed)
            if size[0] % unet.factor or size[1] % unet.factor:
                table.add_row("", "U-Net", widths_of(unet), f"needs latents divisible by {unet.factor}", *[""] * 5)
            else:
                t = torch.zeros(1, dtype=torch.long)
                network = build_unet(unet, vae.latent_channels)
                add_row(table, ("", "U-Net", widths_of(unet)), network, (latent, t), unet_settings.loop, speed)
    console = SafeConsole()
    print_table(console, table)
    about = {"backward": BACKWARD, "speed": speed / 1e9, "width": WIDTH, "device": device.type}
    console.print(EXPLAINED.format(**about, chosen=preset_for(device.type)), soft_wrap=True)


def built(model: type[T], family: str, name: str, resolution: Size) -> T:
    """A preset's settings for images of a size."""
    settings: T = build(model, [preset_layer(family, name, min(resolution))])
    return settings


def flops_a_second(device: torch.device) -> float:
    """What this machine computes in training steps of a convolution, the best of a few tries."""
    layer = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, device=device)
    x = torch.randn(8, WIDTH, 32, 32, device=device, requires_grad=True)
    speeds, precision = list[float](), pick_precision("auto", device)
    for _ in range(1 + TRIES):
        began = time.perf_counter()
        with autocast(device, precision):
            y = layer(x)
        y.sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        speeds.append(BACKWARD * 2 * 9 * WIDTH * y.numel() / (time.perf_counter() - began))
    return max(speeds[1:])


def add_row(
    table: Table,
    names: tuple[str, str, str],
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    loop: LoopSettings,
    speed: float,
) -> None:
    """Add one network's row."""
    parameters = sum(p.numel() for p in model.parameters())
    fixed = parameters * BYTES_A_PARAMETER + optimizer_state_bytes(model, loop)
    with FlopCounterMode(display=False) as flops:
        model(*inputs)
    images = loop.steps * loop.batch_size
    table.add_row(
        *names,
        f"{parameters / 1e6:.2f} M",
        f"{flops.get_total_flops() / 1e9:.3g}",
        f"{fixed / 1e6:.0f} MB",
        f"{activation_bytes(model, inputs) / 1e6:.1f} MB",
        f"{images / 1e6:.3g} M",
        f"{float(f'{images * BACKWARD * flops.get_total_flops() / speed / 3600:.2g}'):,g}",
    )


def widths_of(model: Architecture) -> str:
    """An architecture's widths as one types them: the VAE's encoder's | decoder's, the U-Net's."""
    names = ("encoder_channels", "decoder_channels", "channels")
    return " | ".join(",".join(map(str, getattr(model, name))) for name in names if hasattr(model, name))
