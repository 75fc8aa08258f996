"""Small models with random weights, to be exported."""

from typing import Any

import torch

from lightdiff.models.unet import build_unet
from lightdiff.models.vae import build_vae
from lightdiff.pipeline import Pipeline
from lightdiff.settings import SamplingSettings, TrainUNetSettings, VAEArchitecture

GUIDED = SamplingSettings(num_steps=4, class_=("dog", "cat"), guidance=3.0, sampler="dpm++2m")
VAES: dict[str, dict[str, Any]] = {
    "default": {"encoder_channels": (8, 16), "decoder_channels": (16, 8)},
    "kl": {"architecture": "kl", "channels": (8, 16), "blocks": 1, "groups": 4},
    "original": {"architecture": "original", "encoder_channels": (8, 8), "decoder_channels": (8, 8)},
    "taesd": {"architecture": "taesd", "width": 8, "encoder_blocks": (1, 1), "decoder_blocks": (1, 1)},
}
UNETS: dict[str, dict[str, Any]] = {
    "default": {"channels": (16, 16, 32), "blocks": 1, "time_dim": 16, "heads": 2, "attend_levels": (1,)},
    "original": {"architecture": "original", "channels": (8, 8, 16), "blocks": 1, "time_dim": 16},
}


def random_pipeline(
    vae: str = "default", unet: str = "default", classes: bool = True, width: int = 8, **target: Any
) -> Pipeline:
    """A model of two architectures, whose networks say something, on the CPU; for latents of 8 x `width`."""
    torch.manual_seed(0)
    model = VAEArchitecture.model_validate(VAES[vae]).resolved(16)
    latent: dict[str, Any] = {"channels": 4, "height": 8, "width": width, "shift": (0.1, -0.2, 0.0, 0.3)}
    latent |= {"scale": (1.1, 0.9, 1.3, 1.0)}
    known = {"label": "animal"} if classes else {}
    latent |= {"labels": {"animal": ("cat", "dog", "fish"), "secret": ("a",)}} if classes else {}
    raw = {"model": UNETS[unet], "latent": latent, "target": target or {}, **known}
    s = TrainUNetSettings.model_validate(raw).resolved()
    networks = build_vae(model), build_unet(s.model, 4, len(s.classes))
    for network in networks:
        for parameter in network.requires_grad_(False).eval().parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.5 / max(1, parameter[0].numel()) ** 0.5))
        for module in network.modules():
            if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
                torch.nn.init.ones_(module.weight)
    return Pipeline(networks[0], model, networks[1], s, torch.device("cpu"))
