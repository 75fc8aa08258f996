"""The run that a sweep is based on: its settings and results, which all cells share except for what is varied."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lightdiff.architectures import Layer
from lightdiff.checkpoint import Checkpoint
from lightdiff.data.index import LatentIndex, read_index
from lightdiff.defaults import with_intervals
from lightdiff.errors import UserError
from lightdiff.extras.evidence import latents_behind
from lightdiff.options import Where, build, merge, nest
from lightdiff.run_folder import INDEX, VAE_COPY, RunFolder, find_unet, find_vae
from lightdiff.settings import (
    EncodeSettings,
    LoopSettings,
    StageSettings,
    TrainUNetSettings,
    TrainVAESettings,
    with_changes,
)

T = TypeVar("T", TrainVAESettings, TrainUNetSettings)
DERIVED: dict[type[StageSettings], dict[Where, Any]] = {  # settings that follow from others unless given
    TrainVAESettings: {("model", "encoder_channels"): (), ("model", "decoder_channels"): ()},
    TrainUNetSettings: {
        ("model", "channels"): (),
        ("model", "attend_levels"): None,
        ("noise", "schedule"): "auto",
    },
}
RESET: Layer = {"loop": {"compile": "auto"}}  # was decided for the base's number of steps


@dataclass(frozen=True)
class Base:
    """The run whose settings and results all cells share, except for what is varied."""

    run: RunFolder
    vae: Checkpoint
    latents: Path | None
    index: LatentIndex | None
    unet: Checkpoint | None

    @classmethod
    def open(cls, run: RunFolder, trains_vae: bool, whole: bool) -> "Base":
        """Open what the run holds.

        Args:
            run: The run folder.
            trains_vae: Whether the sweep trains VAEs; otherwise it uses the one behind the latents.
            whole: Whether the cells end in samples.

        Raises:
            UserError: If something required is missing.
        """
        if not any(path.is_file() for path in (run.vae.best, run.vae.last)) and trains_vae:
            raise UserError(f"--run: {run.path} has no VAE to take settings from: train one first")
        if whole and not any(path.is_file() for path in (run.unet.best, run.unet.last)):
            hint = ", or stop at the VAEs with --until vae" if trains_vae else ""
            raise UserError(f"--run: {run.path} has no U-Net to take settings from: train one first{hint}")
        unet = Checkpoint(find_unet(None, run), "unet") if whole else None
        its_own = run.latents if (run.latents / INDEX).is_file() else None
        latents = latents_behind(unet, run) if unet else its_own
        vae = latents / VAE_COPY if latents and not trains_vae else find_vae(None, run)
        return cls(run, Checkpoint(vae, "vae"), latents, read_index(latents) if latents else None, unet)

    @property
    def vae_settings(self) -> TrainVAESettings:
        """Settings its VAE was trained with."""
        settings: TrainVAESettings = build(TrainVAESettings, [self.vae.metadata.settings, RESET])
        return reset_derived(settings)

    @property
    def unet_settings(self) -> TrainUNetSettings:
        """Settings its U-Net was trained with."""
        assert self.unet is not None
        settings: TrainUNetSettings = build(TrainUNetSettings, [self.unet.metadata.settings, RESET])
        return reset_derived(settings)

    def encode_layer(self, images: Layer) -> Layer:
        """Settings its latents were encoded with, applied to these images."""
        loop = self.vae_settings.loop
        layer: Layer = {"images": images, "compute": {"device": loop.device, "precision": loop.precision}}
        if self.index is None:
            return layer
        its_own = self.vae_settings.images.model_dump(mode="json")
        encoded = self.index.images.model_dump(mode="json")
        changed = {name: value for name, value in encoded.items() if its_own.get(name) != value}
        kept = {"dtype": self.index.dtype, "shard_size": self.index.shard_size}
        return merge(EncodeSettings, layer, {**kept, "images": changed, "compute": {"precision": self.index.precision}})

    def scale_layer(self) -> Layer:
        """Settings its latents were scaled with."""
        found = self.index.statistics if self.index else None
        if found is None:
            return {}
        by_channel = len(found.shift) > 1 or found.shift[0] != 0
        by_hand = not by_channel and abs(found.scale[0] * found.std - 1) > 1e-6
        normalize = "channel" if by_channel else "global"
        return {"only_mu": found.only_mu, "normalize": normalize, "scaling_factor": found.scale[0] if by_hand else 0}


def reset_derived(settings: T) -> T:
    """The settings with derived ones unset again, so that they follow when others are varied."""
    whole = settings.resolved()
    for path, empty in DERIVED[type(settings)].items():
        if path[0] == "model" and settings.model.architecture != "default":
            continue  # other architectures derive nothing
        trial = type(settings).model_validate(merge(type(settings), settings.model_dump(), nest({path: empty})))
        if trial.resolved() == whole:
            settings = trial
    for name in ("warmup_steps", "val_every", "save_every"):
        free = with_changes(settings.loop, **{name: None})
        if getattr(with_intervals(free, free.steps, {}), name) == getattr(settings.loop, name):
            settings = with_changes(settings, loop=free)
    return settings


def finished(saved: Checkpoint, steps: int) -> bool:
    """Whether a checkpoint was trained for this number of steps, with the same settings throughout."""
    epochs = saved.settings(LoopSettings, "loop").epochs
    return saved.metadata.step == steps and not epochs and not saved.metadata.extra.get("history")
