"""Pictures as an animation."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lightdiff.run_folder import atomic_write

FRAME_MS = 60


def save_animation(path: Path, frames: Sequence[Image.Image], last_ms: int = FRAME_MS) -> None:
    """Save pictures as an animation that repeats; the last one stays for `last_ms` milliseconds."""
    first, *others = frames
    durations = [FRAME_MS] * len(others) + [last_ms]
    atomic_write(
        path,
        lambda temporary: first.save(
            temporary, format="WEBP", save_all=True, append_images=others, duration=durations, loop=0, lossless=True
        ),
    )
