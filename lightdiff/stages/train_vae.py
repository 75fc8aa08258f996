"""train-vae: images -> a VAE (MSE + beta KL + gamma LPIPS)."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lightdiff.data.bad_files import BadFiles
from lightdiff.data.files import ImageFile, data_digest, list_images
from lightdiff.data.images import to_float
from lightdiff.data.loading import ImageBatch, ImageDataset, load_batches
from lightdiff.data.order import batch_at, item_noise
from lightdiff.errors import UserError
from lightdiff.losses import VAELoss, psnr
from lightdiff.models.vae import LatentTransform, build_vae
from lightdiff.pictures import save_grid
from lightdiff.runtime.processes import Means, autocast, pick_workers
from lightdiff.runtime.progress import console, shape_words
from lightdiff.runtime.stage import Stage, open_stage
from lightdiff.settings import GRID, TrainVAESettings
from lightdiff.training.loop import Tensors, train


def run(settings: TrainVAESettings) -> Path:
    """Train a VAE and return its best checkpoint."""
    with open_stage(settings, "vae") as stage:
        files = list_images(stage.settings.images, console)
        digest = data_digest(files)
        stage.processes.check_same("list of images", digest)
        task = VAETask(stage, files)
        if stage.start_or_resume(task, {"data": digest}):
            loop = stage.settings.loop
            console.print(
                f"VAE: {sum(p.numel() for p in task.model.parameters()) / 1e6:.2f} M parameters, "
                f"{stage.settings.images.resolution} px -> {shape_words(task.latent_shape)}; "
                f"{len(task.train)} training and {len(task.val)} validation images; "
                f"{stage.total_steps} steps of {loop.batch_size} on {stage.machine} in {loop.precision}"
            )
            train(task, stage)
            if task.bad.count:
                console.print(f"{task.bad.count} unreadable images are listed in {stage.folder.bad_files}")
        return stage.folder.best


class VAETask:
    """What the training loop needs to know of a VAE."""

    def __init__(self, stage: Stage[TrainVAESettings], files: list[ImageFile]) -> None:
        """Build the network and both data sets."""
        self.stage, self.files = stage, files
        s = self.settings = stage.settings
        self.vae_loss = VAELoss(s.loss, stage.device, stage.processes.fetch)
        if s.freeze_encoder and not (stage.saved or s.init_from):
            raise UserError("--freeze-encoder needs the VAE that it belongs to: --init-from CHECKPOINT")
        vae = stage.new_network(lambda: build_vae(s.model))
        vae.get_submodule("encoder").requires_grad_(not s.freeze_encoder)
        self.model = vae
        self.train = [i for i, f in enumerate(files) if f.split == "train"]
        self.val = [i for i, f in enumerate(files) if f.split == "val"]
        self.train_items = len(self.train)
        self.train_set = self._images(self.train, train=True)
        self.val_set = self._images(self.val, train=False)
        self.bad = BadFiles(stage.folder.bad_files, files, s.images.data, s.images.max_bad)
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
        part = self.stage.processes.batch_slice(loop.batch_size)
        order = (self._batch_at(start + i * loop.batch_size)[part] for i in range(steps))
        workers, on_gpu = pick_workers(loop.workers, self.stage.device), self.stage.device.type == "cuda"
        yield from load_batches(self.train_set, order, workers, self._noting(self.train), pin=on_gpu)

    def _batch_at(self, start: int) -> list[tuple[int, int]]:
        loop = self.settings.loop
        return batch_at(start, loop.batch_size, len(self.train), loop.seed)

    def names(self, start: int) -> list[str]:
        """The files of the batch that begins after `start` images."""
        return [self.train_set.path(i) for _, i in self._batch_at(start)]

    def prepare(self, batch: ImageBatch, rng: torch.Generator) -> Tensors:
        """Images in [-1, 1] and the noise of their posteriors."""
        size = self.settings.loop.batch_size
        noise = torch.randn((size, *self.latent_shape), generator=rng, device=self.stage.device)[
            self.stage.processes.batch_slice(size)
        ]
        x = to_float(batch.x.to(self.stage.device, non_blocking=True))
        change = sample_transform(random.Random(rng.initial_seed()), self.settings.loss.equivariance)
        return {"x": x, "noise": noise, "change": torch.tensor([change]).expand(len(x), -1)}  # on the CPU

    def loss(self, model: nn.Module, part: Tensors) -> Tensors:
        """The VAE's loss."""
        change = LatentTransform(*part["change"][0].tolist())
        x_hat, posterior = model(part["x"], part["noise"], change)
        x = change(part["x"], self.settings.model.factor)
        return self.vae_loss(x, x_hat, posterior)

    def validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, noise) of this process's readable validation images; the noise is the same at each validation."""
        loop = self.settings.loop
        indices = self.stage.processes.share(len(self.val))
        order = ([(0, i) for i in indices[k : k + loop.micro]] for k in range(0, len(indices), loop.micro))
        for batch in load_batches(self.val_set, order, workers=0, on_bad=self._noting(self.val)):
            if len(batch.x):
                noise = item_noise(self.latent_shape, batch.index.tolist(), loop.seed, "validation")
                yield to_float(batch.x.to(self.stage.device)), noise.to(self.stage.device)

    @torch.inference_mode()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean loss, its parts and PSNR (dB) over the whole validation set."""
        model.eval()
        means = Means()
        for x, noise in self.validation_batches():
            with autocast(self.stage.device, self.settings.loop.precision):
                x_hat, posterior = model(x, noise)
                losses = self.vae_loss(x, x_hat, posterior)
            means.add(losses | {"psnr": psnr(x, x_hat).mean()}, len(x))
        return means.over(self.stage.processes)

    @torch.inference_mode()
    def picture(self, model: nn.Module, path: Path) -> None:
        """Rows of originals, each above its reconstructions; always the same images."""
        columns = GRID[0]
        if self._shown is None:
            source, items = (self.val_set, self.val) if self.val else (self.train_set, self.train)
            chosen = [(0, i) for i in range(min(2 * columns, len(items)))]
            self._shown = next(load_batches(source, [chosen], workers=0)).x
        x = to_float(self._shown.to(self.stage.device))
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
