"""The packaged presets: for each, the VAE's and the U-Net's architecture and what of their training goes with it."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from lightdiff.options import Layer, build, defaults, read_settings

PRESETS = ("tiny", "small", "base", "original")
PRESET_FOLDER = Path(__file__).parent
Network = Literal["vae", "unet"]


def preset_layer(network: Network, name: str) -> Layer:
    """What a preset says of one network and its training."""
    return read_settings(PRESET_FOLDER / f"{network}-{name}.toml")


def preset_settings(model: type[BaseModel], network: Network, name: str) -> Any:
    """A training's settings as a preset alone makes them."""
    return build(model, [defaults(model), preset_layer(network, name)])
