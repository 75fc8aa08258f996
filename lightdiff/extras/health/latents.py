"""What is wrong with latents: their scale, their tails, and the VAE they come from."""

import math
from collections.abc import Iterator

from lightdiff.extras.evidence import Evidence
from lightdiff.extras.health.finding import Finding, mean, value_range
from lightdiff.extras.latent_facts import EDGES, ChannelFacts, LatentFacts

TAILS = 0.005  # beyond 4 std; a Laplace distribution has 0.0035 there, a normal one 0.00006
# A factor of 2 moves the signal-to-noise ratio of all levels by 4, as twice the resolution does (Hoogeboom et al. 2023,
# arXiv:2301.11093); a mean beyond 1 is larger than the noise that sampling starts from.
STD_RANGE, MAX_MEAN = (0.5, 2.0), 1.0


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
