"""Where each stage's files lie below a run folder, and how a later stage finds them (design: one folder a stage)."""

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightdiff.errors import RunError, UserError


@dataclass(frozen=True)
class StageFolder:
    """One stage's sub-folder of a run."""

    path: Path

    @property
    def settings(self) -> Path:
        """The settings the stage ran with, all filled in."""
        return self.path / "settings.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, in the order of steps."""
        return self.path / "metrics.jsonl"

    @property
    def images(self) -> Path:
        """Grids drawn at validations."""
        return self.path / "images"

    @property
    def bad_files(self) -> Path:
        """Unreadable images and why."""
        return self.path / "bad-files.txt"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """The newest state; can be resumed."""
        return self.checkpoints / "last.safetensors"

    @property
    def best(self) -> Path:
        """The weights with the lowest validation loss; without optimizer state."""
        return self.checkpoints / "best.safetensors"

    def step(self, step: int) -> Path:
        """The state after a number of optimizer steps; can be resumed."""
        return self.checkpoints / f"step-{step:08d}.safetensors"

    def steps(self) -> list[Path]:
        """All step files, oldest first."""
        return sorted(self.checkpoints.glob("step-*.safetensors"))


@dataclass(frozen=True)
class RunFolder:
    """A run: everything that one model came from and made."""

    path: Path

    @property
    def vae(self) -> StageFolder:
        """What train-vae writes."""
        return StageFolder(self.path / "vae")

    @property
    def unet(self) -> StageFolder:
        """What train-unet writes."""
        return StageFolder(self.path / "unet")

    @property
    def latents(self) -> Path:
        """What encode writes, and scale adds its result to."""
        return self.path / "latents"

    @property
    def samples(self) -> Path:
        """What generate writes, a folder a call."""
        return self.path / "samples"


def find_vae(given: Path | None, run: RunFolder) -> Path:
    """The VAE's checkpoint: the one given, or the best of a given run, or of this one."""
    folder = run.vae if given is None else RunFolder(given).vae
    return _find(given, [folder.best, folder.last], "--vae", folder.path, "lightdiff train-vae")


def find_unet(given: Path | None, run: RunFolder) -> Path:
    """The U-Net's checkpoint: the one given, or the last of a given run, or of this one."""
    folder = run.unet if given is None else RunFolder(given).unet
    return _find(given, [folder.last, folder.best], "--unet", folder.path, "lightdiff train-unet")


def find_latents(given: Path | None, run: RunFolder) -> Path:
    """The folder of latents: the one given, or that of a given run, or of this one."""
    places = [run.latents] if given is None else [given, RunFolder(given).latents]
    for place in places:
        if (place / "index.json").is_file():
            return place
    raise UserError(f"{places[-1]} holds no latents: run 'lightdiff encode' first, or point --latents at some")


def _find(given: Path | None, places: list[Path], flag: str, folder: Path, command: str) -> Path:
    if given is not None and not given.is_dir():
        if not given.exists():
            raise UserError(f"{flag}: {given} does not exist; name a checkpoint file or a run folder")
        return given
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"{folder} holds no checkpoint: run '{command}' first, or point {flag} at one")


def claim(folder: Path) -> None:
    """Make a folder and see that it can be written to, before any long work.

    Raises:
        UserError: If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder} cannot be made: a file of that name is in the way") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written to: check its owner and permissions")


def set_aside(folder: Path) -> Path | None:
    """Rename a folder to NAME.old-1 (or -2, ...), so that a new one can take its place; None if there is none."""
    if not folder.exists():
        return None
    free = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.old-{n}").exists())
    return folder.rename(folder.with_name(f"{folder.name}.old-{free}"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a run folder.

    Raises:
        RunError: If it is damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise RunError(f"{path} cannot be read: not a JSON object")
    return value
