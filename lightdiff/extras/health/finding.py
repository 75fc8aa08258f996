"""What a check of a run's health finds, and how its numbers read."""

import math
import os
import shlex
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from lightdiff.settings import LoopSettings


class Finding(BaseModel):
    """Something unusual: what was measured, what is usual, and what to change."""

    code: str
    stage: Literal["data", "vae", "latents", "unet", "samples"]
    title: str
    measured: str
    usual: str
    advice: str


def mean(values: list[float]) -> float:
    """The arithmetic mean; nan if there are no values."""
    return sum(values) / len(values) if values else math.nan


def double_length(loop: LoopSettings) -> str:
    """The flag that trains for twice as long."""
    return f"--epochs {2 * loop.epochs:g}" if loop.epochs else f"--steps {2 * loop.steps}"


def value_range(values: list[float]) -> str:
    """The smallest and the largest value, as text."""
    return f"{min(values):.3g} to {max(values):.3g}"


def quote_path(path: Path) -> str:
    """A path, quoted for the shell where it needs to be."""
    if os.name == "posix":
        return shlex.quote(str(path))
    return f'"{path}"' if " " in str(path) else str(path)
