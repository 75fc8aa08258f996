"""Folders of images -> a list of files, each with its split and its labels. Opens no image and imports no torch.

The list depends on the names below the folders alone: not on where the folders lie, nor on the machine or the order in
which its file system lists them.
"""

import csv
import hashlib
import json
import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lightdiff.errors import UserError
from lightdiff.runtime.progress import console
from lightdiff.settings import ImageSettings

Split = Literal["train", "val"]
Layout = Literal["FairFace", "FFHQ", "class folders", "plain"]

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .tif .tiff .ppm .pgm .pbm .pnm .gif".split()
)  # fmt: skip
SPLIT_FOLDERS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
TELL_EVERY = 1000
FAIRFACE_TABLES = ("fairface_label_train.csv", "fairface_label_val.csv")
FAIRFACE_LABELS = ("age", "gender", "race")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image: `path` (with "/") lies below the `root`-th --data folder."""

    root: int
    path: str
    split: Split
    labels: dict[str, str]


def scan(
    folders: Sequence[Path],
    val_share: float,
    found: Callable[[int], object] = lambda count: None,
    table: Path | None = None,
) -> list[ImageFile]:
    """Every image below the folders, sorted by folder and path (by code point), with its split and its labels.

    `found` is told now and then how many there are so far. Labels come from the folders' names, or from a `table`.

    An image is held out for validation when a hash of its path, a number in [0, 1), lies below `val_share`: adding
    files moves no other file. Two exceptions: FairFace keeps its own split (unless its training images are missing),
    and should every image be held out, as happens with two or three, the one with the largest hash is trained on.
    """
    _check_folders(folders)
    files: list[ImageFile] = []
    for root, folder in enumerate(folders):
        listed: list[str] = []
        for path in _image_paths(folder):
            listed.append(path)
            if len(listed) % TELL_EVERY == 0:
                found(len(files) + len(listed))
        paths = sorted(listed)
        if not paths:
            raise UserError(f"--data: {folder} holds no image (no file ends in {', '.join(sorted(SUFFIXES))})")
        recognised = layout(folder, paths)
        labels = _labels(folder, paths, recognised)
        keep_split = recognised == "FairFace" and any(path.startswith("train/") for path in paths)
        for path in paths:
            top = path.partition("/")[0]
            own: Split | None = "train" if top == "train" else "val" if top == "val" else None
            split = own if keep_split and own else _split(path, val_share)
            files.append(ImageFile(root, path, split, labels.get(path, {})))
    if table is not None:
        files = labelled(files, folders, table)
    if all(file.split == "val" for file in files):
        last = max(range(len(files)), key=lambda i: _place(files[i].path))
        files[last] = replace(files[last], split="train")
    return files


def layout(folder: Path, paths: Sequence[str]) -> Layout:
    """What the images at these paths below the folder look like: a known data set, one folder a class, or neither."""
    tops = {path.partition("/")[0] for path in paths if "/" in path}
    if tops & {"train", "val"} and any((folder / table).is_file() for table in FAIRFACE_TABLES):
        return "FairFace"
    if all(_is_ffhq(path) for path in paths):
        return "FFHQ"
    # Folders such as 00000 and 01000 number the images; they say nothing about them.
    classes = _class_folders(paths)
    return "class folders" if classes and not all(_is_number(name) for name in classes) else "plain"


def label_values(labels: Iterable[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """Each label's name with the sorted values it takes, of the labels of each image."""
    values: dict[str, set[str]] = {}
    for found in labels:
        for name, value in found.items():
            values.setdefault(name, set()).add(value)
    return {name: tuple(sorted(values[name])) for name in sorted(values)}


def _check_folders(folders: Sequence[Path]) -> None:
    if not folders:
        raise UserError("--data: name a folder of images")
    for folder in folders:
        if os.path.isfile(folder):
            raise UserError(f"--data: {folder} is a file; name the folder that holds the images")
        if not os.path.isdir(folder):
            raise UserError(f"--data: there is no folder {folder}")
    real = [folder.resolve() for folder in folders]
    for i, inner in enumerate(real):
        for j, outer in enumerate(real):
            # Its images would be taken twice, under two names: once for training, perhaps, and once for validation.
            if i > j and inner == outer:
                raise UserError(f"--data: {folders[i]} is given twice")
            if outer in inner.parents:
                raise UserError(f"--data: {folders[i]} lies inside {folders[j]}; name only one of them")


def _image_paths(folder: Path) -> Iterator[str]:
    """The paths of all images below the folder, in no particular order.

    Links to folders are followed after all real folders, and no folder is entered twice, so a loop does no harm.
    """
    todo, links, seen = [""], list[str](), set[tuple[int, int]]()
    while todo or links:
        if todo:
            below = todo.pop()
        else:
            links.remove(below := min(links))
        try:
            status = os.stat(folder / below)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    path = f"{below}/{entry.name}" if below else entry.name
                    if entry.name.startswith("."):
                        continue
                    if _is_folder(entry):
                        (links if entry.is_symlink() else todo).append(path)
                    # A broken link has an image's name too: it is to be named as unreadable, not passed over.
                    elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                        yield path
        except OSError as error:
            raise UserError(f"--data: the folder {folder / below} cannot be read: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _place(path: str) -> float:
    """The path's hash, a number in [0, 1). Unicode is normalised: some systems store "é" as two characters."""
    name = unicodedata.normalize("NFC", path).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64


def _split(path: str, val_share: float) -> Split:
    return "val" if _place(path) < val_share else "train"


def _is_number(name: str) -> bool:
    return len(name) == 5 and name.isascii() and name.isdecimal()


def _is_ffhq(path: str) -> bool:
    """Whether this is 00000 to 69999, lying flat or in its folder of a thousand."""
    folder, _, name = path.rpartition("/")
    stem = os.path.splitext(name)[0]
    return _is_number(stem) and stem < "70000" and folder in ("", f"{stem[:2]}000")


def _class_folders(paths: Sequence[str]) -> list[str]:
    """The class of each path: its first folder, or the next one below train/ and val/. Empty if any path has none."""
    parts = [path.split("/") for path in paths]
    if all(len(part) > 1 and part[0].lower() in SPLIT_FOLDERS for part in parts):
        parts = [part[1:] for part in parts]
    return [part[0] for part in parts] if all(len(part) > 1 for part in parts) else []


def _labels(folder: Path, paths: Sequence[str], recognised: Layout) -> dict[str, dict[str, str]]:
    if recognised == "class folders":
        return {path: {"class": name} for path, name in zip(paths, _class_folders(paths), strict=True)}
    labels: dict[str, dict[str, str]] = {}
    for table in FAIRFACE_TABLES if recognised == "FairFace" else ():
        if (folder / table).is_file():
            labels.update(_read_fairface(folder / table))
    return labels


def _read_fairface(table: Path) -> dict[str, dict[str, str]]:
    rows = _read_table(table, "--data", FAIRFACE_LABELS)
    return {row["file"]: {name: row[name] for name in FAIRFACE_LABELS if row[name]} for row in rows}


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
    """The files with the labels of a CSV table: a column `file` (a path below a folder of images), and one a label.

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


def full_paths(files: Sequence[ImageFile], folders: Sequence[Path]) -> list[str]:
    """Where each image lies on this machine."""
    return [os.path.join(folders[file.root], file.path) for file in files]


def data_digest(files: Sequence[ImageFile]) -> str:
    """A digest of the list of images: names, labels and split, not pixels."""
    text = json.dumps([(f.root, f.path, f.split, f.labels) for f in files])
    return hashlib.sha256(text.encode()).hexdigest()


def list_images(images: ImageSettings) -> list[ImageFile]:
    """All images of the --data folders; a terminal shows how many there are so far."""
    with console.status("looking for images") as status:
        tell = lambda count: status.update(f"looking for images: {count:,}")  # noqa: E731
        files = scan(images.data, images.val_share, tell, images.labels)
    if images.labels and (without := sum(not file.labels for file in files)):
        console.print(f"note: {without:,} of {len(files):,} images have no label in {images.labels}", soft_wrap=True)
    return files
