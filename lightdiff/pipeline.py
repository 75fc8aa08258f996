"""The library in four calls: load a model, encode images, sample latents, decode them. Tensors in, tensors out.

model = Pipeline.load("runs/faces")
z = model.encode(x)                    # (b, 3, h, w) in [-1, 1] -> (b, c, h/f, w/f)
z = model.sample(16, seed=0)           # new latents
x = model.decode(z)                    # -> (b, 3, h, w) in [-1, 1]
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightdiff.checkpoint import Checkpoint, check_own, load_weights
from lightdiff.data.latents import Scaling, read_index
from lightdiff.data.order import item_noise
from lightdiff.diffusion.objectives import Guidance, denoiser, inpainting, with_callback
from lightdiff.diffusion.samplers import SAMPLERS
from lightdiff.diffusion.schedules import Level, Schedule, sampling_levels
from lightdiff.errors import UserError
from lightdiff.models.unet import UNet
from lightdiff.models.vae import VAE
from lightdiff.run_folder import INDEX, RunFolder, find_unet, find_vae, named_latents
from lightdiff.runtime.device import autocast, cast_weights, pick_device, pick_precision, place
from lightdiff.settings import (
    EPS_MIN_ALPHA_BAR,
    Device,
    Precision,
    SamplerName,
    Spacing,
    TrainUNetSettings,
    VAESettings,
)

N = TypeVar("N", bound=nn.Module)
DECODED_PIXELS = 64 * 256 * 256  # decoded at a time: 64 images of 256 px


@dataclass(frozen=True)
class Sampling:
    """How to draw: everything that `generate` lets one choose about the sampler."""

    num_steps: int = 20
    eta: float = 0.0
    clamp: float = 0.0
    min_alpha_bar: float | None = None  # None: what suits the objective
    sampler: SamplerName = "dpm++2m"
    spacing: Spacing = "trailing"
    classes: Sequence[str] = ()  # what to draw, in turns; none: any
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # share of the levels at which it is applied; 0 is clean


@dataclass(frozen=True)
class Edit:
    """A picture to begin with."""

    z: Float[Tensor, "1 c h w"]  # its latent
    strength: float  # share of the levels of noise, above which nothing is visited
    mask: Float[Tensor, "1 1 h w"] | None = None  # 1 where it is drawn anew, 0 where it stays; None: all of it changes


@dataclass(frozen=True)
class TrajectoryStep:
    """One call of the network on the way from noise to images in [-1, 1], on the CPU."""

    level: Level
    x_t: Float[Tensor, "b 3 h w"]  # the noisy latent at unit variance, decoded as if it were clean
    x0: Float[Tensor, "b 3 h w"]  # what the network takes to be behind it


def min_signal(settings: TrainUNetSettings) -> float:
    """The share of signal at which to begin sampling, for a network with these settings."""
    return EPS_MIN_ALPHA_BAR if settings.target.objective == "eps" else 0.0


def levels_for(settings: TrainUNetSettings, sampling: Sampling, strength: float = 1.0) -> list[Level]:
    """The levels that sampling visits.

    Raises:
        ValueError: If there are more steps than usable levels.
    """
    floor = min_signal(settings) if sampling.min_alpha_bar is None else sampling.min_alpha_bar
    schedule = Schedule.of(settings.resolved().noise)
    return sampling_levels(schedule, sampling.num_steps, floor, sampling.spacing, strength)


def usable_levels(settings: TrainUNetSettings) -> int:
    """How many levels a network can begin sampling at, which are as many steps as it can take."""
    return int((Schedule.of(settings.resolved().noise).signal() >= min_signal(settings)).sum())


def guidance_for(settings: TrainUNetSettings, sampling: Sampling, items: Sequence[int]) -> Guidance | None:
    """Which class each of the items is to be drawn of; None for a network that knows none.

    Raises:
        UserError: For a class that it does not know.
    """
    known = settings.classes
    for name in sampling.classes:
        if name not in known:
            quoted = [f'"{value}"' if "," in value else value for value in known]
            listed = f"it knows {', '.join(quoted)}" if known else "it was trained without --label"
            raise UserError(f"--class: this U-Net knows no {name}; {listed}")
    if not sampling.classes:
        return None
    turns = [known.index(sampling.classes[i % len(sampling.classes)]) for i in items]
    first, last = (share * settings.noise.timesteps - 1 for share in sampling.guidance_interval)
    return Guidance(torch.tensor(turns), len(known), sampling.guidance, first, last)


def sample_latents(
    network: Callable[..., Tensor],
    settings: TrainUNetSettings,
    items: Sequence[int],
    seed: int,
    device: torch.device,
    sampling: Sampling,
    size: tuple[int, int] | None = None,
    edit: Edit | None = None,
    noise: Float[Tensor, "b c h w"] | None = None,
    see: Callable[[Level, Tensor, Tensor], None] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Latents z of the items (numbers of images of this seed), each the same in whatever batch it is drawn.

    Args:
        network: (x_t, t) or (x_t, t, label) -> prediction.
        settings: What it was trained with.
        items: Which images of the seed.
        seed: Seed of all noise.
        device: Where to compute.
        sampling: Sampler, steps, guidance, first level.
        size: Height and width of the latents, if not those trained on.
        edit: A picture to begin with.
        noise: Noise to begin with, if not that of the items.
        see: Told the level, x_t and x0_hat of each call of the network.

    Raises:
        ValueError: If there are more steps than usable levels.
        UserError: For a class that the network does not know.
    """
    latent, scaling = settings.latent, Scaling.of(settings.latent)
    shape = (latent.channels, *(size or (latent.height, latent.width)))
    levels = levels_for(settings, sampling, edit.strength if edit else 1.0)
    guidance = guidance_for(settings, sampling, items)
    if guidance is not None:
        guidance = guidance._replace(label=guidance.label.to(device))
    denoise = denoiser(network, settings.target.objective, sampling.clamp, guidance)
    start = levels[0]
    x = (item_noise(shape, list(items), seed, "start") if noise is None else noise).to(device)
    if edit is None:
        x = math.hypot(start.alpha, start.sigma) * x  # as if x0 were noise, too: it has unit variance
    else:
        known = scaling.to_x0(edit.z.to(device)).expand_as(x)
        x = start.alpha * known + start.sigma * x
        if edit.mask is not None:
            denoise = inpainting(denoise, known, edit.mask.to(device).expand(len(x), -1, -1, -1))

    if see is not None:
        denoise = with_callback(denoise, see)

    def step_noise(step: int) -> Tensor:
        return item_noise(shape, list(items), seed, f"step {step}").to(device)

    x0 = SAMPLERS[sampling.sampler](denoise, levels, x, sampling.eta, step_noise)
    return scaling.to_z(x0)


def noise_between(shape: tuple[int, ...], ends: Sequence[int], frames: int, seed: int) -> Float[Tensor, "n c h w"]:
    """Starting noise on the way between images of a seed, both ends included, `frames` from each to the next.

    Spherical interpolation (Shoemake 1985): what lies between keeps the length that noise has.
    """
    noise = item_noise(shape, list(ends), seed, "start")
    found: list[Tensor] = []
    for a, b in pairwise(noise):
        angle = torch.acos(torch.clamp((a * b).sum() / (a.norm() * b.norm()), -1, 1))
        for share in torch.linspace(0, 1, frames)[1 if found else 0 :].tolist():
            found.append(a if share == 0 else b if share == 1 else slerp(a, b, angle, share))
    return torch.stack(found)


def slerp(a: Tensor, b: Tensor, angle: Tensor, share: float) -> Tensor:
    """The point at a share of the way from a to b, on the arc between them."""
    if angle < 1e-4:  # a and b are the same
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


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
        self.unet = cast_weights(load_unet(unet, self.settings, device, ema), precision)

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
        edit: Edit | None = None,
        noise: Float[Tensor, "b c h w"] | None = None,
        see: Callable[[Level, Tensor, Tensor], None] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """New latents: the first `items` of a seed, or those of these numbers; the rest as in `sample_latents`."""
        wanted = range(items) if isinstance(items, int) else items
        how = sampling or Sampling()
        with autocast(self.device, self.precision):
            return sample_latents(self.unet, self.settings, wanted, seed, self.device, how, size, edit, noise, see)

    def trajectory(
        self,
        items: int | Sequence[int],
        seed: int = 0,
        sampling: Sampling | None = None,
        size: tuple[int, int] | None = None,
        edit: Edit | None = None,
    ) -> list[TrajectoryStep]:
        """What `sample` passes through, one moment for each call of the network; arguments as there."""
        scaling, found = Scaling.of(self.settings.latent), list[TrajectoryStep]()

        def see(level: Level, x_t: Tensor, x0: Tensor) -> None:
            noisy = scaling.to_z(x_t / math.hypot(level.alpha, level.sigma))
            found.append(TrajectoryStep(level, self.decode(noisy), self.decode(scaling.to_z(x0))))

        self.sample(items, seed, sampling, size, edit, see=see)
        return found

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
    return cast_weights(vae, precision), model


def load_unet(saved: Checkpoint, settings: TrainUNetSettings, device: torch.device, ema: bool) -> UNet:
    """A U-Net ready for use."""
    s = settings
    return ready(lambda: UNet(s.model, s.latent.channels, len(s.classes)), saved, saved.weights_prefix(ema), device)


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
    """The digest by which later stages know this VAE: of its encoder, which made the latents."""
    return saved.metadata.weights_digest(f"{saved.weights_prefix()}encoder.")


def check_lineage(unet: Checkpoint, vae: Checkpoint) -> None:
    """See that a U-Net's latents came from this VAE.

    Raises:
        UserError: If not, with both digests.
    """
    wanted, found = unet.metadata.lineage.get("vae", ""), vae_digest(vae)
    if wanted != found:
        raise UserError(
            f"{unet.path} was trained on latents of VAE {wanted[:8]}, but {vae.path} holds {found[:8]}: "
            "point --vae at the right one, or encode and train again"
        )


def latents_behind(unet: Checkpoint, run: RunFolder) -> Path | None:
    """The folder of latents that a U-Net was trained on, where it still is; else others of its run, or of this one."""
    there = [home for home in latents_candidates(unet, run) if (home / INDEX).is_file()]
    return fitting(there, lambda home: read_index(home).digest, unet.metadata.lineage.get("latents"))


def vae_behind(unet: Checkpoint, given: Path | None, run: RunFolder) -> Path:
    """The VAE to decode with: the one given, else the copy kept with the U-Net's latents, else the run's."""
    if given is not None:
        return find_vae(given, run)
    copies = [home / "vae.safetensors" for home in latents_candidates(unet, run)]
    there = [copy for copy in copies if copy.is_file()]
    wanted = unet.metadata.lineage.get("vae")
    return fitting(there, lambda copy: vae_digest(Checkpoint(copy, "vae")), wanted) or find_vae(None, run)


def latents_candidates(unet: Checkpoint, run: RunFolder) -> list[Path]:
    """Where the latents of a U-Net may be: where it was told that they are, in its run, and in this one."""
    told = unet.metadata.settings.get("latents")
    named = named_latents(Path(told)) if isinstance(told, str) else []
    homes = [*named, RunFolder(unet.path.parent.parent.parent).latents, run.latents]
    return list({home.absolute(): home for home in homes}.values())


def fitting(places: list[Path], digest: Callable[[Path], str], wanted: str | None) -> Path | None:
    """The first of this digest, else the first; a place without rivals is not looked into."""
    if len(places) > 1:
        return next((place for place in places if digest(place) == wanted), places[0])
    return places[0] if places else None
