"""train-unet: cached latents + scale -> a U-Net that tells signal from noise, with averaged weights."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.data.latents import LatentSet, Scaling, async_copy, latents_settings, prefetch
from lightdiff.data.order import batch_at, item_noise, key
from lightdiff.diffusion.objectives import loss_weight, target
from lightdiff.diffusion.schedules import Schedule, random_levels
from lightdiff.errors import UserError
from lightdiff.models.unet import UNet
from lightdiff.models.vae import Posterior
from lightdiff.pictures import save_grid
from lightdiff.pipeline import Sampling, load_vae, min_signal, sample_latents, usable_levels
from lightdiff.run_folder import Lock, RunFolder, find_latents
from lightdiff.runtime.device import autocast, pick_device, place
from lightdiff.runtime.processes import Processes, init_distributed
from lightdiff.runtime.progress import console, shape_words
from lightdiff.settings import GRID, TrainUNetSettings
from lightdiff.stages.encode import VAE_COPY
from lightdiff.stages.start import begin, decided, machine, resumed
from lightdiff.training.loop import Batch, train

BANDS = 4  # the levels are split into so many bands of equal width for validation
RESIDENT_SHARE = 0.25  # of a GPU's free memory, that latents may take up


class UNetTask:
    """What the training loop needs to know of a U-Net."""

    stage = "unet"

    def __init__(self, settings: TrainUNetSettings, latents: LatentSet, device: torch.device, ranks: Processes) -> None:
        """Build the network from resolved settings; `latents` gives the data."""
        s = self.settings = settings
        self.device, self.latents, self.ranks = device, latents, ranks
        torch.manual_seed(s.loop.seed)  # the initial weights
        self.model = network(s)
        place(self.model, device)
        self.schedule = Schedule.of(s.noise).to(device)
        self.scaling = Scaling.of(s.latent, device)
        self.shape = (s.latent.channels, s.latent.height, s.latent.width)
        self.classes = latents.index.classes(s.label, s.classes) if s.label else torch.empty(0)

    def batches(self, start: int, steps: int) -> Iterator[tuple[Posterior, Tensor]]:
        """This process's share of each batch, on the device; the next one is read meanwhile."""
        size = self.settings.loop.batch_size
        part = self.ranks.batch_slice(size)
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

    def prepare(self, batch: tuple[Posterior, Tensor], rng: torch.Generator) -> Batch:
        """Clean latents x0, their levels t and noise eps; posterior sample and all are drawn here."""
        latents, label = batch
        s = self.settings
        size = self.settings.loop.batch_size
        part = self.ranks.batch_slice(size)
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

    def loss(self, model: nn.Module, part: Batch) -> dict[str, Tensor]:
        """Mean squared error of the prediction, weighed by level (Ho et al. 2020, Eq. 14, where that is the noise)."""
        chosen = self.settings.target
        weight = loss_weight(chosen.loss_weight, chosen.min_snr_gamma, chosen.objective, *self.schedule.at(part["t"]))
        return {"loss": (weight * self.squared_error(model, part)).mean()}

    def squared_error(self, model: nn.Module, part: Batch) -> Tensor:
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
        mine = self.ranks.share(len(items))
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
        means = (self.ranks.sum(sums) / len(items)).tolist()
        return {"loss": sum(means) / BANDS, **{f"loss_band_{band + 1}": mean for band, mean in enumerate(means)}}

    @torch.inference_mode()
    def picture(self, model: nn.Module, path: Path) -> None:
        """A grid of samples, drawn always from the same noise."""
        model.eval()
        s = self.settings
        vae, _ = load_vae(Checkpoint(self.latents.folder / VAE_COPY, "vae"), self.device)
        start = min_signal(s)
        usable = usable_levels(s)
        steps = min(Sampling.num_steps, usable or s.noise.timesteps)
        sampling = Sampling(num_steps=steps, min_alpha_bar=start if usable else 0.0, classes=s.classes)
        with autocast(self.device, s.loop.precision):
            z = sample_latents(model, s, range(GRID[0] * GRID[1] // 2), s.loop.seed, self.device, sampling)
            x = vae.decoder(z)
        save_grid(path, x.clamp(-1, 1), GRID[0])


def network(settings: TrainUNetSettings) -> nn.Module:
    """The network that resolved settings describe."""
    return UNet(settings.model, settings.latent.channels, len(settings.classes))


def inherited(run: Path, latents: Path | None) -> dict[str, object]:
    """What train-unet takes over from the latents."""
    return {"latent": latents_settings(find_latents(latents, RunFolder(run))).model_dump()}


def run(settings: TrainUNetSettings) -> Path:
    """Train a U-Net and return its last checkpoint."""
    with Lock(settings.job.force_unlock) as lock:
        return train_unet(settings, lock)


def train_unet(settings: TrainUNetSettings, lock: Lock) -> Path:
    """The same, in a run folder that nobody else writes to."""
    # 1. What there is to train on, and where the results go
    device = pick_device(settings.loop.device)
    ranks = init_distributed(device, settings.job.timeout)
    latents = LatentSet(find_latents(settings.latents, RunFolder(settings.run)))
    if latents_settings(latents.folder) != settings.latent:
        raise UserError(f"the settings' section `latent` is not that of the latents in {latents.folder}")
    settings = resolve(settings)
    ranks.check_same("set of latents", latents.index.digest)
    folder = RunFolder(settings.run).unet
    saved = resumed(folder, "unet", settings, lock, ranks, network)
    total = settings.loop.total_steps(len(latents.train))
    settings = decided(settings, saved, device, ranks, total)
    if not latents.train:
        raise UserError(f"{latents.folder} has no latents in the training split; encode more images")
    if device.type == "cuda" and latents.nbytes < RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
        latents.to(device)  # else they are read as they are needed, from files that all processes share in memory

    # 2. The task: network, data, loss
    task = UNetTask(settings, latents, device, ranks)
    lineage = {"vae": latents.index.vae_digest, "latents": latents.index.digest}
    metadata = Metadata(stage="unet", settings=settings.to_save(), lineage=lineage)

    # 3. Fresh, from another's weights, or on from where it was
    if saved and saved.metadata.lineage != lineage:
        raise UserError(
            f"{folder.path} was trained on latents {saved.metadata.lineage['latents'][:8]}, but "
            f"{latents.folder} holds {latents.index.digest[:8]}: choose another --run, or --restart"
        )
    if not begin(task, settings, folder, metadata, saved, total):
        return folder.last
    parameters = sum(p.numel() for p in task.model.parameters())
    console.print(
        f"U-Net: {parameters / 1e6:.2f} M parameters, latents {shape_words(task.shape)}; "
        f"{len(latents.train)} training and {len(latents.val)} validation latents; "
        f"{total} steps of {settings.loop.batch_size} on {machine(device, ranks)} in {settings.loop.precision}"
    )

    if settings.latent.labels and not settings.label:
        named = ", ".join(f"{name} ({len(values)} values)" for name, values in settings.latent.labels.items())
        example = next(iter(settings.latent.labels))
        console.print(f"note: the latents have labels: {named}; with --label {example}, generate could be told which")

    # 4. Train
    train(task, settings.loop, folder, metadata, total, settings.loop.precision, saved, settings.job)
    return folder.last


def resolve(settings: TrainUNetSettings) -> TrainUNetSettings:
    """The settings with every size that follows from the latents filled in.

    Raises:
        UserError: If the latents' size does not fit the architecture.
    """
    latent = settings.latent
    settings = settings.resolved()
    model = settings.model
    if latent.height % model.factor or latent.width % model.factor:
        raise UserError(
            f"--model.channels: {len(model.channels) - 1} levels need latents divisible by {model.factor}, "
            f"but these are {latent.height} x {latent.width}; give fewer widths"
        )
    return settings
