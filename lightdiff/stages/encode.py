"""encode: images + VAE -> cached mu and logvar of every image and of its mirror image."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from lightdiff.run_folder import INDEX, RunFolder, atomic_link, find_vae
from lightdiff.runtime.processes import autocast, pick_workers
from lightdiff.runtime.progress import Reporter, console, shape_words
from lightdiff.runtime.resume import start_over
from lightdiff.runtime.stage import Stage, open_stage
from lightdiff.settings import EncodeSettings, VAEArchitecture

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
VAE_COPY = "vae.safetensors"
ADVICE = "'lightdiff encode --restart' replaces these latents, another --run keeps them"


def run(settings: EncodeSettings) -> Path:
    """Encode all images and return the folder of latents."""
    with open_stage(settings, "latents", begun=begun) as stage:
        settings = stage.settings
        saved = Checkpoint(find_vae(settings.vae, RunFolder(settings.run)), "vae")
        vae, model = load_vae(saved, stage.device, settings.compute.precision)
        files = list_images(settings.images, console)
        index = plan(settings, saved, model, files)
        stage.processes.check_same("list of images or VAE", (index.files, index.vae_digest))
        if stage.processes.run_on_main(lambda: prepare(stage, index, saved)):
            console.print(f"{stage.path} has the latents of all {len(files)} images already")
            return stage.path
        bad = BadFiles(stage.path / "bad-files.txt", files, settings.images.data, settings.images.max_bad)
        missing = stage.processes.run_on_main(lambda: missing_shards(index.shard_paths(stage.path), bad))
        mine = stage.processes.strided(missing)
        empty = torch.empty(0, 1 + index.mirrored, *index.shape, dtype=DTYPES[settings.dtype])
        unfinished = False
        with (
            Reporter("encode", sum(len(index.shards[n]) for n in mine)) as reporter,
            ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            writing: Future[None] | None = None  # of one shard, while the next one is encoded
            for number, shard in encoded(vae.encoder, mine, index, files, stage, bad, reporter.advance):
                if writing:
                    writing.result()
                writing = pool.submit(shard.save, shard_path(stage.path, number), empty)
                unfinished = number != mine[-1]
                if stage.out_of_time() and unfinished:
                    break
            if writing:
                writing.result()
        stage.finish_together(unfinished)
        stage.processes.run_on_main(lambda: finish(stage.path, index))
        return stage.path


def inherited(run: Path, vae: Path | None) -> dict[str, object]:
    """The image settings that encode takes over from the VAE's checkpoint."""
    saved = Checkpoint(find_vae(vae, RunFolder(run)), "vae")
    return {"images": saved.metadata.settings.get("images", {})}


def begun(folder: Path) -> Mapping[str, Any]:
    """The settings that latents found in a folder were begun with."""
    return depends_on(read_index(folder)) if (folder / INDEX).is_file() else {}


def depends_on(index: LatentIndex) -> dict[str, Any]:
    """What latents depend on, named as settings are; lists of images by their digest."""
    images = {f"images.{name}": index.images.get(name) for name in ("resolution", "background")}
    return {
        "vae": index.vae_digest[:8],
        "dtype": index.dtype,
        "compute.precision": index.precision,
        "images.flip": index.mirrored,
        "shard_size": index.shard_size,
        **images,
        "images.data": index.files_digest,
    }


def prepare(stage: Stage[EncodeSettings], index: LatentIndex, saved: Checkpoint) -> bool:
    """Make the folder ready for shards; whether it has all of them already.

    Raises:
        UserError: If it holds other latents than those planned.
    """
    if stage.settings.restart:
        start_over(stage.path)
    elif stage.begun:
        stage.check_begun(depends_on(index), ADVICE)
        if read_index(stage.path).complete:
            return True
    index.write(stage.path)
    atomic_link(stage.path / VAE_COPY, saved.path)
    if vae_digest(Checkpoint(stage.path / VAE_COPY, "vae")) != index.vae_digest:
        raise RunError(f"{saved.path} was replaced by a newer VAE just now; run the same command again")
    return False


def missing_shards(paths: Sequence[Path], bad: BadFiles) -> list[int]:
    """The numbers of shards that are missing or damaged; unreadable images named in the others are listed."""
    missing = []
    for number, path in enumerate(paths):
        metadata = shard_metadata(path)
        if metadata is None:
            missing.append(number)
        else:
            bad.add([(position, why) for position, why in metadata.extra["bad"]])
    return missing


def finish(folder: Path, index: LatentIndex) -> None:
    """Write the index of all shards, with its digest, and print what they hold."""
    paths = index.shard_paths(folder)
    shards = [Checkpoint(path, "latents").metadata for path in paths]
    index.bad = [position for shard in shards for position, _ in shard.extra["bad"]]
    index.digest = index.compute_digest([shard.digest for shard in shards])
    index.write(folder)
    size = sum(path.stat().st_size for path in paths)
    console.print(
        f"{len(index.files) - len(index.bad)} images{' and their mirror images' if index.mirrored else ''} encoded to "
        f"{shape_words(index.shape)} ({size / 1e6:.1f} MB); {len(index.bad)} unreadable"
    )


def plan(settings: EncodeSettings, saved: Checkpoint, model: VAEArchitecture, files: list[ImageFile]) -> LatentIndex:
    """The index that finished latents of these settings will have, but for what encoding finds out."""
    images = settings.images
    if images.resolution % model.factor:
        raise not_divisible(images.resolution, model.factor)
    side = images.resolution // model.factor
    return LatentIndex(
        shape=(model.latent_channels, side, side),
        dtype=settings.dtype,
        precision=settings.compute.precision,
        mirrored=images.flip,
        vae_digest=vae_digest(saved),
        images=images.model_dump(mode="json"),
        shard_size=settings.shard_size,
        files=[(f.root, f.path) for f in files],
        splits="".join(f.split[0] for f in files),
        labels=[f.labels for f in files],
    )


def shard_metadata(path: Path) -> Metadata | None:
    """The metadata of a shard that is there and whole."""
    if not path.is_file():
        return None
    try:
        return Checkpoint(path, "latents").verify().metadata
    except UserError as error:
        console.print(f"{error}; it will be encoded again")
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

    def save(self, path: Path, empty: Tensor) -> None:
        """Write its file; `empty` stands for latents where no image was readable."""
        tensors = {"mu": torch.cat([empty, *self.mu]), "logvar": torch.cat([empty, *self.logvar])}
        checkpoint.save(path, tensors, Metadata(stage="latents", extra={"positions": self.kept, "bad": self.bad}))


def encoded(
    encoder: torch.nn.Module,
    numbers: Sequence[int],
    index: LatentIndex,
    files: list[ImageFile],
    stage: Stage[EncodeSettings],
    bad: BadFiles,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, Shard]]:
    """The shards of these numbers, each when it is full; `advance` is called with the number of images done.

    One set of worker processes loads the images of all shards, ahead of the encoder.
    """
    settings, images, device = stage.settings, stage.settings.images, stage.device
    dataset = ImageDataset(files, images, seed=0, train=False)
    size = settings.batch_size
    parts = [
        (n, whole[k : k + size]) for n in numbers for whole in [index.shards[n]] for k in range(0, len(whole), size)
    ]
    order = ([(0, position) for position in part] for _, part in parts)
    workers, on_gpu = pick_workers(settings.compute.workers, device), device.type == "cuda"
    done, shard, shards = 0, Shard(), index.shards
    for (number, part), batch in zip(parts, load_batches(dataset, order, workers, bad.add, on_gpu), strict=True):
        if part.start == shards[number].start:
            shard = Shard()
        shard.bad += batch.bad
        if len(batch.x):
            x = to_float(batch.x.to(device, non_blocking=True))
            sides = [x, x.flip(-1)] if images.flip else [x]
            with torch.inference_mode(), autocast(device, settings.compute.precision):
                posterior = encoder(torch.cat(sides))
            shard.add(posterior, len(sides), batch.index.tolist(), DTYPES[settings.dtype])
        done += len(part)
        advance(done)
        if part.stop == shards[number].stop:
            yield number, shard
