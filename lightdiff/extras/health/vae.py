"""What is wrong with a VAE: a KL term with too much weight or none, poor reconstructions."""

import math
from collections.abc import Iterator
from typing import Any

from lightdiff.defaults import following
from lightdiff.extras.grid_pattern import PATTERN
from lightdiff.extras.health.finding import Finding, double_length, mean, value_range
from lightdiff.extras.latent_facts import ChannelFacts, LatentFacts
from lightdiff.runtime.progress import Row
from lightdiff.settings import TrainVAESettings
from lightdiff.stages.scale import DEAD_BITS

COLLAPSED_KL = 0.02  # nats per element: of a normal channel, all but 1 - exp(-2 KL) = 4 % of the variance is noise
# Where the VAE is linear, the loss MSE + beta mean(KL) trades beta / 2 of squared error for a lower KL: each latent
# dimension keeps noise until the two slopes are equal (that case: Lucas et al. 2019, arXiv:1911.02469). The KL
# dominates when that is most of the error, and the error is visible.
KL_SHARE, KL_PSNR = 0.5, 25.0
# beta 1e-4 leaves a sigma of 0.02 of the std or more; below 0.003, the decoder has learnt nothing about small errors.
MIN_SIGMA = 0.003
# Grey levels of 256, about what an eye can see on even ground. Five trained VAEs, of drawn faces and photographs of 16
# to 64 px, have 0.0, 0.1, 0.2, 0.2 and 0.7 +- 0.4; with a checkerboard of 2.55 added, 2.5 to 2.7.
MAX_PATTERN = 1.0
SIGMAS = 3.0  # times what chance alone would give
LOW_PSNR = 20.0  # dB: an error of a tenth of the range, 26 of 256 grey levels


def check_vae(settings: TrainVAESettings, metrics: Row, facts: LatentFacts | None) -> Iterator[Finding]:
    """A KL term with too much weight or none, and reconstructions that limit everything after them."""
    channels = facts.channels if facts else []
    yield from list(check_high_kl(settings, metrics, channels)) or check_reconstructions(settings, metrics)
    yield from check_no_kl(settings, metrics, channels)


def check_high_kl(settings: TrainVAESettings, metrics: Row, channels: list[ChannelFacts]) -> Iterator[Finding]:
    """Posterior collapse, channels that carry no information, or a KL term that blurs."""
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
            title=f"{len(dead)} of {len(channels)} latent channels carry no information",
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
    imported = not metrics  # its authors may well have used 1e-6, summed; its latents are what they are
    if imported or (sigma >= MIN_SIGMA and (beta > 0 or settings.freeze_encoder)):
        return
    measured, usual_beta = [f"--kl-beta {beta:g}"], following(settings)["loss"]["kl_beta"]
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
        usual="--kl-beta 1e-3 to 1e-2 with a VAE of factor 4, a quarter of that with 8: sigma 0.02 to 0.5 of the std, "
        "a std near 1, 1 to 4 nats. Without it, latents take any size and shape, and small "
        "errors of the U-Net show in the pixels",
        advice=f"lightdiff train-vae --restart --kl-beta {usual_beta:g}, then encode, scale and train-unet again",
    )


def check_pattern(settings: TrainVAESettings, evaluation: dict[str, Any]) -> Iterator[Finding]:
    """A pattern that the decoder adds to every image, as `evaluate` measured it."""
    level, chance = evaluation.get(PATTERN), evaluation.get(f"{PATTERN} +-", 0.0)
    if isinstance(level, float) and isinstance(chance, float) and level > max(MAX_PATTERN, SIGMAS * chance):
        yield Finding(
            code="decoder-pattern",
            stage="vae",
            title="The decoder adds the same pattern to every image",
            measured=f"{level:.1f} of 256 grey levels (root mean square) of the mean error of reconstructions repeat "
            "at each position of the latent",
            usual=f"0 to 0.3; more than {MAX_PATTERN:g} can be seen on even ground, and is in all samples, too",
            advice=f"lightdiff train-vae {double_length(settings.loop)} continues the training; transposed "
            "convolutions, as in --preset original, do this more easily than the default's",
        )
