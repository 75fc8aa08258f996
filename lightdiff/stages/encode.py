"""encode: images + VAE -> cached mu and logvar of every image and of its mirror image."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lightdiff import checkpoint
from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.data.bad_files import BadFiles
from lightdiff.data.files import ImageFile, list_images
from lightdiff.data.images import to_float
from lightdiff.data.latents import LatentIndex, read_index, shard_path
from lightdiff.data.loading import ImageDataset, load_batches
from lightdiff.errors import RunError, UserError, not_divisible
from lightdiff.models.vae import Posterior
from lightdiff.pipeline import load_vae, vae_digest
from lightdiff.run_folder import INDEX, Lock, RunFolder, find_vae
from lightdiff.runtime.background import Background
from lightdiff.runtime.device import (
    as_begun,
    autocast,
    explain_out_of_memory,
    pick_device,
    pick_precision,
    pick_workers,
)
from lightdiff.runtime.processes import init_distributed
from lightdiff.runtime.progress import Reporter, console, shape_words
from lightdiff.runtime.signals import TimeLimit
from lightdiff.settings import EncodeSettings, Precision, VAESettings
from lightdiff.stages.start import enter

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
VAE_COPY = "vae.safetensors"


def inherited(run: Path, vae: Path | None) -> dict[str, object]:
    """The image settings that encode takes over from the VAE's checkpoint."""
    saved = Checkpoint(find_vae(vae, RunFolder(run)), "vae")
    return {"images": saved.metadata.settings.get("images", {})}


def run(settings: EncodeSettings) -> Path:
    """Encode all images and return the folder of latents."""
    with Lock(settings.job.force_unlock) as lock:
        return encode(settings, lock)


def encode(settings: EncodeSettings, lock: Lock) -> Path:
    """The same, in a folder that nobody else writes to."""
    # 1. The VAE, the images, and what the latents will be
    device = pick_device(settings.compute.device)
    ranks = init_distributed(device, settings.job.timeout)
    saved = Checkpoint(find_vae(settings.vae, RunFolder(settings.run)), "vae")
    files = list_images(settings.images, console)
    folder = RunFolder(settings.run).latents
    precision = ranks.run_on_main(lambda: pick_precision(wanted_precision(settings, folder), device))
    vae, model = load_vae(saved, device, precision)
    index = plan(settings, saved, model, files, precision)
    ranks.check_same("list of images or VAE", (index.files, index.vae_digest))
    if ranks.run_on_main(lambda: prepare(folder, index, saved, settings, lock)):
        console.print(f"{folder} has the latents of all {len(files)} images already")
        return folder

    # 2. Encode shard by shard, and write each while the next is encoded; a shard that is there is whole
    bad = BadFiles(folder / "bad-files.txt", files, settings.images.data, settings.images.max_bad)
    missing = ranks.run_on_main(lambda: to_encode(index.shard_paths(folder), bad))
    mine = ranks.strided([(number, index.shards[number]) for number in missing])
    limit = TimeLimit(settings.job.max_time)
    empty = torch.empty(0, 1 + index.mirrored, *index.shape, dtype=DTYPES[settings.dtype])
    unfinished = False
    with (
        Reporter("encode", sum(len(positions) for _, positions in mine)) as reporter,
        explain_out_of_memory("--batch-size", settings.batch_size),
        Background() as writing,
    ):

        def advance(done: int) -> None:
            reporter.advance(done, {})

        for number, shard in encoded(vae.encoder, mine, files, settings, bad, precision, device, advance):
            writing.do(partial(shard.atomic_write, shard_path(folder, number), empty))
            unfinished = number != mine[-1][0]
            if limit.spent() and unfinished:
                break

    # 3. Only a finished index has a digest
    limit.conclude(unfinished, ranks)
    ranks.run_on_main(lambda: finish(folder, index))
    return folder


def wanted_precision(settings: EncodeSettings, folder: Path) -> Precision:
    """The precision asked for; `auto` is that of latents which are to be gone on with, where there are any."""
    going_on = not settings.restart and (folder / INDEX).is_file()
    wanted: Precision = as_begun(settings.compute.precision, read_index(folder).precision if going_on else None)
    return wanted


def prepare(folder: Path, index: LatentIndex, saved: Checkpoint, settings: EncodeSettings, lock: Lock) -> bool:
    """Make the folder ready for shards; whether it has all of them already."""
    enter(folder, lock, settings.restart)
    present = check_resumable(folder, index)
    if present is not None and present.complete:
        return True
    index.write(folder)
    checkpoint.atomic_link(folder / VAE_COPY, saved.path)
    if vae_digest(Checkpoint(folder / VAE_COPY, "vae")) != index.vae_digest:
        raise RunError(f"{saved.path} was replaced by a newer VAE just now; run the same command again")
    return False


def to_encode(paths: Sequence[Path], bad: BadFiles) -> list[int]:
    """The shards that are not there, or not whole; what those that are say of unreadable images is listed."""
    missing = []
    for number, path in enumerate(paths):
        metadata = shard_metadata(path)
        if metadata is None:
            missing.append(number)
        else:
            bad.add([(p, why) for p, why in metadata.extra["bad"]])
    return missing


def finish(folder: Path, index: LatentIndex) -> None:
    """Publish the index of all shards, and say what they hold."""
    paths = index.shard_paths(folder)
    documents = [Checkpoint(path, "latents").metadata for path in paths]
    index.bad = [p for metadata in documents for p, _ in metadata.extra["bad"]]
    index.digest = index.compute_digest([metadata.digest for metadata in documents])
    index.write(folder)
    size = sum(path.stat().st_size for path in paths)
    console.print(
        f"{len(index.files) - len(index.bad)} images{' and their mirror images' if index.mirrored else ''} encoded to "
        f"{shape_words(index.shape)} ({size / 1e6:.1f} MB); {len(index.bad)} unreadable"
    )


def plan(
    settings: EncodeSettings, saved: Checkpoint, model: VAESettings, files: list[ImageFile], precision: str
) -> LatentIndex:
    """The index that finished latents of these settings will have, but for what encoding finds out."""
    images = settings.images
    if images.resolution % model.factor:
        raise not_divisible(images.resolution, model.factor)
    side = images.resolution // model.factor
    return LatentIndex(
        shape=(model.latent_channels, side, side),
        dtype=settings.dtype,
        precision=precision,
        mirrored=images.flip,
        vae_digest=vae_digest(saved),
        images=images.model_dump(mode="json"),
        shard_size=settings.shard_size,
        files=[(f.root, f.path) for f in files],
        splits="".join(f.split[0] for f in files),
        labels=[f.labels for f in files],
    )


def check_resumable(folder: Path, index: LatentIndex) -> LatentIndex | None:
    """The index of the latents that are there, if there are any.

    Raises:
        UserError: If they are others than those planned.
    """
    if not (folder / INDEX).is_file():
        return None
    there = read_index(folder)
    framing = ("resolution", "background")
    differ = {
        "VAE": (there.vae_digest[:8], index.vae_digest[:8]),
        "--dtype": (there.dtype, index.dtype),
        "--precision": (there.precision, index.precision),
        "--flip": (there.mirrored, index.mirrored),
        "--shard-size": (there.shard_size, index.shard_size),
        **{f"--{name}": (there.images.get(name), index.images[name]) for name in framing},
        "list of images": (there.files, index.files),
        "split or labels": ((there.splits, there.labels), (index.splits, index.labels)),
    }
    for what, (old, new) in differ.items():
        if old != new:
            shown = "" if isinstance(old, (list, tuple)) else f" ({old}, now {new})"
            raise UserError(
                f"{folder} holds latents of another {what}{shown}; 'lightdiff encode --restart' replaces them, "
                "another --run keeps them"
            )
    return there


def shard_metadata(path: Path) -> Metadata | None:
    """The metadata of a shard that is there and whole."""
    if not path.is_file():
        return None
    try:
        return Checkpoint(path, "latents").verify().metadata
    except UserError as error:
        console.print(f"{error}; it is encoded again")
        return None


@dataclass
class Shard:
    """The latents of some images, as they come in."""

    mu: list[Tensor] = field(default_factory=list)
    logvar: list[Tensor] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)

    def add(self, posterior: Posterior, sides: int, positions: list[int], dtype: torch.dtype) -> None:
        """Take in a batch: each image, followed, behind all of them, by its mirror image."""
        for store, value in ((self.mu, posterior.mu), (self.logvar, posterior.logvar)):
            store.append(torch.stack(value.chunk(sides), dim=1).to("cpu", dtype))  # (b, m, c, h, w)
        self.kept += positions

    def atomic_write(self, path: Path, empty: Tensor) -> None:
        """Write its file; `empty` stands for latents where no image was readable."""
        tensors = {"mu": torch.cat([empty, *self.mu]), "logvar": torch.cat([empty, *self.logvar])}
        checkpoint.save(path, tensors, Metadata(stage="latents", extra={"positions": self.kept, "bad": self.bad}))


def encoded(
    encoder: torch.nn.Module,
    shards: Sequence[tuple[int, range]],
    files: list[ImageFile],
    settings: EncodeSettings,
    bad: BadFiles,
    precision: str,
    device: torch.device,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, Shard]]:
    """Each shard's number, and the shard when it is full; `advance` is told how many images are done in all.

    One set of worker processes loads the images of all shards, ahead of the encoder.
    """
    images, size, dtype = settings.images, settings.batch_size, DTYPES[settings.dtype]
    dataset = ImageDataset(files, images, seed=0, train=False)
    parts = [
        (number, whole, whole[first : first + size]) for number, whole in shards for first in range(0, len(whole), size)
    ]
    order = ([(0, position) for position in part] for _, _, part in parts)
    workers, on_gpu = pick_workers(settings.compute.workers, device), device.type == "cuda"
    done, shard = 0, Shard()
    for (number, whole, part), batch in zip(parts, load_batches(dataset, order, workers, bad.add, on_gpu), strict=True):
        if part.start == whole.start:
            shard = Shard()
        shard.bad += batch.bad
        if len(batch.x):
            x = to_float(batch.x.to(device, non_blocking=True))
            sides = [x, x.flip(-1)] if images.flip else [x]
            with torch.inference_mode(), autocast(device, precision):
                posterior = encoder(torch.cat(sides))
            shard.add(posterior, len(sides), batch.index.tolist(), dtype)
        done += len(part)
        advance(done)
        if part.stop == whole.stop:
            yield number, shard
