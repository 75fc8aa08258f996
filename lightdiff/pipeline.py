"""The library in four calls: load a model, encode images, sample latents, decode them. Tensors in, tensors out.

model = Pipeline.load("runs/faces")
z = model.encode(x)                    # (b, 3, h, w) in [-1, 1] -> (b, c, h/f, w/f)
z = model.sample(16, seed=0)           # new latents
x = model.decode(z)                    # -> (b, 3, h, w) in [-1, 1]
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar
from unicodedata import normalize

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightdiff.checkpoint import Checkpoint, check_own
from lightdiff.data.latents import Scaling, async_copy
from lightdiff.data.order import item_noise
from lightdiff.diffusion.objectives import Denoise, Guidance, Latents, Network, denoiser
from lightdiff.diffusion.samplers import SAMPLERS
from lightdiff.diffusion.schedules import Level, Schedule, sampling_levels
from lightdiff.errors import UserError, shorten
from lightdiff.models.unet import build_unet
from lightdiff.models.vae import VAE, build_vae
from lightdiff.on_demand import on_demand
from lightdiff.run_folder import VAE_COPY, RunFolder, find_unet, find_vae, named_latents
from lightdiff.runtime.processes import autocast, pick_device, pick_precision, to_device
from lightdiff.settings import (
    EPS_MIN_ALPHA_BAR,
    WITH_ETA,
    Device,
    Precision,
    SamplingSettings,
    Size,
    TrainUNetSettings,
    VAEArchitecture,
)

N = TypeVar("N", bound=nn.Module)
Start = Callable[[Denoise, Level, Latents], tuple[Denoise, Latents]]
"""(denoiser, first level, noise) -> (denoiser, x at that level): how sampling begins."""
EXPORTED = "lightdiff.json"
DECODED_PIXELS = 4 * 256 * 256  # decoded at a time: 4 images of 256 px, 64 of 64 px


def levels_for(settings: TrainUNetSettings, sampling: SamplingSettings, strength: float = 1.0) -> list[Level]:
    """The levels that sampling visits, with a network trained with these settings.

    Raises:
        UserError: If there are more steps than usable levels.
    """
    floor = min_signal(settings) if sampling.min_alpha_bar is None else sampling.min_alpha_bar
    try:
        return sampling_levels(schedule_of(settings), sampling.num_steps, floor, sampling.spacing, strength)
    except ValueError as error:
        if strength < 1:
            raise UserError(f"--strength {strength:g}: {error}: give more, or fewer --num-steps") from None
        raise UserError(f"--num-steps: {error}") from None


def schedule_of(settings: TrainUNetSettings) -> Schedule:
    """The noise schedule of a training."""
    return Schedule.of(settings.noise.resolved(settings.target.objective))


def min_signal(settings: TrainUNetSettings) -> float:
    """The smallest share of signal at which sampling begins by default."""
    return EPS_MIN_ALPHA_BAR if settings.target.objective == "eps" else 0.0


def usable_levels(settings: TrainUNetSettings) -> int:
    """The number of levels at which sampling may begin by default, and so the most steps that it may take."""
    return int((schedule_of(settings).signal() >= min_signal(settings)).sum())


def default_sampling(settings: TrainUNetSettings) -> SamplingSettings:
    """Sampling as by default, the classes taking turns, with no more steps than the schedule has usable levels."""
    usable = usable_levels(settings)
    steps = min(SamplingSettings().num_steps, usable or settings.noise.timesteps)
    return SamplingSettings(num_steps=steps, min_alpha_bar=None if usable else 0.0, class_=settings.classes)


def guidance_for(
    settings: TrainUNetSettings,
    sampling: SamplingSettings,
    items: Sequence[int],
    device: torch.device | None = None,
    weak: Network | None = None,
) -> Guidance | None:
    """The class that each item is drawn of, the classes taking turns, and the guidance; None without either.

    Raises:
        UserError: For a class that the network does not know, or guidance without a class or a `weak` network.
    """
    first, last = (share * settings.noise.timesteps - 1 for share in sampling.guidance_interval)
    how = Guidance(None, len(settings.classes), sampling.guidance, first, last, weak)
    if not sampling.class_ and (weak or sampling.guidance == 1):
        return how if weak else None
    if not sampling.class_:
        hint = "" if settings.label else "; this U-Net was trained without --label"
        raise UserError(f"--guidance needs a --class to guide to{hint}, or a U-Net to --guide-with")
    known, wanted = ([normalize("NFC", name) for name in names] for names in (settings.classes, sampling.class_))
    for name in wanted:
        if name not in known:
            quoted = [f'"{value}"' if "," in value else value for value in known]
            listed = f"it knows {shorten(', '.join(quoted))}" if known else "it was trained without --label"
            raise UserError(f"--class: this U-Net knows no {shorten(name)}; {listed}")
    turns = [known.index(wanted[i % len(wanted)]) for i in items]
    return how._replace(label=async_copy(torch.tensor(turns), device or torch.device("cpu")))


def from_noise(denoise: Denoise, level: Level, noise: Latents) -> tuple[Denoise, Latents]:
    """Start from noise alone, as if x0 were noise of unit variance, too."""
    return denoise, math.hypot(level.alpha, level.sigma) * noise


@dataclass
class Pipeline:
    """A VAE and a U-Net, ready for use."""

    vae: VAE
    vae_settings: VAEArchitecture
    unet: nn.Module
    settings: TrainUNetSettings  # that the U-Net was trained with
    device: torch.device
    precision: str = "fp32"
    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)  # by name, if the networks come from files
    weak: nn.Module | None = None  # a worse U-Net, that guidance leads away from

    @classmethod
    def load(
        cls,
        run: str | Path = "runs/default",
        unet: Path | None = None,
        vae: Path | None = None,
        device: Device = "auto",
        precision: Precision = "fp32",
        ema: float | None = None,
        guide_with: Path | None = None,
    ) -> "Pipeline":
        """The newest U-Net of a run, and the VAE behind its latents; `ema` as `Checkpoint.weights_prefix` takes it.

        `guide_with` is a worse U-Net for guidance: `early` or `step-N` beside the first, a checkpoint, or a run.

        Instead of a run, it may be a U-Net's checkpoint in one, an exported folder, or hf://owner/name.

        Raises:
            UserError: If one is missing, damaged, or they do not belong together.
        """
        if str(run).startswith("hf://") or (Path(run) / EXPORTED).is_file():
            others = {"unet": unet, "vae": vae, "ema": ema, "guide_with": guide_with}
            exported: Pipeline = on_demand("export.folder:load_exported")(str(run), device, precision, others)
            return exported
        if unet is None and Path(run).is_file():
            unet, run = Path(run), Path(run).absolute().parents[2]
        folder, on = RunFolder(Path(run)), pick_device(device)
        learned = Checkpoint(find_unet(unet, folder), "unet")
        behind = Checkpoint(vae_behind(learned, vae, folder), "vae")
        wanted, found = learned.metadata.lineage.get("vae", ""), vae_digest(behind)
        if wanted != found:
            raise UserError(
                f"{learned.path} was trained on latents of VAE {wanted[:8]}, but {behind.path} holds {found[:8]}: "
                "point --vae at the right one, or encode and train again"
            )
        s, chosen = learned.settings(TrainUNetSettings), pick_precision(precision, on)
        network, opened, weak = load_unet(learned, on, chosen, ema), {"unet": learned, "vae": behind}, None
        if guide_with is not None:
            opened["guide"] = on_demand("guide:find_weak")(guide_with, learned)
            weak = load_unet(opened["guide"], on, chosen)
        return cls(*load_vae(behind, on, chosen), network, s, on, chosen, opened, weak)

    @property
    def digests(self) -> dict[str, str]:
        """Digests of both checkpoints."""
        return {name: checkpoint.metadata.digest for name, checkpoint in self.checkpoints.items()}

    @property
    def resolution(self) -> Size:
        """Height and width of the images trained on, in pixels."""
        return Size(*(side * self.vae_settings.factor for side in self.latent_size()))

    def latent_size(self, resolution: Size | int = 0) -> tuple[int, int]:
        """Height and width of the latents of images of this size, in pixels; 0 is the size trained on.

        Raises:
            UserError: If the networks cannot make images of this size.
        """
        size = Size.of(resolution)
        if not any(size):
            return self.settings.latent.height, self.settings.latent.width
        size.divided(self.vae_settings.factor * self.settings.model.factor)
        return size.divided(self.vae_settings.factor)

    @cached_property
    def scaling(self) -> Scaling:
        """The latents' scaling, z <-> x0, on the device."""
        return Scaling.of(self.settings.latent, self.device)

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
        """New latents z: the first `items` of a seed, or those of these numbers, each the same in whatever batch.

        Args:
            items: How many images of the seed, or which.
            seed: Seed of all noise.
            sampling: Sampler, steps, guidance, first level.
            size: Height and width of the latents, if not those trained on.
            strength: Share of the noise levels above which none is visited.
            start: How to begin; the way for another denoiser and for other latents than noise.

        Raises:
            UserError: If there are more steps than usable levels, or for a class that the network does not know.
        """
        numbers, how = list(range(items) if isinstance(items, int) else items), sampling or SamplingSettings()
        shape = (self.settings.latent.channels, *(size or self.latent_size()))

        def noise_of(purpose: str) -> Float[Tensor, "b c h w"]:
            return async_copy(item_noise(shape, numbers, seed, purpose), self.device)

        levels = levels_for(self.settings, how, strength)
        guidance = guidance_for(self.settings, how, numbers, self.device, self.weak)
        denoise = denoiser(self.unet, self.settings.target.objective, how.clamp, guidance)
        denoise, x = start(denoise, levels[0], noise_of("start"))
        eta = {"eta": how.eta} if how.sampler in WITH_ETA else {}
        with autocast(self.device, self.precision):
            x0 = SAMPLERS[how.sampler](denoise, levels, x, lambda step: noise_of(f"step {step}"), **eta)
        return self.scaling.to_z(x0)

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
    vae = load_network(partial(build_vae, settings), saved, device, precision)
    # Without a backward pass, channels_last is faster on CPUs, too
    return vae.to(memory_format=torch.channels_last), settings


def load_unet(saved: Checkpoint, device: torch.device, precision: str, ema: float | None = None) -> nn.Module:
    """A U-Net ready for use."""
    s = saved.settings(TrainUNetSettings)
    return load_network(partial(build_unet, s.model, s.latent.channels, len(s.classes)), saved, device, precision, ema)


def load_network(
    build: Callable[[], N], saved: Checkpoint, device: torch.device, precision: str = "fp32", ema: float | None = None
) -> N:
    """A network with a snapshot's weights, those of `Checkpoint.weights_prefix`, ready for use.

    Raises:
        UserError: If they do not fit, or the settings make no network.
    """
    check_own(build, saved, saved.weights_prefix(ema))
    network = build().requires_grad_(False).eval()
    network.load_state_dict(saved.weights(ema))
    to_device(network, device)
    return cast_weights(network, precision)


def cast_weights(network: N, precision: str) -> N:
    """A network for inference under autocast, with the weights cast once that every call would cast."""
    for module in network.modules() if precision == "bf16" else ():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            module.bfloat16()
    return network


def vae_digest(saved: Checkpoint) -> str:
    """The digest that later stages know this VAE by: that of its encoder, which made the latents."""
    return saved.metadata.weights_digest(f"{saved.weights_prefix()}encoder.")


def vae_behind(unet: Checkpoint, given: Path | None, run: RunFolder) -> Path:
    """The VAE to decode with: the one given, else the copy kept with the U-Net's latents, else the run's."""
    if given is not None:
        return find_vae(given, run)
    copies = [path for home in latents_candidates(unet, run) if (path := home / VAE_COPY).is_file()]
    wanted = (path for path in copies if vae_digest(Checkpoint(path, "vae")) == unet.metadata.lineage.get("vae"))
    return next(wanted, None) or (copies[0] if copies else find_vae(None, run))


def latents_candidates(unet: Checkpoint, run: RunFolder) -> list[Path]:
    """Where the latents of a U-Net may be: where its settings say, in its run, and in this one."""
    named = named_latents(Path(saved)) if isinstance(saved := unet.metadata.settings.get("latents"), str) else []
    return [*named, RunFolder(unet.path.parent.parent.parent).latents, run.latents]
