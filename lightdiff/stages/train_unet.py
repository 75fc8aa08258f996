"""train-unet: cached latents + scale -> a U-Net that denoises latents, with averaged weights."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lightdiff.checkpoint import Checkpoint, tensor_digest
from lightdiff.data.latents import LatentSet, Scaling, async_copy, latents_settings, prefetch
from lightdiff.data.order import Order, item_noise, key
from lightdiff.diffusion.objectives import loss_weight, target
from lightdiff.diffusion.schedules import Schedule, random_levels
from lightdiff.errors import UserError
from lightdiff.models.unet import build_unet
from lightdiff.models.vae import Posterior
from lightdiff.on_demand import on_demand
from lightdiff.pictures import save_grid
from lightdiff.pipeline import Pipeline, default_sampling, load_vae, vae_digest
from lightdiff.run_folder import VAE_COPY, RunFolder, find_latents
from lightdiff.runtime.processes import autocast
from lightdiff.runtime.progress import console, shape_words
from lightdiff.runtime.stage import Stage, open_stage
from lightdiff.settings import GRID, TrainUNetSettings
from lightdiff.training.loop import train
from lightdiff.training.saving import Tensors

BANDS = 4  # bands of equal width that the levels are split into for validation
RESIDENT_SHARE = 0.25  # of a GPU's free memory, that latents may take up


def run(settings: TrainUNetSettings) -> Path:
    """Train a U-Net and return its last checkpoint."""
    with open_stage(settings, "unet") as stage:
        latents = open_latents(stage)
        task = UNetTask(stage, latents)
        labels = {"labels": tensor_digest(task.classes)} if stage.settings.label else {}
        lineage = {"vae": latents.index.vae_digest, "latents": latents.index.digest, **labels}
        if stage.start_or_resume(task, lineage):
            train(task, stage)
        return stage.folder.last


def inherited(run: Path, latents: Path | None) -> dict[str, object]:
    """What train-unet takes over from the latents, and the preset of the VAE that they came from."""
    folder = find_latents(latents, RunFolder(run))
    copy = folder / VAE_COPY
    preset = Checkpoint(copy, "vae").metadata.settings.get("preset") if copy.is_file() else ""
    return {"latent": latents_settings(folder).model_dump(), **({"preset": preset} if preset else {})}


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
    copy = Checkpoint(latents.folder / VAE_COPY, "vae")
    if vae_digest(copy) != latents.index.vae_digest:
        raise UserError(f"{copy.path} is not the VAE of these latents: run 'lightdiff encode' again, which replaces it")
    if stage.device.type == "cuda" and latents.nbytes < RESIDENT_SHARE * torch.cuda.mem_get_info(stage.device)[0]:
        latents.to(stage.device)
    return latents


class UNetTask:
    """What the training loop needs to know of a U-Net."""

    def __init__(self, stage: Stage[TrainUNetSettings], latents: LatentSet) -> None:
        """Build the network; `latents` gives the data."""
        s = self.settings = stage.settings
        self.stage, self.device, self.latents = stage, stage.device, latents
        self.train_items, self.val_items = len(latents.train), len(latents.val)
        index, weights, seed = latents.index, latents.index.images.data_weights, s.loop.seed
        self.order = Order(self.train_items, seed)
        if weights:
            self.order = on_demand("data.mixing:Mixture")(index.roots[index.positions("train")], weights, seed)
        self.batch_slice = stage.processes.batch_slice(s.loop.batch_size)  # this process's share of each batch
        self.shape = (s.latent.channels, s.latent.height, s.latent.width)
        self.model = stage.new_network(lambda: build_unet(s.model, s.latent.channels, len(s.classes)))
        self.schedule, self.scaling = Schedule.of(s.noise).to(self.device), Scaling.of(s.latent, self.device)
        self.classes = latents.index.classes(s.label, s.classes) if s.label else torch.empty(0)
        if s.latent.labels and not s.label:
            named = ", ".join(f"{name} ({len(values)} values)" for name, values in s.latent.labels.items())
            hint = f"with --label {next(iter(s.latent.labels))}, generate could be asked for one"
            console.print(f"note: the latents have labels: {named}; {hint}")

    @property
    def example(self) -> tuple[Tensor, Tensor]:
        """A latent and its level."""
        return torch.zeros(1, *self.shape, device=self.device), torch.zeros(1, device=self.device)

    @property
    def networks(self) -> list[nn.Module]:
        """What is compiled."""
        return [self.model]

    @property
    def summary(self) -> str:
        """What is trained on what."""
        size, latents = sum(p.numel() for p in self.model.parameters()) / 1e6, self.latents
        count = f"{len(latents.train)} training and {len(latents.val)} validation latents"
        return f"U-Net: {size:.2f} M parameters, latents {shape_words(self.shape)}; {count}"

    def batches(self, start: int, steps: int) -> Iterator[tuple[Posterior, Tensor]]:
        """This process's share of each batch, on the device; the next one is read meanwhile."""
        starts = (start + i * self.settings.loop.batch_size for i in range(steps))
        return prefetch(partial(self._read, self._batch_at(first)[self.batch_slice]) for first in starts)

    def _read(self, batch: list[tuple[int, int]]) -> tuple[Posterior, Tensor]:
        """The posteriors of (epoch, item), items counting training latents, half of them mirrored; their classes."""
        mirror = torch.tensor([key(self.settings.loop.seed, "mirror", e, i) % 2 for e, i in batch])
        positions = [self.latents.train[i] for _, i in batch]
        return Posterior(*self.latents.gather(positions, mirror, self.device)), self._classes(positions)

    def _classes(self, positions: list[int]) -> Tensor:
        """The classes of images at these positions, as the network counts them; empty without a label."""
        return async_copy(self.classes[positions] if self.settings.label else self.classes, self.device)

    def _batch_at(self, start: int) -> list[tuple[int, int]]:
        return self.order.batch_at(start, self.settings.loop.batch_size)

    def names(self, start: int) -> list[str]:
        """The images behind the batch that begins after `start` images."""
        return [self.latents.index.name(self.latents.train[i]) for _, i in self._batch_at(start)]

    def prepare(self, batch: tuple[Posterior, Tensor], rng: torch.Generator) -> Tensors:
        """Clean latents x0, their levels t and noise eps; posterior sample and all are drawn here."""
        (latents, label), s, device, mine = batch, self.settings, self.device, self.batch_slice
        whole = (s.loop.batch_size, *self.shape)
        posterior = torch.randn(whole, generator=rng, device=device)[mine]
        z = latents.mu if s.latent.only_mu else latents.sample(posterior)
        u = torch.rand(whole[0], generator=rng, device=device)
        t = random_levels(u, s.levels, len(self.schedule))[mine]
        eps = torch.randn(whole, generator=rng, device=device)[mine]
        drawn = {"x0": self.scaling.to_x0(z), "t": t, "eps": eps}
        if not s.label:
            return drawn
        forgotten = torch.rand(whole[0], generator=rng, device=device)[mine] < s.label_dropout
        return drawn | {"label": label.masked_fill(forgotten, len(s.classes))}

    def loss(self, model: nn.Module, batch: Tensors) -> Tensors:
        """Mean squared error of the prediction, weighted by level (Ho et al. 2020, Eq. 14, where that is the noise)."""
        s = self.settings.target
        weight = loss_weight(s.loss_weight, s.min_snr_gamma, s.objective, *self.schedule.at(batch["t"]))
        return {"loss": (weight * self.squared_error(model, batch)).mean()}

    def squared_error(self, model: nn.Module, batch: Tensors) -> Tensor:
        """Of each element of the prediction, (b, c, h, w)."""
        x0, eps, t = batch["x0"], batch["eps"], batch["t"]
        label = [batch["label"]] if "label" in batch else []
        prediction: Tensor = model(self.schedule.q_sample(x0, eps, t), t, *label)
        wanted = target(self.settings.target.objective, x0, eps, *self.schedule.at(t))
        return (prediction - wanted).square()

    @torch.inference_mode()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean error over the validation latents, whole and by noise band, each latent at one level of every band.

        Levels and noise are the same at each validation. `loss_band_1` covers the least noisy levels.
        """
        model.eval()
        loop, items, errors = self.settings.loop, self.latents.val, [list[Tensor]() for _ in range(BANDS)]
        mine = self.stage.processes.share(len(items))
        for at in (mine[i : i + loop.micro] for i in range(0, len(mine), loop.micro)):
            positions = [items[i] for i in at]
            x0 = self.scaling.to_x0(self.latents.gather(positions, device=self.device)[0])
            label = {"label": self._classes(positions)} if self.settings.label else {}
            for band in range(BANDS):
                shares = [(key(loop.seed, "validation level", band, i) % 4096 + 0.5) / 4096 for i in at]
                levels = [int((band + share) * len(self.schedule) / BANDS) for share in shares]
                noise = item_noise(self.shape, list(at), loop.seed, f"validation {band}")
                t, eps = (async_copy(x, self.device) for x in (torch.tensor(levels), noise))
                with autocast(self.device, loop.precision):
                    error = self.squared_error(model, {"x0": x0, "eps": eps, "t": t, **label})
                errors[band].append(error.mean((1, 2, 3)))
        if not items:
            return {}
        sums = torch.stack([torch.cat(found or [torch.zeros(0)]).cpu().double().sum() for found in errors])
        means = (self.stage.processes.all_reduce_sum(sums) / len(items)).tolist()
        return {"loss": sum(means) / BANDS, **{f"loss_band_{band + 1}": mean for band, mean in enumerate(means)}}

    def picture(self, model: nn.Module, path: Path) -> None:
        """A grid of samples, drawn always from the same noise."""
        s = self.settings
        vae, vae_settings = load_vae(Checkpoint(self.latents.folder / VAE_COPY, "vae"), self.device)
        pipeline = Pipeline(vae, vae_settings, model.eval(), s, self.device, s.loop.precision)
        z = pipeline.sample(GRID[0] * GRID[1] // 2, s.loop.seed, default_sampling(s))
        save_grid(path, pipeline.decode(z), GRID[0])
