"""What has become of the images since a list of them was kept: for trainings and latents that are resumed."""

import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.files import fingerprinters
from lightdiff.data.layouts import Mask
from lightdiff.data.table import Fingerprinter, ImageTable
from lightdiff.errors import UserError
from lightdiff.runtime.progress import console, print_note
from lightdiff.runtime.stage import Stage
from lightdiff.settings import TrainVAESettings

READERS = 8  # threads that read files to compare their contents


@dataclass(frozen=True)
class Comparison:
    """What has become of the images of an older table."""

    before: NDArray[np.int64]  # the position of each image there; -1: it is new
    changed: Mask  # whether its file is another one since
    gone: NDArray[np.int64]  # positions there
    older: ImageTable

    @property
    def nothing(self) -> bool:
        """Whether they are the same images."""
        return not (self.changed.any() or len(self.gone) or (self.before < 0).any())

    def __str__(self) -> str:
        return f"{self.changed.sum():,} changed, {(self.before < 0).sum():,} added, {len(self.gone):,} gone"

    def check_loss(self, max_bad: float, where: Path) -> None:
        """Check that hardly any images are gone.

        Raises:
            UserError: If more are than can be unreadable.
        """
        if len(self.gone) > max_bad * len(self.older):
            example = self.older.name(int(self.gone[0]))
            raise UserError(
                f"{len(self.gone):,} of the {len(self.older):,} images behind {where} are gone ({example}), more than "
                f"--max-bad {max_bad:g}: is every disk mounted, and --data right? --allow-missing goes on without them"
            )


def compare(
    table: ImageTable, older: ImageTable, fingerprinters: Sequence[Fingerprinter], contents: bool
) -> Comparison:
    """What has become of the images of an older table, in a newer one.

    A file is another one when its size is. Where only the time of change differs, as after copying, its contents
    decide if the older table has their hashes (`contents`); if not, it counts as the same.
    """
    if table.list_digest() == older.list_digest():
        before = np.arange(len(table))
    else:
        names = {key: i for i, key in enumerate(older.keys(range(len(older))))}
        known = {_composed(key): i for key, i in names.items() if not key[1].isascii()} | names
        keys = table.keys(range(len(table)))
        before = np.fromiter((known.get(key, known.get(_composed(key), -1)) for key in keys), np.int64, len(table))
    now, then = table.files, older.files[before]
    changed = (before >= 0) & (now["size"] != then["size"])
    if contents:
        touched = np.flatnonzero((before >= 0) & ~changed & (now["mtime"] != then["mtime"]))
        with ThreadPoolExecutor(READERS) as pool:
            read = pool.map(lambda key: fingerprinters[key[0]](key[1], True), table.keys(touched))
            now["hash"][touched] = [hashed for _, _, hashed in read]
        known = now["hash"] != b""
        changed[touched] = ((now["hash"] != then["hash"]) | ~known)[touched]
    gone = np.setdiff1d(np.arange(len(older)), before)
    return Comparison(before, changed, gone, older)


def _composed(key: tuple[int, str]) -> tuple[int, str]:
    """The same in one Unicode form: on its way between systems, "é" may become two characters."""
    return (key[0], key[1] if key[1].isascii() else unicodedata.normalize("NFC", key[1]))


def compare_images(stage: Stage[TrainVAESettings], saved: Checkpoint, table: ImageTable) -> None:
    """Say what has become of the images that a run to resume was trained on.

    Raises:
        UserError: If too many are gone, or other --data hold other images.
    """
    images = stage.settings.images
    try:
        older = ImageTable.read(stage.folder.image_list)
    except UserError as error:
        if saved.metadata.lineage.get("data") != table.list_digest():
            print_note(f"this run was started with another list of images: {error}")
        return
    found = compare(table, older, fingerprinters(images.data), contents=False)
    if found.nothing:
        return
    moved = saved.settings(TrainVAESettings).images.data != images.data and not stage.settings.allow_missing
    if moved and found.changed.sum() + len(found.gone) > images.max_bad * len(older):
        raise UserError(
            f"--data: {', '.join(map(str, images.data))} holds other images than {stage.path} was trained on "
            f"({found}): choose another --run, or leave --data out; --allow-missing trains on with these"
        )
    found.check_loss(1.0 if stage.settings.allow_missing else images.max_bad, stage.path)
    console.print(f"images since this run was last started: {found}", soft_wrap=True)
