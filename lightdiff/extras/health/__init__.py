"""Health: what a run's own numbers show to be wrong with it, what is usual, and what to change."""

import math
import re
from pathlib import Path

from lightdiff.data.table import ImageTable
from lightdiff.extras.evidence import gather, try_read
from lightdiff.extras.health.data import check_data
from lightdiff.extras.health.finding import Finding as Finding
from lightdiff.extras.health.finding import quote_path
from lightdiff.extras.health.latents import check_latents, check_lineage
from lightdiff.extras.health.samples import check_quality, check_samples
from lightdiff.extras.health.training import check_rise, check_training
from lightdiff.extras.health.unet import check_baseline, check_ema, check_labels, check_overfitting, check_schedule
from lightdiff.extras.health.vae import check_pattern, check_vae
from lightdiff.run_folder import RunFolder
from lightdiff.runtime.progress import Row
from lightdiff.settings import LoopSettings


def examine(run: Path) -> list[Finding]:
    """What is unusual about a run, stage by stage; empty for a healthy one.

    A stage that is missing or damaged is left out: other commands report that.
    """
    home = RunFolder(run)
    found, listed = gather(home), home.vae.image_list
    images = len(found.index.positions("train")) if found.index else 0
    facts, findings = found.facts, list[Finding]()
    if found.vae:
        loop = found.vae.loop
        seen = try_read(lambda: int(ImageTable.read(listed).of_split("train").sum())) or images
        findings += check_data(found.vae.images)
        findings += check_training(loop, "vae", found.vae_rows, seen)
        findings += check_rise(loop, "vae", found.vae_rows)
        settled = found.index or ended(loop, found.vae_rows, seen)  # before, reconstructions still get better
        metrics = found.vae_metrics if settled else found.vae_metrics | {"psnr": math.inf}
        findings += check_vae(found.vae, metrics, facts if found.same_vae else None)
        findings += check_pattern(found.vae, found.vae_evaluation)
    if facts and found.index and found.index.statistics:
        regular = not any(finding.code == "no-kl" for finding in findings)
        findings += check_latents(facts, regular)
    findings += check_lineage(found)
    if found.unet:
        loop, rows = found.unet.loop, found.unet_rows
        z_std = found.index.statistics.channel_std if found.index and found.index.statistics else []
        findings += check_training(loop, "unet", rows, images)
        findings += check_labels(found.unet)
        findings += check_baseline(found.unet, rows, images, z_std)
        findings += check_schedule(found.unet)
        findings += check_ema(loop, rows) if ended(loop, rows, images) else []
        findings += list(check_overfitting(rows, images)) or check_rise(loop, "unet", rows)
        findings += check_quality(found.evaluation, loop)
    findings += check_samples(found.evaluation, found.unet_rows, images)
    for finding in findings:
        finding.advice = complete_commands(finding.advice, run)
    return findings


def ended(loop: LoopSettings, rows: list[Row], images: int) -> bool:
    """Whether a training on this many images has done all of its steps."""
    return not rows or rows[-1]["step"] >= loop.total_steps(images)


def complete_commands(advice: str, run: Path) -> str:
    """Advice whose commands can be typed as they are: with --run, and on --restart with the saved settings."""

    def complete(found: re.Match[str]) -> str:
        command, restart = found[1], found[2] or ""
        saved = run / command.removeprefix("train-") / "settings.json"
        settings = f" --settings {quote_path(saved)}" if restart and saved.is_file() else ""
        return f"lightdiff {command} --run {quote_path(run)}{restart}{settings}"

    advice = advice.replace("RUN/unet/checkpoints/best.safetensors", quote_path(RunFolder(run).unet.best))
    return re.sub(r"lightdiff (train-vae|encode|scale|train-unet|generate|evaluate)( --restart)?", complete, advice)
