"""Health: what a run's own numbers show to be wrong with it, what is usual, and what to change."""

import math
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from lightdiff.diffusion.schedules import Schedule
from lightdiff.extras.evidence import COPIES_SHARE, Evidence, gather
from lightdiff.extras.health_data import Finding as Finding
from lightdiff.extras.health_data import check_data
from lightdiff.extras.latent_facts import EDGES, ChannelFacts, LatentFacts
from lightdiff.run_folder import RunFolder
from lightdiff.runtime.progress import Row
from lightdiff.settings import (
    LoopSettings,
    ScheduleSettings,
    TrainUNetSettings,
    TrainVAESettings,
    with_changes,
)
from lightdiff.stages.scale import DEAD_BITS

BANDS = tuple(f"val_loss_band_{band}" for band in (1, 2, 3, 4))

# Each threshold lies well beyond what healthy runs show (the demo, the recipe), so that a finding is worth reading.

COLLAPSED_KL = 0.02  # nats per element: of a normal channel, all but 1 - exp(-2 KL) = 4 % of the variance is noise
# Where the VAE is linear, the loss MSE + beta mean(KL) trades beta / 2 of squared error for a lower KL: each latent
# dimension keeps noise until the two slopes are equal (that case: Lucas et al. 2019, arXiv:1911.02469). The KL
# dominates when that is most of the error, and the error is visible.
KL_SHARE, KL_PSNR = 0.5, 25.0
# beta 1e-4 leaves a sigma of 0.02 of the std or more; below 0.003, the decoder has learnt nothing about small errors.
MIN_SIGMA = 0.003
TAILS = 0.005  # beyond 4 std; a Laplace distribution has 0.0035 there, a normal one 0.00006
# A factor of 2 moves the signal-to-noise ratio of all levels by 4, as twice the resolution does (Hoogeboom et al. 2023,
# arXiv:2301.11093); a mean beyond 1 is larger than the noise that sampling starts from.
STD_RANGE, MAX_MEAN = (0.5, 2.0), 1.0
LOW_PSNR = 20.0  # dB: an error of a tenth of the range, 26 of 256 grey levels
# Stable Diffusion's schedule ends with 0.0047 of signal, and draws pictures of medium brightness only, because of it
# (Lin et al. 2023, arXiv:2305.08891, Table 1): twice that is too much.
SIGNAL_LEFT = 0.01
NOISE_AT_FIRST = 0.01  # share of variance, 20 dB: with 50 steps, the last level visited has about a tenth of it
EMA_COST = 0.05  # share of the loss by which the raw weights would do better
RISE, STEEP_RISE = 0.10, 0.50  # of a band's validation loss above its best
# A denoiser memorises fewer than 1,000 photographs of faces (Kadkhodaie et al. 2024, arXiv:2310.02557).
FEW_IMAGES, MANY_EPOCHS = 1000, 100
COPIES = 0.05  # 0.01 of the held-out images lie as near to a training image, by construction of the measure


def examine(run: Path) -> list[Finding]:
    """What is unusual about a run, stage by stage; empty for a healthy one.

    A stage that is missing or damaged is left out: other commands report that.
    """
    found = gather(RunFolder(run))
    images = len(found.index.positions("train")) if found.index else 0
    findings: list[Finding] = []
    if found.vae:
        findings += check_data(found.vae.images)
        findings += check_settings(found.vae, "vae", images)
        findings += check_vae(found.vae, found.vae_metrics, found.facts if found.same_vae else None)
    if found.facts and found.index and found.index.statistics:
        regular = not any(finding.code == "no-kl" for finding in findings)
        findings += check_latents(found.facts, regular)
    findings += check_lineage(found)
    if found.unet:
        findings += check_settings(found.unet, "unet", images)
        findings += check_schedule(found.unet)
        findings += check_ema(found.unet.loop, found.unet_rows)
        findings += check_overfitting(found.unet_rows, images)
    findings += check_samples(found.evaluation, found.unet_rows, images)
    for finding in findings:
        finding.advice = complete_commands(finding.advice, run)
    return findings


def complete_commands(advice: str, run: Path) -> str:
    """Advice whose commands can be typed as they are: with --run, and on --restart with the saved settings."""

    def complete(found: re.Match[str]) -> str:
        command, restart = found[1], found[2] or ""
        saved = run / command.removeprefix("train-") / "settings.json"
        settings = f" --settings {quote_path(saved)}" if restart and saved.is_file() else ""
        return f"lightdiff {command} --run {quote_path(run)}{restart}{settings}"

    advice = advice.replace("RUN/unet/checkpoints/best.safetensors", quote_path(RunFolder(run).unet.best))
    return re.sub(r"lightdiff (train-vae|encode|scale|train-unet|generate|evaluate)( --restart)?", complete, advice)


def quote_path(path: Path) -> str:
    """A path, quoted for the shell where it needs to be."""
    if os.name == "posix":
        return shlex.quote(str(path))
    return f'"{path}"' if " " in str(path) else str(path)


def check_settings(s: TrainVAESettings | TrainUNetSettings, stage: Literal["vae", "unet"], n: int) -> Iterator[Finding]:
    """A training of n images that ends before its warm-up does, or is never told a label."""
    again, total = f"lightdiff train-{stage} --restart", s.loop.total_steps(n)
    if (warmup := s.loop.warmup_steps) > total and (n or not s.loop.epochs):
        measured = (
            f"{total:,} steps with --warmup-steps {warmup}: the learning rate ends at {total / warmup:.0%} of --lr"
        )
        advice, title = f"{again} --warmup-steps {total // 10}", "The training ends before its warm-up"
        usual = "a warm-up of a tenth of the steps or less"
        yield Finding(code="warm-up", stage=stage, title=title, measured=measured, usual=usual, advice=advice)
    if isinstance(s, TrainUNetSettings) and s.label and s.label_dropout == 1:
        measured, usual = "--label-dropout 1: --class and --guidance change nothing", "0.1"
        title, advice = "The U-Net was never told a label", f"{again} --label-dropout 0.1"
        yield Finding(code="no-labels", stage=stage, title=title, measured=measured, usual=usual, advice=advice)


# --- the VAE ------------------------------------------------------------------------------------------------------


def check_vae(settings: TrainVAESettings, metrics: Row, facts: LatentFacts | None) -> Iterator[Finding]:
    """A KL term with too much weight or none, and reconstructions that limit everything after them."""
    channels = facts.channels if facts else []
    yield from list(check_high_kl(settings, metrics, channels)) or check_reconstructions(settings, metrics)
    yield from check_no_kl(settings, metrics, channels)


def check_high_kl(settings: TrainVAESettings, metrics: Row, channels: list[ChannelFacts]) -> Iterator[Finding]:
    """Posterior collapse, channels that carry nothing, or a KL term that blurs."""
    beta = settings.loss.kl_beta
    lower = f"lightdiff train-vae --restart --kl-beta {min(3e-3, beta / 10):.1g}"
    kl = mean([c.kl for c in channels]) if channels else metrics.get("kl", math.nan)
    mse, psnr = metrics.get("mse", 0.0), metrics.get("psnr", math.inf)  # beta / 2 is about squared errors
    dead = [n for n, c in enumerate(channels) if c.bits < DEAD_BITS]
    if (channels and len(dead) == len(channels)) or kl < COLLAPSED_KL:
        yield Finding(
            code="posterior-collapsed",
            stage="vae",
            title="Posterior collapse: the latents carry nothing but noise",
            measured=f"a KL of {kl:.2g} nats per element, with --kl-beta {beta:g}",
            usual="1 to 4 nats; below 0.02, all but 4 % of a latent's variance is noise",
            advice=f"{lower}, then encode, scale and train-unet again",
        )
    elif dead:
        yield Finding(
            code="dead-channels",
            stage="vae",
            title=f"{len(dead)} of {len(channels)} latent channels carry nothing",
            measured=f"channel {', '.join(map(str, dead))}: at most {max(channels[n].bits for n in dead):.2g} bits per "
            f"element, sigma {min(channels[n].posterior_std for n in dead):.2g} or more",
            usual=f"1 bit or more (below {DEAD_BITS:g}, a channel is noise); sigma 0.02 to 0.5",
            advice=f"{lower if beta else 'lightdiff train-vae --restart'} or --model.latent-channels "
            f"{len(channels) - len(dead)}: the U-Net learns their noise for nothing",
        )
    elif mse > 0 and beta / 2 > KL_SHARE * mse and psnr < KL_PSNR:
        limit = 10 * math.log10(8 / beta)
        yield Finding(
            code="kl-dominates",
            stage="vae",
            title="The KL weight is so high that reconstructions are blurred",
            measured=f"--kl-beta {beta:g} alone costs a squared error of about {beta / 2:.2g} (a PSNR of "
            f"{limit:.0f} dB at most), out of {mse:.2g} in total (PSNR {psnr:.1f} dB)",
            usual=f"less than {KL_SHARE:.0%} of the error; 3e-3 costs 0.0015 (34 dB)",
            advice=f"{lower}, then encode, scale and train-unet again",
        )


def check_reconstructions(settings: TrainVAESettings, metrics: Row) -> Iterator[Finding]:
    """Reconstructions so poor that no U-Net can make up for them."""
    psnr = metrics.get("psnr", math.inf)
    if psnr < LOW_PSNR:
        yield Finding(
            code="low-psnr",
            stage="vae",
            title="The VAE's reconstructions limit everything that follows",
            measured=f"PSNR {psnr:.1f} dB",
            usual=f"22 to 35 dB; at {LOW_PSNR:g} dB, pixels are off by a tenth of their range",
            advice=f"lightdiff train-vae {double_length(settings.loop)} continues the training; if that does not help, "
            f"start over with --restart --model.latent-channels {2 * settings.model.latent_channels}",
        )


def check_no_kl(settings: TrainVAESettings, metrics: Row, channels: list[ChannelFacts]) -> Iterator[Finding]:
    """Latents that no KL term regularises."""
    beta = settings.loss.kl_beta
    sigma = max((c.posterior_std / max(c.std, 1e-12) for c in channels), default=1.0)
    if sigma >= MIN_SIGMA and (beta > 0 or settings.freeze_encoder):
        return
    measured = [f"--kl-beta {beta:g}"]
    if channels:
        stds = value_range([c.std for c in channels])
        measured.append(f"sigma is {sigma:.2g} of a channel's std or less, stds are {stds}")
        measured.append(f"a KL of {mean([c.kl for c in channels]):.3g} nats per element")
    elif "kl" in metrics:
        measured.append(f"a KL of {metrics['kl']:.3g} nats per element")
    yield Finding(
        code="no-kl",
        stage="vae",
        title="No KL term regularises the latents",
        measured="; ".join(measured),
        usual="--kl-beta 1e-3 to 1e-2: sigma 0.02 to 0.5 of the std, a std near 1, 1 to 4 nats. Without it, latents "
        "take any size and shape, and small errors of the U-Net show in the pixels",
        advice="lightdiff train-vae --restart --kl-beta 3e-3, then encode, scale and train-unet again",
    )


def check_lineage(found: Evidence) -> Iterator[Finding]:
    """Latents that the run's VAE did not make, as it has been trained since."""
    if found.vae_digest and found.index and found.own_latents and not found.same_vae:
        yield Finding(
            code="earlier-vae",
            stage="latents",
            title="The latents come from another VAE than the run's",
            measured=f"VAE {found.index.vae_digest[:8]} made them, but vae/ now holds {found.vae_digest[:8]}",
            usual="the same; a U-Net of these latents draws with the VAE kept beside them, never with the new one",
            advice="lightdiff encode --restart, then lightdiff scale, then lightdiff train-unet --restart",
        )


# --- the latents --------------------------------------------------------------------------------------------------


def check_latents(facts: LatentFacts, regular: bool) -> Iterator[Finding]:
    """Whether x0 = (z - shift) * scale is what diffusion expects: near mean 0 and std 1, without long tails."""
    stds = [c.scaled_std for c in facts.channels]
    std = math.sqrt(mean([std**2 for std in stds]))
    offset = max((abs(c.scaled_mean) for c in facts.channels), default=0.0)
    if not (STD_RANGE[0] <= std <= STD_RANGE[1] and offset <= MAX_MEAN):  # also where one is nan
        yield Finding(
            code="latent-scale",
            stage="latents",
            title="The latents that the U-Net is trained on are far from unit scale",
            measured=f"x0 = (z - shift) * scale has a std of {std:.3g} (channels: {value_range(stds)}) "
            f"and a mean of up to {offset:.2g}",
            usual=f"std 1, {STD_RANGE[0]:g} to {STD_RANGE[1]:g}; mean 0, -{MAX_MEAN:g} to {MAX_MEAN:g}: otherwise "
            "the schedule's signal-to-noise ratios do not hold",
            advice="lightdiff scale (without --scaling-factor), then lightdiff train-unet --restart",
        )
        return
    tails = [tail_share(c) - normal_tail_share(c.scaled_mean, c.scaled_std) for c in facts.channels]
    if regular and max(tails, default=0.0) > TAILS:
        worst = tails.index(max(tails))
        yield Finding(
            code="heavy-tails",
            stage="latents",
            title="The latents have heavy tails",
            measured=f"{tail_share(facts.channels[worst]):.2%} of channel {worst} lies beyond 4 std after scaling",
            usual=f"0.01 to 0.2 %, of a normal distribution 0.006 %; a Laplace distribution has less than {TAILS:.1%}",
            advice="lightdiff train-vae --restart with a higher --kl-beta, and --model.norm pixel if it is group",
        )


def tail_share(channel: ChannelFacts) -> float:
    """The share of a channel that lies outside the histogram."""
    return max(0.0, 1 - sum(channel.histogram) * (EDGES[1] - EDGES[0]))


def normal_tail_share(mean: float, std: float) -> float:
    """The share of a normal distribution that lies outside the histogram."""
    unit = max(std, 1e-12) * math.sqrt(2)
    return 0.5 * (math.erfc((EDGES[-1] - mean) / unit) + math.erfc((mean - EDGES[0]) / unit))


# --- the U-Net ----------------------------------------------------------------------------------------------------


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
    age = average_age(loop.ema_decay, step)
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
            "--no-ema",
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
    validated = any(band in row for row in rows for band in BANDS)
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
    for number, band in enumerate(BANDS, 1):
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


# --- the samples --------------------------------------------------------------------------------------------------


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
            measured=f"the validation loss of band {band} is {1 + rise:.1f} times its best{trained_on}",
            usual=f"less than {1 + STEEP_RISE:.1f} times; this is inferred from overfitting, not from samples",
            advice=f"lightdiff evaluate measures it; {remedy}",
        )


# --- formatting ---------------------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    """The arithmetic mean; nan if there are no values."""
    return sum(values) / len(values) if values else math.nan


def double_length(loop: LoopSettings) -> str:
    """The flag that trains for twice as long."""
    return f"--epochs {2 * loop.epochs:g}" if loop.epochs else f"--steps {2 * loop.steps}"


def value_range(values: list[float]) -> str:
    """The smallest and the largest value, as text."""
    return f"{min(values):.3g} to {max(values):.3g}"
