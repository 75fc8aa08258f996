"""What a user's folders say beyond classes: split folders (train, val, test), and images beside class folders."""

import re
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from lightdiff.data.layouts import Mask, Names, classes, common_folder, folders_of
from lightdiff.errors import UserError

Role = Literal["train", "val", "test", ""]
ROLES: dict[str, Role] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
FEW_STRAY = 0.05  # share of images beside class folders that is hardly meant


class Place(NamedTuple):
    """Where images lie: the role of the split folder above them, if any, and their other folders."""

    role: Role
    folders: tuple[str, ...]


def places(names: Names) -> list[Place]:
    """The place of each of `names.homes`, counted from the folder that holds all images.

    Split folders lie at the top (train/cat/1.jpg) or in every class (cat/train/1.jpg).
    """
    start = len(common_folder(names))
    parts = [tuple(filter(None, home[start:].split("/"))) for home in names.homes[0]]
    depth, roles = 0, _top_roles({part[0] for part in parts if part})
    if not roles and all(len(part) > 1 and part[1].lower() in ROLES for part in parts):
        depth, roles = 1, {part[1]: ROLES[part[1].lower()] for part in parts}
        roles = roles if len(set(roles.values())) > 1 else {}
    found = []
    for part in parts:
        split = len(part) > depth and part[depth] in roles
        found.append(Place(roles[part[depth]], part[:depth] + part[depth + 1 :]) if split else Place("", part))
    return found


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
    """The role of each of several --data folders, if their own names are those of split folders."""
    _check_apart(folders)
    roles = _top_roles({folder.name for folder in folders})
    of = [roles.get(folder.name, "") for folder in folders]
    if "val" not in of:  # some of the others are held out
        of = ["test" if role == "test" else "" for role in of]
    return of if set(of) != {"test"} else [""] * len(of)


def _check_apart(folders: Sequence[Path]) -> None:
    """Check that there is a --data folder, and none lies inside another.

    Raises:
        UserError: If not.
    """
    if not folders:
        raise UserError("--data: name a folder or an archive of images")
    for (i, inner), (j, outer) in permutations(enumerate(folder.resolve() for folder in folders), 2):
        # Its images would be taken twice, under two names: once for training, perhaps, and once for validation.
        if i > j and inner == outer:
            raise UserError(f"--data: {folders[i]} is given twice")
        if outer in inner.parents:
            raise UserError(f"--data: {folders[i]} lies inside {folders[j]}; name only one of them")


def own_split(folder: Path, names: Names, whole: Role, notes: list[str]) -> tuple[Mask, Mask | None]:
    """Which images of a source to use, (n,), and which of these the user's folders hold out; None if they do not say.

    Folders for testing are left out, unless there is nothing else. A folder for validation makes the rest training.
    `whole` is the role of the source itself; `notes` takes what is to be said.
    """
    roles = np.array([whole or place.role for place in places(names)])[names.homes[1]]
    used = roles != "test"
    if not used.any() and not whole:
        return ~used, None
    held_out: Mask = roles[used] == "val"
    said, count, split = [], len(held_out), int(held_out.sum())
    by_folders = bool(count and whole) or 0 < split < count
    if by_folders:
        said.append(f"split by its folders into {count - split:,} training and {split:,} validation images")
    if left_out := len(names) - count:
        said.append(f"{left_out:,} images in a folder for testing are left out")
    if said:
        notes.append(f"{folder}: {'; '.join(said)}")
    return used, held_out if by_folders else None


def note_stray_images(folder: Path, names: Names, notes: list[str]) -> None:
    """Say that a few images lie beside the folders of all others, without which these would be classes."""
    stray = np.array([not parts for parts in folders_of(names)])[names.homes[1]]
    if stray.sum() <= FEW_STRAY * len(names):
        others = classes(names.where(~stray))
        if others and not all(map(str.isdigit, others)):
            first = names[int(stray.argmax())]
            notes.append(f"{folder}: its folders are not taken for classes, as {first} lies in none of them")
