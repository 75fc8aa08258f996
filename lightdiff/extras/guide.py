"""`--guidance` without a class: the worse U-Net of autoguidance (Karras et al. 2024, arXiv:2406.02507)."""

import re
from pathlib import Path

from lightdiff.checkpoint import Checkpoint
from lightdiff.errors import UserError
from lightdiff.run_folder import RunFolder, StageFolder, find_unet
from lightdiff.settings import EARLY, TrainUNetSettings


def find_weak(named: Path, unet: Checkpoint) -> Checkpoint:
    """The worse U-Net of a name, for guidance of another one.

    Raises:
        UserError: If there is none, or they do not predict the same of the same noisy latents.
    """
    beside = StageFolder(unet.path.parent.parent)
    if named == EARLY:
        path = beside.early
        if not path.is_file():
            needs = "--guidance needs a --class to guide to, or a worse U-Net to guide away from"
            raise UserError(f"{needs}: there is no {path}; name another one by --guide-with")
    elif step := re.fullmatch(r"step-(\d+)", str(named)):
        path = beside.step(int(step[1]))
        if not path.is_file():
            steps = ", ".join(f"step-{beside.step_of(file)}" for file in beside.steps()) or "none"
            raise UserError(f"--guide-with {named}: {beside.checkpoints} has no such step file; there are: {steps}")
    else:
        path = find_unet(named, RunFolder(named), "--guide-with")
    weak = Checkpoint(path, "unet")
    s, w = (each.settings(TrainUNetSettings) for each in (unet, weak))
    differs = {
        "on latents of another VAE": weak.metadata.lineage.get("vae") != unet.metadata.lineage.get("vae"),
        "on latents with another shift or scale": (w.latent.shift, w.latent.scale) != (s.latent.shift, s.latent.scale),
        f"with --objective {w.target.objective}": w.target.objective != s.target.objective,
        "with another noise schedule": w.noise.resolved(w.target.objective) != s.noise.resolved(s.target.objective),
        "for other classes": w.classes != s.classes,
    }
    for how, wrong in differs.items():
        if wrong:
            raise UserError(f"--guide-with: {path} was trained {how} than {unet.path}: guidance needs two of a kind")
    return weak
