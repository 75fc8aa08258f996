"""encode: images + VAE -> cached mu and logvar of every image and of its mirror image."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lightdiff import checkpoint
from lightdiff.checkpoint import Checkpoint, Document
from lightdiff.data.files import ImageFile, full_paths
from lightdiff.data.images import to_float
from lightdiff.data.latents import LatentIndex, read_index, shard_path
from lightdiff.data.loading import BadFiles, ImageDataset, batches
from lightdiff.errors import RunError, UserError
from lightdiff.pipeline import load_vae, vae_digest
from lightdiff.run_folder import Lock, RunFolder, find_vae
from lightdiff.settings import EncodeSettings, ImageSettings, VAESettings
from lightdiff.stages.start import enter, list_images
from lightdiff.training.compute import autocast, out_of_memory_explained, pick_device, pick_precision, pick_workers
from lightdiff.training.progress import Reporter, console
from lightdiff.training.ranks import join
from lightdiff.training.stopping import TimeLimit

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
VAE_COPY = "vae.safetensors"


def inherited(run: Path, vae: Path | None) -> dict[str, object]:
    """The image settings that encode takes over from the VAE's checkpoint."""
    saved = Checkpoint(find_vae(vae, RunFolder(run)), "vae")
    return {"images": saved.document.settings.get("images", {})}


def run(settings: EncodeSettings) -> Path:
    """Encode all images and return the folder of latents."""
    with Lock(settings.job.force_unlock) as lock:
        return encode(settings, lock)


def encode(settings: EncodeSettings, lock: Lock) -> Path:
    """The same, in a folder that nobody else writes to."""
    # 1. The VAE, the images, and what the latents will be
    device = pick_device(settings.compute.device)
    ranks = join(device, settings.job.timeout)
    saved = Checkpoint(find_vae(settings.vae, RunFolder(settings.run)), "vae")
    vae, model = load_vae(saved, device)
    files = list_images(settings.images)
    folder = RunFolder(settings.run).latents
    precision = ranks.on_first(lambda: pick_precision(settings.compute.precision, device))
    index = plan(settings, saved, model, files, precision)
    ranks.check_same("list of images or VAE", (index.files, index.vae_digest))
    if ranks.on_first(lambda: prepare(folder, index, saved, settings, lock)):
        console.print(f"{folder} has the latents of all {len(files)} images already")
        return folder

    # 2. Encode shard by shard; a shard that is there is whole
    bad = BadFiles(
        folder / "bad-files.txt", full_paths(files, settings.images.data), len(files), settings.images.max_bad
    )
    encoder = vae.encoder
    shards = [range(k, min(k + settings.shard_size, len(files))) for k in range(0, len(files), settings.shard_size)]
    mine = ranks.deal([(n, shards[n]) for n in ranks.on_first(lambda: to_encode(folder, len(shards), bad))])
    limit = TimeLimit(settings.job.max_time)
    done, unfinished = 0, False
    with (
        Reporter("encode", sum(len(positions) for _, positions in mine)) as reporter,
        out_of_memory_explained("--batch-size", settings.batch_size),
    ):
        for number, positions in mine:
            advance = partial(reporter.step, done)
            path = shard_path(folder, number)
            encode_shard(path, encoder, files, positions, settings, bad, precision, device, advance)
            done += len(positions)
            reporter.advance(done, {})
            unfinished = number != mine[-1][0]
            if limit.spent() and unfinished:
                break

    # 3. Only a finished index has a digest
    limit.conclude(unfinished, ranks)
    ranks.on_first(lambda: finish(folder, index, len(shards)))
    return folder


def prepare(folder: Path, index: LatentIndex, saved: Checkpoint, settings: EncodeSettings, lock: Lock) -> bool:
    """Make the folder ready for shards; whether it has all of them already."""
    enter(folder, lock, settings.restart)
    present = check_resumable(folder, index)
    if present is not None and present.complete:
        return True
    index.write(folder)
    checkpoint.publish_link(folder / VAE_COPY, saved.path)
    if vae_digest(Checkpoint(folder / VAE_COPY, "vae")) != index.vae_digest:
        raise RunError(f"{saved.path} was replaced by a newer VAE just now; run the same command again")
    return False


def to_encode(folder: Path, shards: int, bad: BadFiles) -> list[int]:
    """The shards that are not there, or not whole; what those that are say of unreadable images is listed."""
    missing = []
    for number in range(shards):
        document = shard_document(shard_path(folder, number))
        if document is None:
            missing.append(number)
        else:
            bad.add([(p, why) for p, why in document.facts["bad"]])
    return missing


def finish(folder: Path, index: LatentIndex, shards: int) -> None:
    """Publish the index of all shards, and say what they hold."""
    paths = [shard_path(folder, number) for number in range(shards)]
    documents = [Checkpoint(path, "latents").document for path in paths]
    index.bad = [p for document in documents for p, _ in document.facts["bad"]]
    index.digest = index.seal([document.digest for document in documents])
    index.write(folder)
    size = sum(path.stat().st_size for path in paths)
    console.print(
        f"{len(index.files) - len(index.bad)} images{' and their mirror images' if index.mirrored else ''} encoded to "
        f"{' x '.join(map(str, index.shape))} ({size / 1e6:.1f} MB); {len(index.bad)} unreadable"
    )


def plan(
    settings: EncodeSettings, saved: Checkpoint, model: VAESettings, files: list[ImageFile], precision: str
) -> LatentIndex:
    """The index that finished latents of these settings will have, but for what encoding finds out."""
    images = settings.images
    if images.resolution % model.factor:
        raise UserError(f"--resolution: {images.resolution} is not divisible by the VAE's {model.factor}")
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
    if not (folder / "index.json").is_file():
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


def shard_document(path: Path) -> Document | None:
    """The document of a shard that is there and whole."""
    if not path.is_file():
        return None
    try:
        return Checkpoint(path, "latents").verify().document
    except UserError as error:
        console.print(f"{error}; it is encoded again")
        return None


def encode_shard(
    path: Path,
    encoder: torch.nn.Module,
    files: list[ImageFile],
    positions: range,
    settings: EncodeSettings,
    bad: BadFiles,
    precision: str,
    device: torch.device,
    advance: Callable[[int], None],
) -> None:
    """Encode the images at these positions and publish their shard; `advance` is told how many are done."""
    images, dtype = settings.images, DTYPES[settings.dtype]
    mu: list[Tensor] = []
    logvar: list[Tensor] = []
    kept: list[int] = []
    found_bad: list[tuple[int, str]] = []
    for x, at, unreadable in readable(files, positions, images, settings.batch_size, device, settings.compute.workers):
        bad.add(unreadable)
        found_bad += unreadable
        if len(at):
            with torch.inference_mode(), autocast(device, precision):
                sides = [x, x.flip(-1)] if images.flip else [x]
                posterior = encoder(torch.cat(sides))
            for store, value in ((mu, posterior.mu), (logvar, posterior.logvar)):
                store.append(torch.stack(value.chunk(len(sides)), dim=1).to("cpu", dtype))  # (b, m, c, h, w)
            kept += at
            advance(at[-1] + 1 - positions.start)
    side = images.resolution
    empty = encoder(torch.zeros(1, 3, side, side, device=device)).mu[:0, None].to("cpu", dtype) if not kept else None
    tensors = {"mu": torch.cat(mu) if empty is None else empty, "logvar": torch.cat(logvar) if empty is None else empty}
    checkpoint.save(path, tensors, Document(stage="latents", facts={"positions": kept, "bad": found_bad}))


def readable(
    files: list[ImageFile], positions: range, images: ImageSettings, size: int, device: torch.device, workers: int
) -> Iterator[tuple[Tensor, list[int], list[tuple[int, str]]]]:
    """Batches of framed images in [-1, 1], their positions, and the unreadable ones among them."""
    dataset = ImageDataset([files[p] for p in positions], images.data, images, seed=0, train=False)
    count = len(positions)
    order = ([(0, i) for i in range(k, min(k + size, count))] for k in range(0, count, size))
    for batch in batches(dataset, order, pick_workers(workers, device)):
        at = [positions[i] for i in batch.index.tolist()]
        yield to_float(batch.x.to(device)), at, [(positions[i], why) for i, why in batch.bad]
