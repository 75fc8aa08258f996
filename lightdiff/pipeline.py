"""The library in four calls: load a model, encode images, sample latents, decode them. Tensors in, tensors out.

model = Pipeline.load("runs/faces")
z = model.encode(x)                    # (b, 3, h, w) in [-1, 1] -> (b, c, h/f, w/f)
z = model.sample(16, seed=0)           # new latents
x = model.decode(z)                    # -> (b, 3, h, w) in [-1, 1]
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightdiff.checkpoint import Checkpoint, check_own, load_weights
from lightdiff.data.latents import Scaling, read_index
from lightdiff.data.order import item_noise
from lightdiff.diffusion.objectives import Denoise, Guidance, Latents, Network, denoiser
from lightdiff.diffusion.samplers import SAMPLERS
from lightdiff.diffusion.schedules import Level, Schedule, sampling_levels
from lightdiff.errors import UserError
from lightdiff.models.unet import build_unet
from lightdiff.models.vae import VAE, build_vae
from lightdiff.run_folder import INDEX, RunFolder, find_unet, find_vae, named_latents
from lightdiff.runtime.compile import cast_weights
from lightdiff.runtime.processes import autocast, pick_device, pick_precision, to_device
from lightdiff.settings import (
    EPS_MIN_ALPHA_BAR,
    WITH_ETA,
    Device,
    Precision,
    SamplingSettings,
    TrainUNetSettings,
    VAEArchitecture,
)

N = TypeVar("N", bound=nn.Module)
Start = Callable[[Denoise, Level, Latents], tuple[Denoise, Latents]]
"""(denoiser, first level, noise) -> (denoiser, x at that level): how sampling begins."""
DECODED_PIXELS = 64 * 256 * 256  # decoded at a time: 64 images of 256 px


def levels_for(settings: TrainUNetSettings, sampling: SamplingSettings, strength: float = 1.0) -> list[Level]:
    """The levels that sampling visits, with a network trained with these settings.

    Raises:
        UserError: If there are more steps than usable levels.
    """
    floor = min_signal(settings) if sampling.min_alpha_bar is None else sampling.min_alpha_bar
    schedule = Schedule.of(settings.resolved().noise)
    try:
        return sampling_levels(schedule, sampling.num_steps, floor, sampling.spacing, strength)
    except ValueError as error:
        raise UserError(f"--num-steps: {error}") from None


def min_signal(settings: TrainUNetSettings) -> float:
    """The smallest share of signal at which sampling begins by default."""
    return EPS_MIN_ALPHA_BAR if settings.target.objective == "eps" else 0.0


def usable_levels(settings: TrainUNetSettings) -> int:
    """The number of levels at which sampling may begin by default, and so the most steps that it may take."""
    return int((Schedule.of(settings.resolved().noise).signal() >= min_signal(settings)).sum())


def guidance_for(
    settings: TrainUNetSettings, sampling: SamplingSettings, items: Sequence[int], device: torch.device | None = None
) -> Guidance | None:
    """The class that each item is drawn of, the classes taking turns, and the guidance; None without classes.

    Raises:
        UserError: For a class that the network does not know, or guidance without a class.
    """
    if not sampling.class_:
        if sampling.guidance != 1:
            hint = "" if settings.label else "; this U-Net was trained without --label"
            raise UserError(f"--guidance needs a --class to guide to{hint}")
        return None
    known = settings.classes
    for name in sampling.class_:
        if name not in known:
            quoted = [f'"{value}"' if "," in value else value for value in known]
            listed = f"it knows {', '.join(quoted)}" if known else "it was trained without --label"
            raise UserError(f"--class: this U-Net knows no {name}; {listed}")
    turns = [known.index(sampling.class_[i % len(sampling.class_)]) for i in items]
    first, last = (share * settings.noise.timesteps - 1 for share in sampling.guidance_interval)
    return Guidance(torch.tensor(turns, device=device), len(known), sampling.guidance, first, last)


def from_noise(denoise: Denoise, level: Level, noise: Latents) -> tuple[Denoise, Latents]:
    """Start from noise alone, as if x0 were noise of unit variance, too."""
    return denoise, math.hypot(level.alpha, level.sigma) * noise


def sample_latents(
    network: Network,
    settings: TrainUNetSettings,
    items: Sequence[int],
    seed: int,
    device: torch.device,
    sampling: SamplingSettings,
    size: tuple[int, int] | None = None,
    strength: float = 1.0,
    start: Start = from_noise,
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
        strength: Share of the noise levels above which none is visited.
        start: How to begin; the way for another denoiser and for other latents than noise.

    Raises:
        UserError: If there are more steps than usable levels, or for a class that the network does not know.
    """
    shape = (settings.latent.channels, *(size or (settings.latent.height, settings.latent.width)))

    def noise_of(purpose: str) -> Float[Tensor, "b c h w"]:
        return item_noise(shape, list(items), seed, purpose).to(device)

    levels = levels_for(settings, sampling, strength)
    guidance = guidance_for(settings, sampling, items, device)
    denoise = denoiser(network, settings.target.objective, sampling.clamp, guidance)
    denoise, x = start(denoise, levels[0], noise_of("start"))
    eta = {"eta": sampling.eta} if sampling.sampler in WITH_ETA else {}
    x0 = SAMPLERS[sampling.sampler](denoise, levels, x, lambda step: noise_of(f"step {step}"), **eta)
    return Scaling.of(settings.latent).to_z(x0)


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
        self.device, self.unet_checkpoint, self.vae_checkpoint, self.precision = device, unet, vae, precision
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
        folder, on = RunFolder(Path(run)), pick_device(device)
        opened = Checkpoint(find_unet(unet, folder), "unet")
        behind = Checkpoint(vae_behind(opened, vae, folder), "vae")
        return cls(opened, behind, on, precision=pick_precision(precision, on))

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
        sampling: SamplingSettings | None = None,
        size: tuple[int, int] | None = None,
        strength: float = 1.0,
        start: Start = from_noise,
    ) -> Float[Tensor, "b c h w"]:
        """New latents: the first `items` of a seed, or those of these numbers; the rest as in `sample_latents`."""
        wanted, how = range(items) if isinstance(items, int) else items, sampling or SamplingSettings()
        with autocast(self.device, self.precision):
            return sample_latents(self.unet, self.settings, wanted, seed, self.device, how, size, strength, start)

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


def load_vae(saved: Checkpoint, device: torch.device, precision: str = "fp32") -> tuple[VAE, VAEArchitecture]:
    """A VAE ready for use, and its architecture."""
    settings = saved.settings(VAEArchitecture, "model")
    vae = load_network(lambda: build_vae(settings), saved, saved.weights_prefix(), device)
    # Without a backward pass, channels_last is faster on CPUs, too
    return cast_weights(vae.to(memory_format=torch.channels_last), precision), settings


def load_unet(saved: Checkpoint, settings: TrainUNetSettings, device: torch.device, ema: bool) -> nn.Module:
    """A U-Net ready for use."""
    s, prefix = settings, saved.weights_prefix(ema)
    return load_network(lambda: build_unet(s.model, s.latent.channels, len(s.classes)), saved, prefix, device)


def load_network(build: Callable[[], N], saved: Checkpoint, prefix: str, device: torch.device) -> N:
    """A network with a snapshot's tensors below a prefix, ready for use.

    Raises:
        UserError: If they do not fit, or the settings make no network.
    """
    check_own(build, saved, prefix)
    network = build().requires_grad_(False).eval()
    load_weights(network, saved, prefix)
    to_device(network, device)
    return network


def vae_digest(saved: Checkpoint) -> str:
    """The digest that later stages know this VAE by: that of its encoder, which made the latents."""
    return saved.metadata.weights_digest(f"{saved.weights_prefix()}encoder.")


def check_lineage(unet: Checkpoint, vae: Checkpoint) -> None:
    """Check that a U-Net's latents came from this VAE.

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
    found = [home for home in latents_candidates(unet, run) if (home / INDEX).is_file()]
    return first_match(found, unet, "latents", lambda home: read_index(home).digest)


def vae_behind(unet: Checkpoint, given: Path | None, run: RunFolder) -> Path:
    """The VAE to decode with: the one given, else the copy kept with the U-Net's latents, else the run's."""
    if given is not None:
        return find_vae(given, run)
    found = [path for home in latents_candidates(unet, run) if (path := home / "vae.safetensors").is_file()]
    return first_match(found, unet, "vae", lambda path: vae_digest(Checkpoint(path, "vae"))) or find_vae(None, run)


def latents_candidates(unet: Checkpoint, run: RunFolder) -> list[Path]:
    """Where the latents of a U-Net may be: where its settings say, in its run, and in this one."""
    named = named_latents(Path(saved)) if isinstance(saved := unet.metadata.settings.get("latents"), str) else []
    homes = [*named, RunFolder(unet.path.parent.parent.parent).latents, run.latents]
    return list({home.absolute(): home for home in homes}.values())


def first_match(candidates: list[Path], unet: Checkpoint, kind: str, digest: Callable[[Path], str]) -> Path | None:
    """The first that has the digest in a U-Net's lineage, else the first; one without rivals is not looked into."""
    if len(candidates) > 1:
        wanted = unet.metadata.lineage.get(kind)
        return next((path for path in candidates if digest(path) == wanted), candidates[0])
    return candidates[0] if candidates else None
