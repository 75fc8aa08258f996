"""generate: noise -> x0 -> z -> images."""

import hashlib
import json
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lightdiff import __version__
from lightdiff.checkpoint import Checkpoint, atomic_write_text
from lightdiff.data.images import BadImage, frame, load_image, to_float, to_uint8
from lightdiff.errors import Stopped, UserError, not_divisible
from lightdiff.pictures import save_grid_of_files, save_png, save_trajectory, save_walk
from lightdiff.pipeline import Edit, Pipeline, Sampling, guidance_for, levels_for, noise_between, vae_behind
from lightdiff.run_folder import Lock, RunFolder, find_unet, read_json
from lightdiff.runtime.background import Background
from lightdiff.runtime.device import (
    as_begun,
    compile_network,
    explain_out_of_memory,
    pick_compile,
    pick_device,
    pick_precision,
    usable_cores,
)
from lightdiff.runtime.dist_env import restarted
from lightdiff.runtime.processes import Processes, init_distributed
from lightdiff.runtime.progress import Reporter, console
from lightdiff.runtime.signals import TimeLimit
from lightdiff.settings import GenerateSettings, flat
from lightdiff.stages.start import enter, flag_of

STRENGTH = 0.6
TRAJECTORY_IMAGES = 4
MACHINE_ONLY = {
    "run",
    "job",
    "unet",
    "vae",
    "out",
    "name",
    "trajectory",
    "from_",
    "mask",
    "num_images",
    "batch_size",
    "compute",
}  # a picture tells none of these


def run(settings: GenerateSettings) -> Path:
    """Draw images and return the folder they are in."""
    with Lock(settings.job.force_unlock) as lock:
        return generate(settings, lock)


def generate(settings: GenerateSettings, lock: Lock) -> Path:
    """The same, in a folder that nobody else writes to."""
    # 1. The networks, and whether they can do what is asked
    device = pick_device(settings.compute.device)
    ranks = init_distributed(device, settings.job.timeout)
    here = RunFolder(settings.run)
    unet = Checkpoint(find_unet(settings.unet, here), "unet")
    vae = Checkpoint(vae_behind(unet, settings.vae, here), "vae")
    out = settings.out or ranks.run_on_main(lambda: new_folder(here.samples))
    precision, compiling = ranks.run_on_main(lambda: decided(settings, out, device, ranks))
    pipeline = Pipeline(unet, vae, device, settings.ema, precision)
    ranks.check_same("U-Net or VAE", digests(pipeline))
    size = latent_size(settings, pipeline)
    source = Source.of(settings, pipeline, size) if settings.from_ else None
    sampling = sampling_of(settings)
    check(pipeline, sampling, source)
    paths = [out / file_name(settings, f"{i:05d}.png") for i in range(settings.count)]
    about = {"settings": chosen(settings), "precision": precision, "compile": compiling, **digests(pipeline)}
    about |= {"source": source.digest} if source else {}
    ranks.run_on_main(lambda: open_folder(out, paths, settings, about, lock))

    # 2. Draw batch by batch; one that is there already is whole
    shape = (pipeline.settings.latent.channels, *size)
    walk = noise_between(shape, settings.interpolate, settings.frames, settings.seed) if settings.interpolate else None
    limit = TimeLimit(settings.job.max_time)
    whole = list(batched(settings.count, settings.batch_size))
    there = ranks.run_on_main(lambda: [all(paths[i].is_file() for i in items) for items in whole])
    mine = ranks.strided([items for items, done in zip(whole, there, strict=True) if not done])
    done, unfinished = 0, False
    if compiling == "on":
        compile_network(pipeline.unet, device, training=False)
    try:
        with (
            Reporter("generate", sum(map(len, mine))) as reporter,
            explain_out_of_memory("--batch-size", settings.batch_size),
            Background(max(1, min(8, usable_cores() // 2))) as writing,
        ):
            for items in mine:
                # A compiled network is made for one size of batch: the last batch is filled up.
                drawn = range(items.start, items.start + len(mine[0])) if compiling == "on" else items
                noise = None if walk is None else walk[[min(i, len(walk) - 1) for i in drawn]]
                edit = source.edit if source else None
                z = pipeline.sample(drawn, settings.seed, sampling, size, edit, noise)
                x = pipeline.decode(z[: len(items)])
                if source:
                    x = source.pasted(x)
                for i, pixels in zip(items, to_uint8(x), strict=True):
                    writing.do(partial(save_png, paths[i], pixels, text_chunks(settings, pipeline, i)))
                done += len(items)
                reporter.advance(done, {})
                unfinished = items is not mine[-1]
                if limit.spent() and unfinished:
                    break
    except (KeyboardInterrupt, Stopped) as stop:
        code = stop.exit_code if isinstance(stop, Stopped) else 128 + signal.SIGINT
        again = "run the same command again" + ("" if settings.out else f" with --out {out}")
        raise Stopped(f"stopped; what is drawn is in {out}: {again} to go on", code) from None

    # 3. All of them at a glance
    limit.conclude(unfinished, ranks, "" if settings.out else f" with --out {out}")
    made = out / file_name(settings, "walk.webp" if settings.interpolate else "grid.png")
    draw = save_walk if settings.interpolate else partial(save_grid_of_files, classes=len(settings.class_))
    ranks.run_on_main(lambda: draw(made, paths))
    if settings.trajectory and ranks.is_main:
        first = range(min(TRAJECTORY_IMAGES, settings.count))
        moments = pipeline.trajectory(first, settings.seed, sampling, size, source.edit if source else None)
        save_trajectory(out, file_name(settings, ""), moments)
    console.print(f"{settings.count} images and {made.name} are in {out}", soft_wrap=True)
    return out


def decided(settings: GenerateSettings, out: Path, device: torch.device, ranks: Processes) -> tuple[str, str]:
    """Precision, and whether to compile: where images are to be gone on with, as they were begun; else by trying."""
    kept = out / file_name(settings, "settings.json")
    before = read_json(kept) if kept.is_file() else {}
    precision = as_begun(settings.compute.precision, before.get("precision"))
    compiling = as_begun(settings.compute.compile, before.get("compile"))
    calls = -(-settings.count // (settings.batch_size * ranks.world_size)) * settings.num_steps
    return pick_precision(precision, device), pick_compile(compiling, device, calls, training=False)


def latent_size(settings: GenerateSettings, pipeline: Pipeline) -> tuple[int, int]:
    """Height and width of the latents to draw.

    Raises:
        UserError: If the networks cannot make images of the size asked for.
    """
    latent = pipeline.settings.latent
    if not settings.resolution:
        return latent.height, latent.width
    step = pipeline.vae_settings.factor * pipeline.settings.model.factor
    if settings.resolution % step:
        raise not_divisible(settings.resolution, step)
    side = settings.resolution // pipeline.vae_settings.factor
    return side, side


def sampling_of(settings: GenerateSettings) -> Sampling:
    """What these settings say of the sampler."""
    s = settings
    first, last = s.guidance_interval
    return Sampling(
        num_steps=s.num_steps,
        eta=s.eta,
        clamp=s.clamp,
        min_alpha_bar=s.min_alpha_bar,
        sampler=s.sampler,
        spacing=s.spacing,
        classes=s.class_,
        guidance=s.guidance,
        guidance_interval=(first, last),
    )


@dataclass(frozen=True)
class Source:
    """The image to begin with, and where it may change."""

    x: Float[Tensor, "1 3 r r"]
    mask: Float[Tensor, "1 1 r r"] | None
    edit: Edit
    digest: str

    @classmethod
    def of(cls, settings: GenerateSettings, pipeline: Pipeline, size: tuple[int, int]) -> "Source":
        """Read, frame and encode the image, and the mask if there is one.

        Raises:
            UserError: If one cannot be read.
        """
        assert settings.from_ is not None
        resolution = size[0] * pipeline.vae_settings.factor
        images = pipeline.vae_checkpoint.metadata.settings.get("images", {})
        pixels = framed(settings.from_, resolution, "--from", images.get("background", "white"))
        digest = hashlib.sha256(pixels.numpy().tobytes())
        x, mask = to_float(pixels)[None], None
        if settings.mask:
            see_shape(settings.mask, settings.from_)
            white = framed(settings.mask, resolution, "--mask", "black").float().mean(0) > 127
            digest.update(white.numpy().tobytes())
            mask = white.float()[None, None]
        small = None if mask is None else F.adaptive_max_pool2d(mask, size)  # what is touched at all is drawn anew
        strength = settings.strength or (STRENGTH if mask is None else 1.0)
        return cls(x, mask, Edit(pipeline.encode(x), strength, small), digest.hexdigest())

    def pasted(self, x: Float[Tensor, "b 3 r r"]) -> Float[Tensor, "b 3 r r"]:
        """Drawn images, with the source's own pixels where they were to stay."""
        return x if self.mask is None else torch.lerp(self.x, x, self.mask)


def framed(path: Path, resolution: int, flag: str, background: str) -> UInt8[Tensor, "3 r r"]:
    """An image's centre square."""
    try:
        return frame(load_image(path, background), resolution)
    except BadImage as error:
        raise UserError(f"{flag}: {path} cannot be read: {error}") from None


def see_shape(mask: Path, source: Path) -> None:
    """See that a mask lies on the image it belongs to: of its shape, or square, as what is drawn.

    Raises:
        UserError: If it is neither.
    """
    with suppress(BadImage):  # which is told where they are read
        (width, height), (w, h) = load_image(source).size, load_image(mask).size
        if w != h and abs(w * height - h * width) > max(w * height, h * width) / 50:
            raise UserError(f"--mask: {mask} has {w} x {h} pixels, {source} {width} x {height}: not the same shape")


def check(pipeline: Pipeline, sampling: Sampling, source: Source | None) -> None:
    """See that the noise schedule has as many levels as steps are asked for, and the network the classes.

    Raises:
        UserError: If not.
    """
    guidance_for(pipeline.settings, sampling, [0])
    learnt = pipeline.settings
    if learnt.label and not learnt.label_dropout and (not sampling.classes or sampling.guidance != 1):
        console.print(
            "note: this U-Net was trained with --label-dropout 0: what it draws without a class, which guidance begins "
            "with, it has learnt from images without a label, if there were any"
        )
    try:
        levels_for(pipeline.settings, sampling, source.edit.strength if source else 1.0)
    except ValueError as error:
        raise UserError(f"--num-steps: {error}") from None


def new_folder(samples: Path) -> Path:
    """The next free folder below samples/: 0001, 0002, ...; after an automatic restart, the last one, to go on."""
    taken = [int(p.name) for p in samples.glob("[0-9]*") if p.name.isdigit()]
    number = max(taken, default=0)
    return samples / f"{number if number and restarted() else number + 1:04d}"


def file_name(settings: GenerateSettings, name: str) -> str:
    """A file's name, behind the prefix if there is one."""
    return f"{settings.name}-{name}" if settings.name else name


def open_folder(out: Path, paths: list[Path], settings: GenerateSettings, about: dict[str, Any], lock: Lock) -> None:
    """Make the folder, or go on in one where the same images were begun.

    Raises:
        UserError: If it holds images of the same names, but of other settings or networks, or of unknown ones.
    """
    enter(out, lock)
    kept = out / file_name(settings, "settings.json")
    now = flat(about)
    if kept.is_file():
        before = flat(read_json(kept))
        for name in [name for name in now if before.get(name) != now[name]]:
            raise UserError(
                f"{out} was begun with {flag_of(name)} {before.get(name)}, now {now[name]}: "
                "choose another --out, or a --name"
            )
    elif there := [path.name for path in paths if path.exists()]:
        raise UserError(f"{out} holds {there[0]} already: choose another --out, or a --name")
    atomic_write_text(kept, json.dumps(about, indent=2) + "\n")


def chosen(settings: GenerateSettings) -> dict[str, Any]:
    """The settings that a picture depends on."""
    return settings.model_dump(mode="json", exclude=MACHINE_ONLY)


def digests(pipeline: Pipeline) -> dict[str, str]:
    """The networks that a picture comes from."""
    return {"unet": pipeline.unet_checkpoint.metadata.digest, "vae": pipeline.vae_checkpoint.metadata.digest}


def batched(count: int, size: int) -> Iterator[range]:
    """The numbers 0 to count - 1 in ranges of at most `size`."""
    return (range(first, min(first + size, count)) for first in range(0, count, size))


def text_chunks(settings: GenerateSettings, pipeline: Pipeline, item: int) -> PngInfo:
    """What a picture says of its own making: seed, index, settings and models; no path of this machine."""
    info = PngInfo()
    info.add_text("Software", f"lightdiff {__version__}")
    info.add_text("seed", str(settings.seed))
    info.add_text("index", str(item))
    info.add_text("settings", json.dumps(chosen(settings)))
    for network, digest in digests(pipeline).items():
        info.add_text(network, digest)
    return info
