"""The U-Net of a model trained with lightdiff, for diffusers."""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from lightdiff.models.unet import UNet as Network


class LightdiffUNet(ModelMixin, ConfigMixin):
    """(x_t, t) -> what the objective asks for; (x_t, t, label) where it knows classes."""

    @register_to_config
    def __init__(self, architecture: dict[str, Any], latent_channels: int, num_classes: int, trained: dict[str, Any]):
        """Build it; `trained` says with which objective, noise, latents and classes it was trained."""
        super().__init__()
        self.network = Network(SimpleNamespace(**architecture), latent_channels, num_classes)

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        """Predict, for latents (b, c, h, w), levels (b,) from 0 to T - 1, and labels (b,)."""
        return self.network(x, t) if label is None else self.network(x, t, label)
