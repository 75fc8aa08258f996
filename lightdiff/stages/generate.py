"""generate: noise -> x0 -> z -> images. Whatever else draws with a U-Net does it through `Samples`, too."""

import json
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lightdiff import __version__
from lightdiff.checkpoint import Checkpoint, atomic_write_text
from lightdiff.data.images import to_uint8
from lightdiff.errors import Stopped, UserError
from lightdiff.pictures import save_grid_of_files, save_png
from lightdiff.pipeline import Pipeline, guidance_for, levels_for, vae_behind
from lightdiff.run_folder import Lock, RunFolder, find_unet, read_json
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
from lightdiff.runtime.processes import init_distributed
from lightdiff.runtime.progress import Reporter, console
from lightdiff.runtime.signals import TimeLimit
from lightdiff.settings import GenerateSettings, flat
from lightdiff.stages.start import enter, flag_of

Draw = Callable[[range], Float[Tensor, "b 3 h w"]]
"""Numbers of images -> the images, in [-1, 1]."""


def run(settings: GenerateSettings) -> Path:
    """Draw images and return the folder they are in."""
    with open_samples(settings) as samples:
        samples.draw(samples.images)
        return samples.finish()


@contextmanager
def open_samples(settings: GenerateSettings) -> Iterator["Samples"]:
    """Samples to draw, in a folder that nobody else writes to."""
    with Lock(settings.job.force_unlock) as lock:
        yield Samples(settings, lock)


class Samples:
    """A folder of images to draw with a trained pipeline; where the same images were begun, they are resumed."""

    def __init__(self, settings: GenerateSettings, lock: Lock) -> None:
        """Load the networks, and choose the folder."""
        device, here = pick_device(settings.compute.device), RunFolder(settings.run)
        self.settings, self.lock, self.processes = settings, lock, init_distributed(device, settings.job.timeout)
        unet = Checkpoint(find_unet(settings.unet, here), "unet")
        vae = Checkpoint(vae_behind(unet, settings.vae, here), "vae")
        self.out = settings.out or self.processes.run_on_main(lambda: new_folder(here.samples))
        precision, self.compile = self.processes.run_on_main(lambda: self.resolve_auto(device))
        self.pipeline = Pipeline(unet, vae, device, settings.ema, precision)
        self.digests = {"unet": unet.metadata.digest, "vae": vae.metadata.digest}
        self.processes.check_same("U-Net or VAE", self.digests)
        self.size = latent_size(settings, self.pipeline)
        self.paths = [self.path(f"{i:05d}.png") for i in range(settings.num_images)]

    def path(self, name: str) -> Path:
        """Where a file of this name belongs, behind the prefix if there is one."""
        return self.out / (f"{self.settings.name}-{name}" if self.settings.name else name)

    def resolve_auto(self, device: torch.device) -> tuple[str, str]:
        """Precision, and whether to compile: as when these images were begun, else found by trying."""
        s, kept = self.settings, self.path("settings.json")
        begun = read_json(kept) if kept.is_file() else {}
        precision = as_begun(s.compute.precision, begun.get("precision"))
        compiling = as_begun(s.compute.compile, begun.get("compile"))
        calls = -(-s.num_images // (s.batch_size * self.processes.world_size)) * s.sampling.num_steps
        return pick_precision(precision, device), pick_compile(compiling, device, calls, training=False)

    def images(self, items: range) -> Float[Tensor, "b 3 h w"]:
        """New images, out of noise."""
        z = self.pipeline.sample(items, self.settings.seed, self.settings.sampling, self.size)
        return self.pipeline.decode(z)

    def draw(self, images: Draw, strength: float = 1.0, **about: str) -> None:
        """Draw and save, batch by batch, what is not there yet; a batch that is there is whole.

        Args:
            images: Draws some of them.
            strength: Share of the noise levels that `images` begins at.
            about: What else the images depend on.

        Raises:
            UserError: If the networks cannot do what is asked, or the folder holds other images.
            Stopped: If there was no time for all of them.
        """
        s, processes = self.settings, self.processes
        self.check(strength)
        missing = processes.run_on_main(lambda: self.open_folder(about))
        batches = [range(i, min(i + s.batch_size, s.num_images)) for i in range(0, s.num_images, s.batch_size)]
        mine = processes.strided([batch for batch in batches if missing & {*batch}])
        if self.compile == "on":
            compile_network(self.pipeline.unet, self.pipeline.device, training=False)
        limit, unfinished, again = TimeLimit(s.job.max_time), False, "" if s.out else f" with --out {self.out}"
        try:
            with (
                Reporter("generate", sum(map(len, mine))) as reporter,
                explain_out_of_memory("--batch-size", s.batch_size),
                ThreadPoolExecutor(max(1, min(8, usable_cores() // 2))) as pool,
            ):
                done, writing = 0, list[Future[None]]()
                for batch in mine:
                    # A compiled network is made for one size of batch: the last batch is filled up.
                    filled = range(batch.start, batch.start + len(mine[0])) if self.compile == "on" else batch
                    pixels = to_uint8(images(filled)[: len(batch)])
                    for future in writing:  # written while these were drawn
                        future.result()
                    writing = [pool.submit(self.save, i, image) for i, image in zip(batch, pixels, strict=True)]
                    done += len(batch)
                    reporter.advance(done, {})
                    unfinished = batch is not mine[-1]
                    if limit.spent() and unfinished:
                        break
                for future in writing:
                    future.result()
        except (KeyboardInterrupt, Stopped) as stop:
            code = stop.exit_code if isinstance(stop, Stopped) else 128 + signal.SIGINT
            hint = f"run the same command again{again} to go on"
            raise Stopped(f"stopped; what is drawn is in {self.out}: {hint}", code) from None
        limit.conclude(unfinished, processes, again)

    def open_folder(self, about: Mapping[str, str]) -> set[int]:
        """Make the folder, or resume one where the same images were begun; returns the images that are missing.

        Raises:
            UserError: If it holds images of the same names, but of other settings or networks, or of unknown ones.
        """
        enter(self.out, self.lock)
        kept = self.path("settings.json")
        how = {"precision": self.pipeline.precision, "compile": self.compile}
        now = {"settings": chosen(self.settings), **how, **self.digests, **about}
        there = {i for i, path in enumerate(self.paths) if path.is_file()}
        if kept.is_file():
            before, after = flat(read_json(kept)), flat(now)
            for name in {**after, **before}:  # what an edit or a walk has more than new images, too
                if before.get(name) != after.get(name):
                    raise UserError(
                        f"{self.out} was begun with {flag_of(name)} {before.get(name)}, now {after.get(name)}: "
                        "choose another --out, or a --name"
                    )
        elif there:
            found = self.paths[min(there)].name
            raise UserError(f"{self.out} holds {found} already: choose another --out, or a --name")
        atomic_write_text(kept, json.dumps(now, indent=2) + "\n")
        return set(range(len(self.paths))) - there

    def check(self, strength: float) -> None:
        """Check that the networks can do what is asked, before anything is written.

        Raises:
            UserError: If not.
        """
        learned, sampling = self.pipeline.settings, self.settings.sampling
        guidance_for(learned, sampling, [0])
        levels_for(learned, sampling, strength)
        if learned.label and not learned.label_dropout and (not sampling.class_ or sampling.guidance != 1):
            console.print(
                "note: this U-Net was trained with --label-dropout 0: its prediction without a class, which guidance "
                "starts from, it has learned from images without a label, if there were any"
            )

    def save(self, item: int, pixels: UInt8[Tensor, "3 h w"]) -> None:
        """Save an image with what it says of its own making: seed, index, settings and models; no path."""
        s, info = self.settings, PngInfo()
        words = {"Software": f"lightdiff {__version__}", "seed": str(s.seed), "index": str(item)}
        for name, text in {**words, "settings": json.dumps(chosen(s)), **self.digests}.items():
            info.add_text(name, text)
        save_png(self.paths[item], pixels, info)

    def finish(self, name: str = "grid.png", save: Callable[[Path, list[Path]], None] | None = None) -> Path:
        """Save all of them as one picture, a grid if not told otherwise, and return the folder."""
        save = save or partial(save_grid_of_files, classes=len(self.settings.sampling.class_))
        made = self.path(name)
        self.processes.run_on_main(lambda: save(made, self.paths))
        console.print(f"{len(self.paths)} images and {made.name} are in {self.out}", soft_wrap=True)
        return self.out


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
        below = settings.resolution // step * step
        fits = f"{below} or {below + step}" if below else str(step)
        raise UserError(f"--resolution: {settings.resolution} is not divisible by {step}; the nearest that fit: {fits}")
    side = settings.resolution // pipeline.vae_settings.factor
    return side, side


def new_folder(samples: Path) -> Path:
    """The next free folder below samples/: 0001, 0002, ...; after an automatic restart, the last one, to resume it."""
    number = max((int(p.name) for p in samples.glob("[0-9]*") if p.name.isdigit()), default=0)
    return samples / f"{number if number and restarted() else number + 1:04d}"


def chosen(settings: GenerateSettings) -> dict[str, Any]:
    """The settings that an image depends on."""
    return settings.model_dump(mode="json", exclude=set(settings.NOT_IN_IMAGES))
