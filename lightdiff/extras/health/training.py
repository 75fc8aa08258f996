"""What is wrong with a training of either network: its length, its learning rate, its loss."""

import math
from collections.abc import Iterator
from statistics import median
from typing import Literal

from lightdiff.extras.health.finding import Finding
from lightdiff.runtime.progress import Row
from lightdiff.settings import LoopSettings

Stage = Literal["vae", "unet"]

RISE = 0.10  # of a validation loss above its best: it is of the same images, levels and noise each time
# A spike is over twice the largest of the lines before and six sigmas over their median, in logarithms, with sigma from
# the median absolute deviation: small batches have long tails, and of 20,000 exponential losses no one is over both.
SPIKE, SIGMAS, LINES_BEFORE = 2.0, 6.0, 20


def check_training(loop: LoopSettings, stage: Stage, rows: list[Row], images: int) -> Iterator[Finding]:
    """A training of this many images that is too short for its warm-up or its images, or whose loss leaps."""
    yield from check_warmup(loop, stage, images)
    yield from check_unused(loop, stage, rows, images)
    yield from check_spikes(loop, stage, rows)


def check_warmup(loop: LoopSettings, stage: Stage, images: int) -> Iterator[Finding]:
    """A training that ends before its warm-up does."""
    total, warmup = loop.total_steps(images), loop.warmup_steps or 0
    if warmup > total and (images or not loop.epochs):
        yield Finding(
            code="warm-up",
            stage=stage,
            title="The training ends before its warm-up",
            measured=f"{total:,} steps with --warmup-steps {warmup}: the learning rate ends at "
            f"{total / warmup:.0%} of --lr",
            usual="a warm-up of a tenth of the steps or less",
            advice=f"lightdiff train-{stage} --restart --warmup-steps {total // 10}",
        )


def check_unused(loop: LoopSettings, stage: Stage, rows: list[Row], images: int) -> Iterator[Finding]:
    """A training that has ended and has not seen all of its images."""
    seen = rows[-1].get("images_seen", images) if rows else images
    if 0 <= seen < images and rows[-1]["step"] >= loop.total_steps(images):
        yield Finding(
            code="unused-images",
            stage=stage,
            title="The training ends before it has seen every image",
            measured=f"{seen:,.0f} of {images:,} images seen: {seen / images:.2f} passes",
            usual="several passes; the first one brings in every image once",
            advice=f"lightdiff train-{stage} --epochs 4 continues the training",
        )


def check_spikes(loop: LoopSettings, stage: Stage, rows: list[Row]) -> Iterator[Finding]:
    """Leaps of the training loss out of its usual spread, and steps that were skipped as not finite."""
    logs = [(row["step"], math.log(row["loss"])) for row in rows if row.get("loss", 0) > 0]
    spikes = []
    for i in range(LINES_BEFORE, len(logs)):
        before = [log for _, log in logs[i - LINES_BEFORE : i]]
        usual, (step, log) = median(before), logs[i]
        sigma = 1.48 * median(abs(other - usual) for other in before)
        if log > max(max(before) + math.log(SPIKE), usual + SIGMAS * sigma):
            spikes.append((math.exp(min(log - usual, 700.0)), step))
    skipped = rows[-1].get("skipped", 0) if rows else 0
    if spikes or skipped:
        worst = (
            "; at step {1:,.0f} it was {0:.3g} times the median of the lines before".format(*max(spikes))
            if spikes
            else ""
        )
        clip = "" if 0 < loop.clip <= 1 else " --clip 1"
        yield Finding(
            code="loss-spikes",
            stage=stage,
            title="The training loss has spikes",
            measured=f"{len(spikes)} of {len(logs)} lines of metrics.jsonl{worst}"
            + (f"; {skipped:.0f} steps skipped as not finite" if skipped else ""),
            usual=f"none: a loss is at most {SPIKE:g} times the largest of the {LINES_BEFORE} lines before it",
            advice=f"lightdiff train-{stage} --restart --lr {loop.lr / 2:g}{clip}",
        )


def check_rise(loop: LoopSettings, stage: Stage, rows: list[Row]) -> Iterator[Finding]:
    """A validation loss that ends well above its best."""
    curve = [row for row in rows if row.get("val_loss", 0) > 0]
    best = min(curve, key=lambda row: row["val_loss"], default={})
    if best and (rise := curve[-1]["val_loss"] / best["val_loss"] - 1) > RISE:
        keep = {
            "vae": "encode takes the best checkpoint",
            "unet": "generate --unet RUN/unet/checkpoints/best.safetensors",
        }
        yield Finding(
            code="loss-rose",
            stage=stage,
            title="The validation loss has risen again",
            measured=f"{curve[-1]['val_loss']:.3g} at step {curve[-1]['step']:,.0f}, {rise:.0%} above its best, "
            f"{best['val_loss']:.3g} at step {best['step']:,.0f}",
            usual=f"it falls, or stays within {RISE:.0%} of its best",
            advice=f"lightdiff train-{stage} --restart --lr {loop.lr / 2:g}; until then, lightdiff {keep[stage]}",
        )
