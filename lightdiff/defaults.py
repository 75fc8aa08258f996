"""Defaults that follow the machine and what is to be learnt: a preset, KL weight, learning rate, intervals.

They are decided once, when a run begins, below all that is said otherwise, and saved. docs/recipe.md has the
measurement or the source behind each number.
"""

from collections.abc import Mapping
from typing import Any

from lightdiff.settings import (
    Layer,
    LoopSettings,
    TrainUNetSettings,
    TrainVAESettings,
    UNetSettings,
    VAESettings,
    with_changes,
)

LR, VAE_WIDTH, UNET_WIDTH = 2e-3, 32, 64  # the learning rate that was measured, and the widths it was measured at
PUBLISHED_LR = 1e-4  # about what published VAEs of other architectures were trained with
KL_BETA, RATIO = 3e-3, 12  # the KL weight that was measured, and pixels' numbers a latent's number there
MAX_PASSES = 300.0  # over the images, where nobody says how many steps
TIMES = 10  # that a run is validated and saved at least; the warm-up takes at most one of so many parts
FEW = 1000  # images, below which a model is likely to copy some


def preset_for(device: str) -> str:
    """The preset of a run that names none, on a type of device: small, unless that is a GPU that CUDA knows."""
    return "base" if device == "cuda" else "small"


def following(settings: TrainVAESettings | TrainUNetSettings) -> Layer:
    """What follows from a training's resolution and network, as a layer of settings.

    The KL weight falls with the numbers of an image over those of its latent, 3 f^2 / c: reconstruction and KL are both
    means over their elements, so that with a fixed weight, the pull on a latent's number would grow with that ratio.
    The learning rate falls with the width, as updates of each matrix grow with it.
    """
    layer: Layer = {"loop": {"max_passes": MAX_PASSES}}
    if isinstance(settings, TrainVAESettings):
        vae = settings.model.resolved(min(settings.images.resolution))
        layer["loss"] = {"kl_beta": KL_BETA * (RATIO * vae.latent_channels / (3 * vae.factor**2))}
        ends = (vae.encoder_channels[0], vae.decoder_channels[-1]) if isinstance(vae, VAESettings) else ()
        layer["loop"]["lr"] = LR * min(1, VAE_WIDTH / max(ends)) if ends else PUBLISHED_LR
    elif isinstance(settings.model, UNetSettings):
        layer["loop"]["lr"] = LR * min(1, UNET_WIDTH / (settings.model.channels or (settings.model.width,))[0])
    return layer


def with_intervals(loop: LoopSettings, total: int, started_with: Mapping[str, Any]) -> LoopSettings:
    """The loop with its steps, and the warm-up and intervals that nobody has set: as when it started, or fitting."""
    tenth = max(1, total // TIMES)
    fitting = {"warmup_steps": min(100, tenth), "val_every": min(1000, tenth), "save_every": min(1000, tenth)}
    fitting |= {name: known for name in fitting if (known := started_with.get(f"loop.{name}")) is not None}
    chosen = {name: value for name, value in fitting.items() if getattr(loop, name) is None}
    limited = {"steps": total, "max_passes": 0.0} if loop.max_passes and not loop.epochs else {}
    return with_changes(loop, **chosen, **limited)
