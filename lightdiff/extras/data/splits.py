"""What a user's folders say beyond classes: split folders (train, val, test), and images beside class folders."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from lightdiff.data.layouts import Split, classes, common_folder, folders_of

Role = Literal["train", "val", "test", ""]
ROLES: dict[str, Role] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
FEW_STRAY = 0.05  # share of images beside class folders that is hardly meant


class Place(NamedTuple):
    """Where an image lies: the role of the split folder above it, if any, and its other folders."""

    role: Role
    folders: tuple[str, ...]


def places(names: Sequence[str]) -> list[Place]:
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


def own_split(folder: Path, names: Sequence[str], whole: Role, notes: list[str]) -> dict[str, Split | None]:
    """The images of a source to use, each with the split that the user's folders give it, if they do.

    Folders for testing are left out, unless there is nothing else. A folder for validation makes the rest training.
    `whole` is the role of the source itself; `notes` takes what is to be said.
    """
    roles = {name: whole or place.role for name, place in zip(names, places(names), strict=True)}
    used = {name: role for name, role in roles.items() if role != "test"}
    if not used and not whole:
        return dict.fromkeys(names)
    held_out = sum(role == "val" for role in used.values())
    said, splits = [], dict[str, Split | None].fromkeys(used)
    if (used and whole) or 0 < held_out < len(used):
        splits = {name: "val" if role == "val" else "train" for name, role in used.items()}
        said.append(f"split by its folders into {len(used) - held_out:,} training and {held_out:,} validation images")
    if left_out := len(names) - len(used):
        said.append(f"{left_out:,} images in a folder for testing are left out")
    if said:
        notes.append(f"{folder}: {'; '.join(said)}")
    return splits


def note_stray_images(folder: Path, names: Sequence[str], notes: list[str]) -> None:
    """Say that a few images lie beside the folders of all others, without which these would be classes."""
    folders = folders_of(tuple(names))
    stray = [name for name, parts in zip(names, folders, strict=True) if not parts]
    if len(stray) <= FEW_STRAY * len(names):
        others = classes([name for name, parts in zip(names, folders, strict=True) if parts])
        if others and not all(map(str.isdigit, others)):
            notes.append(f"{folder}: its folders are not taken for classes, as {stray[0]} lies in none of them")
