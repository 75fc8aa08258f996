"""train-unet: cached latents + scale -> a U-Net that tells signal from noise, with averaged weights."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.latents import LatentSet, Scaling, async_copy, latents_settings, prefetch
from lightdiff.data.order import batch_at, item_noise, key
from lightdiff.diffusion.objectives import loss_weight, target
from lightdiff.diffusion.schedules import Schedule, random_levels
from lightdiff.errors import UserError
from lightdiff.models.unet import build_unet
from lightdiff.models.vae import Posterior
from lightdiff.pictures import save_grid
from lightdiff.pipeline import load_vae, sample_latents, usable_levels
from lightdiff.run_folder import RunFolder, find_latents
from lightdiff.runtime.processes import autocast
from lightdiff.runtime.progress import console, shape_words
from lightdiff.runtime.stage import Stage, open_stage
from lightdiff.settings import GRID, SamplingSettings, TrainUNetSettings
from lightdiff.stages.encode import VAE_COPY
from lightdiff.training.loop import Tensors, train

BANDS = 4  # bands of equal width that the levels are split into for validation
RESIDENT_SHARE = 0.25  # of a GPU's free memory, that latents may take up


def run(settings: TrainUNetSettings) -> Path:
    """Train a U-Net and return its last checkpoint."""
    with open_stage(settings, "unet") as stage:
        latents = open_latents(stage)
        task = UNetTask(stage, latents)
        if stage.start_or_resume(task, {"vae": latents.index.vae_digest, "latents": latents.index.digest}):
            loop, latent = stage.settings.loop, stage.settings.latent
            console.print(
                f"U-Net: {sum(p.numel() for p in task.model.parameters()) / 1e6:.2f} M parameters, "
                f"latents {shape_words(task.shape)}; "
                f"{len(latents.train)} training and {len(latents.val)} validation latents; "
                f"{stage.total_steps} steps of {loop.batch_size} on {stage.machine} in {loop.precision}"
            )
            if latent.labels and not stage.settings.label:
                named = ", ".join(f"{name} ({len(values)} values)" for name, values in latent.labels.items())
                console.print(
                    f"note: the latents have labels: {named}; "
                    f"with --label {next(iter(latent.labels))}, generate could be asked for one"
                )
            train(task, stage)
        return stage.folder.last


def inherited(run: Path, latents: Path | None) -> dict[str, object]:
    """What train-unet takes over from the latents."""
    return {"latent": latents_settings(find_latents(latents, RunFolder(run))).model_dump()}


def open_latents(stage: Stage[TrainUNetSettings]) -> LatentSet:
    """The latents to train on, on the GPU where they fit; else they are read as needed, from files mapped into memory.

    Raises:
        UserError: If they are not those of the settings, or there are none to train on.
    """
    latents = LatentSet(find_latents(stage.settings.latents, RunFolder(stage.settings.run)))
    stage.processes.check_same("set of latents", latents.index.digest)
    if latents_settings(latents.index) != stage.settings.latent:
        raise UserError(f"the settings' section `latent` is not that of the latents in {latents.folder}")
    if not latents.train:
        raise UserError(f"{latents.folder} has no latents in the training split; encode more images")
    if stage.device.type == "cuda" and latents.nbytes < RESIDENT_SHARE * torch.cuda.mem_get_info(stage.device)[0]:
        latents.to(stage.device)
    return latents


class UNetTask:
    """What the training loop needs to know of a U-Net."""

    def __init__(self, stage: Stage[TrainUNetSettings], latents: LatentSet) -> None:
        """Build the network; `latents` gives the data."""
        s = self.settings = stage.settings
        self.stage, self.device, self.latents, self.train_items = stage, stage.device, latents, len(latents.train)
        self.shape = (s.latent.channels, s.latent.height, s.latent.width)
        self.model = stage.new_network(lambda: build_unet(s.model, s.latent.channels, len(s.classes)))
        self.schedule = Schedule.of(s.noise).to(self.device)
        self.scaling = Scaling.of(s.latent, self.device)
        self.classes = latents.index.classes(s.label, s.classes) if s.label else torch.empty(0)

    def batches(self, start: int, steps: int) -> Iterator[tuple[Posterior, Tensor]]:
        """This process's share of each batch, on the device; the next one is read meanwhile."""
        size = self.settings.loop.batch_size
        part = self.stage.processes.batch_slice(size)
        return prefetch(partial(self._read, self._batch_at(start + i * size)[part]) for i in range(steps))

    def _read(self, batch: list[tuple[int, int]]) -> tuple[Posterior, Tensor]:
        """The posteriors of (epoch, item), items counting training latents, half of them mirrored; their classes."""
        mirror = torch.tensor([key(self.settings.loop.seed, "mirror", e, i) % 2 for e, i in batch])
        positions = [self.latents.train[i] for _, i in batch]
        mu, logvar = self.latents.gather(positions, mirror)
        posterior = Posterior(async_copy(mu, self.device), async_copy(logvar, self.device))
        return posterior, self._classes(positions)

    def _classes(self, positions: list[int]) -> Tensor:
        """The classes of images at these positions, as the network counts them."""
        return async_copy(self.classes[positions] if self.settings.label else torch.empty(0), self.device)

    def _batch_at(self, start: int) -> list[tuple[int, int]]:
        loop = self.settings.loop
        return batch_at(start, loop.batch_size, len(self.latents.train), loop.seed)

    def names(self, start: int) -> list[str]:
        """The images behind the batch that begins after `start` images."""
        positions = [self.latents.train[i] for _, i in self._batch_at(start)]
        return [self.latents.index.files[p][1] for p in positions]

    def prepare(self, batch: tuple[Posterior, Tensor], rng: torch.Generator) -> Tensors:
        """Clean latents x0, their levels t and noise eps; posterior sample and all are drawn here."""
        latents, label = batch
        s = self.settings
        size = self.settings.loop.batch_size
        part = self.stage.processes.batch_slice(size)
        whole = (size, *self.shape)
        posterior = torch.randn(whole, generator=rng, device=self.device)[part]
        z = latents.mu if s.latent.only_mu else latents.sample(posterior)
        u = torch.rand(size, generator=rng, device=self.device)
        t = random_levels(u, s.levels, len(self.schedule))[part]
        eps = torch.randn(whole, generator=rng, device=self.device)[part]
        drawn = {"x0": self.scaling.to_x0(z), "t": t, "eps": eps}
        if not s.label:
            return drawn
        forgotten = torch.rand(size, generator=rng, device=self.device)[part] < s.label_dropout
        return drawn | {"label": label.masked_fill(forgotten, len(s.classes))}

    def loss(self, model: nn.Module, part: Tensors) -> Tensors:
        """Mean squared error of the prediction, weighed by level (Ho et al. 2020, Eq. 14, where that is the noise)."""
        chosen = self.settings.target
        weight = loss_weight(chosen.loss_weight, chosen.min_snr_gamma, chosen.objective, *self.schedule.at(part["t"]))
        return {"loss": (weight * self.squared_error(model, part)).mean()}

    def squared_error(self, model: nn.Module, part: Tensors) -> Tensor:
        """Of each element of the prediction, (b, c, h, w)."""
        x0, eps, t = part["x0"], part["eps"], part["t"]
        told = [part["label"]] if "label" in part else []
        prediction = model(self.schedule.q_sample(x0, eps, t), t, *told)
        wanted = target(self.settings.target.objective, x0, eps, *self.schedule.at(t))
        error: Tensor = prediction - wanted
        return error.square()

    @torch.inference_mode()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean error over the validation latents, whole and by noise band, each latent at one level of every band.

        Levels and noise are the same at each validation. `loss_band_1` covers the least noisy levels.
        """
        model.eval()
        loop, levels = self.settings.loop, len(self.schedule)
        items = self.latents.val
        sums = torch.zeros(BANDS, dtype=torch.float64)
        mine = self.stage.processes.share(len(items))
        for first in range(mine.start, mine.stop, loop.micro):
            at = range(first, min(first + loop.micro, mine.stop))
            positions = [items[i] for i in at]
            mu, _ = self.latents.gather(positions)
            x0 = self.scaling.to_x0(async_copy(mu, self.device))
            label = {"label": self._classes(positions)} if self.settings.label else {}
            for band in range(BANDS):
                place = [(key(loop.seed, "validation level", band, i) % 4096 + 0.5) / 4096 for i in at]
                t = torch.tensor([int((band + p) * levels / BANDS) for p in place], device=self.device)
                eps = item_noise(self.shape, list(at), loop.seed, f"validation {band}").to(self.device)
                with autocast(self.device, loop.precision):
                    error = self.squared_error(model, {"x0": x0, "eps": eps, "t": t, **label})
                sums[band] += error.mean((1, 2, 3)).cpu().double().sum()
        if not items:
            return {}
        means = (self.stage.processes.all_reduce_sum(sums) / len(items)).tolist()
        return {"loss": sum(means) / BANDS, **{f"loss_band_{band + 1}": mean for band, mean in enumerate(means)}}

    @torch.inference_mode()
    def picture(self, model: nn.Module, path: Path) -> None:
        """A grid of samples, drawn always from the same noise."""
        model.eval()
        s = self.settings
        vae, _ = load_vae(Checkpoint(self.latents.folder / VAE_COPY, "vae"), self.device)
        usable, most = usable_levels(s), SamplingSettings().num_steps
        steps = min(most, usable or s.noise.timesteps)
        sampling = SamplingSettings(num_steps=steps, min_alpha_bar=None if usable else 0.0, class_=s.classes)
        with autocast(self.device, s.loop.precision):
            z = sample_latents(model, s, range(GRID[0] * GRID[1] // 2), s.loop.seed, self.device, sampling)
            x = vae.decoder(z)
        save_grid(path, x.clamp(-1, 1), GRID[0])
