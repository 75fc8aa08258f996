"""Draw with a model trained with lightdiff, in diffusers; lightdiff need not be installed.

pipe = DiffusionPipeline.from_pretrained("this folder", trust_remote_code=True)
images = pipe(num_images=4, seed=0).images
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor

from lightdiff.data.images import to_uint8
from lightdiff.data.order import item_noise
from lightdiff.diffusion.objectives import Guidance, denoiser
from lightdiff.diffusion.samplers import SAMPLERS
from lightdiff.diffusion.schedules import Schedule, sampling_levels
from lightdiff.settings import EPS_MIN_ALPHA_BAR, WITH_ETA


class LightdiffPipeline(DiffusionPipeline):
    """Noise -> latents -> images. Image i of a seed is that of `lightdiff generate`, whatever the batch."""

    _optional_components = ("guide",)

    def __init__(self, vae, unet, guide=None):
        """Take both networks, and a worse U-Net that guidance without a class leads away from."""
        super().__init__()
        self.register_modules(vae=vae, unet=unet, guide=guide)

    @torch.no_grad()
    def __call__(
        self,
        num_images: int = 1,
        seed: int = 0,
        class_names: str | Sequence[str] = (),
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_steps: int = 20,
        sampler: str = "dpm++2m",
        spacing: str = "trailing",
        eta: float = 0.0,
        batch_size: int = 32,
        output_type: str = "pil",
    ):
        """Draw images.

        Args:
            num_images: How many.
            seed: Seed of all noise.
            class_names: Classes to draw, the images taking turns; any if not given.
            guidance: Classifier-free guidance; 1 is the class as learned. Without a class, autoguidance.
            guidance_interval: Share of noise levels to guide at, 0 is clean.
            num_steps: Steps, each one call of the U-Net (two with heun).
            sampler: ddim, ddpm, dpm++2m, heun or euler.
            spacing: trailing, uniform, karras or quadratic.
            eta: Noise that ddim adds at each step.
            batch_size: Images at a time.
            output_type: pil, or pt for a tensor in [-1, 1].
        """
        wanted = [class_names] if isinstance(class_names, str) else list(class_names)
        known = list(self.unet.config.trained["classes"])
        for name in wanted:
            if name not in known:
                raise ValueError(f"this model knows no class {name}; it knows {', '.join(known) or 'none'}")
        if guidance != 1 and not wanted and self.guide is None:
            raise ValueError("guidance needs class_names to guide to, or a worse U-Net exported with --guide-with")
        parts = []
        for first in self.progress_bar(range(0, num_images, batch_size)):
            items = list(range(first, min(first + batch_size, num_images)))
            turns = [known.index(wanted[i % len(wanted)]) for i in items] if wanted else None
            x0 = self.sample(items, seed, turns, guidance, guidance_interval, num_steps, sampler, spacing, eta)
            parts.append(self.decode(x0))
        x = torch.cat(parts)
        if output_type == "pt":
            return ImagePipelineOutput(images=x)
        return ImagePipelineOutput(images=[Image.fromarray(one.permute(1, 2, 0).numpy()) for one in to_uint8(x)])

    def sample(
        self, items, seed=0, turns=None, guidance=1.0, interval=(0, 1), num_steps=20, sampler="dpm++2m",
        spacing="trailing", eta=0.0,
    ) -> Tensor:  # fmt: skip
        """Clean latents x0 of images of a seed, by their numbers and classes."""
        s = SimpleNamespace(**self.unet.config.trained)
        shape = (s.latent["channels"], s.latent["height"], s.latent["width"])
        schedule, device = Schedule.of(SimpleNamespace(**s.noise)), self.device
        floor = EPS_MIN_ALPHA_BAR if s.objective == "eps" else 0.0
        levels = sampling_levels(schedule, num_steps, floor, spacing)
        first, last = (share * len(schedule) - 1 for share in interval)
        label = None if turns is None else torch.tensor(turns, device=device)
        weak = self.guide if label is None else None
        guide = Guidance(label, len(s.classes), guidance, first, last, weak) if turns or weak else None
        denoise = denoiser(self.unet, s.objective, 0.0, guide)
        size = (levels[0].alpha ** 2 + levels[0].sigma ** 2) ** 0.5  # as if x0 were noise of unit variance, too
        x = size * item_noise(shape, items, seed, "start").to(device)
        more = {"eta": eta} if sampler in WITH_ETA else {}
        return SAMPLERS[sampler](
            denoise, levels, x, lambda step: item_noise(shape, items, seed, f"step {step}").to(device), **more
        )

    def decode(self, x0: Tensor) -> Tensor:
        """Images in [-1, 1] of clean latents, on the CPU."""
        latent = self.unet.config.trained["latent"]
        scale, shift = (torch.tensor(latent[name]).to(x0)[:, None, None] for name in ("scale", "shift"))
        return self.vae.decode(x0 / scale + shift).sample.clamp(-1, 1).float().cpu()
