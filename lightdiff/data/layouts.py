"""What the names of a source's images say: the user's own split, the layout, the classes. Opens no image."""

import posixpath
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from lightdiff.run_folder import open_regular

Split = Literal["train", "val"]
Role = Literal["train", "val", "test", ""]
Layout = Literal["FairFace", "StyleGAN", "class folders", "plain"]
Labels = dict[str, str]
Read = Callable[[Path], bytes]

ROLES: dict[str, Role] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
FAIRFACE_TABLES = ("fairface_label_train.csv", "fairface_label_val.csv")
FAIRFACE_LABELS = ("age", "gender", "race")
STYLEGAN_TABLE = "dataset.json"
# What systems keep for themselves in the folders of users, in lower case: thumbnails, deleted files, other versions.
SYSTEM_NAMES = frozenset(
    "@eadir @tmp @recycle @recently-snapshot #recycle #snapshot $recycle.bin recycler recycled __macosx lost+found "
    "lost.dir _vti_cnf _gsdata_ thumbs.db ehthumbs.db ehthumbs_vista.db zbthumbnail.info".split()
) | {"system volume information"}
FEW_STRAY = 0.05  # share of images beside class folders that is hardly meant


class Place(NamedTuple):
    """Where an image lies: the role of the split folder above it, if any, and its other folders."""

    role: Role
    folders: tuple[str, ...]


def common_folder(names: Sequence[str]) -> str:
    """The folder, with a "/" at its end, that holds all images; empty if that is the source itself."""
    common = posixpath.commonpath([posixpath.dirname(name) for name in (min(names), max(names))])
    return f"{common}/" if common else ""


@lru_cache(maxsize=1)  # asked for several times in a row
def places(names: tuple[str, ...]) -> list[Place]:
    """The place of each image, counted from the folder that holds all.

    Split folders lie at the top (train/cat/1.jpg) or in every class (cat/train/1.jpg).
    """
    start = len(common_folder(names))
    homes = [name[start:].rpartition("/")[0] for name in names]
    parts = {home: tuple(home.split("/")) if home else () for home in set(homes)}  # far fewer than names
    depth, roles = 0, _top_roles({part[0] for part in parts.values() if part})
    if not roles and all(len(part) > 1 and part[1].lower() in ROLES for part in parts.values()):
        depth, roles = 1, {part[1]: ROLES[part[1].lower()] for part in parts.values()}
        roles = roles if len(set(roles.values())) > 1 else {}
    found = {home: Place("", part) for home, part in parts.items()}
    for home, part in parts.items():
        if len(part) > depth and part[depth] in roles:
            found[home] = Place(roles[part[depth]], part[:depth] + part[depth + 1 :])
    return [found[home] for home in homes]


def _top_roles(folders: set[str]) -> dict[str, Role]:
    """The split folders among those at the top, with their roles."""
    exact = {folder: ROLES[folder.lower()] for folder in folders if folder.lower() in ROLES}
    if exact.keys() == folders:
        return exact
    # train2017, seg_test, DIV2K_valid_HR, testA: words that are a role, if every folder has one and two differ.
    words = {f: [w.lower().removesuffix("set") for w in re.findall("[A-Z]?[a-z]+|[A-Z]+", f)] for f in folders}
    named = {folder: ROLES[word] for folder in folders for word in words[folder] if word in ROLES}
    if named.keys() == folders and len(set(named.values())) > 1:
        return named
    # A lone folder "train" beside others is a class of vehicles.
    return {} if set(exact.values()) == {"train"} else exact


def folder_roles(folders: Sequence[Path]) -> list[Role]:
    """The role of each --data folder, if several are given and their own names are those of split folders."""
    if len(folders) == 1:
        return [""]
    roles = _top_roles({folder.name for folder in folders})
    of = [roles.get(folder.name, "") for folder in folders]
    if "val" not in of:  # some of the others are held out
        of = ["test" if role == "test" else "" for role in of]
    return of if set(of) != {"test"} else [""] * len(of)


def own_split(names: Sequence[str], whole: Role = "") -> tuple[dict[str, Split | None], list[str]]:
    """The images to use, each with the split that the user's folders give it, if they do; and what is to be said.

    Folders for testing are left out, unless there is nothing else. A folder for validation makes the rest training.
    `whole` is the role of the --data folder itself.
    """
    roles = {name: whole or place.role for name, place in zip(names, places(tuple(names)), strict=True)}
    used = {name: role for name, role in roles.items() if role != "test"}
    if not used and not whole:
        return dict.fromkeys(names), []
    held_out = sum(role == "val" for role in used.values())
    said, splits = [], dict[str, Split | None].fromkeys(used)
    if (used and whole) or 0 < held_out < len(used):
        splits = {name: "val" if role == "val" else "train" for name, role in used.items()}
        said.append(f"split by its folders into {len(used) - held_out:,} training and {held_out:,} validation images")
    if left_out := len(names) - len(used):
        said.append(f"{left_out:,} images in a folder for testing are left out")
    return splits, ["; ".join(said)] if said else []


def read_table(table: Path) -> bytes:
    """The bytes of a table of labels, in a folder or beside it."""
    with open_regular(table) as stream:
        return stream.read()


def layout(folder: Path, names: Sequence[str], read: Read = read_table) -> Layout:
    """What the images of this source look like: a known data set, one folder a class, or neither."""
    if tables := label_tables(folder, names, read):
        return "StyleGAN" if tables[0].name == STYLEGAN_TABLE else "FairFace"
    # Folders such as 00000 and 01000 number the images; they say nothing about them.
    return "plain" if all(re.fullmatch("[0-9]{5}", name) for name in set(classes(names))) else "class folders"


def classes(names: Sequence[str]) -> list[str]:
    """The class of each image: its first folder where these differ, split folders aside. Empty if any has none."""
    if any("/" not in name for name in names):
        return []
    lie = places(tuple(names))
    folders = {place: place.folders for place in set(lie)}
    while all(folders.values()):
        if len({parts[0] for parts in folders.values()}) > 1:
            of = {place: unicodedata.normalize("NFC", parts[0]) for place, parts in folders.items()}
            return [of[place] for place in lie]
        folders = {place: parts[1:] for place, parts in folders.items()}
    return []


def stray_images(names: Sequence[str]) -> list[str]:
    """The few images beside the folders of all others, without which these would be classes."""
    lie = places(tuple(names))
    stray = [name for name, place in zip(names, lie, strict=True) if not place.folders]
    if not 0 < len(stray) <= FEW_STRAY * len(names):
        return []
    others = classes([name for name, place in zip(names, lie, strict=True) if place.folders])
    return stray if others and not all(map(str.isdigit, others)) else []


def label_tables(folder: Path, names: Sequence[str], read: Read) -> list[Path]:
    """FairFace's tables or StyleGAN's dataset.json, beside all images or above: in --data or, FairFace's, beside it.

    FairFace's need its folders train/ or val/, StyleGAN's needs labels. `read` reads a table, or raises an OSError.
    """
    place = folder / common_folder(names)
    above = (place, *place.parents[: len(place.parts) - len(folder.parts) + 1])
    found = dict[Path, bytes]()
    for path in (path / table for path in above for table in (*FAIRFACE_TABLES, STYLEGAN_TABLE)):
        with suppress(OSError):
            found[path] = read(path)
    return _own_tables(found, folder, names) if found else []


def _own_tables(found: Mapping[Path, bytes], folder: Path, names: Sequence[str]) -> list[Path]:
    """Those of the tables found, nearest first, that speak of these images."""
    fairface = [table for table in found if table.name in FAIRFACE_TABLES]
    if fairface and any(re.search("(^|/)(train|val)/", f"{folder.name}/{name}") for name in names):
        return [table for table in fairface if table.parent == fairface[0].parent]
    for table, text in found.items():
        if table.name == STYLEGAN_TABLE and folder in table.parents:
            return [table] if re.match(rb'\s*\{\s*"labels"\s*:\s*\[\s*\[\s*"', text) else []
    return []


def _of_classes(names: Sequence[str], of: Sequence[str]) -> dict[str, Labels]:
    """The label of each image; those of a class share it."""
    labels = {value: {"class": value} for value in set(of)}
    return {name: labels[value] for name, value in zip(names, of, strict=True)}


# The labels of each image that has some, by layout; those of other layouts come from their tables.
LABELS: dict[Layout, Callable[[Sequence[str]], dict[str, Labels]]] = {
    "class folders": lambda names: _of_classes(names, classes(names)),
    "plain": lambda names: {},
}
