"""evaluate: how good a VAE's reconstructions and a U-Net's samples are, in numbers and a picture."""

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.table import Table
from torch import Tensor

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.files import ImageFile, data_digest, full_paths, list_images, scan
from lightdiff.data.images import to_float, to_uint8
from lightdiff.data.loading import ImageDataset, load_batches
from lightdiff.errors import UserError, not_installed
from lightdiff.extras.distances import FEWEST, Found, copies, frechet, kernel, nearest_of, precision_recall
from lightdiff.extras.evidence import NETWORK
from lightdiff.extras.features import EVAL, Features, features_of, load_features
from lightdiff.extras.latent_facts import ACTIVE, evenly
from lightdiff.extras.settings import EvaluateSettings
from lightdiff.losses import kl_per_element, lpips, psnr
from lightdiff.models.lpips import cached_weights
from lightdiff.models.vae import Posterior
from lightdiff.pictures import save_grid
from lightdiff.pipeline import load_vae, usable_levels, vae_behind
from lightdiff.run_folder import RunFolder, atomic_write, atomic_write_text, find_unet, find_vae, read_json
from lightdiff.runtime.processes import Means, Processes, pick_workers
from lightdiff.runtime.progress import Reporter, console
from lightdiff.runtime.stage import open_stage
from lightdiff.settings import (
    GenerateSettings,
    ImageSettings,
    SamplingSettings,
    TrainUNetSettings,
    VAELossSettings,
    with_changes,
)
from lightdiff.stages import generate

SHOWN = 8
PICTURES = ("grid.png", "trajectory.png", "trajectory.webp", "walk.webp")  # that are made beside samples
BASIS = (NETWORK, "samples", "samples in", "training images", "images", "which are")  # what numbers stand on


def run(settings: EvaluateSettings) -> Path:
    """Measure, print, and return the file of results."""
    with open_stage(settings, "evaluation") as stage:
        settings, here, device, ranks = stage.settings, RunFolder(settings.run), stage.device, stage.processes
        unet = unet_of(settings, here)
        if settings.samples and not settings.samples.is_dir():
            raise UserError(f"--samples: there is no folder {settings.samples}")
        vae = vae_behind(Checkpoint(unet, "unet"), settings.vae, here) if unet else find_vae(settings.vae, here)
        saved = Checkpoint(vae, "vae")
        images = images_of(saved, settings)
        files = list_images(images, console)
        features = load_features(settings.weights, settings.features, device, ranks)
        parts: dict[str, Callable[[], Found]] = {}
        if settings.of != "unet":
            parts["vae"] = lambda: evaluate_vae(saved, images, files, features, settings, device, ranks)
        if unet:
            parts["unet"] = lambda: evaluate_unet(
                unet, vae, images, files, features, settings, stage.path, device, ranks
            )
        for name, measure in parts.items():
            found = measure()
            ranks.run_on_main(partial(store, stage.path / "metrics.json", name, found))
            show(name, found)
        return stage.path / "metrics.json"


def unet_of(settings: EvaluateSettings, here: RunFolder) -> Path | None:
    """The U-Net to measure; None where the VAE alone is asked for, or there is nothing else."""
    if settings.of == "vae":
        return None
    try:
        return find_unet(settings.unet, here)
    except UserError as error:
        if settings.of == "unet" or settings.unet or not here.vae.path.is_dir():
            raise
        console.print(f"note: {error}; the VAE alone is measured", soft_wrap=True)
        return None


def images_of(vae: Checkpoint, settings: EvaluateSettings) -> ImageSettings:
    """The images that a VAE learnt from, or others treated like them; their labels do not matter here."""
    images = ImageSettings.model_validate(vae.metadata.settings["images"])
    return with_changes(images, labels=None, data=settings.data or images.data)


def store(path: Path, part: str, found: Found) -> None:
    """Put a part's results beside what other features have found of the same network and images, in one file."""
    everything = read_json(path) if path.is_file() else {}
    before = everything.get(part)
    if isinstance(before, dict) and all(before.get(name) == found.get(name) for name in BASIS):
        found = before | found
    everything[part] = found
    atomic_write_text(path, json.dumps(everything, indent=2) + "\n")


def show(part: str, found: Found) -> None:
    """Print results as a table."""
    title = {"vae": "Reconstructions of the VAE", "unet": "Samples of the U-Net"}[part]
    table = Table(title=title, title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in found.items():
        if isinstance(value, float):
            error = found.get(f"{name} +-")
            if not name.endswith("+-"):
                table.add_row(name, f"{value:.4g}" + (f" +- {error:.2g}" if error is not None else ""))
        elif isinstance(value, list):
            table.add_row(name, "  ".join(f"{v:.3g}" for v in value))
        else:
            table.add_row(name, value[:8] if name == NETWORK else str(value))
    console.print(table)


# --- the VAE ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate_vae(
    saved: Checkpoint,
    images: ImageSettings,
    files: list[ImageFile],
    features: Features,
    settings: EvaluateSettings,
    device: torch.device,
    ranks: Processes,
) -> Found:
    """Reconstructions of the held-out images (of training images, where none are held out), through mu."""
    held_out = [file for file in files if file.split == "val"]
    chosen = held_out or files
    vae, model = load_vae(saved, device)
    loss = lpips_settings(VAELossSettings.model_validate(saved.metadata.settings["loss"]), settings, ranks)
    distance = lpips(loss, device, ranks.fetch) if loss.lpips_gamma else None
    dataset = ImageDataset(chosen, images, seed=0, train=False)
    mine, size = ranks.share(len(chosen)), settings.batch_size
    order = ([(0, i) for i in mine[k : k + size]] for k in range(0, len(mine), size))
    side = images.resolution // model.factor
    means, units, pairs = Means(), Units(model.latent_channels, side), Pairs(features, len(chosen))
    with Reporter("reconstructions", len(mine)) as reporter:
        done = 0
        for batch in load_batches(dataset, order, pick_workers(settings.compute.workers, device)):
            done += len(batch.x) + batch.missing
            if not len(batch.x):
                continue
            x = to_float(batch.x.to(device))
            posterior = vae.encoder(x)
            x_hat = vae.decoder(posterior.mu)
            pixels = to_uint8(x_hat)
            found = {"PSNR (dB)": psnr(x, x_hat).mean(), "SSIM": ssim(batch.x, pixels.cpu())}
            if distance:
                found[f"LPIPS ({loss.lpips_net})"] = distance(x, x_hat.clamp(-1, 1), posterior)
            means.add(found, len(x))
            units.add(posterior)
            pairs.add(batch.index, batch.x.to(device), pixels)
            reporter.advance(done, {})
    numbers = means.over(ranks)
    originals, back = pairs.over(ranks)
    if not len(originals):
        raise UserError(f"none of the {len(chosen)} images can be read that reconstructions would be measured on")
    which = "held out" if held_out else "trained on, as none are held out"
    result: Found = {NETWORK: saved.metadata.digest, "images": len(originals), "which are": which, **numbers}
    result |= frechet(features, back, originals, ("reconstructions' Frechet distance", "rFID"))
    kl, active = units.over(ranks)
    return result | {"KL a channel (nats an element)": kl, "active units a channel (share)": active}


def lpips_settings(loss: VAELossSettings, settings: EvaluateSettings, ranks: Processes) -> VAELossSettings:
    """The VAE's settings of LPIPS, with what was asked for; weight 0 where its network's weights are not at hand."""
    net = settings.lpips_net or loss.lpips_net
    its_own = loss.lpips_weights if net == loss.lpips_net else None
    file = settings.lpips_weights or its_own
    at_hand = file if file and (settings.lpips_weights or file.is_file()) else None
    there = ranks.run_on_main(lambda: at_hand is not None or cached_weights(net).is_file())
    if not there:
        console.print(f"note: no LPIPS, as the weights of {net} are not at hand; --lpips-weights FILE names them")
    chosen = {"lpips_net": net, "lpips_weights": at_hand, "lpips_gamma": float(there)}
    return loss.model_copy(update=chosen)


class Units:
    """What each latent unit does over images: its KL, and how much its mu varies."""

    def __init__(self, channels: int, side: int) -> None:
        """Start with nothing."""
        self.sums = torch.zeros(4, channels, side, side, dtype=torch.float64)  # of 1, mu, mu^2 and the KL

    def add(self, posterior: Posterior) -> None:
        """Take in a batch."""
        mu, kl = posterior.mu.double().cpu(), kl_per_element(posterior).double().cpu()
        self.sums += torch.stack([part.sum(0) for part in (torch.ones_like(mu), mu, mu.square(), kl)])

    def over(self, ranks: Processes) -> tuple[list[float], list[float]]:
        """For each channel, the mean KL (nats an element) and the share of units that are active."""
        count, first, second, kl = ranks.all_reduce_sum(self.sums)
        variance = second / count - (first / count).square()
        return (kl / count).mean((1, 2)).tolist(), (variance > ACTIVE).double().mean((1, 2)).tolist()


class Pairs:
    """Features of images and of their reconstructions."""

    def __init__(self, features: Features, count: int) -> None:
        """Make room for `count` images."""
        self.features = features
        self.rows = torch.full((count, 2, features.width), torch.nan)

    def add(self, index: Tensor, x: Tensor, x_hat: Tensor) -> None:
        """Take in a batch of bytes."""
        self.rows[index] = torch.stack([self.features(x), self.features(x_hat)], 1).float().cpu()

    def over(self, ranks: Processes) -> tuple[Tensor, Tensor]:
        """Those of all processes, without images that could not be read."""
        there = ranks.all_reduce_sum(self.rows.isfinite().all(2).all(1).float()) > 0
        rows = ranks.all_reduce_sum(self.rows.nan_to_num())[there]
        return rows[:, 0], rows[:, 1]


def ssim(x: Tensor, x_hat: Tensor) -> Tensor:
    """Mean structural similarity of images of bytes (Wang et al. 2004), by scikit-image."""
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
    files: list[ImageFile],
    features: Features,
    settings: EvaluateSettings,
    home: Path,
    device: torch.device,
    ranks: Processes,
) -> Found:
    """Samples against the images trained on, and how near they lie to them."""
    folder = settings.samples or drawn(unet, vae, settings, home)
    drawn_images = images.model_copy(update={"data": (folder,), "labels": None})
    samples = samples_in(folder)
    if len(samples) < 2:
        raise UserError(f"--samples: {folder} holds {len(samples)} images; some hundred are needed")
    workers = pick_workers(settings.compute.workers, device)

    def measured(which: list[ImageFile], of: ImageSettings, what: str) -> tuple[Tensor, list[int]]:
        return features_of(features, which, of, settings.batch_size, workers, ranks, what)

    every = {split: [file for file in files if file.split == split] for split in ("train", "val")}
    train, val = (at_most(some, settings.num_reference) for some in every.values())
    if len(train) < len(every["train"]):
        console.print(
            f"note: {len(train):,} of {len(every['train']):,} training images are compared with, and copies of the "
            "others are not found: --num-reference 0 takes all"
        )
    of_train = cached(home, features, train, images, ranks, lambda: measured(train, images, "training images"))
    of_val = (
        cached(home, features, val, images, ranks, lambda: measured(val, images, "images held out")) if val else None
    )
    found, numbers = measured(samples, drawn_images, "samples")
    if not len(found) or not len(of_train[0]):
        raise UserError(f"none of the {'images trained on' if len(found) else 'samples'} can be read")
    if min(len(found), len(of_train[0])) < FEWEST:
        console.print(f"note: fewer than {FEWEST} images say nothing as a set: only the nearest ones are looked for")
    digest = Checkpoint(unet, "unet").metadata.digest
    result: Found = {NETWORK: digest, "samples": len(found), "samples in": str(folder)}
    result["training images"] = len(of_train[0])
    result |= frechet(features, found, of_train[0], ("Frechet distance", "FID"))
    result |= kernel(features, found, of_train[0])
    result |= features.naming(precision_recall(found, of_train[0]))
    distance, nearest = nearest_of(found, of_train[0])
    if of_val and len(of_val[0]):
        new = nearest_of(of_val[0], of_train[0])[0]
        result |= features.naming(copies(distance[:, 0], new[:, 0]))
    picture = home / "nearest.png"
    most_alike = distance[:, 0].argsort()[:SHOWN].tolist()
    rows = [(samples[numbers[i]], [train[of_train[1][j]] for j in nearest[i].tolist()]) for i in most_alike]
    ranks.run_on_main(lambda: draw_nearest(picture, rows, drawn_images, images))
    result["the samples most like training images, beside those"] = str(picture)
    return result


def samples_in(folder: Path) -> list[ImageFile]:
    """The images in a folder, without those that `generate` makes beside its samples."""
    return [file for file in scan((folder,), 0) if not file.path.endswith(PICTURES)]


def drawn(unet: Path, vae: Path, settings: EvaluateSettings, home: Path) -> Path:
    """The folder with this U-Net's samples, drawn as `generate` draws by default, as far as its levels suffice.

    A U-Net that was always told the class draws all of them in turn.
    """
    saved = Checkpoint(unet, "unet")
    learnt, precision = saved.settings(TrainUNetSettings), settings.compute.precision
    digests = f"{saved.metadata.digest[:8]}-{Checkpoint(vae, 'vae').metadata.digest[:8]}"
    out = home / f"samples-{digests}-{settings.num_images}{'' if precision == 'auto' else f'-{precision}'}"
    chosen: dict[str, Any] = {"run": settings.run, "unet": unet, "vae": vae, "num_images": settings.num_images}
    chosen |= {"out": out, "compute": settings.compute, "batch_size": settings.batch_size, "job": settings.job}
    drawing = GenerateSettings.model_validate(chosen)
    steps = min(drawing.sampling.num_steps, max(1, usable_levels(learnt)))
    classes = learnt.classes if not learnt.label_dropout else ()
    generate.run(with_changes(drawing, sampling=SamplingSettings(num_steps=steps, class_=classes)))
    return out


def at_most(files: list[ImageFile], most: int) -> list[ImageFile]:
    """At most so many of them, evenly spread; all for 0."""
    return [files[i] for i in evenly(len(files), most or len(files))]


def cached(
    home: Path,
    features: Features,
    files: list[ImageFile],
    images: ImageSettings,
    ranks: Processes,
    measure: Callable[[], tuple[Tensor, list[int]]],
) -> tuple[Tensor, list[int]]:
    """Features of a set of images, kept for the next time."""
    sources = [str(place) for place in images.data if place.is_file()]  # whose images are no files
    there = ranks.run_on_main(lambda: [stamp(path) for path in sources + full_paths(files, images.data)])
    what = [features.digest, data_digest(files), there, images.resolution, images.background]
    path = home / f"features-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}.safetensors"
    if ranks.run_on_main(path.is_file):
        tensors = safetensors.torch.load_file(path)
        return tensors["features"], tensors["numbers"].tolist()
    found, numbers = measure()
    tensors = {"features": found.contiguous(), "numbers": torch.tensor(numbers)}
    ranks.run_on_main(lambda: atomic_write(path, lambda temporary: safetensors.torch.save_file(tensors, temporary)))
    return found, numbers


def stamp(path: str) -> list[int]:
    """By which a file is known to be the same as before without being read: its size, and when it was written."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def draw_nearest(
    path: Path, rows: list[tuple[ImageFile, list[ImageFile]]], drawn_images: ImageSettings, images: ImageSettings
) -> None:
    """Save a picture: in each row a sample, then the training images nearest to it."""
    shown = []
    for sample, others in rows:
        for files, of in (([sample], drawn_images), (others, images)):
            dataset = ImageDataset(files, of, seed=0, train=False)
            shown += [to_float(item.x) for item in (dataset[0, i] for i in range(len(files))) if item.x is not None]
    save_grid(path, torch.stack(shown), 1 + len(rows[0][1]))
