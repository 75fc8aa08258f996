"""encode: images + VAE -> cached mu and logvar of every image and of its mirror image."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightdiff import checkpoint
from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.data.bad_files import BadFiles
from lightdiff.data.files import ImageFile, list_images
from lightdiff.data.images import to_float
from lightdiff.data.latents import LatentIndex, prefetch, read_index, shard_path
from lightdiff.data.loading import ImageDataset, load_batches
from lightdiff.data.survey import with_whites
from lightdiff.errors import RunError, UserError, not_divisible
from lightdiff.pipeline import load_vae, vae_digest
from lightdiff.run_folder import INDEX, VAE_COPY, RunFolder, atomic_link, find_vae
from lightdiff.runtime.processes import autocast, pick_workers
from lightdiff.runtime.progress import Reporter, console, shape_words
from lightdiff.runtime.resume import start_over
from lightdiff.runtime.stage import Stage, open_stage
from lightdiff.settings import EncodeSettings, VAEArchitecture, with_changes

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ADVICE = "choose another --run, or replace these latents by 'lightdiff encode --restart'"


def run(settings: EncodeSettings) -> Path:
    """Encode all images and return the folder of latents."""
    with open_stage(settings, "latents", begun=begun) as stage:
        settings, processes = stage.settings, stage.processes
        saved = Checkpoint(find_vae(settings.vae, RunFolder(settings.run)), "vae")
        vae, model = load_vae(saved, stage.device, settings.compute.precision)
        files = list_images(settings.images, console)
        images = processes.run_on_main(lambda: with_whites(settings.images, files, console))
        settings = stage.settings = with_changes(settings, images=images)
        index = plan(settings, saved, model, files)
        processes.check_same("list of images or VAE", (index.files, index.vae_digest))
        if processes.run_on_main(lambda: prepare(stage, index, saved)):
            console.print(f"{stage.path} has the latents of all {len(files)} images already", soft_wrap=True)
            return stage.path
        bad = BadFiles(stage.path / "bad-files.txt", files, settings.images.max_bad)
        mine = processes.strided(processes.run_on_main(lambda: missing_shards(index.shard_paths(stage.path), bad)))
        with Reporter("encode", sum(len(index.shards[n]) for n in mine)) as reporter:
            shards = encoded(vae.encoder, mine, index, files, stage, bad, reporter.advance)
            written = sum(1 for _ in prefetch(shards))  # one is written while the next is encoded
        stage.finish_together(written < len(mine))
        processes.run_on_main(lambda: finish(stage.path, index))
        return stage.path


def inherited(run: Path, vae: Path | None) -> dict[str, object]:
    """The image settings that encode takes over from the VAE's checkpoint."""
    saved = Checkpoint(find_vae(vae, RunFolder(run)), "vae")
    return {"images": saved.metadata.settings.get("images", {})}


def begun(folder: Path) -> Mapping[str, Any]:
    """The settings that latents found in a folder were started with, and whether they are complete."""
    if not (folder / INDEX).is_file():
        return {}
    index = read_index(folder)
    return depends_on(index) | {"complete": index.complete}


def depends_on(index: LatentIndex) -> dict[str, Any]:
    """What latents depend on, named as settings are; `files` is a digest of the list of images."""
    return {
        "vae": index.vae_digest[:8],
        "dtype": index.dtype,
        "compute.precision": index.precision,
        "images.flip": index.mirrored,
        "shard_size": index.shard_size,
        **{f"images.{name}": index.images.get(name) for name in ("resolution", "background")},
        **{f"images.{name}": index.images.get(name, 0.0) for name in ("integer_white", "float_white")},
        "files": index.files_digest,
    }


def prepare(stage: Stage[EncodeSettings], index: LatentIndex, saved: Checkpoint) -> bool:
    """Make the folder ready for shards; whether it has all of them already.

    Raises:
        UserError: If it holds other latents than those planned.
    """
    if stage.settings.restart:
        start_over(stage.path)
    elif stage.begun:
        if stage.begun["files"] != index.files_digest:
            raise UserError(f"{stage.path} has latents of another list of images: {ADVICE}")
        stage.check_begun(depends_on(index), ADVICE)
        if stage.begun["complete"]:
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
        try:
            shard = Checkpoint(path, "latents").verify() if path.is_file() else None
        except UserError as error:
            console.print(f"{error}; it will be encoded again")
            shard = None
        if shard:
            bad.add([(position, why) for position, why in shard.metadata.extra["bad"]])
        else:
            missing.append(number)
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


def encoded(
    encoder: torch.nn.Module,
    numbers: Sequence[int],
    index: LatentIndex,
    files: list[ImageFile],
    stage: Stage[EncodeSettings],
    bad: BadFiles,
    advance: Callable[[int], None],
) -> Iterator[Callable[[], Metadata]]:
    """Encode the shards of these numbers, as far as time allows; each comes, when it is full, as a call that writes it.

    One set of worker processes loads the images of all shards, ahead of the encoder. `advance` is called with the
    number of images done.
    """
    settings, images, device, shards = stage.settings, stage.settings.images, stage.device, index.shards
    dataset, size = ImageDataset(files, images, seed=0, train=False), settings.batch_size
    parts = [(n, shards[n][k : k + size]) for n in numbers for k in range(0, len(shards[n]), size)]
    order = ([(0, position) for position in part] for _, part in parts)
    workers = pick_workers(settings.compute.workers, device)
    batches = load_batches(dataset, order, workers, bad.add, pin=device.type == "cuda")
    latents = [torch.empty(2, 0, 1 + index.mirrored, *index.shape, dtype=DTYPES[settings.dtype])]
    done, rows, positions, unreadable = 0, latents[:], list[int](), list[tuple[int, str]]()
    for (number, part), batch in zip(parts, batches, strict=True):
        unreadable += batch.bad
        positions += batch.index.tolist()
        if len(batch.x):
            x = to_float(batch.x.to(device, non_blocking=True))
            sides = [x, x.flip(-1)] if images.flip else [x]
            with torch.inference_mode(), autocast(device, settings.compute.precision):
                posterior = torch.stack(encoder(torch.cat(sides)))  # mu and logvar: (2, m*b, c, h, w)
            rows.append(torch.stack(posterior.chunk(len(sides), dim=1), dim=2).to("cpu", rows[0].dtype))
        done += len(part)
        advance(done)
        if part.stop == shards[number].stop:
            mu, logvar = torch.cat(rows, dim=1)  # (n, m, c, h, w) each
            metadata = Metadata(stage="latents", extra={"positions": positions, "bad": unreadable})
            yield partial(checkpoint.save, shard_path(stage.path, number), {"mu": mu, "logvar": logvar}, metadata)
            rows, positions, unreadable = latents[:], [], []
            if stage.out_of_time():
                return
