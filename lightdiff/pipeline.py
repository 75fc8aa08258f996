"""The library in four calls: load a model, encode images, sample latents, decode them. Tensors in, tensors out.

model = Pipeline.load("runs/faces")
z = model.encode(x)                    # (b, 3, h, w) in [-1, 1] -> (b, c, h/f, w/f)
z = model.sample(16, seed=0)           # new latents
x = model.decode(z)                    # -> (b, 3, h, w) in [-1, 1]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightdiff.checkpoint import Checkpoint, check_own, first_found, load_weights
from lightdiff.data.latents import Scaling
from lightdiff.data.order import item_noise
from lightdiff.diffusion.objectives import denoiser
from lightdiff.diffusion.samplers import ddim
from lightdiff.diffusion.schedules import alpha_bar_table, sampling_levels
from lightdiff.errors import UserError
from lightdiff.models.unet import UNet
from lightdiff.models.vae import VAE
from lightdiff.run_folder import RunFolder, find_unet, find_vae
from lightdiff.settings import (
    MIN_ALPHA_BAR,
    Device,
    LatentsSettings,
    Precision,
    ScheduleSettings,
    TrainUNetSettings,
    UNetSettings,
    VAESettings,
)
from lightdiff.training.compute import autocast, in_low_precision, pick_device, pick_precision, place

N = TypeVar("N", bound=nn.Module)
DECODED_PIXELS = 64 * 256 * 256  # decoded at a time: 64 images of 256 px


@dataclass(frozen=True)
class Sampling:
    """How to draw: everything that `generate` lets one choose about the sampler."""

    num_steps: int = 50
    eta: float = 0.0
    clamp: float = 0.0
    min_alpha_bar: float = MIN_ALPHA_BAR


def sample_latents(
    network: Callable[[Tensor, Tensor], Tensor],
    latent: LatentsSettings,
    noise: ScheduleSettings,
    items: Sequence[int],
    seed: int,
    device: torch.device,
    sampling: Sampling,
    size: tuple[int, int] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Latents z of the items (numbers of images of this seed), each the same in whatever batch it is drawn.

    Args:
        network: (x_t, t) -> eps_hat.
        latent: What the network knows of its latents.
        noise: Its noise schedule.
        items: Which images of the seed.
        seed: Seed of all noise.
        device: Where to compute.
        sampling: Steps, eta, clamp, first level.
        size: Height and width of the latents, if not those trained on.

    Raises:
        ValueError: If there are more steps than usable levels.
    """
    shape = (latent.channels, *(size or (latent.height, latent.width)))
    levels = sampling_levels(alpha_bar_table(noise), sampling.num_steps, sampling.min_alpha_bar)
    x = item_noise(shape, list(items), seed, "start").to(device)

    def step_noise(step: int) -> Tensor:
        return item_noise(shape, list(items), seed, f"step {step}").to(device)

    x0 = ddim(denoiser(network, sampling.clamp), levels, x, sampling.eta, step_noise)
    return Scaling.of(latent).to_z(x0)


class Pipeline:
    """A trained VAE and U-Net, ready for use."""

    def __init__(
        self, unet: Checkpoint, vae: Checkpoint, device: torch.device, ema: bool = True, precision: str = "fp32"
    ) -> None:
        """Build both networks from their checkpoints.

        Raises:
            UserError: If the U-Net's latents came from another VAE.
        """
        check_lineage(unet, vae)
        self.device, self.unet_checkpoint, self.vae_checkpoint = device, unet, vae
        self.precision = precision
        self.vae, self.vae_settings = load_vae(vae, device, precision)
        self.settings = unet.settings(TrainUNetSettings)
        channels = self.settings.latent.channels
        self.unet = in_low_precision(load_unet(unet, self.settings.model, channels, device, ema), precision)

    @classmethod
    def load(
        cls,
        run: str | Path = "runs/default",
        unet: Path | None = None,
        vae: Path | None = None,
        device: Device = "auto",
        precision: Precision = "fp32",
    ) -> "Pipeline":
        """The newest U-Net of a run, with its averaged weights, and the VAE behind its latents.

        Raises:
            UserError: If one is missing, damaged, or they do not belong together.
        """
        opened = Checkpoint(find_unet(unet, RunFolder(Path(run))), "unet")
        behind = Checkpoint(vae_behind(opened, vae, RunFolder(Path(run))), "vae")
        where = pick_device(device)
        return cls(opened, behind, where, precision=pick_precision(precision, where))

    @property
    def resolution(self) -> int:
        """Side of the images trained on, in pixels."""
        return self.settings.latent.height * self.vae_settings.factor

    @torch.inference_mode()
    def encode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l m n"]:
        """Latents (the posterior's mean) of images in [-1, 1]; h and w divisible by the VAE's factor."""
        with autocast(self.device, self.precision):
            mu: Tensor = self.vae.encoder(x.to(self.device)).mu
        return mu

    @torch.inference_mode()
    def sample(
        self,
        items: int | Sequence[int],
        seed: int = 0,
        sampling: Sampling | None = None,
        size: tuple[int, int] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """New latents: the first `items` of a seed, or those of these numbers."""
        wanted = range(items) if isinstance(items, int) else items
        with autocast(self.device, self.precision):
            s = self.settings
            return sample_latents(self.unet, s.latent, s.noise, wanted, seed, self.device, sampling or Sampling(), size)

    @torch.inference_mode()
    def decode(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l m n"]:
        """Images in [-1, 1] of latents, on the CPU, decoded in chunks so that memory stays small."""
        pixels = z.shape[2] * z.shape[3] * self.vae_settings.factor**2
        chunk = max(1, DECODED_PIXELS // pixels)
        with autocast(self.device, self.precision):
            parts = [
                self.vae.decoder(part.to(self.device)).clamp(-1, 1).float().cpu() for part in torch.split(z, chunk)
            ]
        return torch.cat(parts)


def load_vae(saved: Checkpoint, device: torch.device, precision: str = "fp32") -> tuple[VAE, VAESettings]:
    """A VAE ready for use, and its architecture."""
    model = saved.settings(VAESettings, "model")
    vae = ready(lambda: VAE(model), saved, saved.weights_prefix(), device)
    vae.to(memory_format=torch.channels_last)  # without a backward pass it is faster on CPUs, too
    return in_low_precision(vae, precision), model


def load_unet(saved: Checkpoint, model: UNetSettings, channels: int, device: torch.device, ema: bool) -> UNet:
    """A U-Net ready for use."""
    return ready(lambda: UNet(model, channels), saved, saved.weights_prefix(ema), device)


def ready(build: Callable[[], N], saved: Checkpoint, prefix: str, device: torch.device) -> N:
    """A network with a snapshot's tensors below a prefix, ready for use.

    Raises:
        UserError: If they do not fit, or the settings make no network.
    """
    check_own(build, saved, prefix)
    network = build()
    load_weights(network, saved, prefix)
    place(network.requires_grad_(False).eval(), device)
    return network


def vae_digest(saved: Checkpoint) -> str:
    """The digest by which later stages know this VAE: of the weights that encoding uses."""
    return saved.document.weights_digest(saved.weights_prefix())


def check_lineage(unet: Checkpoint, vae: Checkpoint) -> None:
    """See that a U-Net's latents came from this VAE.

    Raises:
        UserError: If not, with both digests.
    """
    wanted, found = unet.document.lineage.get("vae", ""), vae_digest(vae)
    if wanted != found:
        raise UserError(
            f"{unet.path} was trained on latents of VAE {wanted[:8]}, but {vae.path} holds {found[:8]}: "
            "point --vae at the right one, or encode and train again"
        )


def vae_behind(unet: Checkpoint, given: Path | None, run: RunFolder) -> Path:
    """The VAE to decode with: the one given, else the copy kept with the latents, else the run's."""
    if given is not None:
        return find_vae(given, run)
    homes = [run.path, unet.path.parent.parent.parent]
    kept = first_found(home / "latents" / "vae.safetensors" for home in homes)
    return kept or find_vae(None, run)
