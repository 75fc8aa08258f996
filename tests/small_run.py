"""The stages by their functions, with networks small enough to train in a test."""

from pathlib import Path

import numpy as np
from PIL import Image

from lightdiff.options import build
from lightdiff.settings import EncodeSettings, GenerateSettings, SamplingSettings, TrainUNetSettings, TrainVAESettings
from lightdiff.stages import encode, generate, train_unet, train_vae

LOOP = {"steps": 4, "batch_size": 8, "workers": 0, "val_every": 2, "save_every": 2, "warmup_steps": 0}


def train_first(run: Path, faces: Path, resolution: int = 32, **images):
    layer = {
        "run": run,
        "images": {"data": [faces], "resolution": resolution, "val_share": 0.2, **images},
        "loss": {"lpips_gamma": 0},
        "loop": {**LOOP, "precision": "fp32"},
        "model": {"encoder_width": 8, "decoder_width": 8},
    }
    return train_vae.run(build(TrainVAESettings, [layer]))


def encode_all(run: Path, vae: Path | None = None, **more):
    layers = [
        encode.inherited(run, vae),
        {"run": run, "vae": vae, "compute": {"workers": 0, "precision": "fp32"}, **more},
    ]
    return encode.run(build(EncodeSettings, layers))


def train_second(run: Path, **more):
    own = {"run": run, "loop": {**LOOP, "lr": 1e-2}, "model": {"width": 16, "blocks": 1, "time_dim": 16}, **more}
    return train_unet.run(build(TrainUNetSettings, [train_unet.inherited(run, None), own]))


def draw(run: Path, out: Path, **more):
    sampling = {"num_steps": 4, **{name: more.pop(name) for name in SamplingSettings.model_fields if name in more}}
    settings = {"run": run, "out": out, "num_images": 5, "sampling": sampling, "compute": {"precision": "fp32"}, **more}
    return generate.run(build(GenerateSettings, [settings]))


def pixels(path: Path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)
