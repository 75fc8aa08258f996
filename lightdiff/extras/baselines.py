"""The loss of a predictor that knows a latent's noise level and nothing of images: what a U-Net's is compared with."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightdiff.checkpoint import Metadata
from lightdiff.diffusion.objectives import target_coefficients
from lightdiff.diffusion.schedules import Schedule
from lightdiff.extras.evidence import try_read
from lightdiff.runtime.progress import Row
from lightdiff.settings import Objective, ObjectiveSettings, ScheduleSettings
from lightdiff.stages.train_unet import BANDS

BAND_LOSSES = tuple(f"val_loss_band_{band + 1}" for band in range(BANDS))
SHARES = 4096  # of a band's width, at the middles of which `UNetTask.validate` draws its levels


def baseline_loss(objective: Objective, alpha: Tensor, sigma: Tensor, std: float = 1.0) -> Tensor:
    """Mean squared error of the best linear prediction of a x0 + b eps from x_t = alpha x0 + sigma eps, level by level.

    Var(target) - Cov(target, x_t)^2 / Var(x_t) = std^2 (a sigma - b alpha)^2 / (alpha^2 std^2 + sigma^2), for elements
    of mean 0 and this std, with independent noise. If they were normal and independent of each other, no network could
    do better; of images, one that has learnt anything does. For unit std it is 1 / (alpha^2 + sigma^2) for flow,
    alpha_bar for eps and 1 for v on a schedule that preserves variance, and sigma^2 there for x0.
    """
    a, b = target_coefficients(objective, alpha, sigma)
    error: Tensor = (std * (a * sigma - b * alpha)).square() / ((std * alpha).square() + sigma.square())
    return error


def band_baselines(target: ObjectiveSettings, noise: ScheduleSettings, std: float = 1.0) -> Row:
    """`baseline_loss` as the mean over the levels of each band, and of all, by the names of the validation losses."""
    schedule = Schedule.of(noise.resolved(target.objective))
    errors = baseline_loss(target.objective, schedule.alpha, schedule.sigma, std)
    shares = (torch.arange(SHARES, dtype=torch.float64) + 0.5) / SHARES
    means = [float(errors[((band + shares) * len(schedule) / BANDS).long()].mean()) for band in range(BANDS)]
    return {"val_loss": sum(means) / BANDS, **dict(zip(BAND_LOSSES, means, strict=True))}


def baselines_of(metadata: Metadata) -> Row:
    """The baselines of a U-Net's validation losses, for latents of unit std; empty for a VAE, or without settings."""
    return losses_beside(metadata.settings) if metadata.stage == "unet" else {}


def losses_beside(settings: Mapping[str, Any]) -> Row:
    """The same of the settings of a training."""
    target, noise = (settings.get(part) for part in ("target", "noise"))
    known = try_read(
        lambda: band_baselines(ObjectiveSettings.model_validate(target), ScheduleSettings.model_validate(noise))
    )
    return known or {}
