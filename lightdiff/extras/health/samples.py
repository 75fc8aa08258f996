"""What is wrong with samples, as `evaluate` has measured it or a training makes it likely."""

import math
from collections.abc import Iterator
from typing import Any

from lightdiff.extras.evidence import COPIES_SHARE
from lightdiff.extras.health.finding import Finding
from lightdiff.extras.health.unet import FEW_IMAGES, longer, rising_bands
from lightdiff.runtime.progress import Row
from lightdiff.settings import LoopSettings

COPIES = 0.05  # 0.01 of the held-out images lie as near to a training image, by construction of the measure
# For two sets of one distribution both are 0.5 to 0.9, whatever the number of images: 0.9 for held-out ones of the
# demo, whose samples have 0.2. Of 60 images, a share that is measured as 0 is below 0.05 with 95 % confidence.
LOW_SHARE, ENOUGH_IMAGES = 0.05, 60
MANY_PASSES = 300  # over FEW_IMAGES or fewer
STEEP_RISE = 0.50  # of a band's validation loss above its best


def check_quality(evaluation: dict[str, Any], loop: LoopSettings) -> Iterator[Finding]:
    """Samples that are unlike the training images, or unlike most of them, as `evaluate` measured."""
    sizes = [evaluation.get(name, 0) for name in ("samples", "training images")]
    found = {name.split(" (")[0]: value for name, value in evaluation.items() if isinstance(value, float)}
    low = [name for name in ("precision", "recall") if found.get(name, 1.0) < LOW_SHARE]
    if low and all(isinstance(size, int) and size >= ENOUGH_IMAGES for size in sizes):
        meant = {"precision": "samples look like training images", "recall": "training images look like a sample"}
        yield Finding(
            code="poor-samples",
            stage="samples",
            title="Hardly any " + ", and hardly any ".join(meant[name] for name in low),
            measured="; ".join(f"{name} {found[name]:.3f}" for name in low) + f", of {sizes[0]:,} samples",
            usual=f"{LOW_SHARE:g} or more: about 0.2 in the demo, and 0.9 for held-out images in place of samples",
            advice=f"lightdiff train-unet {longer(loop)} continues the training",
        )


def check_samples(evaluation: dict[str, Any], rows: list[Row], images: int) -> Iterator[Finding]:
    """Samples that are copies of training images: as `evaluate` measured, or else as overfitting makes likely."""
    share = next((value for name, value in evaluation.items() if name.startswith(COPIES_SHARE)), None)
    remedy = "more images, fewer duplicates, a smaller U-Net, or fewer steps"
    steep = [(band, rise) for band, _, rise in rising_bands(rows) if rise > STEEP_RISE]
    samples = evaluation.get("samples", 1)
    if isinstance(share, float) and 0 <= share <= 1 and isinstance(samples, int):
        count = max(1, samples)
        error = math.sqrt(share * (1 - share) / count)  # binomial standard error
        if share - 3 * error > 0.01 and share > COPIES:
            yield Finding(
                code="copies",
                stage="samples",
                title="Many samples are near-copies of training images",
                measured=f"{share:.0%} of {count:,} samples lie nearer to a training image than 99 % of the held-out "
                "images do",
                usual=f"about 1 %, less than {COPIES:.0%}",
                advice=f"check evaluation/nearest.png; {remedy}",
            )
    elif steep:
        band, rise = steep[0]
        trained_on = f", trained on {images:,} images" if images else ""
        yield Finding(
            code="copies-likely",
            stage="samples",
            title="Samples are probably near-copies of training images",
            measured=f"the validation loss of band {band} is {1 + rise:.2f} times its best{trained_on}",
            usual=f"less than {1 + STEEP_RISE:.1f} times; this is inferred from overfitting, not from samples",
            advice=f"lightdiff evaluate measures it; {remedy}",
        )
    elif 0 < images < FEW_IMAGES and rows and (passes := rows[-1].get("images_seen", 0) / images) > MANY_PASSES:
        yield Finding(
            code="many-passes",
            stage="samples",
            title="Few images, seen very often: samples may be copies of them",
            measured=f"{passes:,.0f} passes over {images:,} images",
            usual=f"fewer than {MANY_PASSES} passes, or more images; inferred from the training, not from samples",
            advice=f"lightdiff evaluate measures it; {remedy}",
        )
