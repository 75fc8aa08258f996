"""train-vae: images -> a VAE (MSE + beta KL + gamma LPIPS)."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lightdiff.checkpoint import Metadata
from lightdiff.data.bad_files import BadFiles
from lightdiff.data.files import ImageFile, data_digest, list_images
from lightdiff.data.images import to_float
from lightdiff.data.loading import ImageBatch, ImageDataset, load_batches
from lightdiff.data.order import batch_at, item_noise
from lightdiff.errors import UserError, not_divisible
from lightdiff.losses import VAELoss, psnr
from lightdiff.models.vae import VAE, LatentTransform
from lightdiff.pictures import save_grid
from lightdiff.run_folder import Lock, RunFolder
from lightdiff.runtime.device import autocast, pick_device, pick_workers, place
from lightdiff.runtime.processes import Processes, init_distributed
from lightdiff.runtime.progress import console, shape_words
from lightdiff.settings import GRID, TrainVAESettings, with_changes
from lightdiff.stages.start import begin, decided, machine, resumed
from lightdiff.training.loop import Batch, Means, train


class VAETask:
    """What the training loop needs to know of a VAE."""

    stage = "vae"

    def __init__(
        self,
        settings: TrainVAESettings,
        files: list[ImageFile],
        device: torch.device,
        vae_loss: VAELoss,
        bad: BadFiles,
        ranks: Processes,
    ) -> None:
        """Build the network and both data sets from resolved settings."""
        self.settings, self.device, self.vae_loss, self.bad, self.ranks = settings, device, vae_loss, bad, ranks
        s = settings
        torch.manual_seed(s.loop.seed)  # the initial weights
        vae = network(s)
        vae.encoder.requires_grad_(not s.freeze_encoder)
        self.model: nn.Module = vae
        place(self.model, device)
        self.files = files
        self.train = [i for i, f in enumerate(files) if f.split == "train"]
        self.val = [i for i, f in enumerate(files) if f.split == "val"]
        self.train_set = self._images(self.train, train=True)
        self.val_set = self._images(self.val, train=False)
        side = s.images.resolution // s.model.factor
        self.latent_shape = (s.model.latent_channels, side, side)
        self._shown: Tensor | None = None

    def _images(self, which: list[int], train: bool) -> ImageDataset:
        files = [self.files[i] for i in which]
        return ImageDataset(files, self.settings.images, self.settings.loop.seed, train)

    def _noting(self, items: list[int]) -> Callable[[list[tuple[int, str]]], None]:
        """List unreadable images, whose numbers count `items`."""
        return lambda bad: self.bad.add([(items[i], why) for i, why in bad])

    def batches(self, start: int, steps: int) -> Iterator[ImageBatch]:
        """Random crops and mirrors of training images, in the order of (seed, epoch)."""
        loop = self.settings.loop
        part = self.ranks.batch_slice(loop.batch_size)
        order = (self._batch_at(start + i * loop.batch_size)[part] for i in range(steps))
        workers, on_gpu = pick_workers(loop.workers, self.device), self.device.type == "cuda"
        yield from load_batches(self.train_set, order, workers, self._noting(self.train), pin=on_gpu)

    def _batch_at(self, start: int) -> list[tuple[int, int]]:
        loop = self.settings.loop
        return batch_at(start, loop.batch_size, len(self.train), loop.seed)

    def names(self, start: int) -> list[str]:
        """The files of the batch that begins after `start` images."""
        return [self.train_set.path(i) for _, i in self._batch_at(start)]

    def prepare(self, batch: ImageBatch, rng: torch.Generator) -> Batch:
        """Images in [-1, 1] and the noise of their posteriors."""
        size = self.settings.loop.batch_size
        noise = torch.randn((size, *self.latent_shape), generator=rng, device=self.device)[self.ranks.batch_slice(size)]
        x = to_float(batch.x.to(self.device, non_blocking=True))
        change = sample_transform(random.Random(rng.initial_seed()), self.settings.loss.equivariance)
        return {"x": x, "noise": noise, "change": torch.tensor([change]).expand(len(x), -1)}  # on the CPU

    def loss(self, model: nn.Module, part: Batch) -> dict[str, Tensor]:
        """The VAE's loss."""
        change = LatentTransform(*part["change"][0].tolist())
        x_hat, posterior = model(part["x"], part["noise"], change)
        x = change(part["x"], self.settings.model.factor)
        return self.vae_loss(x, x_hat, posterior)

    def validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, noise) of this process's readable validation images; the noise is the same at each validation."""
        loop = self.settings.loop
        indices = self.ranks.share(len(self.val))
        order = ([(0, i) for i in indices[k : k + loop.micro]] for k in range(0, len(indices), loop.micro))
        for batch in load_batches(self.val_set, order, workers=0, on_bad=self._noting(self.val)):
            if len(batch.x):
                noise = item_noise(self.latent_shape, batch.index.tolist(), loop.seed, "validation")
                yield to_float(batch.x.to(self.device)), noise.to(self.device)

    @torch.inference_mode()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean loss, its parts and PSNR (dB) over the whole validation set."""
        model.eval()
        means = Means()
        for x, noise in self.validation_batches():
            with autocast(self.device, self.settings.loop.precision):
                x_hat, posterior = model(x, noise)
                losses = self.vae_loss(x, x_hat, posterior)
            means.add(losses | {"psnr": psnr(x, x_hat).mean()}, len(x))
        return means.over(self.ranks)

    @torch.inference_mode()
    def picture(self, model: nn.Module, path: Path) -> None:
        """Rows of originals, each above its reconstructions; always the same images."""
        columns = GRID[0]
        if self._shown is None:
            source, items = (self.val_set, self.val) if self.val else (self.train_set, self.train)
            chosen = [(0, i) for i in range(min(2 * columns, len(items)))]
            self._shown = next(load_batches(source, [chosen], workers=0)).x
        x = to_float(self._shown.to(self.device))
        model.eval()
        x_hat = model.decoder(model.encoder(x).mu)  # type: ignore[operator]
        pairs = zip(torch.split(x, columns), torch.split(x_hat, columns), strict=True)
        save_grid(path, torch.cat([row for pair in pairs for row in pair]), columns)


def sample_transform(rng: random.Random, share: float) -> LatentTransform:
    """What is done to a batch's latents and images: nothing, or, in this share of the steps, anything else."""
    if rng.random() >= share:
        return LatentTransform(4, 0)
    smaller, turns = divmod(rng.randrange(1, 16), 4)
    return LatentTransform(4 - smaller, turns)


def network(settings: TrainVAESettings) -> VAE:
    """The network that resolved settings describe."""
    return VAE(settings.model)


def run(settings: TrainVAESettings) -> Path:
    """Train a VAE and return its best checkpoint."""
    with Lock(settings.job.force_unlock) as lock:
        return train_vae(settings, lock)


def train_vae(settings: TrainVAESettings, lock: Lock) -> Path:
    """The same, in a run folder that nobody else writes to."""
    # 1. What there is to train on, and where the results go
    device = pick_device(settings.loop.device)
    ranks = init_distributed(device, settings.job.timeout)
    resolution = settings.images.resolution
    settings = resolve(settings)
    files = list_images(settings.images, console)
    ranks.check_same("list of images", data_digest(files))
    vae_loss = VAELoss(settings.loss, device, ranks.fetch)
    folder = RunFolder(settings.run).vae
    saved = resumed(folder, "vae", settings, lock, ranks, network)
    total = settings.loop.total_steps(sum(file.split == "train" for file in files))
    settings = decided(settings, saved, device, ranks, total)

    if settings.freeze_encoder and not (saved or settings.init_from):
        raise UserError("--freeze-encoder needs the VAE that it belongs to: --init-from CHECKPOINT")

    # 2. The task: network, data, loss
    bad = BadFiles(folder.bad_files, files, settings.images.data, settings.images.max_bad)
    task = VAETask(settings, files, device, vae_loss, bad, ranks)

    # 3. Fresh, from another's weights, or on from where it was
    metadata = Metadata(stage="vae", settings=settings.to_save(), lineage={"data": data_digest(files)})
    if not begin(task, settings, folder, metadata, saved, total):
        return folder.best
    parameters = sum(p.numel() for p in task.model.parameters())
    console.print(
        f"VAE: {parameters / 1e6:.2f} M parameters, {resolution} px -> {shape_words(task.latent_shape)}; "
        f"{len(task.train)} training and {len(task.val)} validation images; "
        f"{total} steps of {settings.loop.batch_size} on {machine(device, ranks)} in {settings.loop.precision}"
    )

    # 4. Train
    train(task, settings.loop, folder, metadata, total, settings.loop.precision, saved, settings.job)
    if bad.count:
        console.print(f"{bad.count} unreadable images are listed in {folder.bad_files}")
    return folder.best


def resolve(settings: TrainVAESettings) -> TrainVAESettings:
    """The settings with every size that follows from the images filled in.

    Raises:
        UserError: If the resolution does not fit the architecture.
    """
    resolution = settings.images.resolution
    model = settings.model.resolved(resolution)
    if resolution % model.factor:
        raise not_divisible(resolution, model.factor)
    return with_changes(settings, model=model)
