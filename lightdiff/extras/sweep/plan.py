"""The plan of a sweep: its cells, and the results that cells share.

A result is a VAE, a set of latents, a U-Net or a set of samples. It belongs to the base run, or lies in a folder of
its own, named by a digest of what it depends on: its settings, and the result it comes from.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lightdiff.architectures import Layer
from lightdiff.checkpoint import Checkpoint
from lightdiff.data.latents import latents_settings
from lightdiff.errors import UserError
from lightdiff.extras.guide import find_weak
from lightdiff.extras.settings import SweepSettings
from lightdiff.extras.sweep.axes import STAGES, Axis, parse_axis
from lightdiff.extras.sweep.base import Base, finished
from lightdiff.options import build, merge
from lightdiff.pipeline import guidance_for, levels_for, vae_digest
from lightdiff.run_folder import VAE_COPY, RunFolder
from lightdiff.settings import (
    EncodeSettings,
    GenerateSettings,
    ScaleSettings,
    StageSettings,
    TrainUNetSettings,
    TrainVAESettings,
    flat,
)

Kind = Literal["vae", "latents", "unet", "samples"]
# Results do not depend on these.
MACHINE_ONLY = {"run", "device", "workers", "compile", "vae", "unet", "latents", "out"}


@dataclass(frozen=True)
class Result:
    """The output of a stage, for its settings and the result of the stage before."""

    kind: Kind
    place: Path  # the base's file or folder; otherwise a run folder of its own, or for samples a folder of images
    token: str  # identifies it in results that depend on it
    settings: dict[str, StageSettings] = field(default_factory=dict)  # by stage; empty if the base has it
    source: "Result | None" = None
    twin: "Result | None" = None  # latents with the same shards, scaled differently

    @property
    def new(self) -> bool:
        """Whether the sweep makes it, rather than the base run."""
        return bool(self.settings)

    @property
    def done(self) -> bool:
        """Whether it is complete."""
        return not self.new or (self.place / "done").is_file()

    def describe(self) -> str:
        """What it depends on, as JSON; its folder is named by a digest of this."""
        about = {stage: cache_key(settings) for stage, settings in self.settings.items()}
        return json.dumps({"from": self.source.token if self.source else "", **about}, indent=2) + "\n"


def cache_key(settings: StageSettings) -> dict[str, Any]:
    """The settings that a result depends on, by flag, except those that the stage before determines."""
    rows = flat(settings.model_dump(mode="json", exclude={*settings.NOT_SAVED, "latent"}))
    return {name: value for name, value in sorted(rows.items()) if name.split(".")[-1] not in MACHINE_ONLY}


@dataclass(frozen=True)
class Cell:
    """One combination of values, and its results."""

    texts: tuple[str, ...]
    results: dict[Kind, Result]

    @property
    def end(self) -> Result:
        """The last of the results."""
        return list(self.results.values())[-1]


class Plan:
    """All cells of a sweep, with every setting checked before any work starts."""

    def __init__(self, settings: SweepSettings) -> None:
        """Plan a sweep.

        Raises:
            UserError: If a setting is invalid, or the base run lacks something.
        """
        self.axes = [parse_axis(argument) for argument in settings.vary]
        self.fixed = [parse_axis(argument, "--set") for argument in settings.set_]
        for stage, steps in (("train-vae", settings.vae_steps), ("train-unet", settings.unet_steps)):
            if steps:
                self.fixed.append(Axis(f"{stage}.steps", stage, ("loop", "steps"), (str(steps),), (steps,)))
        first, *others = self.axes
        if others and (others[0].stage, others[0].path) == (first.stage, first.path):
            raise UserError(f"--vary {first.name}: it is varied twice; give all its values in one --vary")
        changed = [*self.axes, *self.fixed]
        self.touched = {axis.stage for axis in changed}
        for late in (axis for axis in changed if axis.stage != "train-vae" and settings.until == "vae"):
            raise UserError(f"--until vae: {late.name} belongs to {late.stage}, which comes later")
        self.settings, self.whole = settings, settings.until != "vae"
        self.name = "-by-".join(axis.name for axis in self.axes)
        self.folder = settings.run / "sweeps" / self.name
        self.base = Base.open(RunFolder(settings.run), "train-vae" in self.touched, self.whole)
        self._encoded: dict[str, Result] = {}  # latents, by what their shards depend on
        numbers = itertools.product(*(range(len(axis.values)) for axis in self.axes))
        self.cells = [self._cell(chosen) for chosen in numbers]

    def new_results(self) -> list[Result]:
        """Each result that the sweep makes, once, in the order of making them."""
        every = [result for cell in self.cells for result in cell.results.values() if result.new]
        return list({result.place: result for result in every}.values())

    def _cell(self, numbers: Sequence[int]) -> Cell:
        changes: dict[str, Layer] = {stage: {} for stage in STAGES}
        for axis, number in [*((axis, 0) for axis in self.fixed), *zip(self.axes, numbers, strict=True)]:
            changes[axis.stage] = merge(STAGES[axis.stage], changes[axis.stage], axis.layer(number))
        vae = build(TrainVAESettings, [self.base.vae_settings.model_dump(), changes["train-vae"]]).resolved()
        results: dict[Kind, Result] = {"vae": self._vae(vae)}
        if self.whole:
            layer = self.base.encode_layer(vae.images.model_dump(mode="json"))
            encode = build(EncodeSettings, [layer, changes["encode"]])
            scale = build(ScaleSettings, [self.base.scale_layer(), changes["scale"]])
            results["latents"] = self._latents(results["vae"], encode, scale)
            unet = self._unet_settings(vae, encode, scale, changes["train-unet"])
            results["unet"] = self._unet(results["latents"], unet)
            results["samples"] = self._samples(results["unet"], unet, changes["generate"])
        return Cell(tuple(axis.texts[n] for axis, n in zip(self.axes, numbers, strict=True)), results)

    def _own(self, kind: Kind, settings: dict[str, StageSettings], source: Result | None) -> Result:
        """A result in a folder of its own."""
        draft = Result(kind, Path(), "", settings, source)
        name = f"{kind}-{hashlib.sha256(draft.describe().encode()).hexdigest()[:10]}"
        return replace(draft, place=self.folder / name, token=name)

    def _vae(self, settings: TrainVAESettings) -> Result:
        """The base's VAE if its settings are not varied or come out equal; otherwise a new one."""
        base = self.base
        its_own = base.vae_settings.resolved()
        last = base.run.vae.last
        done = last.is_file() and finished(Checkpoint(last), its_own.loop.steps)
        same = done and cache_key(settings) == cache_key(its_own)
        if "train-vae" not in self.touched or same:
            return Result("vae", base.vae.path, base.vae.metadata.digest)
        return self._own("vae", {"train-vae": settings}, None)

    def _latents(self, vae: Result, encode: EncodeSettings, scale: ScaleSettings) -> Result:
        """The base's latents if they come out equal; otherwise new ones, which reuse equal shards."""
        base = self.base
        if not vae.new and base.latents and base.index and base.index.vae_digest == vae_digest(base.vae):
            token = f"{base.index.digest} {base.index.statistics}"
            mine = Result("latents", base.latents, token, source=vae)
            plain = build(EncodeSettings, [base.encode_layer(base.vae_settings.images.model_dump(mode="json"))])
            if cache_key(encode) == cache_key(plain):
                if cache_key(scale) == cache_key(build(ScaleSettings, [base.scale_layer()])) and base.index.statistics:
                    return mine
                self._encoded.setdefault(vae.token + json.dumps(cache_key(encode)), mine)
        elif not vae.new and not self.touched & {"train-vae", "encode", "scale", "train-unet"}:
            return Result("latents", base.vae.path, base.vae.metadata.digest, source=vae)  # none are needed
        made = self._own("latents", {"encode": encode, "scale": scale}, vae)
        first = self._encoded.setdefault(vae.token + json.dumps(cache_key(encode)), made)
        return made if first.place == made.place else replace(made, twin=first)

    def _unet_settings(
        self, vae: TrainVAESettings, encode: EncodeSettings, scale: ScaleSettings, changes: Layer
    ) -> TrainUNetSettings:
        """Settings of a U-Net's training; its latents' scaling is not known yet, and filled in when they are made."""
        settings = self.base.unet_settings
        height, width = encode.images.resolution.divided(vae.model.factor)
        shape = {"channels": vae.model.latent_channels, "height": height, "width": width, "only_mu": scale.only_mu}
        latent = {**settings.latent.model_dump(), **shape}
        whole: TrainUNetSettings = build(TrainUNetSettings, [{**settings.model_dump(), "latent": latent}, changes])
        return whole.resolved()

    def _unet(self, latents: Result, settings: TrainUNetSettings) -> Result:
        base = self.base
        assert base.unet is not None
        mine = Result("unet", base.unet.path, base.unet.metadata.digest, source=latents)
        if not latents.new:
            if not self.touched & {"train-vae", "encode", "scale", "train-unet"}:
                return mine
            its_own = base.unet_settings.resolved()
            of_these = base.index is not None and base.unet.metadata.lineage.get("latents") == base.index.digest
            scaled = base.latents is not None and latents_settings(base.latents) == its_own.latent
            if cache_key(settings) == cache_key(its_own) and of_these and scaled:
                if finished(base.unet, its_own.loop.steps):
                    return mine
        return self._own("unet", {"train-unet": settings}, latents)

    def _samples(self, unet: Result, trained_as: TrainUNetSettings, changes: Layer) -> Result:
        """Samples, drawn in the precision that the U-Net was trained in, the same for all cells."""
        loop = trained_as.loop
        layer = {"num_images": self.settings.num_images, "compute": {"device": loop.device}}
        if loop.precision != "auto":
            layer["compute"] |= {"precision": loop.precision}  # type: ignore[operator]
        settings = build(GenerateSettings, [layer, changes])
        if settings.guide is None:
            guidance_for(trained_as, settings.sampling, [0])
        elif not unet.new:  # beside one that the sweep trains, there may be one later
            find_weak(settings.guide, Checkpoint(unet.place, "unet"))
        levels_for(trained_as, settings.sampling)
        return self._own("samples", {"generate": settings}, unet)


def vae_of(unet: Result) -> Path:
    """The VAE that decodes a U-Net's samples: the copy kept with its latents, if there is one."""
    latents = unet.source
    assert latents is not None
    assert latents.source is not None
    copy = latents_of(latents) / VAE_COPY
    return copy if copy.is_file() else latents.source.place


def latents_of(latents: Result) -> Path:
    """The folder with the index and the shards of latents."""
    return RunFolder(latents.place).latents if latents.new else latents.place
