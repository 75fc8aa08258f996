"""Health in plain words: what a run's own numbers say is wrong with it, what is usual, and what to change."""

import math
import os
import re
import shlex
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from lightdiff.data.files import scan
from lightdiff.diffusion.schedules import Schedule
from lightdiff.extras.evidence import Evidence, gather, same_content, trained_on, tried
from lightdiff.extras.latent_facts import EDGES, ChannelFacts, LatentFacts
from lightdiff.run_folder import RunFolder
from lightdiff.runtime.progress import Row
from lightdiff.settings import (
    ImageSettings,
    LoopSettings,
    ScheduleSettings,
    TrainUNetSettings,
    TrainVAESettings,
    with_changes,
)

BANDS = tuple(f"val_loss_band_{band}" for band in (1, 2, 3, 4))

# Each threshold lies well beyond what healthy runs show (the demo, the recipe), so that a finding is worth reading.

COLLAPSED_KL = 0.02  # nats an element: of a normal channel, all but 1 - exp(-2 KL) = 4 % of the variance is noise
# A channel carries nothing where mu varies over images by less than 0.01 (Burda et al. 2016, arXiv:1509.00519) at
# nearly all positions, while the noise has a variance above 0.25: less than 0.03 bits an element.
DEAD_SHARE, DEAD_SIGMA = 0.05, 0.5
# Where the VAE is linear, the loss MSE + beta mean(KL) leaves beta / 2 of squared error for the sake of the KL: each
# latent dimension keeps noise until the two slopes are equal (that case: Lucas et al. 2019, arXiv:1911.02469). The KL
# dominates when that is most of the error, and the error is one that is seen.
KL_SHARE, KL_PSNR = 0.5, 25.0
# beta 1e-4 leaves a sigma of 0.02 of the std or more; below 0.003, the decoder has learnt nothing about small errors.
SHARP = 0.003
TAILS = 0.005  # beyond 4 std; Laplace's distribution has 0.0035 there, a normal one 0.00006
# A factor of 2 moves the signal-to-noise ratio of all levels by 4, as twice the resolution does (Hoogeboom et al. 2023,
# arXiv:2301.11093); a mean beyond 1 is larger than the noise that sampling begins with.
SCALES, OFF_CENTRE = (0.5, 2.0), 1.0
LOW_PSNR = 20.0  # dB: an error of a tenth of the range, 26 of 256 grey levels
# Stable Diffusion's schedule ends with 0.0047 of signal, and draws pictures of medium brightness only, because of it
# (Lin et al. 2023, arXiv:2305.08891, Table 1): twice that is too much.
SIGNAL_LEFT = 0.01
NOISE_AT_FIRST = 0.01  # share of variance, 20 dB: with 50 steps, the last level visited has about a tenth of it
EMA_COST = 0.05  # share of the loss, that raw weights would have less
RISE, STEEP_RISE = 0.10, 0.50  # of a band's validation loss above its best
# Below 1,000 photographs of faces, a denoiser learns them by heart (Kadkhodaie et al. 2024, arXiv:2310.02557).
FEW_IMAGES, MANY_EPOCHS = 1000, 100
COPIES = 0.05  # 0.01 of the images held out lie as near to a training image, by construction of the measure
DUPLICATES = 0.01
MOST_FILES = 20_000  # beyond, duplicates are not looked for here


class Finding(BaseModel):
    """Something unusual: what was measured, what is usual, and what to change."""

    code: str
    stage: Literal["data", "vae", "latents", "unet", "samples"]
    title: str
    measured: str
    usual: str
    advice: str


def examine(run: Path) -> list[Finding]:
    """What is unusual about a run, stage by stage; empty for a healthy one.

    A stage that is missing or damaged is left out: other commands tell of that.
    """
    found = gather(RunFolder(run))
    findings = duplicates(found.vae.images) if found.vae else []
    if found.vae:
        findings += of_vae(found.vae, found.vae_metrics, found.facts if found.same_vae else None)
    if found.facts and found.index and found.index.statistics:
        regular = not any(finding.code == "no-kl" for finding in findings)
        findings += of_latents(found.facts, regular)
    findings += of_lineage(found)
    images = len(trained_on(found.index)) if found.index else 0
    if found.unet:
        findings += of_schedule(found.unet)
        findings += of_average(found.unet.loop, found.unet_rows)
        findings += of_generalisation(found.unet_rows, images)
    findings += of_samples(found.evaluation, found.unet_rows, images)
    for finding in findings:
        finding.advice = as_typed(finding.advice, run)
    return findings


def as_typed(advice: str, run: Path) -> str:
    """Advice whose commands can be typed as they stand: about this run, and beginning anew with its own settings."""

    def whole(found: re.Match[str]) -> str:
        command, anew = found[1], found[2] or ""
        saved = run / command.removeprefix("train-") / "settings.json"
        settings = f" --settings {quoted(saved)}" if anew and saved.is_file() else ""
        return f"lightdiff {command} --run {quoted(run)}{anew}{settings}"

    advice = advice.replace("RUN/unet/checkpoints/best.safetensors", quoted(RunFolder(run).unet.best))
    return re.sub(r"lightdiff (train-vae|encode|scale|train-unet|generate|evaluate)( --restart)?", whole, advice)


def quoted(path: Path) -> str:
    """A path as it is typed."""
    if os.name == "posix":
        return shlex.quote(str(path))
    return f'"{path}"' if " " in str(path) else str(path)


# --- the data -----------------------------------------------------------------------------------------------------


def duplicates(images: ImageSettings) -> list[Finding]:
    """Files with the same bytes, where the folders are there and small enough to look quickly."""

    def few(count: int) -> None:
        if count > MOST_FILES:
            raise ValueError("too many to look at quickly")

    files = tried(lambda: scan(images.data, images.val_share, few)) or []
    if not 0 < len(files) <= MOST_FILES:
        return []
    splits: dict[str, str] = {str(images.data[file.root] / file.path): file.split for file in files}
    groups = tried(lambda: list(same_content(list(splits)))) or []
    spare = sum(len(group) - 1 for group in groups)
    leaks = sum(splits[path] == "val" for g in groups if any(splits[p] == "train" for p in g) for path in g)
    held_out = sum(split == "val" for split in splits.values())
    if spare <= DUPLICATES * len(files) and leaks <= DUPLICATES * held_out:
        return []
    also = f"; {leaks} of {held_out} images held out are among those trained on" if leaks else ""
    return [
        Finding(
            code="duplicates",
            stage="data",
            title="The same images come more than once",
            measured=f"{spare:,} of {len(files):,} files repeat another one, byte for byte{also}",
            usual=f"less than {DUPLICATES:.0%}; what is repeated is learnt by heart first",
            advice=f"lightdiff inspect {images.data[0]} names them: remove them, and train anew with --restart",
        )
    ]


# --- the VAE ------------------------------------------------------------------------------------------------------


def of_vae(settings: TrainVAESettings, metrics: Row, facts: LatentFacts | None) -> list[Finding]:
    """A KL that weighs too much or nothing, and reconstructions that limit everything."""
    channels = facts.channels if facts else []
    findings = of_much_kl(settings, metrics, channels) or of_reconstruction(settings, metrics)
    return findings + of_no_kl(settings, metrics, channels)


def of_much_kl(settings: TrainVAESettings, metrics: Row, channels: list[ChannelFacts]) -> list[Finding]:
    """A posterior that collapsed, channels that carry nothing, or a KL that blurs."""
    beta = settings.loss.kl_beta
    lower = f"lightdiff train-vae --restart --kl-beta {min(3e-3, beta / 10):.1g}"
    kl = mean([c.kl for c in channels]) if channels else metrics.get("kl", math.nan)
    dead = [n for n, c in enumerate(channels) if c.active_share < DEAD_SHARE and c.posterior_std > DEAD_SIGMA]
    if (channels and len(dead) == len(channels)) or kl < COLLAPSED_KL:
        return [
            Finding(
                code="posterior-collapsed",
                stage="vae",
                title="The latents carry nothing: the posterior has collapsed to noise",
                measured=f"a KL of {kl:.2g} nats an element, with --kl-beta {beta:g}",
                usual="1 to 4 nats; below 0.02, all but 4 % of a latent's variance is noise",
                advice=f"{lower}, then encode, scale and train-unet anew",
            )
        ]
    if dead:
        worst = max(channels[n].active_share for n in dead)
        return [
            Finding(
                code="dead-channels",
                stage="vae",
                title=f"{len(dead)} of {len(channels)} latent channels carry nothing",
                measured=f"in channel {', '.join(map(str, dead))}, mu varies over the images at {worst:.0%} of "
                f"positions, and sigma is {min(channels[n].posterior_std for n in dead):.2g} or more",
                usual="at more than half of the positions; sigma 0.02 to 0.5",
                advice=f"{lower if beta else 'lightdiff train-vae --restart'} or --model.latent-channels "
                f"{len(channels) - len(dead)}: the U-Net learns their noise for nothing",
            )
        ]
    mse, psnr = metrics.get("mse"), metrics.get("psnr", math.inf)  # beta / 2 is about squared errors
    if mse and beta / 2 > KL_SHARE * mse and psnr < KL_PSNR:
        limit = 10 * math.log10(8 / beta)
        return [
            Finding(
                code="kl-dominates",
                stage="vae",
                title="The KL weighs so much that reconstructions are blurred",
                measured=f"--kl-beta {beta:g} alone costs a squared error of about {beta / 2:.2g} (a PSNR of "
                f"{limit:.0f} dB at most), of {mse:.2g} in all (PSNR {psnr:.1f} dB)",
                usual=f"less than {KL_SHARE:.0%} of the error; 3e-3 costs 0.0015 (34 dB)",
                advice=f"{lower}, then encode, scale and train-unet anew",
            )
        ]
    return []


def of_reconstruction(settings: TrainVAESettings, metrics: Row) -> list[Finding]:
    """Reconstructions so poor that no U-Net can make up for them."""
    psnr = metrics.get("psnr", math.inf)
    if psnr >= LOW_PSNR:
        return []
    return [
        Finding(
            code="low-psnr",
            stage="vae",
            title="The VAE's reconstructions limit everything that follows",
            measured=f"PSNR {psnr:.1f} dB",
            usual=f"22 to 35 dB; at {LOW_PSNR:g} dB, pixels are wrong by a tenth of their range",
            advice=f"lightdiff train-vae {twice(settings.loop)} goes on with the training; if that does not help, "
            f"begin anew with --restart --model.latent-channels {2 * settings.model.latent_channels}",
        )
    ]


def of_no_kl(settings: TrainVAESettings, metrics: Row, channels: list[ChannelFacts]) -> list[Finding]:
    """Latents that nothing keeps regular."""
    beta = settings.loss.kl_beta
    sharp = max((c.posterior_std / max(c.std, 1e-12) for c in channels), default=1.0)
    if sharp >= SHARP and (beta > 0 or settings.freeze_encoder):
        return []
    words = [f"--kl-beta {beta:g}"]
    if channels:
        words.append(f"sigma is {sharp:.2g} of a channel's std or less, stds are {span([c.std for c in channels])}")
        words.append(f"a KL of {mean([c.kl for c in channels]):.3g} nats an element")
    elif "kl" in metrics:
        words.append(f"a KL of {metrics['kl']:.3g} nats an element")
    return [
        Finding(
            code="no-kl",
            stage="vae",
            title="No KL keeps the latents regular",
            measured="; ".join(words),
            usual="--kl-beta 1e-3 to 1e-2: sigma 0.02 to 0.5 of the std, a std near 1, 1 to 4 nats. Without, latents "
            "take any size and shape, and small errors of the U-Net show in the pixels",
            advice="lightdiff train-vae --restart --kl-beta 3e-3, then encode, scale and train-unet anew",
        )
    ]


def of_lineage(found: Evidence) -> list[Finding]:
    """Latents that this run's VAE, which was trained on or anew since, did not make."""
    if not (found.vae_digest and found.index and found.own_latents) or found.same_vae:
        return []
    return [
        Finding(
            code="earlier-vae",
            stage="latents",
            title="The latents come from another VAE than the run's",
            measured=f"they were made by VAE {found.index.vae_digest[:8]}, and vae/ holds {found.vae_digest[:8]} now",
            usual="the same; a U-Net of these latents draws with the VAE kept beside them, never with the new one",
            advice="lightdiff encode --restart, then lightdiff scale, then lightdiff train-unet --restart",
        )
    ]


# --- the latents --------------------------------------------------------------------------------------------------


def of_latents(facts: LatentFacts, regular: bool) -> list[Finding]:
    """Whether x0 = (z - shift) scale is what diffusion expects: near mean 0 and std 1, without long tails."""
    stds = [c.scaled_std for c in facts.channels]
    size = math.sqrt(mean([std**2 for std in stds]))
    off = max((abs(c.scaled_mean) for c in facts.channels), default=0.0)
    if not (SCALES[0] <= size <= SCALES[1] and off <= OFF_CENTRE):  # so that nan is a finding, too
        return [
            Finding(
                code="latent-scale",
                stage="latents",
                title="The latents that the U-Net sees are far from unit scale",
                measured=f"x0 = (z - shift) scale has a std of {size:.3g} (channels: {span(stds)}) "
                f"and a mean of up to {off:.2g}",
                usual=f"std 1, {SCALES[0]:g} to {SCALES[1]:g}; mean 0, -{OFF_CENTRE:g} to {OFF_CENTRE:g}: else each "
                "level of the schedule has another noise than it says",
                advice="lightdiff scale (without --scaling-factor), then lightdiff train-unet --restart",
            )
        ]
    tails = [beyond(c) - normal_beyond(c.scaled_mean, c.scaled_std) for c in facts.channels]
    if not regular or max(tails, default=0.0) <= TAILS:
        return []
    worst = tails.index(max(tails))
    return [
        Finding(
            code="heavy-tails",
            stage="latents",
            title="Some latents lie far outside",
            measured=f"{beyond(facts.channels[worst]):.2%} of channel {worst} lies beyond 4, after scaling",
            usual=f"0.01 to 0.2 %, of a normal distribution 0.006 %; more than {TAILS:.1%} is more than Laplace's",
            advice="lightdiff train-vae --restart with a higher --kl-beta, and --model.norm pixel if it is group",
        )
    ]


def beyond(channel: ChannelFacts) -> float:
    """The share of a channel that lies outside the histogram."""
    return max(0.0, 1 - sum(channel.histogram) * (EDGES[1] - EDGES[0]))


def normal_beyond(mean: float, std: float) -> float:
    """The share of a normal distribution that does."""
    unit = max(std, 1e-12) * math.sqrt(2)
    return 0.5 * (math.erfc((EDGES[-1] - mean) / unit) + math.erfc((mean - EDGES[0]) / unit))


# --- the U-Net ----------------------------------------------------------------------------------------------------


def of_schedule(settings: TrainUNetSettings) -> list[Finding]:
    """Ends of the schedule that are wrong for it: signal left at the last level, or much noise at the first."""
    noise = settings.resolved().noise
    first, last = ends(noise)
    long = with_changes(noise, timesteps=1000)
    first_then, last_then = ends(long)
    other = "flow" if settings.target.objective == "flow" else "cosine"
    better = "--timesteps 1000" if noise.timesteps < 1000 else f"--schedule {other}"
    ending = better if last_then <= SIGNAL_LEFT else f"--schedule {other}"
    findings = []
    if last > SIGNAL_LEFT:
        findings.append(
            Finding(
                code="signal-left",
                stage="unet",
                title="The schedule's last level is not noise alone",
                measured=f"--schedule {noise.schedule} with --timesteps {noise.timesteps} leaves {last:.3g} of the "
                "variance as signal, but sampling begins with noise alone",
                usual=f"below 0.005; above {SIGNAL_LEFT:g} is too much",
                advice=f"lightdiff train-unet --restart {ending}",
            )
        )
    if first > NOISE_AT_FIRST:
        fits = better if first_then <= NOISE_AT_FIRST else "--beta-start 1e-4"
        findings.append(
            Finding(
                code="noisy-start",
                stage="unet",
                title="The schedule's first level is too noisy",
                measured=f"--schedule {noise.schedule} with --timesteps {noise.timesteps} has {first:.3g} of the "
                "variance as noise at its least noisy level: what is finer is never learnt",
                usual=f"0.0001 or less; above {NOISE_AT_FIRST:g} is too much",
                advice=f"lightdiff train-unet --restart {fits}",
            )
        )
    return findings


def ends(noise: ScheduleSettings) -> tuple[float, float]:
    """The noise's share of the variance at the first level, and the signal's at the last."""
    signal = Schedule.of(noise).signal()
    return 1 - float(signal[0]), float(signal[-1])


def of_average(loop: LoopSettings, rows: list[Row]) -> list[Finding]:
    """Averaged weights that lag behind: validation judges them, and `generate` draws with them.

    The warm-up keeps them at an age of a tenth of the steps at most; that is much only while the loss falls fast. How
    fast is read from a power of the step through two validations, the earlier at 0.8 of the steps or before.
    """
    curve = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss", 0) > 0 and row["step"] > 0]
    earlier = [point for point in curve if point[0] <= 0.8 * curve[-1][0]]
    if not loop.ema_decay or not earlier:
        return []
    (step, loss), (step_then, loss_then) = curve[-1], earlier[-1]
    power = math.log(loss_then / loss) / math.log(step / step_then)
    age = average_age(loop.ema_decay, step)
    cost = 1 - (1 + age / step) ** -power
    if cost <= EMA_COST:
        return []
    return [
        Finding(
            code="ema-lags",
            stage="unet",
            title="The averaged weights lag behind",
            measured=f"after {step:,.0f} steps they are {age:.0f} steps old on average, in which the loss still falls "
            f"by {cost:.0%} (it fell from {loss_then:.3g} at step {step_then:,.0f} to {loss:.3g})",
            usual=f"less than {EMA_COST:.0%}: at the end of a training the loss hardly falls",
            advice=f"lightdiff train-unet {twice(loop)} goes on with the training; or try lightdiff generate --no-ema",
        )
    ]


def average_age(decay: float, steps: float) -> float:
    """How many steps old averaged weights are, on average: sum of age times weight, by `training/ema.py`.

    A decay d settles at d / (1 - d). While (1 + n) / (10 + n) is less, the age is (1 + n) / 10.
    """
    return min(decay / (1 - decay), (1 + steps) / 10)


def of_generalisation(rows: list[Row], images: int) -> list[Finding]:
    """Over-fitting, band by band; or few images and none held out to see it."""
    passes = rows[-1].get("images_seen", 0) / images if rows and images else 0.0
    risen = rising(rows)
    if risen:
        band, best, _ = risen[0]
        words = [f"{b} ({r:+.0%})" for b, _, r in risen]
        seen = f", after {passes:,.0f} passes over {images:,} images" if passes else ""
        return [
            Finding(
                code="over-fitting",
                stage="unet",
                title="The U-Net over-fits: it does ever worse on images held out",
                measured=f"validation loss has risen from its best in band {', '.join(words)} of 4 (1 is the least "
                f"noisy), while the training loss fell{seen}; band {band} was best at step {best['step']:,.0f}",
                usual=f"it falls, or stays within {RISE:.0%} of its best",
                advice="lightdiff generate --unet RUN/unet/checkpoints/best.safetensors, or more images, or a smaller "
                f"U-Net; lightdiff train-unet --restart --steps {best['step']:.0f} ends before",
            )
        ]
    with_callback = any(band in row for row in rows for band in BANDS)
    if not with_callback and images < FEW_IMAGES and passes > MANY_EPOCHS:
        return [
            Finding(
                code="unwatched",
                stage="unet",
                title="Few images, many passes, and none held out: over-fitting cannot be seen",
                measured=f"{images:,} images, {passes:,.0f} passes, no validation loss",
                usual=f"{FEW_IMAGES:,} images or more, or fewer than {MANY_EPOCHS} passes; a U-Net can learn fewer "
                "images by heart",
                advice="lightdiff train-vae --restart --val-share 0.1 holds some out; then see val_loss_band_1 to 4",
            )
        ]
    return []


def rising(rows: list[Row]) -> list[tuple[int, Row, float]]:
    """Bands whose loss has risen while the training loss fell: number, the best validation, the rise; worst first."""
    found = []
    for number, band in enumerate(BANDS, 1):
        curve = [row for row in rows if row.get(band, 0) > 0]
        if len(curve) < 2:
            continue
        best, last = min(curve, key=lambda row: row[band]), curve[-1]
        rise, middle = last[band] / best[band] - 1, (best["step"] + last["step"]) / 2
        then = [row["loss"] for row in rows if "loss" in row and best["step"] / 2 < row["step"] <= best["step"]]
        now = [row["loss"] for row in rows if "loss" in row and row["step"] > middle]
        if rise > RISE and then and now and mean(now) < mean(then):
            found.append((number, best, rise))
    return sorted(found, key=lambda entry: -entry[2])


# --- the samples --------------------------------------------------------------------------------------------------


def of_samples(evaluation: dict[str, Any], rows: list[Row], images: int) -> list[Finding]:
    """Samples that are copies of training images: as `evaluate` measured, else as over-fitting makes likely."""
    share = next((v for name, v in evaluation.items() if name.startswith("share of samples nearer")), None)
    more = "more images, fewer duplicates, a smaller U-Net, or fewer steps"
    if isinstance(share, float):
        count = max(1, int(evaluation.get("samples", 1)))
        error = math.sqrt(share * (1 - share) / count)  # of a share of so many
        if share - 3 * error <= 0.01 or share <= COPIES:
            return []
        return [
            Finding(
                code="copies",
                stage="samples",
                title="Many samples are near-copies of training images",
                measured=f"{share:.0%} of {count:,} samples lie nearer to a training image than 99 % of the images "
                "held out do",
                usual=f"about 1 %, less than {COPIES:.0%}",
                advice=f"look at evaluation/nearest.png; {more}",
            )
        ]
    steep = [(band, rise) for band, _, rise in rising(rows) if rise > STEEP_RISE]
    if not steep:
        return []
    band, rise = steep[0]
    few = f", trained on {images:,} images" if images else ""
    return [
        Finding(
            code="copies-likely",
            stage="samples",
            title="Samples are probably near-copies of training images",
            measured=f"the validation loss of band {band} is {1 + rise:.1f} times its best{few}",
            usual=f"less than {1 + STEEP_RISE:.1f} times; this is judged from over-fitting, not from samples",
            advice=f"lightdiff evaluate measures it; {more}",
        )
    ]


# --- words --------------------------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    """Their mean; nan of none."""
    return sum(values) / len(values) if values else math.nan


def twice(loop: LoopSettings) -> str:
    """The flag that trains for twice as long."""
    return f"--epochs {2 * loop.epochs:g}" if loop.epochs else f"--steps {2 * loop.steps}"


def span(values: list[float]) -> str:
    """From the smallest to the largest."""
    return f"{min(values):.3g} to {max(values):.3g}"
