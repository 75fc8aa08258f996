"""encode: images + VAE -> cached mu and logvar of every image and of its mirror image."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightdiff import checkpoint
from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.data.bad_files import BadFiles
from lightdiff.data.files import fingerprinters, list_images
from lightdiff.data.images import to_float
from lightdiff.data.index import LatentIndex, ShardFacts, open_shard, read_index, shard_path
from lightdiff.data.latents import prefetch
from lightdiff.data.loading import ImageDataset, OnBad, load_batches
from lightdiff.data.survey import note_sizes, with_whites
from lightdiff.data.table import FINGERPRINT, Fingerprint, ImageList
from lightdiff.errors import RunError, UserError
from lightdiff.on_demand import on_demand
from lightdiff.pipeline import load_vae, vae_digest
from lightdiff.run_folder import INDEX, VAE_COPY, RunFolder, atomic_link, find_vae
from lightdiff.runtime.processes import autocast, pick_workers
from lightdiff.runtime.progress import Reporter, console, print_note, shape_words
from lightdiff.runtime.stage import Stage, open_stage
from lightdiff.settings import EncodeSettings, VAEArchitecture, with_changes

Positions = NDArray[np.int64]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ADVICE = "choose another --run, or replace these latents by 'lightdiff encode --restart'"


def run(settings: EncodeSettings) -> Path:
    """Encode all images that have no latent yet and return the folder of latents."""
    with open_stage(settings, "latents", started_with=started_with) as stage:
        settings, processes = stage.settings, stage.processes
        saved = Checkpoint(find_vae(settings.vae, RunFolder(settings.run)), "vae")
        vae, model = load_vae(saved, stage.device, settings.compute.precision)
        files = list_images(settings.images, console, RunFolder(settings.run).vae.image_list)
        images = processes.run_on_main(lambda: with_whites(settings.images, files, print_note))
        settings = stage.settings = with_changes(settings, images=images)
        processes.run_on_main(lambda: note_sizes(images, files, print_note))
        index = plan(settings, saved, model, files)
        processes.check_same("list of images or VAE", (index.list_digest(), index.vae_digest))
        on_bad = partial(BadFiles(stage.folder.bad_files, len(files), settings.images.max_bad).add, files)
        todo = processes.run_on_main(lambda: prepare(stage, index, files, saved, on_bad))
        mine = processes.strided(list(todo))
        with Reporter("encode", sum(len(todo[n]) for n in mine)) as reporter:
            shards = encoded(vae.encoder, {n: todo[n] for n in mine}, index, files, stage, on_bad, reporter.advance)
            written = sum(1 for _ in prefetch(shards))  # one is written while the next is encoded
        stage.finish_together(written < len(mine))
        before = stage.started_with["index"].digest if "index" in stage.started_with else ""
        processes.run_on_main(lambda: finish(stage.path, index, before))
        return stage.path


def inherited(run: Path, vae: Path | None) -> dict[str, object]:
    """The image settings that encode takes over from the VAE's checkpoint."""
    saved = Checkpoint(find_vae(vae, RunFolder(run)), "vae")
    return {"images": saved.metadata.settings.get("images", {})}


def started_with(folder: Path) -> Mapping[str, Any]:
    """The settings that latents found in a folder were started with, and their index."""
    if not (folder / INDEX).is_file():
        return {}
    index = read_index(folder)
    return index.depends_on | {"index": index}


def prepare(
    stage: Stage[EncodeSettings], index: LatentIndex, files: ImageList, saved: Checkpoint, on_bad: OnBad
) -> dict[int, Positions]:
    """Make the folder ready for shards: the images of each one that is to be encoded, by its number.

    Raises:
        UserError: If it holds latents of other settings, or too many of their images are gone.
    """
    old: LatentIndex | None = stage.started_with.get("index")
    index.take_fingerprints(fingerprinters(index.images.data), files.table)
    if stage.settings.restart:
        on_demand("set_aside:start_over")(stage.path)
    stage.check_unchanged(index.depends_on, ADVICE)
    unreadable = [] if old is None else resume(stage, index, old)
    stage.folder.bad_files.unlink(missing_ok=True)  # what it lists may have been repaired
    on_bad(unreadable)
    without = np.flatnonzero(index.shard < 0)
    index.shard[without] = len(index.shards) + np.arange(len(without)) // index.shard_size
    index.shards += [""] * (int(index.shard.max()) + 1 - len(index.shards))
    todo = {number: mine for number, mine in index.by_shard().items() if not index.shards[number]}
    if todo or old is None or not old.complete:
        index.write(stage.path / INDEX)  # else the old one stays until this one is finished
    atomic_link(stage.path / VAE_COPY, saved.path)
    if vae_digest(Checkpoint(stage.path / VAE_COPY, "vae")) != index.vae_digest:
        raise RunError(f"{saved.path} was replaced by a newer VAE just now; run the same command again")
    return todo


def resume(stage: Stage[EncodeSettings], index: LatentIndex, old: LatentIndex) -> list[tuple[int, str]]:
    """Take over the places of images that have a latent, or a place for one, and are what they were.

    Returns the positions of those that are known to be unreadable, with reasons.

    Raises:
        UserError: If too many of the images are gone.
    """
    unreadable: dict[int, str] = {}
    for number, mine in old.by_shard().items():
        try:
            unreadable |= old.take_in(number, mine, open_shard(stage.path, old, number, mine).verify())
        except UserError:
            path = shard_path(stage.path, number)
            if old.shards[number] or path.exists():
                what = "damaged, or of another VAE, other settings or other images" if path.exists() else "missing"
                console.print(f"{path} is {what}; it will be encoded again", soft_wrap=True)
            old.forget(number, mine)
    with console.status("comparing the images with those that were encoded"):
        found = on_demand("data.changes:compare")(index, old, fingerprinters(index.images.data), contents=True)
    found.check_loss(1.0 if stage.settings.allow_missing else index.images.max_bad, stage.path)
    if not found.nothing:
        console.print(f"images since they were encoded last: {found}", soft_wrap=True)
    kept = np.flatnonzero((found.before >= 0) & ~found.changed)
    at = found.before[kept]
    index.shard[kept], index.row[kept] = old.shard[at], old.row[at]
    index.files["hash"][kept] = old.files["hash"][at]
    index.shards, index.digest, index.statistics = old.shards, "", old.statistics
    return [(p, unreadable[q]) for p, q in zip(kept.tolist(), at.tolist(), strict=True) if q in unreadable]


def finish(folder: Path, index: LatentIndex, before: str) -> None:
    """Write the index of all shards, with its digest, and print what they hold.

    `before` is the digest of the latents that were there, if any.
    """
    used = index.by_shard()
    for number, mine in used.items():
        if not index.shards[number]:
            index.take_in(number, mine, open_shard(folder, index, number, mine))
    unused = [number for number, digest in enumerate(index.shards) if digest and number not in used]
    for number in unused:
        index.shards[number] = ""
    index.digest = index.compute_digest()
    scaled = index.statistics
    if scaled is not None and scaled.latents != index.digest:
        index.statistics = None
    index.write(folder / INDEX)
    for number in unused:
        shard_path(folder, number).unlink(missing_ok=True)
    count = int(index.encoded.sum())
    if index.digest == before:
        console.print(f"{folder} has the latents of all {len(index)} images already", soft_wrap=True)
    else:
        size = sum(shard_path(folder, number).stat().st_size for number in used)
        console.print(
            f"{count} images{' and their mirror images' if index.mirrored else ''} encoded to "
            f"{shape_words(index.shape)} ({size / 1e6:.1f} MB); {len(index) - count} unreadable"
        )
    if scaled is not None and index.statistics is None:
        console.print("the latents are not those that were scaled: run 'lightdiff scale' again")


def plan(settings: EncodeSettings, saved: Checkpoint, model: VAEArchitecture, files: ImageList) -> LatentIndex:
    """The index that finished latents of these settings will have, but for what encoding finds out."""
    images = settings.images
    return LatentIndex.of(
        files,
        shape=(model.latent_channels, *images.resolution.divided(model.factor)),
        dtype=settings.dtype,
        precision=settings.compute.precision,
        mirrored=images.flip,
        logvar=settings.logvar,
        vae_digest=vae_digest(saved),
        images=images,
        shard_size=settings.shard_size,
        shard=np.full(len(files), -1, np.int32),
        row=np.full(len(files), -1, np.int32),
    )


def encoded(
    encoder: torch.nn.Module,
    todo: Mapping[int, Positions],
    index: LatentIndex,
    files: ImageList,
    stage: Stage[EncodeSettings],
    on_bad: OnBad,
    advance: Callable[[int], None],
) -> Iterator[Callable[[], Metadata]]:
    """Encode these shards, as far as time allows; each comes, when it is full, as a call that writes it.

    One set of worker processes loads the images of all shards, ahead of the encoder. `advance` is called with the
    number of images done.

    Raises:
        RunError: If a latent is not finite.
    """
    settings, images, device = stage.settings, stage.settings.images, stage.device
    dataset, size = ImageDataset(files, images, seed=0, train=False, fingerprints=True), settings.batch_size
    chunks = [(n, todo[n][k : k + size].tolist()) for n in todo for k in range(0, len(todo[n]), size)]
    order = ([(0, position) for position in chunk] for _, chunk in chunks)
    workers = pick_workers(settings.compute.workers, device)
    batches = load_batches(dataset, order, workers, on_bad, pin=device.type == "cuda")
    stored, c = DTYPES[settings.dtype], index.shape[0]
    latents = [torch.empty(1 + index.logvar, 0, 1 + index.mirrored, *index.shape, dtype=stored)]
    variances = [torch.empty(0, 1 + index.mirrored, c)]
    done, rows, spread = 0, latents[:], variances[:]
    fingerprints, unreadable = list[Fingerprint](), list[tuple[int, str, str]]()
    for (number, chunk), batch in zip(chunks, batches, strict=True):
        unreadable += [(files[position].root, files[position].path, why) for position, why in batch.bad]
        fingerprints += batch.fingerprints
        if len(batch.x):
            x = to_float(batch.x.to(device, non_blocking=True))
            sides = [x, x.flip(-1)] if images.flip else [x]
            with torch.inference_mode(), autocast(device, settings.compute.precision):
                posterior = torch.stack(encoder(torch.cat(sides)))  # mu and logvar: (2, m*b, c, h, w)
            posterior = torch.stack(posterior.chunk(len(sides), dim=1), dim=2)  # (2, b, m, c, h, w)
            rows.append(posterior[: len(rows[0])].to("cpu", stored))
            if not index.logvar:
                spread.append(posterior[1].float().exp().mean((3, 4)).cpu())
            finite = rows[-1].isfinite().transpose(0, 1).flatten(1).all(1)
            if not finite.all():
                raise not_finite(dataset.path(int(batch.index[~finite][0])), posterior, settings)
        done += len(chunk)
        advance(done)
        if chunk[-1] == todo[number][-1]:
            mu, *logvar = torch.cat(rows, dim=1)  # (n, m, c, h, w) each
            facts = ShardFacts(vae=index.vae_digest, plan=index.plan(todo[number]), bad=unreadable)
            of_files = np.array(fingerprints, FINGERPRINT)[:, None].view(np.uint8)
            about = {"logvar": logvar[0]} if logvar else {"variance": torch.cat(spread)}
            tensors = {"mu": mu, **about, "fingerprints": torch.from_numpy(of_files)}
            metadata = Metadata(stage="latents", extra=facts.model_dump())
            yield partial(checkpoint.save, shard_path(stage.path, number), tensors, metadata)
            rows, spread, fingerprints, unreadable = latents[:], variances[:], [], []
            if stage.out_of_time():
                return


def not_finite(name: str, posterior: torch.Tensor, settings: EncodeSettings) -> RunError:
    """That the latent of an image cannot be stored, with what to do."""
    if posterior.isfinite().all():
        largest, kind = float(posterior.abs().max()), settings.dtype
        return RunError(f"the latent of {name} is too large for {kind} ({largest:.3g}): --dtype float32 --restart")
    fp32 = settings.compute.precision == "fp32"
    advice = "the VAE has diverged, train it again with a lower --lr" if fp32 else "try --precision fp32 --restart"
    return RunError(f"the latent of {name} is not finite: {advice}")
