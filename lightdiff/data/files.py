"""What --data names -> a list of images, each with its split and its labels. Decodes no image.

The list depends on the names of the images alone, and on a look at a few where folders share names: not on where the
data lie, nor on the machine or the order in which its file system lists them.
"""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress, repeat
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from PIL import Image
from rich.console import Console

from lightdiff.data import layouts
from lightdiff.data.formats import SUFFIXES, open_image
from lightdiff.data.layouts import Labels, Layout, Mask, Names
from lightdiff.data.table import SPLITS, Fingerprint, Fingerprinter, ImageList, ImageTable, fingerprint
from lightdiff.data.table import ImageFile as ImageFile
from lightdiff.errors import UserError
from lightdiff.on_demand import on_demand
from lightdiff.run_folder import open_regular
from lightdiff.settings import ImageSettings

Report = Callable[[int], object]  # of how many images have been found
REPORT_EVERY = 1000
UNREAD_TABLES = ("metadata.csv", "metadata.jsonl")  # Hugging Face's: they may hold captions or boxes, too
PARTS_OF_RUN = frozenset({"vae", "latents", "unet", "samples", "evaluation", "sweeps"})
# What systems keep for themselves in the folders of users, in lower case: thumbnails, deleted files, other versions.
SYSTEM_NAMES = frozenset(
    "@eadir @tmp @recycle @recently-snapshot #recycle #snapshot $recycle.bin recycler recycled __macosx lost+found "
    "lost.dir _vti_cnf _gsdata_ thumbs.db ehthumbs.db ehthumbs_vista.db zbthumbnail.info".split()
) | {"system volume information"}


# --- sources ------------------------------------------------------------------------------------------------------


def read_in_folder(folder: Path, table: Path) -> bytes:
    """The bytes of a table of labels, in a folder or beside it."""
    with open_regular(table) as stream:
        return stream.read()


def no_labels(place: Path, names: Names) -> None:
    """What most sources say of their images beside the names."""


class Source(NamedTuple):
    """What --data can name: a folder of images, or a file that holds many.

    `names` lists its images in any order, by names that stay (with "/" between folders, if it has any), and counts, by
    kind, what looks like a picture but is not read; `open` opens one of them as Pillow does. Whatever `open` raises
    says that this image is unreadable. The others may be left as they are: `fingerprint` tells whether an image has
    been changed, `read` reads a table of labels in the source or beside it, or raises an OSError, and `labels` are what
    the source itself says of each of its images, given their sorted names; None if it says nothing.
    """

    names: Callable[[Path, Counter[str]], Iterable[str]]
    open: Callable[[Path, str], AbstractContextManager[Image.Image]]
    fingerprint: Callable[[Path, str, bool], Fingerprint] = fingerprint
    read: Callable[[Path, Path], bytes] = read_in_folder
    labels: Callable[[Path, Names], Iterable[Labels] | None] = no_labels


def names_in_folder(folder: Path, passed_over: Counter[str]) -> Iterator[str]:
    """The paths of all images below the folder, those in one folder sorted.

    Links to folders are followed after all real folders, and no folder is entered twice, so a loop does no harm.

    Args:
        folder: Where to look.
        passed_over: Counts, by kind, what looks like a picture but is not read, and the folders not looked into.
    """
    starts, seen, misses = [os.fspath(folder)], set[tuple[int, ...]](), Counter[str]()
    while starts:
        for path, folders, files in os.walk(starts.pop(starts.index(min(starts))), onerror=_unreadable):
            if (identity := os.stat(path)[1:3]) in seen:  # inode and device
                folders.clear()
                continue
            seen.add(identity)
            if folders:
                parts = _parts_of_run(path, folders)
                kinds = {name: "folder of a run of lightdiff" if name in parts else left_out(name) for name in folders}
                passed_over.update(filter(None, kinds.values()))
                folders[:] = sorted((name for name in folders if not kinds[name]), key="{}/".format)
                starts += filter(os.path.islink, (os.path.join(path, name) for name in folders))
            # A broken link has an image's name too: it is to be named as unreadable, not passed over.
            images = sorted(name for name in files if name[0] != "." and name.lower().endswith(SUFFIXES))
            if len(images) < len(files):
                passed_over.update(on_demand("data.unread:kinds_of")(path, files, images, misses))
            below = f"{Path(path).relative_to(folder).as_posix()}/".removeprefix("./")
            yield from (below + name for name in images)


def left_out(folder: str) -> str:
    """What a folder of this name is counted as if it is not looked into; empty if it is."""
    if folder[0] == ".":
        return "hidden folder"
    return f"folder {folder}" if folder.lower() in SYSTEM_NAMES else ""


def _parts_of_run(path: str, folders: Sequence[str]) -> list[str]:
    """Those of the folders that are parts of a run of lightdiff, and hold pictures that it drew."""
    parts = [name for name in folders if name.partition(".old-")[0] in PARTS_OF_RUN]
    return parts if any(os.path.isfile(os.path.join(path, name, "settings.json")) for name in parts) else []


def _unreadable(error: OSError) -> NoReturn:
    raise UserError(f"--data: the folder {error.filename} cannot be read: {error.strerror}") from error


def open_in_folder(folder: Path, name: str) -> AbstractContextManager[Image.Image]:
    """The image file, open but not yet decoded."""
    return open_image(os.path.join(folder, name))


FOLDER = Source(names_in_folder, open_in_folder)
ARCHIVES = "data.archives:SOURCE"
# Files that hold many images, by suffix, and how hf://datasets/... begins; a text is imported `on_demand`.
SOURCES: dict[str, Source | str] = {
    ".zip": ARCHIVES,
    ".tar": ARCHIVES,
    ".parquet": "data.parquet:SOURCE",
    "hf:": "data.hub_data:SOURCE",
}


def source_of(place: Path) -> Source:
    """How the images that --data names are listed and opened.

    A pattern such as shards/*.tar names archives, too. Where there is no source, listing its images says so.
    """
    if os.path.isdir(place):
        return FOLDER
    found = SOURCES.get("hf:" if place.parts[:1] == ("hf:",) else place.suffix.lower())
    if isinstance(found, Source) and os.path.isfile(place):
        return found
    source: Source = on_demand(found if isinstance(found, str) else ARCHIVES)
    return source


# --- the list -----------------------------------------------------------------------------------------------------


@dataclass
class Listing:
    """The images of the sources, and what there is to know about what was found there."""

    files: ImageList
    layouts: list[Layout]  # of each source
    passed_over: Counter[str]  # what looks like a picture and is not read, and folders not looked into, by kind
    notes: list[str]  # one sentence each


def list_images(images: ImageSettings, console: Console, kept: Path | None = None) -> ImageList:
    """All images of the --data sources; the console says what was passed over, left out or left unlabelled.

    On a terminal it shows how many have been found so far. A list of archives that was `kept` is taken over, with all
    that it knows of their images, if none of them has changed.
    """

    def search() -> ImageList:
        with console.status("looking for images") as line:
            found = find_images(
                images.data, images.val_share, lambda n: line.update(f"looking for images: {n:,}"), images.labels
            )
        for note in found.notes:
            console.print(f"note: {note}", soft_wrap=True)
        return found.files

    if all(map(os.path.isdir, images.data)):
        return search()
    files: ImageList = on_demand("data.archives:kept_list")(images, kept, search)
    return files


def find_images(
    folders: Sequence[Path], val_share: float, report: Report | None = None, table: Path | None = None
) -> Listing:
    """Every image of the sources, sorted by source and name (by code point), with its split and its labels.

    `report` is called now and then with the number found so far. Labels come from a `table`, from one that belongs to
    the layout, or from the folders' names.

    The user's own split is kept: `own_split`. Without one, an image is held out for validation when a hash of its
    path, a number in [0, 1), lies below `val_share`: adding files moves no other file. Should every image be held out,
    as happens with two or three, the one with the largest hash is trained on.
    """
    passed_over, notes, found = Counter[str](), list[str](), list[SourceImages]()
    roles = [""] if len(folders) == 1 else on_demand("data.splits:folder_roles")(folders)
    for folder, source, role in zip(folders, map(source_of, folders), roles, strict=True):
        not_read = Counter[str]()
        names = Names.of(_counted(source.names(folder, not_read), sum(len(of.names) for of in found), report), True)
        if not len(names):
            raise on_demand("data.unread:no_image")(folder, not_read)
        passed_over += not_read
        found.append(_images_of(folder, source, names, role, val_share, notes, labelled=table is None))
    if passed_over:
        notes.insert(0, on_demand("data.unread:passed_over_note")(passed_over))
    labels = [of.labels for of in found]
    if table:
        labels = on_demand("data.labels:labels_of_one_table")(
            table, folders, [of.names for of in found], [of.used for of in found], notes
        )
    images = ImageTable.of_columns(
        found[0].used if len(found) == 1 else Names.of(chain.from_iterable(of.used for of in found)),
        np.repeat(np.arange(len(found), dtype=np.int32), [len(of.used) for of in found]),
        np.concatenate([of.held_out for of in found]).astype(np.uint8),  # 0 and 1, as in SPLITS
        chain.from_iterable(labels),
    )
    if images.splits.all():
        images.splits[np.argmax([*map(position, images.names)])] = SPLITS.index("train")
    return Listing(ImageList(images), [of.layout for of in found], passed_over, notes)


class SourceImages(NamedTuple):
    """The images of one source."""

    names: Names  # of all
    layout: Layout
    used: Names
    held_out: Mask  # of those that are used: whether for validation
    labels: Iterable[Labels]  # of each of those


def _images_of(
    folder: Path, source: Source, names: Names, role: str, val_share: float, notes: list[str], labelled: bool
) -> SourceImages:
    """What the names of a source's images say, and tables of labels beside them if they are to be `labelled`.

    `role` is that of the source itself, as a split folder; `notes` takes what is to be said.
    """
    chosen, originals, read, tables = np.ones(len(names), bool), dict[str, str](), partial(source.read, folder), []
    if layouts.may_hold_copies(names):
        chosen, originals = on_demand("data.copies:find_copies")(folder, names, partial(source.open, folder), notes)
    kept, held_out = names.where(chosen), None
    if found := layouts.data_set_tables(folder, kept, read):
        tables = on_demand("data.labels:own_tables")(found, folder, kept)
    kind, in_split = layouts.layout(kept, tables), np.ones(len(kept), bool)
    if role or layouts.has_split_folders(kept):
        in_split, held_out = on_demand("data.splits:own_split")(folder, kept, role, notes)
    if kind == "plain" and len({*map(bool, layouts.folders_of(kept))}) > 1:  # some lie in folders, some do not
        on_demand("data.splits:note_stray_images")(folder, kept, notes)
    used = kept.where(in_split)
    labels: Iterable[Labels] = ()
    if labelled and (own := source.labels(folder, names)) is not None:
        labels = compress(compress(own, chosen), in_split)
    elif labelled and tables:
        given = on_demand("data.labels:labels_of_tables")(tables, folder, names, read, notes)
        labels = map(given.get, used, repeat({}))
    elif labelled:
        labels = compress(layouts.LABELS[kind](kept), in_split)
        unread = [path for name in UNREAD_TABLES if (path := folder / name).is_file()]
        notes += [f"{path} is not read; to have labels from it: --labels {path}" for path in unread]
    if held_out is None:
        held_out = np.fromiter((position(originals.get(name, name)) < val_share for name in used), bool, len(used))
    return SourceImages(names, kind, used, held_out, labels)


def _counted(names: Iterable[str], before: int, report: Report | None) -> Iterator[str]:
    """The names; now and then their number and the one before is reported."""
    for count, name in enumerate(names, before + 1):
        if report and count % REPORT_EVERY == 0:
            report(count)
        yield name


def position(name: str) -> float:
    """The name's hash, a number in [0, 1). Unicode is normalised: some systems store "é" as two characters."""
    text = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64


def fingerprinters(folders: Sequence[Path]) -> list[Fingerprinter]:
    """For each source, what tells whether an image of it has been changed."""
    return [partial(source_of(folder).fingerprint, folder) for folder in folders]
