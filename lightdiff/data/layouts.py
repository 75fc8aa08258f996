"""What the names of a source's images say: the layout, the classes, and whether to look closer. Opens no image."""

import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Literal

from lightdiff.on_demand import on_demand

Split = Literal["train", "val"]
Layout = Literal["FairFace", "StyleGAN", "class folders", "plain"]
Labels = dict[str, str]
Read = Callable[[Path], bytes]

# Tables of labels that come with data sets: FairFace's, and StyleGAN's.
TABLES = ("fairface_label_train.csv", "fairface_label_val.csv", "dataset.json")
# Of a file's name: the suffix, the last part, as in 1_small.jpg, and the first, as in small_1.jpg
SUFFIX = re.compile(r"(?<=[^/\n])\.[^./\n]*$", re.MULTILINE)
LAST = re.compile(r"[-_@ ]([^-_@ /.\n]+)(?=\.\w+$)", re.MULTILINE)
FIRST = re.compile(r"(?:^|(?<=/))([^-_@ /.\n]+)[-_@ ](?=[^/\n]*$)", re.MULTILINE)
MAX_VARIANTS = 6  # more folders than a photograph has sizes are classes
SPLIT = re.compile("train|val|test", re.IGNORECASE)


def common_folder(names: Sequence[str]) -> str:
    """The folder, with a "/" at its end, that holds all images; empty if that is the source itself."""
    common = posixpath.commonpath([posixpath.dirname(name) for name in (min(names), max(names))])
    return f"{common}/" if common else ""


@lru_cache(maxsize=1)  # asked for several times in a row
def folders_of(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The folders of each image below the one that holds all, split folders (train, val, test) aside."""
    if has_split_folders(names):
        return [place.folders for place in on_demand("data.splits:places")(names)]
    start = len(common_folder(names))
    homes = [name[start:].rpartition("/")[0] for name in names]
    parts = {home: tuple(home.split("/")) if home else () for home in set(homes)}  # far fewer than names
    return [parts[home] for home in homes]


def has_split_folders(names: Iterable[str]) -> bool:
    """Whether a folder's name speaks of training, validation or testing; that of a class may, too."""
    return any(map(SPLIT.search, {name.rpartition("/")[0] for name in names}))


def layout(names: Sequence[str], tables: Sequence[Path] = ()) -> Layout:
    """What the images of a source look like: a data set with its own `tables`, one folder a class, or neither."""
    if tables:
        return "StyleGAN" if tables[0].name == TABLES[-1] else "FairFace"
    # Folders such as 00000 and 01000 number the images; they say nothing about them.
    return "plain" if all(re.fullmatch("[0-9]{5}", name) for name in set(classes(names))) else "class folders"


def classes(names: Sequence[str]) -> list[str]:
    """The class of each image: its first folder where these differ, split folders aside. Empty if any has none."""
    if any("/" not in name for name in names):
        return []
    folders = folders_of(tuple(names))
    for depth in range(min(map(len, folders))):
        if len(kinds := {parts[depth] for parts in folders}) > 1:
            of = {kind: unicodedata.normalize("NFC", kind) for kind in kinds}
            return [of[parts[depth]] for parts in folders]
    return []


def data_set_tables(folder: Path, names: Sequence[str], read: Read) -> dict[Path, bytes]:
    """The `TABLES` beside all images or above, nearest first: in --data or, FairFace's, beside it.

    `read` reads a table, or raises an OSError.
    """
    place = folder / common_folder(names)
    found = dict[Path, bytes]()
    for above in (place, *place.parents[: len(place.parts) - len(folder.parts) + 1]):
        for table in TABLES:
            with suppress(OSError):
                found[above / table] = read(above / table)
    return found


def may_hold_copies(names: Sequence[str]) -> bool:
    """Whether images can be copies of one another by their names, which differ in a folder, a suffix or one part.

    A part is the first or last of several, as in small_1.jpg. Where there are many, numbers count images.
    """
    text = "\n".join(names)
    stems = SUFFIX.sub("", text).split("\n")
    if len({stem.rpartition("/")[2] for stem in stems}) < len(names) or len(stems) > len(names):
        return True
    for pattern in (LAST, FIRST):
        parts = pattern.findall(text)
        kinds = set(parts)
        if len(kinds) == 1 and len(parts) == len(names):  # as in IMG_0001.jpg
            continue
        if kinds and (len(kinds) <= MAX_VARIANTS or not all(map(str.isdigit, kinds))):
            rests = SUFFIX.sub("", pattern.sub("", text)).split("\n")
            cut = [rest for rest, stem in zip(rests, stems, strict=True) if rest != stem]
            if len({*stems, *cut}) < len(stems) + len(cut):
                return True
    return False


def _of_classes(names: Sequence[str], of: Sequence[str]) -> dict[str, Labels]:
    """The label of each image; those of a class share it."""
    labels = {value: {"class": value} for value in set(of)}
    return {name: labels[value] for name, value in zip(names, of, strict=True)}


# The labels of each image that has some, by layout; those of other layouts come from their tables.
LABELS: dict[Layout, Callable[[Sequence[str]], dict[str, Labels]]] = {
    "class folders": lambda names: _of_classes(names, classes(names)),
    "plain": lambda names: {},
}
