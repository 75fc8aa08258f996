"""Snapshots of a training on the disk: `last`, step files, `best`."""

from collections.abc import Callable

from torch import Tensor

from lightdiff import checkpoint
from lightdiff.checkpoint import Metadata
from lightdiff.run_folder import StageFolder, atomic_link
from lightdiff.settings import LoopSettings


def write_snapshots(
    folder: StageFolder,
    state: Callable[[bool], dict[str, Tensor]],
    metadata: Metadata,
    loop: LoopSettings,
    keep_step: bool,
    best: bool,
) -> None:
    """Write `last`, and, where wanted, a step file and `best`.

    Args:
        folder: Where they lie.
        state: Whether it can be resumed -> the tensors of a snapshot.
        metadata: What they say of the run.
        loop: How many step files stay.
        keep_step: Whether to write a step file.
        best: Whether this is the best state so far.
    """
    if best:
        checkpoint.save(folder.best, state(False), metadata)
    if not keep_step:
        checkpoint.save(folder.last, state(True), metadata)
        return
    kept = folder.step(metadata.step)
    checkpoint.save(kept, state(True), metadata)
    atomic_link(folder.last, kept)
    for path in folder.steps()[: -loop.keep]:
        if not (loop.keep_every and folder.step_of(path) % loop.keep_every == 0):
            path.unlink()
