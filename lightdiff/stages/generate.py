"""generate: noise -> x0 -> z -> images. Whatever else draws with a U-Net does it through `Samples`, too."""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Float, UInt8
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lightdiff import __version__
from lightdiff.checkpoint import Checkpoint
from lightdiff.data.images import to_uint8
from lightdiff.errors import UserError, not_divisible
from lightdiff.pictures import save_grid_of_files, save_png
from lightdiff.pipeline import Pipeline, guidance_for, levels_for, vae_behind
from lightdiff.run_folder import RunFolder, atomic_write_text, find_unet, read_json
from lightdiff.runtime import restarted
from lightdiff.runtime.compile import compile_network, pick_compile
from lightdiff.runtime.processes import usable_cores
from lightdiff.runtime.progress import Reporter, console
from lightdiff.runtime.stage import Stage, open_stage
from lightdiff.settings import GenerateSettings, flat

ADVICE = "choose another --out, or a --name"
Draw = Callable[[range], Float[Tensor, "b 3 h w"]]
"""Numbers of images -> the images, in [-1, 1]."""


def run(settings: GenerateSettings) -> Path:
    """Draw images and return the folder they are in."""
    with open_samples(settings) as samples:
        samples.draw(samples.images)
        return samples.finish()


@contextmanager
def open_samples(settings: GenerateSettings) -> Iterator["Samples"]:
    """Samples to draw, in a folder that nobody else writes to; where they were begun, they are resumed."""
    here, kept = RunFolder(settings.run), named(settings, "settings.json")

    def begun(folder: Path) -> dict[str, Any]:
        return flat(read_json(folder / kept)) if (folder / kept).is_file() else {}

    def folder() -> Path:
        find_unet(settings.unet, here)  # names a misspelled run before its folder is made
        return settings.out or new_folder(here.samples)

    with open_stage(settings, "samples", folder, begun) as stage:
        stage.again = f"run the same command again{'' if settings.out else f' with --out {stage.path}'} to resume"
        yield Samples(stage)


class Samples:
    """A folder of images to draw with a trained pipeline."""

    def __init__(self, stage: Stage[GenerateSettings]) -> None:
        """Load the networks."""
        s = self.settings = stage.settings
        self.stage, self.out, here = stage, stage.path, RunFolder(s.run)
        unet = Checkpoint(find_unet(s.unet, here), "unet")
        vae = Checkpoint(vae_behind(unet, s.vae, here), "vae")
        self.pipeline = Pipeline(unet, vae, stage.device, s.ema, s.compute.precision)
        self.digests = {"unet": unet.metadata.digest, "vae": vae.metadata.digest}
        stage.processes.check_same("U-Net or VAE", self.digests)
        self.size = latent_size(s, self.pipeline)
        self.paths = [self.path(f"{i:05d}.png") for i in range(s.num_images)]

    def path(self, name: str) -> Path:
        """Where a file of this name belongs."""
        return self.out / named(self.settings, name)

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
        s, stage = self.settings, self.stage
        self.check(strength)
        calls = -(-s.num_images // (s.batch_size * stage.processes.world_size)) * s.sampling.num_steps
        stage.resolve_auto("compile", lambda asked: pick_compile(asked, stage.device, calls, training=False))
        missing = stage.processes.run_on_main(lambda: self.missing(about))
        batches = [range(i, min(i + s.batch_size, s.num_images)) for i in range(0, s.num_images, s.batch_size)]
        mine = stage.processes.strided([batch for batch in batches if missing & {*batch}])
        compiled, unfinished = stage.settings.compute.compile == "on", False
        if compiled:
            compile_network(self.pipeline.unet, stage.device, training=False)
        with (
            Reporter("generate", sum(map(len, mine))) as reporter,
            ThreadPoolExecutor(max(1, min(8, usable_cores() // 2))) as pool,
        ):
            done, writing = 0, list[Future[None]]()
            for batch in mine:
                # A compiled network is made for one size of batch: the last batch is filled up.
                filled = range(batch.start, batch.start + len(mine[0])) if compiled else batch
                pixels = to_uint8(images(filled)[: len(batch)])
                for future in writing:  # written while these were drawn
                    future.result()
                writing = [pool.submit(self.save, i, image) for i, image in zip(batch, pixels, strict=True)]
                done += len(batch)
                reporter.advance(done, {})
                unfinished = batch is not mine[-1]
                if stage.out_of_time() and unfinished:
                    break
            for future in writing:
                future.result()
        stage.finish_together(unfinished)

    def missing(self, about: Mapping[str, str]) -> set[int]:
        """The images that are not there yet; the folder remembers what it was begun with.

        Raises:
            UserError: If it holds images of the same names, but of other settings or networks, or of unknown ones.
        """
        compute = self.stage.settings.compute
        how = {"precision": compute.precision, "compile": compute.compile}
        command = type(self.settings).__name__.removesuffix("Settings").lower()
        now = {"command": command, "settings": chosen(self.settings), "compute": how, **self.digests, **about}
        there = {i for i, path in enumerate(self.paths) if path.is_file()}
        if there and not self.stage.begun:
            raise UserError(f"{self.out} holds {self.paths[min(there)].name} already: {ADVICE}")
        self.stage.check_begun(now, ADVICE)
        atomic_write_text(self.path("settings.json"), json.dumps(now, indent=2) + "\n")
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
        self.stage.processes.run_on_main(lambda: save(made, self.paths))
        console.print(f"{len(self.paths)} images and {made.name} are in {self.out}", soft_wrap=True)
        return self.out


def named(settings: GenerateSettings, name: str) -> str:
    """A file's name, behind the prefix if there is one."""
    return f"{settings.name}-{name}" if settings.name else name


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


def new_folder(samples: Path) -> Path:
    """The next free folder below samples/: 0001, 0002, ...; after an automatic restart, the last one, to resume it."""
    number = max((int(p.name) for p in samples.glob("[0-9]*") if p.name.isdigit()), default=0)
    return samples / f"{number if number and restarted() else number + 1:04d}"


def chosen(settings: GenerateSettings) -> dict[str, Any]:
    """The settings that an image depends on."""
    return settings.model_dump(mode="json", exclude=set(settings.NOT_IN_IMAGES))
