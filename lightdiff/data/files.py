"""What --data names -> a list of images, each with its split and its labels. Decodes no image.

The list depends on the names of the images alone, and on a look at a few where folders share names: not on where the
data lie, nor on the machine or the order in which its file system lists them.
"""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, permutations
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from lightdiff import __version__
from lightdiff.data.archives import (
    ARCHIVES,
    archives_at,
    file_state,
    labels_in_archive,
    look_in_archive,
    names_in_archive,
    open_archive,
    open_in_archive,
    read_beside_images,
    state_of,
)
from lightdiff.data.copies import find_copies
from lightdiff.data.formats import HEAD, SUFFIXES, UNREAD_SUFFIXES, how_to_read, open_image, picture_format
from lightdiff.data.labels import Images, read_labels
from lightdiff.data.layouts import (
    LABELS,
    SYSTEM_NAMES,
    Labels,
    Layout,
    Split,
    folder_roles,
    label_tables,
    layout,
    own_split,
    places,
    read_table,
    stray_images,
)
from lightdiff.data.table import SPLITS, Fingerprint, ImageList, ImageTable, Look, fingerprint
from lightdiff.data.table import ImageFile as ImageFile
from lightdiff.errors import UserError
from lightdiff.run_folder import open_regular
from lightdiff.settings import ImageSettings

Report = Callable[[int], object]  # of how many images have been found
REPORT_EVERY = 1000
UNREAD_TABLES = ("metadata.csv", "metadata.jsonl")  # Hugging Face's: they may hold captions or boxes, too
PARTS_OF_RUN = frozenset({"vae", "latents", "unet", "samples", "evaluation", "sweeps"})
KINDS = 8  # of what was passed over, that a note names
MISSES = 200  # files of an unknown suffix that are no pictures, after which no more of that suffix are opened


# --- sources ------------------------------------------------------------------------------------------------------


def read_in_folder(folder: Path, table: Path) -> bytes:
    """A table of labels, in a folder or beside it."""
    return read_table(table)


def no_labels(place: Path) -> dict[str, Labels]:
    """What most sources say of their images beside the names."""
    return {}


class Source(NamedTuple):
    """What --data can name: a folder of images, or a file that holds many.

    `names` lists its images in any order, by names that stay (with "/" between folders, if it has any); `open` opens
    one of them as Pillow does. Whatever `open` raises says that this image is unreadable. The others may be left as
    they are: `look` tells whether an image has been changed, `read` reads a table of labels in the source or beside
    it, or raises an OSError, and `labels` are what the source itself says of its images.
    """

    names: Callable[[Path], Iterable[str]]
    open: Callable[[Path, str], AbstractContextManager[Image.Image]]
    look: Callable[[Path, str, bool], Fingerprint] = fingerprint
    read: Callable[[Path, Path], bytes] = read_in_folder
    labels: Callable[[Path], dict[str, Labels]] = no_labels


def names_in_folder(folder: Path, passed_over: Counter[str] | None = None) -> Iterator[str]:
    """The paths of all images below the folder, in no particular order.

    Links to folders are followed after all real folders, and no folder is entered twice, so a loop does no harm.

    Args:
        folder: Where to look.
        passed_over: Counts, by kind, what looks like a picture but is not read, and the folders not looked into.
    """
    passed_over = Counter() if passed_over is None else passed_over
    starts, seen, misses = [os.fspath(folder)], set[tuple[int, ...]](), Counter[str]()
    while starts:
        for path, folders, files in os.walk(starts.pop(starts.index(min(starts))), onerror=_unreadable):
            if (identity := os.stat(path)[1:3]) in seen:  # inode and device
                folders.clear()
                continue
            seen.add(identity)
            if folders:
                skipped = _not_entered(path, folders)
                passed_over.update(skipped.values())
                folders[:] = [name for name in folders if name not in skipped]
                starts += filter(os.path.islink, (os.path.join(path, name) for name in folders))
            below = f"{Path(path).relative_to(folder).as_posix()}/".removeprefix("./")
            for name in files:
                # A broken link has an image's name too: it is to be named as unreadable, not passed over.
                if name[0] != "." and name.lower().endswith(SUFFIXES):
                    yield below + name
                elif kind := _passed_over(path, name, misses):
                    passed_over[kind] += 1


def _not_entered(folder: str, folders: Sequence[str]) -> dict[str, str]:
    """The folders that are not looked into, with what they are counted as; parts of a run hold our own pictures."""
    parts = [name for name in folders if name.partition(".old-")[0] in PARTS_OF_RUN]
    if not any(os.path.isfile(os.path.join(folder, name, "settings.json")) for name in parts):
        parts = []
    return {
        **{name: "hidden folder" for name in folders if name[0] == "."},
        **{name: f"folder {name}" for name in folders if name.lower() in SYSTEM_NAMES},
        **dict.fromkeys(parts, "folder of a run of lightdiff"),
    }


def _passed_over(folder: str, name: str, misses: Counter[str]) -> str:
    """What kind of picture a file is that is not read; empty if it is none.

    Files whose suffix says nothing are opened, until as many of one suffix as `MISSES` were no pictures.
    """
    suffix = os.path.splitext(name)[1].lower()
    if name[0] == ".":
        return "hidden file" if name.lower().endswith((*SUFFIXES, *UNREAD_SUFFIXES)) else ""
    if name.lower() in SYSTEM_NAMES or suffix in UNREAD_SUFFIXES:
        return suffix if suffix in UNREAD_SUFFIXES else name
    if misses[suffix] == MISSES:
        return ""
    with suppress(OSError), open_regular(os.path.join(folder, name)) as file:
        if found := picture_format(file.read(HEAD)):
            return f"{found} named {suffix}" if suffix else f"{found} without a suffix"
    misses[suffix] += 1
    return ""


def _unreadable(error: OSError) -> NoReturn:
    raise UserError(f"--data: the folder {error.filename} cannot be read: {error.strerror}") from error


def open_in_folder(folder: Path, name: str) -> AbstractContextManager[Image.Image]:
    """The image file, open but not yet decoded."""
    return open_image(os.path.join(folder, name))


FOLDER = Source(names_in_folder, open_in_folder)
ARCHIVE = Source(names_in_archive, open_in_archive, look_in_archive, read_beside_images, labels_in_archive)
SOURCES: dict[str, Source] = dict.fromkeys(ARCHIVES, ARCHIVE)  # files that hold many images, by suffix
EXTRA_SOURCES = {  # imported when they are asked for; hf://datasets/... is a path that begins with hf:
    ".parquet": "lightdiff.extras.parquet:SOURCE",
    "hf:": "lightdiff.extras.hub_data:SOURCE",
}


def source_of(place: Path) -> Source:
    """How the images that --data names are listed and opened.

    Raises:
        UserError: If there is nothing, or a file that is no source.
    """
    if os.path.isdir(place):
        return FOLDER
    suffix = "hf:" if place.parts[:1] == ("hf:",) else place.suffix.lower()
    if suffix in EXTRA_SOURCES:
        source: Source = resolve_name(EXTRA_SOURCES[suffix])
        return source
    if os.path.isfile(place) and suffix in SOURCES:
        return SOURCES[suffix]
    archives_at(place)
    return ARCHIVE


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
    made_of = _made_of(images)
    if kept and made_of:
        with suppress(UserError):
            if (table := ImageTable.read(kept)).made_of == made_of:
                return ImageList(table)
    with console.status("looking for images") as line:
        found = find_images(
            images.data, images.val_share, lambda n: line.update(f"looking for images: {n:,}"), images.labels
        )
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True)
    found.files.table.made_of = made_of
    return found.files


def _made_of(images: ImageSettings) -> str:
    """A digest of all that a list depends on; empty if there are sources that cannot be known without a search."""
    if any(source_of(place) is not ARCHIVE for place in images.data):
        return ""
    parts = [(str(place), state_of(place)) for place in images.data]
    labels = file_state(images.labels) if images.labels and images.labels.is_file() else str(images.labels)
    return hashlib.sha256(repr([__version__, parts, images.val_share, labels]).encode()).hexdigest()


def scan(
    folders: Sequence[Path], val_share: float, report: Report | None = None, table: Path | None = None
) -> ImageList:
    """The images that `find_images` finds."""
    return find_images(folders, val_share, report, table).files


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
    layouts, all_passed_over, notes = list[Layout](), Counter[str](), list[str]()
    labels, indexed, used = list[Mapping[str, Labels]](), dict[int, Images](), list[list[str]]()
    splits, roles = list[NDArray[np.uint8]](), folder_roles(folders)

    def drawn(name: str) -> bool:
        return val_share > 0 and _position(name) < val_share

    for root, (folder, source) in enumerate(zip(folders, _sources(folders), strict=True)):
        passed_over = Counter[str]()
        list_names = partial(names_in_folder, passed_over=passed_over) if source is FOLDER else source.names
        names = sorted(_counted(list_names(folder), sum(map(len, used)), report))
        passed_over += open_archive(folder).passed_over if source is ARCHIVE else Counter()
        if not names:
            there = f"; {passed_over_note(passed_over)}" if passed_over else ""
            held = [suffix for suffix in ARCHIVES if source is FOLDER and any(folder.glob(f"*{suffix}"))]
            there += f"; for the archives in it: --data '{folder}/*{held[0]}'" if held else ""
            raise UserError(f"--data: {folder} holds no image (no file ends in {', '.join(sorted(SUFFIXES))}){there}")
        all_passed_over += passed_over
        kept, originals = find_copies(folder, names, partial(source.open, folder), notes)
        read = partial(source.read, folder)
        layouts.append(layout(folder, kept, read))
        own = dict[str, Split | None].fromkeys(kept)
        if roles[root] or any("/" in name for name in kept):
            own, said = own_split(kept, roles[root])
            if layouts[-1] == "plain" and (stray := stray_images(kept)):
                said.append(f"its folders are not taken for classes, as {stray[0]} lies in none of them")
            notes += [f"{folder}: {note}" for note in said]
        labels.append({})
        if table:
            indexed[root] = Images(folder, names)
        elif given := source.labels(folder):
            labels[-1] = given
        elif layouts[-1] in LABELS:
            labels[-1] = LABELS[layouts[-1]](kept)
            unread = [path for name in UNREAD_TABLES if (path := folder / name).is_file()]
            notes += [f"{path} is not read; to have labels from it: --labels {path}" for path in unread]
        else:
            for own_table in label_tables(folder, kept, read):
                rows = read_labels(own_table, "--data", {root: Images(folder, names)}, notes, read)
                labels[-1] = {**labels[-1], **{name: given for (_, name), given in rows.items()}}
        held_out = (split == "val" if split else drawn(originals.get(name, name)) for name, split in own.items())
        splits.append(np.fromiter(held_out, np.uint8, len(own)))
        used.append(list(own))
    if all_passed_over:
        notes.insert(0, passed_over_note(all_passed_over))
    if table:
        by_root: list[dict[str, Labels]] = [{} for _ in folders]
        for (root, name), row in read_labels(table, "--labels", indexed, notes).items():
            by_root[root][name] = row
        labels = list(by_root)
    images = ImageTable.of_columns(
        chain.from_iterable(used),
        np.repeat(np.arange(len(folders), dtype=np.int32), [len(names) for names in used]),
        np.concatenate(splits),
        (of.get(name, {}) for names, of in zip(used, labels, strict=True) for name in names),
    )
    without = np.flatnonzero((images.codes < 0).all(0))
    if table and len(without):
        example = f"(such as {images.name(int(without[0]))})"
        notes.append(f"{len(without):,} of {len(images):,} images have no label in {table} {example}")
    if images.splits.all():
        last = max(range(len(images)), key=lambda i: _position(images.name(i)))
        images.splits[last] = SPLITS.index("train")
    places.cache_clear()  # which holds all names
    return Listing(ImageList(images), layouts, all_passed_over, notes)


def passed_over_note(passed_over: Counter[str]) -> str:
    """What was passed over, pictures before folders, most of it first, and how to have it read."""
    kinds = sorted(passed_over.items(), key=lambda pair: ("folder" in pair[0], -pair[1], pair[0]))[:KINDS]
    more = f" and {len(passed_over) - KINDS} other kinds" if len(passed_over) > KINDS else ""
    names = [name for name in ("HEIC", "AVIF") if any(name[:3] in kind.upper() for kind in passed_over)]
    hint = "".join(f"; to read {name}: {how}" for name in names if (how := how_to_read(name)))
    return f"passed over: {', '.join(f'{kind} ({count:,})' for kind, count in kinds)}{more}{hint}"


def _counted(names: Iterable[str], before: int, report: Report | None) -> Iterator[str]:
    """The names; now and then their number and the one before is reported."""
    for count, name in enumerate(names, before + 1):
        if report and count % REPORT_EVERY == 0:
            report(count)
        yield name


def _sources(folders: Sequence[Path]) -> list[Source]:
    """The sources that --data names, none of which holds another."""
    if not folders:
        raise UserError("--data: name a folder of images")
    for (i, inner), (j, outer) in permutations(enumerate(folder.resolve() for folder in folders), 2):
        # Its images would be taken twice, under two names: once for training, perhaps, and once for validation.
        if i > j and inner == outer:
            raise UserError(f"--data: {folders[i]} is given twice")
        if outer in inner.parents:
            raise UserError(f"--data: {folders[i]} lies inside {folders[j]}; name only one of them")
    return [source_of(folder) for folder in folders]


def _position(name: str) -> float:
    """The name's hash, a number in [0, 1). Unicode is normalised: some systems store "é" as two characters."""
    text = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64


def lookers(folders: Sequence[Path]) -> list[Look]:
    """For each source, what tells whether an image of it has been changed."""
    return [partial(source_of(folder).look, folder) for folder in folders]


def full_paths(files: Sequence[ImageFile], folders: Sequence[Path]) -> list[str]:
    """Where each image lies on this machine."""
    return [os.path.join(folders[file.root], file.path) for file in files]
