"""What is said when a GPU's memory does not suffice."""

import math
import os

import torch

from lightdiff.errors import RunError
from lightdiff.runtime import DistEnv
from lightdiff.runtime.resume import untouched
from lightdiff.settings import StageSettings, TrainingSettings


def out_of_memory(settings: StageSettings) -> RunError:
    """How many images were to fit at a time, and the flag to lower."""
    flag, images = "--batch-size", getattr(settings, "batch_size", 1)
    if isinstance(settings, TrainingSettings):  # of which each process has its share
        share = math.ceil(settings.loop.batch_size / DistEnv.from_env(os.environ).world_size)
        flag, images = "--micro-batch", min(settings.loop.micro, share)
    size = torch.cuda.mem_get_info()[1] / 1e9 if torch.cuda.is_available() else 0.0
    advice = f"try {flag} {images // 2}" if images > 1 else "a smaller network or --resolution is needed"
    what = f"the GPU's memory ({size:.0f} GB) does not suffice for {images} images at a time"
    return RunError(f"{what}: {advice}; {untouched(settings)}")
