"""evaluate: the quality of a VAE's reconstructions and of a U-Net's samples, in numbers and a picture."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from rich.table import Table
from torch import Tensor

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.files import ImageFile, find_images, fingerprinters, list_images
from lightdiff.data.images import to_float, to_uint8
from lightdiff.data.loading import ImageBatch
from lightdiff.errors import UserError
from lightdiff.extras import not_installed
from lightdiff.extras.distances import (
    CAUTION,
    MIN_IMAGES,
    Found,
    caution,
    copies,
    frechet,
    kernel,
    nearest_of,
    precision_recall,
)
from lightdiff.extras.evidence import NETWORK, held_out, load_images
from lightdiff.extras.features import EVAL, Features, compute_features, load_features, process_images
from lightdiff.extras.grid_pattern import GridPattern
from lightdiff.extras.guide import find_weak
from lightdiff.extras.latent_facts import UnitMoments, channel_active_share, channel_kl, evenly
from lightdiff.extras.settings import EvaluateSettings
from lightdiff.extras.sheet import Heading, contact_sheet
from lightdiff.extras.tables import print_table
from lightdiff.losses import lpips, psnr
from lightdiff.models.lpips import TRUNKS, cached
from lightdiff.pictures import grid, save_png
from lightdiff.pipeline import load_vae, usable_levels, vae_behind
from lightdiff.run_folder import RunFolder, atomic_write, atomic_write_text, find_unet, find_vae, read_json
from lightdiff.runtime.processes import Means, Processes, pick_workers
from lightdiff.runtime.progress import console, print_note
from lightdiff.runtime.stage import open_stage
from lightdiff.settings import (
    EARLY,
    GenerateSettings,
    ImageSettings,
    LoopSettings,
    SamplingSettings,
    TrainUNetSettings,
    VAELossSettings,
    with_changes,
)
from lightdiff.stages import generate

SHOWN = 8
NOTE = 24  # characters below a picture
INCEPTION_SIDE = 299  # pixels
PICTURES = ("grid.png", "trajectory.png", "trajectory.webp", "walk.webp")  # written beside samples
BASIS = (
    NETWORK,
    "samples",
    "samples in",
    "training images",
    "images",
    "which are",
)  # what the numbers were measured on


def run(settings: EvaluateSettings) -> Path:
    """Measure, print the results, and return the file they are stored in."""
    with open_stage(settings, "evaluation") as stage:
        # The settings as given: samples are found by the precision asked for, and generate resolves `auto`
        here, device, ranks = RunFolder(settings.run), stage.device, stage.processes
        unet = unet_of(settings, here)
        if settings.samples and not settings.samples.is_dir():
            missing = "is no folder" if settings.samples.exists() else "does not exist"
            raise UserError(f"--samples: {settings.samples} {missing}")
        vae = vae_behind(Checkpoint(unet, "unet"), settings.vae, here) if unet else find_vae(settings.vae, here)
        saved, home = Checkpoint(vae, "vae"), stage.path
        images = images_of(saved, settings)
        files = list_images(images, console)
        features = load_features(settings.weights, settings.features, device, ranks)
        parts: dict[str, Callable[[], Found]] = {}
        if settings.of != "unet":
            parts["vae"] = lambda: evaluate_vae(saved, images, files, features, settings, device, ranks)
        if unet:
            for name, how in ways_to_draw(unet, settings).items():
                parts[name] = partial(evaluate_unet, unet, vae, images, files, features, how, home, device, ranks)
        results: dict[str, Found] = {}
        for name, measure in parts.items():
            results[name] = found = measure()
            ranks.run_on_main(partial(store_results, home / "metrics.json", name, found))
            print_results(name, found)
        if settings.compare_ema:
            print_best({name: found for name, found in results.items() if name != "vae"})
        return home / "metrics.json"


def unet_of(settings: EvaluateSettings, here: RunFolder) -> Path | None:
    """The U-Net to measure; None if only the VAE is to be measured, or there is nothing else."""
    if settings.of == "vae":
        return None
    try:
        return find_unet(settings.unet, here)
    except UserError as error:
        if settings.of == "unet" or settings.unet or not here.vae.path.is_dir():
            raise
        print_note(f"{error}; only the VAE is measured")
        return None


def images_of(vae: Checkpoint, settings: EvaluateSettings) -> ImageSettings:
    """The images that a VAE was trained on, or others framed in the same way; labels play no part here."""
    images = vae.settings(ImageSettings, "images")
    return with_changes(images, labels=None, data=settings.data or images.data)


def ways_to_draw(unet: Path, settings: EvaluateSettings) -> dict[str, EvaluateSettings]:
    """The settings to draw samples with, by part of the results: with each EMA, if they are compared."""
    if not settings.compare_ema:
        return {"unet": settings}
    decays = Checkpoint(unet, "unet").settings(LoopSettings, "loop").ema_decay
    each = {f"unet --ema {decay}": {"ema": decay, "compare_ema": False} for decay in (*decays, 0.0)}
    return {name: with_changes(settings, **changes) for name, changes in each.items()}


def print_best(results: Mapping[str, Found]) -> None:
    """Say which samples are nearest to the training images, by the Frechet distance."""
    measure = next((name for found in results.values() for name in found if name.startswith(("FID", "Frechet"))), "")
    if measure:
        best = min(results, key=lambda name: results[name][measure])
        console.print(f"lowest {measure}: {results[best][measure]:.4g}, with {best.removeprefix('unet ')}")


def store_results(path: Path, part: str, found: Found) -> None:
    """Add a part's results to those that other features gave for the same network and images, in one file."""
    everything = read_json(path) if path.is_file() else {}
    before = everything.get(part)
    if isinstance(before, dict) and all(before.get(name) == found.get(name) for name in BASIS):
        found = before | found
    everything[part] = found
    atomic_write_text(path, json.dumps(everything, indent=2) + "\n")


def print_results(part: str, found: Found) -> None:
    """Print results as a table."""
    title = "Reconstructions of the VAE" if part == "vae" else part.replace("unet", "Samples of the U-Net")
    table = Table(title=title, title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in found.items():
        if name == CAUTION:
            continue
        if isinstance(value, float):
            error = found.get(f"{name} +-")
            if not name.endswith("+-"):
                table.add_row(name, f"{value:.4g}" + (f" +- {error:.2g}" if error is not None else ""))
        elif isinstance(value, list):
            table.add_row(name, "  ".join(f"{v:.3g}" for v in value))
        else:
            table.add_row(name, value[:8] if name == NETWORK else str(value))
    print_table(console, table)
    if CAUTION in found:
        console.print(f"caution: {found[CAUTION]}", style="yellow", soft_wrap=True)


def formats(files: Sequence[ImageFile]) -> str:
    """How many images of each file format there are, as text."""
    kinds = Counter(Path(file.path).suffix.lower().removeprefix(".") or "no suffix" for file in files)
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())


def resampling(images: ImageSettings) -> str:
    """How images come to the size that features are computed at, as text."""
    return f"bicubic with antialiasing to {images.resolution} px, then to {INCEPTION_SIDE} px bilinear as TensorFlow 1"


# --- the VAE ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate_vae(
    saved: Checkpoint,
    images: ImageSettings,
    files: Sequence[ImageFile],
    features: Features,
    settings: EvaluateSettings,
    device: torch.device,
    ranks: Processes,
) -> Found:
    """Quality of reconstructions from mu, of the held-out images (of training images if none are held out)."""
    chosen = held_out(files)
    vae, model = load_vae(saved, device)
    loss = lpips_settings(saved.settings(VAELossSettings, "loss"), settings, ranks)
    distance = lpips(loss, device, ranks.fetch) if loss.lpips_gamma else None
    size, workers = images.resolution.divided(model.factor), pick_workers(settings.compute.workers, device)
    means, moments = Means(), UnitMoments(model.latent_channels, *size)
    pairs = PairedFeatures(features, len(chosen))
    pattern = GridPattern(*images.resolution)

    def measure(batch: ImageBatch) -> None:
        x = to_float(batch.x.to(device))
        posterior = vae.encoder(x)
        x_hat = vae.decoder(posterior.mu)
        pixels = to_uint8(x_hat)
        found = {"PSNR (dB)": psnr(x, x_hat).mean(), "SSIM": ssim(batch.x, pixels.cpu())}
        if distance:
            found[f"LPIPS ({loss.lpips_net})"] = distance(x, x_hat.clamp(-1, 1), posterior)
        means.add(found, len(x))
        pattern.add(x, x_hat)
        moments.add(posterior.mu[:, None].cpu(), posterior.logvar[:, None].cpu())
        pairs.add(batch.index, batch.x.to(device), pixels)

    process_images(measure, chosen, images, settings.batch_size, workers, ranks, "reconstructions")
    numbers = means.over(ranks)
    ranks.all_reduce_sum(moments.sums)
    ranks.all_reduce_sum(pattern.sums)
    originals, reconstructed = pairs.gather(ranks)
    if not len(originals):
        raise UserError(f"none of the {len(chosen)} images to measure reconstructions on can be read")
    which = "held out" if chosen[0].split == "val" else "training images, as none are held out"
    result: Found = {NETWORK: saved.metadata.digest, "images": len(originals), "which are": which, **numbers}
    result |= {"files": formats(chosen), "resampling": resampling(images)}
    result |= pattern.measures(len(originals), model.factor)
    result |= frechet(features, reconstructed, originals, ("reconstructions' Frechet distance", "rFID"))
    result |= caution(features.width, len(originals))
    result["KL per channel (nats per element)"] = channel_kl(moments)
    return result | {"active units per channel (share)": channel_active_share(moments)}


def lpips_settings(loss: VAELossSettings, settings: EvaluateSettings, ranks: Processes) -> VAELossSettings:
    """The VAE's LPIPS settings, overridden by the command's; gamma is 0 if the network's weights are not available."""
    net = settings.lpips_net or loss.lpips_net
    its_own = loss.lpips_weights if net == loss.lpips_net else None
    file = settings.lpips_weights or its_own
    weights = file if file and (settings.lpips_weights or file.is_file()) else None
    available = ranks.run_on_main(lambda: weights is not None or cached(TRUNKS[net].url).is_file())
    if not available:
        console.print(f"note: no LPIPS, as there are no weights of {net}; pass them with --lpips-weights FILE")
    chosen = {"lpips_net": net, "lpips_weights": weights, "lpips_gamma": float(available)}
    return loss.model_copy(update=chosen)


class Neighbour(NamedTuple):
    """A training image near to a sample, and how near."""

    file: ImageFile
    distance: float


class PairedFeatures:
    """Features of images and of their reconstructions."""

    def __init__(self, features: Features, count: int) -> None:
        self.features = features
        self.rows = torch.full((count, 2, features.width), torch.nan)

    def add(self, index: Tensor, x: Tensor, x_hat: Tensor) -> None:
        """Add a batch of uint8 images."""
        self.rows[index] = torch.stack([self.features(x), self.features(x_hat)], 1).float().cpu()

    def gather(self, ranks: Processes) -> tuple[Tensor, Tensor]:
        """The features from all processes, without images that could not be read, (n, d) each."""
        there = ranks.all_reduce_sum(self.rows.isfinite().all(2).all(1).float()) > 0
        rows = ranks.all_reduce_sum(self.rows.nan_to_num())[there]
        return rows[:, 0], rows[:, 1]


def ssim(x: Tensor, x_hat: Tensor) -> Tensor:
    """Mean structural similarity of uint8 images (Wang et al. 2004), by scikit-image."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        raise not_installed("evaluate", *EVAL) from None
    pairs = zip(x.permute(0, 2, 3, 1).numpy(), x_hat.permute(0, 2, 3, 1).numpy(), strict=True)
    found = [structural_similarity(a, b, channel_axis=2, data_range=255) for a, b in pairs]  # type: ignore[no-untyped-call]
    return torch.tensor(found).mean()


# --- the U-Net ----------------------------------------------------------------------------------------------------


def evaluate_unet(
    unet: Path,
    vae: Path,
    images: ImageSettings,
    files: Sequence[ImageFile],
    features: Features,
    settings: EvaluateSettings,
    home: Path,
    device: torch.device,
    ranks: Processes,
) -> Found:
    """Samples compared with the training images as sets, and their nearest neighbours among them."""
    folder = settings.samples or draw_samples(unet, vae, settings, home)
    sample_images = images.model_copy(update={"data": (folder,), "labels": None})
    samples = samples_in(folder)
    if len(samples) < 2:
        raise UserError(f"--samples: {folder} holds {len(samples)} images; a few hundred are needed")
    workers = pick_workers(settings.compute.workers, device)

    def measured(which: Sequence[ImageFile], of: ImageSettings, what: str) -> tuple[Tensor, list[int]]:
        return compute_features(features, which, of, settings.batch_size, workers, ranks, what)

    all_train, all_val = ([file for file in files if file.split == split] for split in ("train", "val"))
    train, val = (subset(some, settings.num_reference) for some in (all_train, all_val))
    if len(train) < len(all_train):
        console.print(
            f"note: the samples are compared with {len(train):,} of {len(all_train):,} training images; copies of the "
            "others are not found: --num-reference 0 uses all"
        )
    of_train = cached_features(home, features, train, images, ranks, lambda: measured(train, images, "training images"))
    of_val = (
        cached_features(home, features, val, images, ranks, lambda: measured(val, images, "held-out images"))
        if val
        else None
    )
    found, numbers = measured(samples, sample_images, "samples")
    if unreadable := len(samples) - len(found):
        console.print(f"note: {unreadable:,} of {len(samples):,} samples in {folder} cannot be read")
    if not len(found) or not len(of_train[0]):
        raise UserError(f"none of the {'training images' if len(found) else 'samples'} can be read")
    if min(len(found), len(of_train[0])) < MIN_IMAGES:
        console.print(
            f"note: fewer than {MIN_IMAGES} images are too few to measure: only their nearest neighbours are shown"
        )
    digest = Checkpoint(unet, "unet").metadata.digest
    result: Found = {NETWORK: digest, "samples": len(found), "samples in": str(folder)}
    result["training images"] = len(of_train[0])
    result |= {"files of samples": formats(samples), "files of training images": formats(train)}
    result |= {"resampling": resampling(images), **caution(features.width, len(found), len(of_train[0]))}
    result |= frechet(features, found, of_train[0], ("Frechet distance", "FID"))
    result |= kernel(features, found, of_train[0])
    result |= features.name_measures(precision_recall(found, of_train[0]))
    distance, nearest = nearest_of(found, of_train[0])
    if of_val and len(of_val[0]):
        new = nearest_of(of_val[0], of_train[0])[0]
        result |= features.name_measures(copies(distance[:, 0], new[:, 0]))
    picture = home / "nearest.png"
    most_alike = distance[:, 0].argsort()[:SHOWN].tolist()
    rows = [
        (
            samples[numbers[i]],
            [Neighbour(train[of_train[1][j]], float(d)) for j, d in zip(nearest[i].tolist(), distance[i], strict=True)],
        )
        for i in most_alike
    ]
    ranks.run_on_main(lambda: draw_nearest(picture, rows, sample_images, images))
    result["samples nearest to training images, shown beside them"] = str(picture)
    return result


def samples_in(folder: Path) -> list[ImageFile]:
    """The images in a folder, without those that `generate` writes beside its samples."""
    try:
        found = find_images((folder,), 0).files
    except UserError as error:
        raise UserError(str(error).replace("--data", "--samples")) from None
    return [file for file in found if not file.path.endswith(PICTURES)]


def draw_samples(unet: Path, vae: Path, settings: EvaluateSettings, home: Path) -> Path:
    """Samples of `generate`'s default settings (fewer steps if the U-Net has fewer levels); returns their folder.

    A U-Net trained without label dropout, which has no unconditional mode, draws all classes in turn.
    """
    saved = Checkpoint(unet, "unet")
    learnt, precision = saved.settings(TrainUNetSettings), settings.compute.precision
    digests = f"{saved.metadata.digest[:8]}-{Checkpoint(vae, 'vae').metadata.digest[:8]}"
    guided = settings.guide_with or settings.guidance != 1
    weak = find_weak(settings.guide_with or EARLY, saved) if guided else None
    how = "" if precision == "auto" else f"-{precision}"
    how += "" if settings.ema is None else f"-ema-{settings.ema}"
    how += f"-guided-{weak.metadata.digest[:8]}-{settings.guidance}" if weak else ""
    out = home / f"samples-{digests}-{settings.num_images}{how}"
    chosen: dict[str, Any] = {"run": settings.run, "unet": unet, "vae": vae, "num_images": settings.num_images}
    chosen |= {"ema": settings.ema, "guide_with": weak.path if weak else None}
    chosen |= {"out": out, "compute": settings.compute, "batch_size": settings.batch_size, "job": settings.job}
    drawing = GenerateSettings.model_validate(chosen)
    steps = min(drawing.sampling.num_steps, max(1, usable_levels(learnt)))
    classes = learnt.classes if not learnt.label_dropout else ()
    sampling = SamplingSettings(num_steps=steps, class_=classes, guidance=settings.guidance)
    generate.run(with_changes(drawing, sampling=sampling))
    return out


def subset(files: Sequence[ImageFile], maximum: int) -> list[ImageFile]:
    """At most `maximum` of the files, evenly spread; all for 0."""
    return [files[i] for i in evenly(len(files), maximum or len(files))]


def cached_features(
    home: Path,
    features: Features,
    files: Sequence[ImageFile],
    images: ImageSettings,
    ranks: Processes,
    measure: Callable[[], tuple[Tensor, list[int]]],
) -> tuple[Tensor, list[int]]:
    """Features of a set of images, computed once and cached in `home`."""
    of_source = fingerprinters(images.data)
    fingerprints = ranks.run_on_main(lambda: [of_source[file.root](file.path, False)[:2] for file in files])
    listed = [(file.root, file.path, file.split, file.labels) for file in files]
    what = [features.digest, listed, fingerprints, images.resolution.plain, images.background]
    path = home / f"features-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}.safetensors"
    if ranks.run_on_main(path.is_file):
        tensors = safetensors.torch.load_file(path)
        return tensors["features"], tensors["numbers"].tolist()
    found, numbers = measure()
    tensors = {"features": found.contiguous(), "numbers": torch.tensor(numbers)}
    ranks.run_on_main(lambda: atomic_write(path, lambda temporary: safetensors.torch.save_file(tensors, temporary)))
    return found, numbers


def draw_nearest(
    path: Path, rows: list[tuple[ImageFile, list[Neighbour]]], sample_images: ImageSettings, images: ImageSettings
) -> None:
    """Save a sheet: in each row a sample, then the training images nearest to it, with their distances and labels."""
    cells, notes = [], []
    for sample, others in rows:
        readable = [load_images([sample], sample_images), *(load_images([other.file], images) for other in others)]
        cells.append([[grid(to_float(x)[None], 1) for x in found] for found in readable])
        labels = [" ".join(filter(None, other.file.labels.values())) for other in others]
        texts = zip(others, labels, strict=True)
        notes.append(["", *(f"{other.distance:.2f} {label}"[:NOTE] for other, label in texts)])
    heads = ["sample", *(f"nearest {i + 1}" for i in range(len(rows[0][1])))]
    names = Heading("", [Path(sample.path).stem for sample, _ in rows])
    caption = "Samples and the training images nearest to them, with the distances of their features"
    save_png(path, contact_sheet(caption, names, Heading("", heads), cells, notes=notes))
