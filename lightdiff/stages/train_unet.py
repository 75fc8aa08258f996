"""train-unet: cached latents + scale -> a U-Net that predicts noise, with averaged weights."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightdiff.checkpoint import Checkpoint, Document
from lightdiff.data.latents import LatentSet, Scaling, latents_settings, to_device
from lightdiff.data.order import batch_at, item_noise, key
from lightdiff.diffusion.schedules import alpha_bar_table, noised
from lightdiff.errors import UserError
from lightdiff.models.unet import UNet
from lightdiff.models.vae import Posterior
from lightdiff.pipeline import Sampling, load_vae, sample_latents
from lightdiff.run_folder import Lock, RunFolder, find_latents
from lightdiff.settings import GRID, MIN_ALPHA_BAR, TrainUNetSettings, with_changes
from lightdiff.stages.encode import VAE_COPY
from lightdiff.stages.start import begin, decided, machine, resumed
from lightdiff.training.background import ahead
from lightdiff.training.compute import autocast, pick_device, place
from lightdiff.training.loop import Batch, train
from lightdiff.training.progress import console, save_grid
from lightdiff.training.ranks import Ranks, join

BANDS = 4  # the levels are split into so many bands of equal width for validation
PICTURE_STEPS = 50
RESIDENT_SHARE = 0.25  # of a GPU's free memory, that latents may take up


class UNetTask:
    """What the training loop needs to know of a U-Net."""

    stage = "unet"

    def __init__(self, settings: TrainUNetSettings, latents: LatentSet, device: torch.device, ranks: Ranks) -> None:
        """Build the network from resolved settings; `latents` gives the data."""
        s = self.settings = settings
        self.device, self.latents, self.ranks = device, latents, ranks
        torch.manual_seed(s.loop.seed)  # the initial weights
        self.model = network(s)
        place(self.model, device)
        self.alpha_bar = alpha_bar_table(s.noise).float().to(device)
        self.scaling = Scaling.of(s.latent)
        self.shape = (s.latent.channels, s.latent.height, s.latent.width)

    def batches(self, start: int, steps: int) -> Iterator[Posterior]:
        """This process's share of each batch, on the device; the next one is read meanwhile."""
        size = self.settings.loop.batch_size
        part = self.ranks.part(size)
        return ahead(partial(self._read, self._batch_at(start + i * size)[part]) for i in range(steps))

    def _read(self, batch: list[tuple[int, int]]) -> Posterior:
        """The posteriors of (epoch, item), items counting training latents; half of them mirrored."""
        mirror = torch.tensor([key(self.settings.loop.seed, "mirror", e, i) % 2 for e, i in batch])
        mu, logvar = self.latents.gather([self.latents.train[i] for _, i in batch], mirror)
        return Posterior(to_device(mu, self.device), to_device(logvar, self.device))

    def _batch_at(self, start: int) -> list[tuple[int, int]]:
        loop = self.settings.loop
        return batch_at(start, loop.batch_size, len(self.latents.train), loop.seed)

    def names(self, start: int) -> list[str]:
        """The images behind the batch that begins after `start` images."""
        positions = [self.latents.train[i] for _, i in self._batch_at(start)]
        return [self.latents.index.files[p][1] for p in positions]

    def prepare(self, batch: Posterior, rng: torch.Generator) -> Batch:
        """Clean latents x0, their levels t and noise eps; posterior sample and all are drawn here."""
        size = self.settings.loop.batch_size
        part = self.ranks.part(size)
        whole = (size, *self.shape)
        posterior = torch.randn(whole, generator=rng, device=self.device)[part]
        z = batch.mu if self.settings.latent.only_mu else batch.sample(posterior)
        t = torch.randint(len(self.alpha_bar), (size,), generator=rng, device=self.device)[part]
        eps = torch.randn(whole, generator=rng, device=self.device)[part]
        return {"x0": self.scaling.to_x0(z), "t": t, "eps": eps}

    def loss(self, model: nn.Module, part: Batch) -> dict[str, Tensor]:
        """Mean squared error of the predicted noise (Ho et al. 2020, Eq. 14)."""
        x_t = noised(part["x0"], part["eps"], self.alpha_bar[part["t"]])
        return {"loss": F.mse_loss(model(x_t, part["t"]), part["eps"])}

    @torch.inference_mode()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean loss over the validation latents, whole and by noise band, each latent at one level of every band.

        Levels and noise are the same at each validation. `loss_band_1` covers the least noisy levels.
        """
        model.eval()
        loop, levels = self.settings.loop, len(self.alpha_bar)
        items = self.latents.val
        sums = torch.zeros(BANDS, dtype=torch.float64)
        mine = self.ranks.share(len(items))
        for first in range(mine.start, mine.stop, loop.micro):
            at = range(first, min(first + loop.micro, mine.stop))
            mu, _ = self.latents.gather([items[i] for i in at])
            x0 = self.scaling.to_x0(to_device(mu, self.device))
            for band in range(BANDS):
                place = [(key(loop.seed, "validation level", band, i) % 4096 + 0.5) / 4096 for i in at]
                t = torch.tensor([int((band + p) * levels / BANDS) for p in place], device=self.device)
                eps = item_noise(self.shape, list(at), loop.seed, f"validation {band}").to(self.device)
                with autocast(self.device, loop.precision):
                    error = model(noised(x0, eps, self.alpha_bar[t]), t) - eps
                sums[band] += error.square().mean((1, 2, 3)).cpu().double().sum()
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
        usable = int((self.alpha_bar >= MIN_ALPHA_BAR).sum())
        start = MIN_ALPHA_BAR if usable else 0.0
        sampling = Sampling(num_steps=min(PICTURE_STEPS, usable or s.noise.timesteps), min_alpha_bar=start)
        count = GRID[0] * GRID[1] // 2
        with autocast(self.device, s.loop.precision):
            z = sample_latents(model, s.latent, s.noise, range(count), s.loop.seed, self.device, sampling)
            x = vae.decoder(z)
        save_grid(path, x.clamp(-1, 1), GRID[0])


def network(settings: TrainUNetSettings) -> nn.Module:
    """The network that resolved settings describe."""
    return UNet(settings.model, settings.latent.channels)


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
    ranks = join(device, settings.job.timeout)
    latents = LatentSet(find_latents(settings.latents, RunFolder(settings.run)))
    if latents_settings(latents.folder) != settings.latent:
        raise UserError("--settings: its latent section is not that of these latents; leave it out")
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
    document = Document(stage="unet", settings=settings.to_save(), lineage=lineage)

    # 3. Fresh, from another's weights, or on from where it was
    if saved and saved.document.lineage != lineage:
        raise UserError(
            f"{folder.path} was trained on latents {saved.document.lineage['latents'][:8]}, but "
            f"{latents.folder} holds {latents.index.digest[:8]}: choose another --run, or --restart"
        )
    if not begin(task, settings, folder, document, saved, total):
        return folder.last
    parameters = sum(p.numel() for p in task.model.parameters())
    console.print(
        f"U-Net: {parameters / 1e6:.2f} M parameters, latents {' x '.join(map(str, task.shape))}; "
        f"{len(latents.train)} training and {len(latents.val)} validation latents; "
        f"{total} steps of {settings.loop.batch_size} on {machine(device, ranks)} in {settings.loop.precision}"
    )

    # 4. Train
    train(task, settings.loop, folder, document, total, settings.loop.precision, saved, settings.job)
    return folder.last


def resolve(settings: TrainUNetSettings) -> TrainUNetSettings:
    """The settings with every size that follows from the latents filled in.

    Raises:
        UserError: If the latents' size does not fit the architecture.
    """
    latent = settings.latent
    model = settings.model.resolved(min(latent.height, latent.width))
    if latent.height % model.factor or latent.width % model.factor:
        raise UserError(
            f"--model.channels: {len(model.channels) - 1} levels need latents divisible by {model.factor}, "
            f"but these are {latent.height} x {latent.width}; give fewer widths"
        )
    return with_changes(settings, model=model)
