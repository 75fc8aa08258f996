"""train-vae: images -> a VAE (MSE + beta KL + gamma LPIPS)."""

import random
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.bad_files import BadFiles
from lightdiff.data.files import fingerprinters, list_images
from lightdiff.data.images import to_float
from lightdiff.data.latents import async_copy
from lightdiff.data.layouts import Split
from lightdiff.data.loading import ImageBatch, ImageDataset, load_batches
from lightdiff.data.order import Order, item_noise
from lightdiff.data.survey import note_sizes, with_whites
from lightdiff.data.table import ImageList
from lightdiff.errors import UserError
from lightdiff.losses import VAELoss, psnr
from lightdiff.models.vae import LatentTransform, build_vae
from lightdiff.on_demand import on_demand
from lightdiff.pictures import save_pairs
from lightdiff.run_folder import RunFolder, find_vae
from lightdiff.runtime.processes import Means, autocast, pick_workers, to_device
from lightdiff.runtime.progress import console, print_note, shape_words
from lightdiff.runtime.stage import Stage, open_stage
from lightdiff.settings import GRID, TrainVAESettings, with_changes
from lightdiff.training.loop import train
from lightdiff.training.saving import Tensors


def run(settings: TrainVAESettings) -> Path:
    """Train a VAE and return its best checkpoint."""
    with open_stage(settings, "vae") as stage:
        files = list_images(stage.settings.images, console, stage.folder.image_list)
        images = stage.processes.run_on_main(lambda: with_whites(stage.settings.images, files, print_note))
        stage.settings = with_changes(stage.settings, images=images)
        table, digest = files.table, files.table.list_digest()
        stage.processes.check_same("list of images", digest)
        task = VAETask(stage, files)
        stage.processes.run_on_main(lambda: table.take_fingerprints(fingerprinters(images.data)))
        if stage.saved is not None:
            stage.processes.run_on_main(partial(on_demand("data.changes:compare_images"), stage, stage.saved, table))
        stage.processes.run_on_main(lambda: note_sizes(images, files, print_note))
        if stage.start_or_resume(task, {"data": digest}):
            stage.processes.run_on_main(lambda: table.write(stage.folder.image_list))
            train(task, stage)
            if task.bad.count:
                console.print(f"{task.bad.count} unreadable images: see {stage.folder.bad_files}", soft_wrap=True)
        return stage.folder.best


def inherited(run: Path, init_from: Path | None) -> dict[str, object]:
    """The architecture of the VAE whose weights to start from."""
    return {"model": Checkpoint(find_vae(init_from, RunFolder(run)), "vae").metadata.settings.get("model", {})}


class VAETask:
    """What the training loop needs to know of a VAE."""

    def __init__(self, stage: Stage[TrainVAESettings], files: ImageList) -> None:
        """Build the network and both data sets."""
        s = self.settings = stage.settings
        self.stage, self.device = stage, stage.device
        self.vae_loss = VAELoss(s.loss, self.device, stage.processes.fetch)
        for network in self.vae_loss.networks:
            to_device(network, self.device)
        if s.freeze_encoder and not (stage.saved or s.init_from):
            raise UserError("--freeze-encoder needs the VAE that it belongs to: --init-from CHECKPOINT")
        self.model = stage.new_network(lambda: build_vae(s.model))
        self.model.get_submodule("encoder").requires_grad_(not s.freeze_encoder)
        self.train_set, self.val_set = self._data_set("train", files), self._data_set("val", files)
        self.train_items, self.val_items = len(self.train_set), len(self.val_set)
        weights, seed = s.images.data_weights, s.loop.seed
        mixed = on_demand("data.mixing:Mixture")(files.of_split("train").roots, weights, seed) if weights else None
        self.order = mixed or Order(self.train_items, seed)
        self.batch_slice = stage.processes.batch_slice(s.loop.batch_size)
        self.bad = BadFiles(stage.folder.bad_files, len(files), s.images.max_bad)
        self.latent_shape = (s.model.latent_channels, *s.images.resolution.divided(s.model.factor))

    @property
    def example(self) -> tuple[Tensor, Tensor]:
        """An image and its posterior's noise."""
        size = self.settings.images.resolution
        return torch.zeros(1, 3, *size, device=self.device), torch.zeros(1, *self.latent_shape, device=self.device)

    @property
    def networks(self) -> list[nn.Module]:
        """What is compiled: with `--equivariance`, the encoder sees images of one size, all others four sizes."""
        return [*self.model.children(), *self.vae_loss.networks]

    @property
    def summary(self) -> str:
        """What is trained on what."""
        count, size = sum(p.numel() for p in self.model.parameters()) / 1e6, self.settings.images.resolution
        networks = f"VAE: {count:.2f} M parameters, {size} px -> {shape_words(self.latent_shape)}"
        return f"{networks}; {self.train_items} training and {self.val_items} validation images"

    def _data_set(self, split: Split, files: ImageList) -> ImageDataset:
        s = self.settings
        return ImageDataset(files.of_split(split), s.images, s.loop.seed, train=split == "train")

    def batches(self, start: int, steps: int) -> Iterator[ImageBatch]:
        """Random crops and mirrors of training images, in the order of (seed, epoch)."""
        size = self.settings.loop.batch_size
        return self._load(self.train_set, (self._batch_at(start + i * size)[self.batch_slice] for i in range(steps)))

    def _load(self, images: ImageDataset, order: Iterable[list[tuple[int, int]]]) -> Iterator[ImageBatch]:
        """Batches of a data set, loaded ahead."""
        workers, on_bad = pick_workers(self.settings.loop.workers, self.device), partial(self.bad.add, images.files)
        return load_batches(images, order, workers, on_bad, pin=self.device.type == "cuda")

    def _batch_at(self, start: int) -> list[tuple[int, int]]:
        return self.order.batch_at(start, self.settings.loop.batch_size)

    def names(self, start: int) -> list[str]:
        """The files of the batch that begins after `start` images."""
        return [self.train_set.path(i) for _, i in self._batch_at(start)]

    def prepare(self, batch: ImageBatch, rng: torch.Generator) -> Tensors:
        """Images in [-1, 1], the noise of their posteriors, and how their latents are transformed."""
        shape = (self.settings.loop.batch_size, *self.latent_shape)
        noise = torch.randn(shape, generator=rng, device=self.device)[self.batch_slice]
        x = to_float(batch.x.to(self.device, non_blocking=True))
        change = sample_transform(random.Random(rng.initial_seed()), self.settings.loss.equivariance)
        return {"x": x, "noise": noise, "change": torch.tensor([change]).expand(len(x), -1)}  # on the CPU

    def loss(self, model: nn.Module, batch: Tensors) -> Tensors:
        """The VAE's loss."""
        change = LatentTransform(*batch["change"][0].tolist())
        x_hat, posterior = model(batch["x"], batch["noise"], change)
        return self.vae_loss(change(batch["x"], self.settings.model.factor), x_hat, posterior)

    def validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, noise) of this process's readable validation images; the noise is the same at each validation."""
        loop = self.settings.loop
        indices = self.stage.processes.share(self.val_items)
        order = ([(0, i) for i in indices[k : k + loop.micro]] for k in range(0, len(indices), loop.micro))
        for batch in self._load(self.val_set, order):
            if len(batch.x):
                noise = item_noise(self.latent_shape, batch.index.tolist(), loop.seed, "validation")
                yield to_float(async_copy(batch.x, self.device)), async_copy(noise, self.device)

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
        return means.over(self.stage.processes)

    @torch.inference_mode()
    def picture(self, model: nn.Module, path: Path) -> None:
        """Rows of originals, each above its reconstructions; always the same images."""
        x = to_float(self._shown.to(self.device))
        model.eval()
        x_hat = model.decoder(model.encoder(x).mu)  # type: ignore[operator]
        save_pairs(path, x, x_hat, GRID[0])

    @cached_property
    def _shown(self) -> Tensor:
        """The images of the picture, as bytes: of validation, or of training where there are none."""
        source = self.val_set if self.val_items else self.train_set
        chosen = [(0, i) for i in range(min(2 * GRID[0], len(source)))]
        return next(load_batches(source, [chosen], workers=0)).x


def sample_transform(rng: random.Random, share: float) -> LatentTransform:
    """What is done to a batch's latents and images: nothing, or, in this share of the steps, anything else."""
    if rng.random() >= share:
        return LatentTransform(4, 0)
    smaller, turns = divmod(rng.randrange(1, 16), 4)
    return LatentTransform(4 - smaller, turns)
