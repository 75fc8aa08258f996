"""Peak memory of training steps on a GPU, for each preset, batch and way to save some."""

from typing import Any

import torch

from lightdiff.options import read_settings
from lightdiff.presets import PRESET_FOLDER
from tests.bench.cases import train_unet_step, train_vae_step
from tests.bench.contest import timed

BATCHES = (8, 32, 128)


def table(device: torch.device) -> list[dict[str, Any]]:
    """One row for each preset and batch: bytes with all activations kept, and with them computed again."""
    rows = []
    for path in sorted(PRESET_FOLDER.glob("*.toml")):
        model = read_settings(path)["model"]
        for batch in BATCHES:
            row: dict[str, Any] = {"preset": path.stem, "batch": batch}
            for name, again in (("kept", False), ("computed again", True)):
                row[name] = peak_of(path.stem, model, batch, again, device)
            rows.append(row)
            print(row, flush=True)
    return rows


def peak_of(preset: str, model: dict[str, Any], batch: int, again: bool, device: torch.device) -> int:
    """Peak bytes of two steps; 0 where they do not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        if preset.startswith("unet"):
            _, step = train_unet_step(model, 32, batch, device, checkpoint_activations=again, compile="off")
        else:
            _, step = train_vae_step(model, 256, batch, device, checkpoint_activations=again, compile="off")
        for _ in range(2):
            timed(step, device)
    except torch.OutOfMemoryError:
        return 0
    return torch.cuda.max_memory_allocated()
