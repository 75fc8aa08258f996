"""Snapshots of a training on the disk: `last`, step files, `best`."""

import math
from typing import TYPE_CHECKING

from lightdiff import checkpoint
from lightdiff.run_folder import StageFolder, atomic_link, check_disk_space
from lightdiff.settings import LoopSettings

if TYPE_CHECKING:
    from lightdiff.training.loop import Trainer


def save(trainer: "Trainer", metrics: dict[str, float], keep_step: bool, validated: bool) -> None:
    """Write `last`, a step file if wanted, and `best` if the validation of this step found it to be that."""
    folder, loop = trainer.stage.folder, trainer.loop
    loss = metrics.get("val_loss")
    better = validated and (loss is None or loss < trainer.best)
    if better and loss is not None:
        trainer.best = loss
    extra = trainer.stage.metadata.extra | ({"best": trainer.best} if math.isfinite(trainer.best) else {})
    extra |= {"skipped": trainer.skipped} if trainer.skipped else {}
    progress = {"step": trainer.step, "images_seen": trainer.images_seen, "metrics": metrics, "extra": extra}
    metadata = trainer.stage.metadata.model_copy(update=progress)

    def write() -> None:
        check_disk_space(folder.checkpoints, trainer.disk_needed)
        if better:
            checkpoint.save(folder.best, trainer.state(resumable=False), metadata)
        if not keep_step:
            checkpoint.save(folder.last, trainer.state(resumable=True), metadata)
            return
        kept = folder.step(trainer.step)
        checkpoint.save(kept, trainer.state(resumable=True), metadata)
        atomic_link(folder.last, kept)
        prune(folder, loop)

    trainer.stage.processes.run_on_main(write)


def prune(folder: StageFolder, loop: LoopSettings) -> None:
    """Remove step files but the newest `keep`, and those of a step that `keep_every` divides."""
    for path in folder.steps()[: -loop.keep]:
        if not (loop.keep_every and folder.step_of(path) % loop.keep_every == 0):
            path.unlink()
