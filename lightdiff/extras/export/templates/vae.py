"""The VAE of a model trained with lightdiff, for diffusers."""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput

from lightdiff.models.vae import VAE as Network


class LightdiffVAE(ModelMixin, ConfigMixin):
    """Images in [-1, 1] <-> latents z."""

    @register_to_config
    def __init__(self, architecture: dict[str, Any]):
        """Build it."""
        super().__init__()
        self.network = Network(SimpleNamespace(**architecture))

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of the latents of images, (b, 3, h, w) -> (b, c, h/f, w/f) each."""
        return tuple(self.network.encoder(x))

    def decode(self, z: torch.Tensor) -> DecoderOutput:
        """Images of latents, (b, c, h, w) -> (b, 3, f h, f w)."""
        return DecoderOutput(sample=self.network.decoder(z))
