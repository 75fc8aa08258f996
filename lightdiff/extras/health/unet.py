"""What is wrong with a U-Net: its schedule, its averaged weights, and how little or how much it has learnt."""

import math
from collections.abc import Iterator
from itertools import cycle

from lightdiff.diffusion.schedules import Schedule
from lightdiff.extras.baselines import BAND_LOSSES, band_baselines
from lightdiff.extras.health.finding import Finding, double_length, mean
from lightdiff.extras.health.training import RISE
from lightdiff.runtime.progress import Row
from lightdiff.settings import LoopSettings, ScheduleSettings, TrainUNetSettings, with_changes

# Stable Diffusion's schedule ends with 0.0047 of signal, and draws pictures of medium brightness only, because of it
# (Lin et al. 2023, arXiv:2305.08891, Table 1): twice that is too much.
SIGNAL_LEFT = 0.01
NOISE_AT_FIRST = 0.01  # share of variance, 20 dB: with 50 steps, the last level visited has about a tenth of it
EMA_COST = 0.05  # share of the loss by which the raw weights would do better
# Where x_t all but gives the target away, a network's own imprecision outweighs what it knows: one that predicts eps
# well elsewhere leaves 0.07 in the noisiest band of the cosine schedule, where the level alone leaves 0.049.
NEARLY_KNOWN = 0.1
ENOUGH_STEPS = 2000  # after a third of its budget, 1,567 steps, the recipe's U-Net draws faces (docs/recipe.md)
# A denoiser memorises fewer than 1,000 photographs of faces (Kadkhodaie et al. 2024, arXiv:2310.02557).
FEW_IMAGES, MANY_EPOCHS = 1000, 100


def longer(loop: LoopSettings) -> str:
    """The flag that trains a U-Net twice as long, and long enough to draw anything."""
    return double_length(loop) if loop.epochs else f"--steps {max(2 * loop.steps, ENOUGH_STEPS)}"


def check_labels(settings: TrainUNetSettings) -> Iterator[Finding]:
    """A network that was trained without any label."""
    if settings.label and settings.label_dropout == 1:
        yield Finding(
            code="no-labels",
            stage="unet",
            title="The U-Net was trained without any label",
            measured="--label-dropout 1: every label was dropped, so --class and --guidance change nothing",
            usual="0.1",
            advice="lightdiff train-unet --restart --label-dropout 0.1",
        )


def check_baseline(settings: TrainUNetSettings, rows: list[Row], images: int, z_std: list[float]) -> Iterator[Finding]:
    """A network that at some noise levels has never done better than the level alone, at the end or after 2,000 steps.

    Args:
        settings: Those that it was trained with.
        rows: Of metrics.jsonl.
        images: How many it was trained on.
        z_std: The std of each channel before scaling; empty where it is not known, and x0 has std 1.
    """
    enough = min(settings.loop.total_steps(images), ENOUGH_STEPS)
    if not rows or rows[-1]["step"] < enough:
        return
    scaled = [std * scale for std, scale in zip(z_std, cycle(settings.latent.scale), strict=False)] or [1.0]
    x0_std = math.hypot(*scaled) / math.sqrt(len(scaled))
    known = band_baselines(settings.target, settings.noise, x0_std)
    best = {band: min((row[band] for row in rows if band in row), default=0.0) for band in BAND_LOSSES}
    poor = [band for band in BAND_LOSSES if best[band] >= known[band] > NEARLY_KNOWN]
    if poor:
        yield Finding(
            code="knows-nothing",
            stage="unet",
            title="At some noise levels the U-Net does no better than a predictor that knows nothing of images",
            measured="validation loss of "
            + "; ".join(f"{best[b]:.3f} at best in band {b[-1]}, {known[b]:.3f} without a network" for b in poor),
            usual="less in every band: 0.2 to 0.65 of it in the demo. Samples of such a network are mush",
            advice=f"lightdiff train-unet {longer(settings.loop)} continues the training",
        )


def check_schedule(settings: TrainUNetSettings) -> Iterator[Finding]:
    """A schedule with signal left at its last level, or much noise at its first."""
    noise = settings.resolved().noise
    first, last = endpoints(noise)
    first_of_1000, last_of_1000 = endpoints(with_changes(noise, timesteps=1000))
    other = f"--schedule {'flow' if settings.target.objective == 'flow' else 'cosine'}"
    better = "--timesteps 1000" if noise.timesteps < 1000 else other
    name = f"--schedule {noise.schedule} with --timesteps {noise.timesteps}"
    if last > SIGNAL_LEFT:
        yield Finding(
            code="signal-left",
            stage="unet",
            title="The schedule's last level is not pure noise",
            measured=f"{name} leaves {last:.3g} of the variance as signal, but sampling starts from pure noise",
            usual=f"below 0.005; above {SIGNAL_LEFT:g} is too much",
            advice=f"lightdiff train-unet --restart {better if last_of_1000 <= SIGNAL_LEFT else other}",
        )
    if first > NOISE_AT_FIRST:
        fits = better if first_of_1000 <= NOISE_AT_FIRST else "--beta-start 1e-4"
        yield Finding(
            code="noisy-start",
            stage="unet",
            title="The schedule's first level is too noisy",
            measured=f"{name} has {first:.3g} of the variance as noise at its least noisy level: finer detail is never "
            "learnt",
            usual=f"0.0001 or less; above {NOISE_AT_FIRST:g} is too much",
            advice=f"lightdiff train-unet --restart {fits}",
        )


def endpoints(noise: ScheduleSettings) -> tuple[float, float]:
    """The noise's share of the variance at the first level, and the signal's at the last."""
    signal = Schedule.of(noise).signal()
    return 1 - float(signal[0]), float(signal[-1])


def check_ema(loop: LoopSettings, rows: list[Row]) -> Iterator[Finding]:
    """EMA weights that lag behind: validation uses them, and `generate` draws with them.

    The warm-up keeps their age at a tenth of the steps at most; that is much only while the loss falls fast. How fast
    is read from a power law in the step through two validations, the earlier at 0.8 of the steps or before.
    """
    curve = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss", 0) > 0 and row["step"] > 0]
    earlier = [point for point in curve if point[0] <= 0.8 * curve[-1][0]]
    if not loop.ema_decay or not earlier:
        return
    (step, loss), (earlier_step, earlier_loss) = curve[-1], earlier[-1]
    power = (math.log(earlier_loss) - math.log(loss)) / math.log(step / earlier_step)
    age = average_age(loop.ema_decay[0], step)
    cost = -math.expm1(min(-power * math.log1p(age / step), 700.0))
    if cost > EMA_COST:
        yield Finding(
            code="ema-lags",
            stage="unet",
            title="The EMA weights lag behind",
            measured=f"after {step:,.0f} steps they are {age:.0f} steps old on average, in which the loss still falls "
            f"by {cost:.0%} (it fell from {earlier_loss:.3g} at step {earlier_step:,.0f} to {loss:.3g})",
            usual=f"less than {EMA_COST:.0%}: at the end of a training the loss hardly falls",
            advice=f"lightdiff train-unet {double_length(loop)} continues the training; or try lightdiff generate "
            "--ema 0",
        )


def average_age(decay: float, steps: float) -> float:
    """Mean age of EMA weights in steps, the sum of age times weight, with the warm-up of `training/ema.py`.

    A decay d settles at d / (1 - d). While (1 + n) / (10 + n) is less, the age is (1 + n) / 10.
    """
    return min(decay / (1 - decay), (1 + steps) / 10)


def check_overfitting(rows: list[Row], images: int) -> Iterator[Finding]:
    """Overfitting, band by band; or few images and none held out to measure it."""
    epochs = rows[-1].get("images_seen", 0) / images if rows and images else 0.0
    if rising := rising_bands(rows):
        band, best, _ = rising[0]
        risen = ", ".join(f"{number} ({rise:+.0%})" for number, _, rise in rising)
        seen = f", after {epochs:,.0f} passes over {images:,} images" if epochs else ""
        yield Finding(
            code="overfitting",
            stage="unet",
            title="The U-Net overfits: it gets worse on held-out images",
            measured=f"validation loss has risen from its best in band {risen} of 4 (1 is the least noisy), while the "
            f"training loss fell{seen}; band {band} was best at step {best['step']:,.0f}",
            usual=f"it falls, or stays within {RISE:.0%} of its best",
            advice="lightdiff generate --unet RUN/unet/checkpoints/best.safetensors, or more images, or a smaller "
            f"U-Net; lightdiff train-unet --restart --steps {best['step']:.0f} stops earlier",
        )
        return
    validated = any(band in row for row in rows for band in BAND_LOSSES)
    if not validated and images < FEW_IMAGES and epochs > MANY_EPOCHS:
        yield Finding(
            code="not-validated",
            stage="unet",
            title="Few images, many epochs, and no validation: overfitting would go unnoticed",
            measured=f"{images:,} images, {epochs:,.0f} epochs, no validation loss",
            usual=f"{FEW_IMAGES:,} images or more, or fewer than {MANY_EPOCHS} epochs; a U-Net can memorise fewer",
            advice="lightdiff train-vae --restart --val-share 0.1 holds some out; then watch val_loss_band_1 to 4",
        )


def rising_bands(rows: list[Row]) -> list[tuple[int, Row, float]]:
    """Bands whose loss has risen while the training loss fell: number, best validation, relative rise; worst first."""
    found = []
    for number, band in enumerate(BAND_LOSSES, 1):
        curve = [row for row in rows if row.get(band, 0) > 0]
        if len(curve) < 2:
            continue
        best, last = min(curve, key=lambda row: row[band]), curve[-1]
        rise, middle = last[band] / best[band] - 1, (best["step"] + last["step"]) / 2
        before = [row["loss"] for row in rows if "loss" in row and best["step"] / 2 < row["step"] <= best["step"]]
        after = [row["loss"] for row in rows if "loss" in row and row["step"] > middle]
        if rise > RISE and before and after and mean(after) < mean(before):
            found.append((number, best, rise))
    return sorted(found, key=lambda entry: -entry[2])
