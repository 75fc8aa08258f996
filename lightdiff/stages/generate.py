"""generate: noise -> x0 -> z -> images. Whatever else samples from a U-Net does it through `Samples`, too."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Float, UInt8
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lightdiff import __version__
from lightdiff.data.images import to_uint8
from lightdiff.errors import UserError
from lightdiff.on_demand import on_demand
from lightdiff.pictures import save_grid_of_files, save_png, text_chunks
from lightdiff.pipeline import Pipeline, guidance_for, levels_for
from lightdiff.run_folder import RunFolder, atomic_write_text, ensure_writable, find_unet, read_json
from lightdiff.runtime import restarted
from lightdiff.runtime.processes import usable_cores
from lightdiff.runtime.progress import Reporter, console
from lightdiff.runtime.stage import Stage, open_stage
from lightdiff.settings import GenerateSettings, SamplingSettings, flat

ADVICE = "choose another --out, or a --name"
Draw = Callable[[range], Float[Tensor, "b 3 h w"]]
"""Numbers of images -> the images, in [-1, 1]."""


def run(settings: GenerateSettings) -> Path:
    """Generate images and return the folder they are in."""
    with open_samples(settings) as samples:
        samples.draw(samples.images)
        return samples.finish()


@contextmanager
def open_samples(settings: GenerateSettings) -> Iterator["Samples"]:
    """Samples to generate, in a folder that nobody else writes to; where they were started, they are resumed."""

    def started_with(folder: Path) -> dict[str, Any]:
        return flat(read_json(file)) if (file := folder / named(settings, "settings.json")).is_file() else {}

    here, made = RunFolder(settings.run), list[Path]()

    def folder() -> Path:
        find_unet(settings.unet, here)  # names a misspelled run before its folder is made
        if settings.out:
            return settings.out
        made.extend([new_folder(here.samples), here.samples, here.path])
        return made[0]

    try:
        with open_stage(settings, "samples", folder, started_with) as stage:
            stage.again = f"run the same command again with --out {stage.path} to resume"
            yield Samples(stage)
    finally:
        with suppress(OSError):  # of a folder that is not empty
            for path in made:
                path.rmdir()


class Samples:
    """A folder of images to generate with a trained pipeline."""

    def __init__(self, stage: Stage[GenerateSettings]) -> None:
        """Load the networks."""
        s = self.settings = stage.settings
        self.stage = stage
        self.pipeline = Pipeline.load(s.run, s.unet, s.vae, s.compute.device, s.compute.precision, s.ema, s.guide)
        stage.processes.check_same("U-Net or VAE", self.pipeline.digests)
        self.size = self.pipeline.latent_size(s.resolution)
        self.paths = [self.path(f"{i:05d}.png") for i in range(s.num_images)]

    def path(self, name: str) -> Path:
        """Where a file of this name belongs."""
        return self.stage.path / named(self.settings, name)

    def images(self, items: range) -> Float[Tensor, "b 3 h w"]:
        """New images, out of noise."""
        return self.pipeline.decode(self.pipeline.sample(items, self.settings.seed, self.settings.sampling, self.size))

    def draw(self, images: Draw, strength: float = 1.0, **about: str) -> None:
        """Generate and save, batch by batch, what is not there yet; a batch that is there is whole.

        Args:
            images: Draws some of them.
            strength: Share of the noise levels that `images` begins at.
            about: What else the images depend on.

        Raises:
            UserError: If the networks cannot do what is asked, or the folder holds other images.
            Stopped: If there was no time for all of them.
        """
        s, stage = self.settings, self.stage
        check(self.pipeline, s.sampling, strength)
        pick: Any = on_demand("compile:pick_for_sampling")
        stage.resolve_auto("compile", lambda asked: pick(asked, self))
        mine = stage.processes.strided(stage.processes.run_on_main(lambda: self.missing(about)))
        if compiled := stage.settings.compute.compile == "on":
            on_demand("compile:compile_sampling")(self)
        writers = max(1, min(8, usable_cores() // 2))
        with Reporter("generate", sum(map(len, mine))) as reporter, ThreadPoolExecutor(writers) as pool:
            done, writing, unfinished, graphs = 0, iter([None]), False, 0
            for batch in mine:
                # A compiled network is made for one size of batch: the last batch is filled up
                filled = range(batch.start, batch.start + len(mine[0])) if compiled else batch
                pixels = to_uint8(images(filled)[: len(batch)])
                graphs = on_demand("compile:note_recompiled")(graphs) if compiled else 0
                list(writing)  # the batch before, saved while this one was generated
                writing = pool.map(self.save, batch, pixels)
                done += len(batch)
                reporter.advance(done, {})
                unfinished = batch is not mine[-1]
                if stage.out_of_time() and unfinished:
                    break
            list(writing)
        stage.finish_together(unfinished)

    def missing(self, about: Mapping[str, str]) -> list[range]:
        """The batches that are not there yet; the folder remembers what it was started with.

        Raises:
            UserError: If it holds images of the same names, but of other settings or networks, or of unknown ones.
        """
        s, stage = self.settings, self.stage
        there = {i for i, path in enumerate(self.paths) if path.exists()}
        held = [path for path in (*self.paths, self.path("grid.png"), self.path("settings.json")) if path.exists()]
        if held and not stage.started_with.keys() >= {"command", *self.pipeline.digests}:
            raise UserError(f"{stage.path} holds {held[0].name} already: {ADVICE}")
        command = type(s).__name__.removesuffix("Settings").lower()
        compute = stage.settings.compute.model_dump(include={"precision", "compile"})
        started_with = {"command": command, "settings": chosen(s), "compute": compute, **self.pipeline.digests, **about}
        stage.check_unchanged(started_with, ADVICE)
        for i in there:
            if not self.words(i).items() <= text_chunks(self.paths[i]).items():
                raise UserError(f"{self.paths[i]} is another image: remove it, {ADVICE}")
        atomic_write_text(self.path("settings.json"), json.dumps(started_with, indent=2) + "\n")
        batches = [range(i, min(i + s.batch_size, s.num_images)) for i in range(0, s.num_images, s.batch_size)]
        return [batch for batch in batches if not there.issuperset(batch)]

    def save(self, item: int, pixels: UInt8[Tensor, "3 h w"]) -> None:
        """Save an image with what it says of its own making: seed, index, settings and models; no path."""
        info, about = PngInfo(), {"Software": f"lightdiff {__version__}", "settings": json.dumps(chosen(self.settings))}
        for name, text in {**about, **self.words(item)}.items():
            info.add_text(name, text)
        save_png(self.paths[item], pixels, info)

    def words(self, item: int) -> dict[str, str]:
        """What tells an image from all others of this name."""
        return {"seed": str(self.settings.seed), "index": str(item), **self.pipeline.digests}

    def finish(self, name: str = "grid.png", save: Callable[[Path, list[Path]], None] | None = None) -> Path:
        """Save all of them as one picture, a grid if not told otherwise, and return the folder."""
        save = save or partial(save_grid_of_files, classes=len(self.settings.sampling.class_))
        made = self.path(name)
        self.stage.processes.run_on_main(lambda: save(made, self.paths))
        console.print(f"{len(self.paths)} images and {made.name} are in {self.stage.path}", soft_wrap=True)
        return self.stage.path


def named(settings: GenerateSettings, name: str) -> str:
    """A file's name, behind the prefix if there is one."""
    return f"{settings.name}-{name}" if settings.name else name


def check(pipeline: Pipeline, sampling: SamplingSettings, strength: float) -> None:
    """Check that a pipeline can do what is asked, before anything is written.

    Raises:
        UserError: If not.
    """
    settings, weak = pipeline.settings, pipeline.weak
    if weak and sampling.guidance == 1:
        raise UserError("--guide-with does nothing at --guidance 1: try 1.5 or 2")
    guidance_for(settings, sampling, [0], weak=weak)
    levels_for(settings, sampling, strength)
    if settings.label_dropout == 1 and sampling.class_:
        console.print("note: this U-Net was trained with --label-dropout 1, so it knows no class from another")
    without = not sampling.class_ or (sampling.guidance != 1 and not weak)
    if settings.label and not settings.label_dropout and without:
        console.print(
            "note: this U-Net was trained with --label-dropout 0: its prediction without a class, which guidance "
            "starts from, it has learned from images without a label, if there were any"
        )


def new_folder(samples: Path) -> Path:
    """A new folder below samples/, 0001, 0002, ..., made at once, so that no other process takes its number too.

    After an automatic restart, it is the last one, to resume it.
    """
    last = max((int(path.name) for path in samples.glob("[0-9]*") if path.name.isdecimal()), default=0)
    if last and restarted():
        return samples / f"{last:04d}"
    ensure_writable(samples)
    for number in itertools.count(last + 1):
        with suppress(FileExistsError):
            (folder := samples / f"{number:04d}").mkdir()
            break
    return folder


def chosen(settings: GenerateSettings) -> dict[str, Any]:
    """The settings that an image depends on."""
    return settings.model_dump(mode="json", exclude=set(settings.NOT_IN_IMAGES))
