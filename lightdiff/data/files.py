"""What --data names -> a list of images, each with its split and its labels. Decodes no image and imports no torch.

The list depends on the names of the images alone: not on where the data lie, nor on the machine or the order in which
its file system lists them.
"""

import csv
import hashlib
import itertools
import json
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from PIL import Image
from rich.console import Console

from lightdiff.data.formats import SUFFIXES, open_image
from lightdiff.errors import UserError
from lightdiff.settings import ImageSettings

Split = Literal["train", "val"]
Layout = Literal["FairFace", "class folders", "plain"]
Labels = dict[str, str]

SPLIT_FOLDERS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
REPORT_EVERY = 1000
FAIRFACE_TABLES = ("fairface_label_train.csv", "fairface_label_val.csv")
FAIRFACE_LABELS = ("age", "gender", "race")
FAIRFACE_SPLITS: dict[str, Split] = {"train": "train", "val": "val"}


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image: `path` (with "/") is its name in the `root`-th --data source, a path below a folder."""

    root: int
    path: str
    split: Split
    labels: Labels


# --- sources ------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """What --data can name: a folder of images, or a file that holds many.

    `names` lists its images in any order, by names that stay (with "/" between folders, if it has any); `open` opens
    one of them as Pillow does. Whatever `open` raises says that this image is unreadable.
    """

    names: Callable[[Path], Iterable[str]]
    open: Callable[[Path, str], AbstractContextManager[Image.Image]]


def names_in_folder(folder: Path) -> Iterator[str]:
    """The paths of all images below the folder, in no particular order.

    Links to folders are followed after all real folders, and no folder is entered twice, so a loop does no harm.
    """
    starts, seen = [os.fspath(folder)], set[tuple[int, ...]]()
    while starts:
        for path, folders, files in os.walk(starts.pop(starts.index(min(starts))), onerror=_unreadable):
            if (identity := os.stat(path)[1:3]) in seen:  # inode and device
                folders.clear()
                continue
            seen.add(identity)
            folders[:] = [name for name in folders if not name.startswith(".")]
            starts += filter(os.path.islink, (os.path.join(path, name) for name in folders))
            below = f"{Path(path).relative_to(folder).as_posix()}/".removeprefix("./")
            # A broken link has an image's name too: it is to be named as unreadable, not passed over.
            yield from (below + name for name in files if name[0] != "." and name.lower().endswith(SUFFIXES))


def _unreadable(error: OSError) -> NoReturn:
    raise UserError(f"--data: the folder {error.filename} cannot be read: {error.strerror}") from error


def open_in_folder(folder: Path, name: str) -> AbstractContextManager[Image.Image]:
    """The image file, open but not yet decoded."""
    return open_image(os.path.join(folder, name))


FOLDER = Source(names_in_folder, open_in_folder)
SOURCES: dict[str, Source] = {}  # files that hold many images, by suffix


def source_of(place: Path) -> Source:
    """How the images that --data names are listed and opened.

    Raises:
        UserError: If there is nothing, or a file that is no source.
    """
    if os.path.isdir(place):
        return FOLDER
    if not os.path.isfile(place):
        raise UserError(f"--data: {place} does not exist")
    if place.suffix.lower() not in SOURCES:
        raise UserError(f"--data: {place} is a file; name the folder that holds the images")
    return SOURCES[place.suffix.lower()]


# --- the list -----------------------------------------------------------------------------------------------------


def list_images(images: ImageSettings, console: Console) -> list[ImageFile]:
    """All images of the --data sources; on a terminal, the console shows how many have been found so far."""
    with console.status("looking for images") as line:
        files = scan(images.data, images.val_share, lambda n: line.update(f"looking for images: {n:,}"), images.labels)
    if images.labels and (without := sum(not file.labels for file in files)):
        console.print(f"note: {without:,} of {len(files):,} images have no label in {images.labels}", soft_wrap=True)
    return files


def scan(
    folders: Sequence[Path],
    val_share: float,
    report: Callable[[int], object] = lambda count: None,
    table: Path | None = None,
) -> list[ImageFile]:
    """Every image of the sources, sorted by source and name (by code point), with its split and its labels.

    `report` is called now and then with the number found so far. Labels come from the folders' names, or from a
    `table`.

    An image is held out for validation when a hash of its path, a number in [0, 1), lies below `val_share`: adding
    files moves no other file. Two exceptions: FairFace keeps its own split (unless its training images are missing),
    and should every image be held out, as happens with two or three, the one with the largest hash is trained on.
    """
    files: list[ImageFile] = []
    for root, (folder, source) in enumerate(zip(folders, _sources(folders), strict=True)):
        names = sorted(_counted(source.names(folder), len(files), report))
        if not names:
            raise UserError(f"--data: {folder} holds no image (no file ends in {', '.join(sorted(SUFFIXES))})")
        recognised = layout(folder, names)
        labels = LABELS[recognised](folder, names)
        own = FAIRFACE_SPLITS if recognised == "FairFace" and any(name.startswith("train/") for name in names) else {}
        for name in names:
            split = own.get(name.partition("/")[0]) or ("val" if _position(name) < val_share else "train")
            files.append(ImageFile(root, name, split, labels.get(name, {})))
    if table is not None:
        files = labelled(files, folders, table)
    if all(file.split == "val" for file in files):
        last = max(range(len(files)), key=lambda i: _position(files[i].path))
        files[last] = replace(files[last], split="train")
    return files


def _counted(names: Iterable[str], before: int, report: Callable[[int], object]) -> Iterator[str]:
    """The names; now and then their number and the one before is reported."""
    for count, name in enumerate(names, before + 1):
        if count % REPORT_EVERY == 0:
            report(count)
        yield name


def _sources(folders: Sequence[Path]) -> list[Source]:
    """The sources that --data names, none of which holds another."""
    if not folders:
        raise UserError("--data: name a folder of images")
    for (i, inner), (j, outer) in itertools.permutations(enumerate(folder.resolve() for folder in folders), 2):
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


def data_digest(files: Sequence[ImageFile]) -> str:
    """A digest of the list of images: names, labels and split, not pixels."""
    return hashlib.sha256(json.dumps([(f.root, f.path, f.split, f.labels) for f in files]).encode()).hexdigest()


def full_paths(files: Sequence[ImageFile], folders: Sequence[Path]) -> list[str]:
    """Where each image lies on this machine."""
    return [os.path.join(folders[file.root], file.path) for file in files]


# --- labels -------------------------------------------------------------------------------------------------------


def layout(folder: Path, names: Sequence[str]) -> Layout:
    """What the images of this source look like: a known data set, one folder a class, or neither."""
    if any(name.startswith(("train/", "val/")) for name in names) and _fairface_tables(folder):
        return "FairFace"
    # Folders such as 00000 and 01000 number the images; they say nothing about them.
    return "plain" if all(re.fullmatch("[0-9]{5}", name) for name in _classes(names)) else "class folders"


def _classes(names: Sequence[str]) -> list[str]:
    """The class of each image: its first folder, or the next one below train/ and val/. Empty if any has none."""
    parts = [name.split("/") for name in names]
    if all(len(part) > 1 and part[0].lower() in SPLIT_FOLDERS for part in parts):
        parts = [part[1:] for part in parts]
    return [part[0] for part in parts] if all(len(part) > 1 for part in parts) else []


def _class_labels(folder: Path, names: Sequence[str]) -> dict[str, Labels]:
    return {name: {"class": found} for name, found in zip(names, _classes(names), strict=True)}


def _fairface_tables(folder: Path) -> list[Path]:
    return [folder / table for table in FAIRFACE_TABLES if (folder / table).is_file()]


def _fairface_labels(folder: Path, names: Sequence[str]) -> dict[str, Labels]:
    rows = [row for table in _fairface_tables(folder) for row in _read_table(table, "--data", FAIRFACE_LABELS)]
    return {row["file"]: {name: row[name] for name in FAIRFACE_LABELS if row[name]} for row in rows}


# The labels of each image that has some, by layout.
LABELS: dict[Layout, Callable[[Path, Sequence[str]], dict[str, Labels]]] = {
    "FairFace": _fairface_labels,
    "class folders": _class_labels,
    "plain": lambda folder, names: {},
}


def _read_table(table: Path, flag: str, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV table that name a file; cells that are missing are empty."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream, restval="")
            rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
            names = [name for name in rows.fieldnames if name]  # a table's index has none
            missing = {"file", *columns}.difference(names)
            if missing:
                hint = "; columns are separated by commas" if len(names) == 1 and ";" in names[0] else ""
                raise UserError(f"{flag}: {table} has no column {', '.join(sorted(missing))}{hint}")
            if len(names) < 2:
                raise UserError(f"{flag}: {table} has no column but file; it needs one for each label")
            return [{name: row[name].strip() for name in names} for row in rows if row["file"].strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{flag}: the table {table} cannot be read: {error}") from error


def labelled(files: Sequence[ImageFile], folders: Sequence[Path], table: Path) -> list[ImageFile]:
    """The files with the labels of a CSV table: a column `file` (the name of an image), and one for each label.

    Files that the table does not name have no label.

    Raises:
        UserError: If it cannot be read, names no file that is there, or one twice with different labels.
    """
    rows: dict[str, dict[str, str]] = {}
    for row in _read_table(table, "--labels"):
        path = posixpath.normpath(row.pop("file").replace("\\", "/"))
        if rows.setdefault(path, row) != row:
            raise UserError(f"--labels: {table} names {path} twice, with different labels")
    found = [replace(file, labels={name: v for name, v in rows.get(file.path, {}).items() if v}) for file in files]
    if not any(file.labels for file in found):
        example = next(iter(rows), "none")
        raise UserError(f"--labels: {table} names no image of {folders[0]}: it has {example}, there is {files[0].path}")
    return found
