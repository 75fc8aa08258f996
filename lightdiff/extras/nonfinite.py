"""What a training says of steps whose loss or gradient is not finite."""

from lightdiff.errors import RunError
from lightdiff.runtime.progress import Reporter
from lightdiff.training.loop import Trainer

NAMES_SHOWN = 8


def report_skipped(trainer: Trainer, skipped: list[int], reporter: Reporter) -> None:
    """Report steps that were skipped because something was not finite, and stop the run if they are too many.

    Raises:
        RunError: If they are more than tolerated.
    """
    loop, step = trainer.loop, skipped[0]
    names = trainer.task.names(trainer.images_seen - (trainer.step - step + 1) * loop.batch_size)
    what = [f"step {step}: loss or gradient is not finite, so it changed nothing. Its batch:"]
    what += [f"  {name}" for name in names[:NAMES_SHOWN]]
    what += [f"  and {len(names) - NAMES_SHOWN} more"] * (len(names) > NAMES_SHOWN)
    if trainer.skipped <= loop.skip_nonfinite:
        reporter.note(*what, f"{trainer.skipped} of at most {loop.skip_nonfinite} such steps (--skip-nonfinite)")
        return
    trainer.writer.wait()
    folder = trainer.stage.folder
    kept = f"The last good state is in {folder.checkpoints}" if folder.resumable() else "Nothing was saved yet"
    raise RunError(
        *what,
        f"{kept}. Look at those images, try a lower "
        "--lr, a lower --clip or --precision fp32, or allow some such steps with --skip-nonfinite",
    )
