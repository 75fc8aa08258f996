"""What `python -m tests.bench gpu` measures: training steps, encoding and generating, lightdiff's way and others'."""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightdiff.data.images import to_float
from lightdiff.extras.compile import compile_network
from lightdiff.extras.estimate import random_images, random_latents
from lightdiff.models.lpips import PerceptualLoss
from lightdiff.models.unet import build_unet
from lightdiff.models.vae import VAE, build_vae
from lightdiff.options import build, preset_layer
from lightdiff.pipeline import Pipeline, cast_weights
from lightdiff.runtime.processes import Processes, autocast, to_device
from lightdiff.runtime.stage import Stage
from lightdiff.settings import SamplingSettings, TrainUNetSettings, TrainVAESettings
from lightdiff.training.loop import Trainer
from tests.bench import peers
from tests.bench.contest import flops_of, parameters_of


class Sizes(NamedTuple):
    """How large everything is."""

    unets: tuple[str, ...] = ("original", "base")  # presets; the original's U-Net has 201 M parameters
    vaes: tuple[str, ...] = ("base", "small")
    original: tuple[int, ...] = ()  # widths of the original's networks, if not their own
    diffusers: tuple[int, ...] = (128, 256, 384, 512)  # widths of diffusers' U-Net; those of its VAE are half of them
    lpips: Any = "vgg"
    side: int = 256  # of images, in pixels
    latent: int = 32
    batches: tuple[int, ...] = (32, 256)  # of U-Nets
    batch: int = 16  # of VAEs
    drawn: int = 64  # images generated or encoded at a time
    steps: int = 20
    seconds: float = 0.7  # that a round is to take
    compiling: tuple[bool, ...] = (False, True)


TINY = Sizes(("tiny",), ("tiny",), (16,) * 3, (32, 32), "squeeze", 32, 8, (2,), 2, 2, 2, 0.02, (False,))


class Work(NamedTuple):
    """Something to be timed."""

    call: Callable[[], object]
    images: int
    flops: float  # of an image, in its networks
    parameters: int


class Way(NamedTuple):
    """One way of doing one thing."""

    case: str
    name: str
    make: Callable[[], Work]


# --- networks -----------------------------------------------------------------------------------------------------


def settings_of(family: str, preset: str, z: Sizes, **loop: Any) -> Any:
    """A training's settings in bf16; LPIPS is added later, as its real weights would have to be fetched."""
    vae, chosen = family == "vae", preset_layer(family, preset)
    if preset == "original" and z.original:
        names = ("encoder_channels", "decoder_channels") if vae else ("channels",)
        chosen = chosen | {"model": chosen["model"] | dict.fromkeys(names, z.original)}
    size = {"images": {"resolution": z.side}} if vae else {"latent": {"height": z.latent, "width": z.latent}}
    more = size | {"loop": {"precision": "bf16"} | loop} | ({"loss": {"lpips_gamma": 0}} if vae else {})
    return build(TrainVAESettings if vae else TrainUNetSettings, [chosen, more]).resolved()


def network_of(settings: Any) -> Any:
    """The network of a training's settings."""
    return build_vae(settings.model) if isinstance(settings, TrainVAESettings) else build_unet(settings.model, 4)


def lpips_of(net: Any, device: torch.device | str) -> PerceptualLoss:
    """LPIPS with random weights, as fast as trained ones."""
    with torch.device(device):
        found = PerceptualLoss(net, None)
    found.scaling.to(device)  # which lpips makes on the CPU
    return found


def flops(network: Callable[[], Any], z: Sizes, what: str = "step", lpips: str = "") -> float:
    """Operations that an image takes, counted on tensors without numbers: of a training step, or forward alone."""
    with torch.device("meta"):
        x, latent, made = torch.zeros(1, 3, z.side, z.side), torch.zeros(1, 4, z.latent, z.latent), network()
        vae = (x, latent) if isinstance(made, VAE) else (x,)  # diffusers' draws its noise itself
        inputs = {"vae": vae, "encoder": (x,), "decoder": (latent,), "unet": (latent, torch.zeros(1))}
        kind = what if what in inputs else "vae" if hasattr(made, "encoder") else "unet"
        part = getattr(made, what) if what in ("encoder", "decoder") else made
        found = flops_of(part, *inputs[kind], backward=what == "step")
        # LPIPS takes two images, and goes back to one of them alone: its weights have no gradients
        return found + (3 * flops_of(lpips_of(lpips, "meta").trunk, x) if lpips else 0)


# --- what is timed ------------------------------------------------------------------------------------------------


def our_step(family: str, preset: str, z: Sizes, batch: int, lpips: str, compiled: bool, device: torch.device) -> Work:
    """Training steps as `train-vae` and `train-unet` take them, on a batch that is there."""
    settings = settings_of(family, preset, z, batch_size=batch, compile="on" if compiled else "off")
    stage: Stage[Any] = Stage(family, settings, device, Processes(), Path(), total_steps=1000)
    task, data = (random_images if family == "vae" else random_latents)(stage)[:2]
    if lpips:
        distance = lpips_of(lpips, device)
        task.vae_loss.terms["lpips"] = lambda x, x_hat, posterior: distance(x_hat, x).mean()
    data = data.pin_memory() if family == "vae" and device.type == "cuda" else data
    trainer, count = Trainer(task, stage), flops(partial(network_of, settings), z, lpips=lpips)
    return Work(partial(trainer.train_step, data), batch, count, parameters_of(trainer.model))


def their_unet_step(z: Sizes, batch: int, device: torch.device, diffusers: bool = False) -> Work:
    """Training steps of the original's U-Net in float32, or of diffusers' under autocast, as its example has them."""
    shape = (batch, 4, z.latent, z.latent)
    if diffusers:
        network = peers.diffusers_unet(z.diffusers, 2, z.latent)
        example = torch.zeros(1, 4, z.latent, z.latent), torch.zeros(1, dtype=torch.long)
        count = flops_of(network, *example, backward=True)
        predict: Any = lambda net, x, t: net(x, t, return_dict=False)[0]  # noqa: E731
        step = peers.DiffusersSteps(network, predict, shape, device, True).step
    else:
        network = network_of(settings_of("unet", "original", z))
        count = flops(partial(network_of, settings_of("unet", "original", z)), z)
        step = peers.DenoiserSteps(network, lambda net, x, t: net(x, t), shape, device, False).step
    return Work(step, batch, count, parameters_of(network))


def their_vae_step(z: Sizes, lpips: str, device: torch.device, diffusers: bool = False) -> Work:
    """Training steps of the original's VAE, or of diffusers', in float32."""
    x = torch.rand(z.batch, 3, z.side, z.side, device=device) * 2 - 1
    make = partial(peers.diffusers_vae, tuple(width // 2 for width in z.diffusers), 2)  # about as large as `base`
    if not diffusers:
        make = partial(network_of, settings_of("vae", "original", z))

    def reconstruct(net: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if diffusers:
            posterior = net.encode(x).latent_dist
            return net.decode(posterior.sample()).sample, posterior.mean, posterior.logvar
        x_hat, posterior = net(x, torch.randn(len(x), 4, z.latent, z.latent, device=device))
        return x_hat, posterior.mu, posterior.logvar

    network = make()
    step = peers.VAESteps(network, reconstruct, x, lpips_of(lpips, device) if lpips else None).step
    return Work(step, z.batch, flops(make, z, lpips=lpips), parameters_of(network))


def encode(preset: str, z: Sizes, device: torch.device) -> Work:
    """From pixels to latents on the CPU: as `encode` does it or, of the original's VAE, in float32, then decoded."""
    make = partial(network_of, settings_of("vae", preset, z))
    vae, pixels = make().eval(), torch.randint(256, (z.drawn, 3, z.side, z.side), dtype=torch.uint8)
    ours = preset != "original"
    to_device(vae, device) if ours else vae.to(device)
    cast_weights(vae, "bf16" if ours else "fp32")
    pixels = pixels.pin_memory() if device.type == "cuda" and ours else pixels

    @torch.inference_mode()
    def call() -> Tensor:
        x = to_float(pixels.to(device, non_blocking=True))
        with autocast(device, "bf16" if ours else "fp32"):
            posterior = vae.encoder(x)
        if not ours:
            vae.decoder(posterior.sample(torch.randn_like(posterior.mu)))
        return torch.stack(posterior).to("cpu", torch.float16)

    count = flops(make, z, "encoder") + (0 if ours else flops(make, z, "decoder"))
    return Work(call, z.drawn, count, parameters_of(vae))


def generate(unet: str, vae: str, z: Sizes, compiled: bool, device: torch.device) -> Work:
    """Images out of noise: as `generate` makes them or, with the original's networks, in float32."""
    ours, precision = vae != "original", "bf16" if vae != "original" else "fp32"
    settings = [settings_of("vae", vae, z), settings_of("unet", unet, z)]
    networks = [network_of(s).requires_grad_(False).eval() for s in settings]
    for network in networks:
        to_device(network, device) if ours else network.to(device)
        cast_weights(network, precision)
    pipeline = Pipeline(networks[0], settings[0].model, networks[1], settings[1], device, precision)
    if compiled:
        compile_network(pipeline.unet, device, training=False)
    how = SamplingSettings(num_steps=z.steps, sampler="ddim")
    vae_of, unet_of = (partial(network_of, s) for s in settings)
    count = flops(vae_of, z, "decoder") + z.steps * flops(unet_of, z, "unet")
    return Work(lambda: pipeline.decode(pipeline.sample(z.drawn, 0, how)), z.drawn, count, parameters_of(networks[1]))


def ways(z: Sizes, device: torch.device) -> list[Way]:
    """All that is measured; last what is compiled, which takes a minute or two each time."""
    found: list[Way] = []
    original, diffusers = "original, float32", importlib.util.find_spec("diffusers")
    for compiled in z.compiling:
        more = ", compiled" if compiled else ""
        for batch in z.batches:
            case = f"U-Net step, batch {batch}"
            for name in z.unets:
                make = partial(our_step, "unet", name, z, batch, "", compiled, device)
                found.append(Way(case, f"lightdiff, preset {name}{more}", make))
            if not compiled:
                found.append(Way(case, original, partial(their_unet_step, z, batch, device)))
            if not compiled and diffusers:
                found.append(Way(case, "diffusers, bf16", partial(their_unet_step, z, batch, device, True)))
        for lpips in ("", z.lpips):
            case = f"VAE step, {z.side} px, batch {z.batch}" + (f", LPIPS ({lpips})" if lpips else "")
            for name in z.vaes:
                make = partial(our_step, "vae", name, z, z.batch, lpips, compiled, device)
                found.append(Way(case, f"lightdiff, preset {name}{more}", make))
            if not compiled:
                found.append(Way(case, original, partial(their_vae_step, z, lpips, device)))
            if not compiled and diffusers:
                found.append(Way(case, "diffusers, float32", partial(their_vae_step, z, lpips, device, True)))
        case, (unet, vae) = f"generate, {z.steps} steps, {z.drawn} images at a time", (z.unets[-1], z.vaes[0])
        found.append(Way(case, f"lightdiff, preset {vae}{more}", partial(generate, unet, vae, z, compiled, device)))
        if not compiled:
            found.append(Way(case, original, partial(generate, "original", "original", z, False, device)))
            for name in (*z.vaes, "original"):
                who = original if name == "original" else f"lightdiff, preset {name}"
                found.append(Way(f"encode, {z.side} px", who, partial(encode, name, z, device)))
    return found
