"""Copies of one photograph among the images of a source: left out, or at least not split from each other.

Two folders hold copies if their images share names and look alike. cats/0001.jpg and dogs/0001.jpg do not.
"""

import itertools
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from lightdiff.data.layouts import FIRST, LAST, MAX_VARIANTS, Mask, Names
from lightdiff.errors import UserError
from lightdiff.extras.data.splits import places

Read = Sequence[tuple[str, str]]  # of each name: its variant, and the rest of its path
Open = Callable[[str], AbstractContextManager[Image.Image]]
Looker = Callable[[str], "Look | None"]
Order = Literal["first", "second", "same size", ""]

# Words of copies that may be cropped, and so look different: FFHQ's folders, thumbnails, FairFace's margins.
COPY = re.compile(r"(?<![a-z])thumb(nail)?s?(?![a-z])|\d{2,5}x\d{2,5}|in-the-wild", re.IGNORECASE)
MARGIN = re.compile(r"(margin|padding)[-_]?\d|^[01]\.25$", re.IGNORECASE)
# Other words of copies, which count where there are many others.
WORD = re.compile(r"^(tiny|small|medium|large|full|orig(inals?)?|previews?|(hi|low?)-?res|edited)$", re.IGNORECASE)
DEPTHS = 3  # folders of a path that are tried
LOOKS = 8  # photographs that are compared,
FEWEST = 4  # or as many, where there are fewer
CLOSE = 0.2  # between two sizes of a picture, of the difference of two pictures
MAX_PIXELS = 50e6  # that are decoded for a look
REST = "the rest"  # how images in none of the folders that are compared are called
LARGER = 1.2  # times as many pixels


class Look(NamedTuple):
    """The pixels of a picture, reduced to 8 x 8, and its area."""

    pixels: npt.NDArray[np.float32]
    area: int


def find_copies(folder: Path, names: Names, open_image: Open, notes: list[str]) -> tuple[Mask, dict[str, str]]:
    """Which images of a source to take, (n,), and for those that are copies of others that are taken, which ones.

    Of copies at several sizes the largest are taken. Where they have one size all are, on one side of the split.
    `notes` takes what is to be said.

    Raises:
        UserError: Only the user can say which of them to take.
    """
    originals, taken = dict[str, str](), np.ones(len(names), bool)
    if not all(name.endswith(names[0].rpartition(".")[2]) for name in names):
        stems = dict[str, str]()
        for name in names:
            if (first := stems.setdefault(posixpath.splitext(name)[0], name)) != name:  # 1.png, after 1.jpg
                originals[name] = first
    look = lru_cache(maxsize=None)(partial(_look, open_image))
    judge = partial(_judge, folder, look, originals, notes)
    folders = [partial(_by_folder, depth) for depth in range(DEPTHS)]
    for read in (*folders, partial(_by_part, LAST), partial(_by_part, FIRST)):
        kept = judge(names, read(names))
        taken[taken] = kept
        names = names.where(kept)
    return taken, {name: _first(name, originals) for name in originals}


def _first(name: str, originals: Mapping[str, str]) -> str:
    """The image that decides on which side of the split this one and all its copies fall."""
    while name in originals:
        name = originals[name]
    return name


def _variants(parts: set[str]) -> set[str]:
    """Those of the parts of names that may tell copies apart: all, if they are few, or else those that are words."""
    words = parts if len(parts) <= MAX_VARIANTS else {part for part in parts if not part.isdigit()}
    if len(words) > MAX_VARIANTS:
        words = {part for part in parts if COPY.search(part) or WORD.search(part)}
    return words if len(words) <= MAX_VARIANTS else set()


def _by_folder(depth: int, names: Names) -> Read:
    """The folder of each image at this depth, split folders aside, and the rest of its path; empty if none matters."""
    lie, homes = places(names), names.homes[1].tolist()
    variants = _variants({place.folders[depth] for place in lie if len(place.folders) > depth})
    if not variants:
        return []
    cut = list[tuple[str, str]]()
    for role, folders in lie:
        variant = folders[depth] if len(folders) > depth and folders[depth] in variants else ""
        others = (*folders[:depth], *folders[depth + 1 :]) if variant else folders
        cut.append((variant, "/".join((role, *others))))
    stems = (posixpath.splitext(posixpath.basename(name))[0] for name in names)
    return [(cut[home][0], f"{cut[home][1]}/{stem}") for home, stem in zip(homes, stems, strict=True)]


def _by_part(pattern: re.Pattern[str], names: Names) -> Read:
    """A part of each file's name, and the rest of its path; empty if the part is the same in all, or of many kinds."""
    parts = pattern.findall("\n".join(names))
    variants = _variants(set(parts))
    if not variants or (len(set(parts)) == 1 and len(parts) == len(names)):
        return []
    cut = []
    for name in names:
        part = pattern.search(name)
        chosen = part if part and part[1] in variants else None
        stem = posixpath.splitext(name)[0]
        rest = posixpath.splitext(name[: chosen.start()] + name[chosen.end() :])[0] if chosen else stem
        cut.append((stem, f"*{chosen[1]}*" if chosen else "", rest))
    others = {rest for _, part, rest in cut if part}
    return [("", stem) if stem in others else (part, rest) for stem, part, rest in cut]  # IMG_1, beside small IMG_1


def _judge(folder: Path, look: Looker, originals: dict[str, str], notes: list[str], names: Names, read: Read) -> Mask:
    """Look at each two variants that share paths; keep all images, (n,), but those of the smaller one, and say so."""
    images: dict[str, dict[str, str]] = defaultdict(dict)  # by variant and the rest of the path
    for name, (variant, rest) in zip(names, read, strict=bool(read)):
        images[variant][rest] = name
    worse, better, left_out = set[str](), set[str](), set[tuple[str, str]]()
    for one, other in itertools.combinations(sorted(images), 2):
        shared = [rest for rest in images[one] if rest in images[other]]
        if not shared:
            continue
        if MARGIN.search(one) and MARGIN.search(other):
            raise UserError(f"--data: {folder} holds the same photographs in {one} and in {other}: name one of these")
        order = _order((one, other), [(images[one][rest], images[other][rest]) for rest in shared], look)
        if order == "same size":
            for rest in shared:
                first, second = (_first(images[variant][rest], originals) for variant in (one, other))
                if first != second:
                    originals[second] = first
            notes.append(
                f"{folder}: {one or REST} and {other or REST} seem to hold the same photographs; both are used, and "
                "none is split from its copy"
            )
        elif order:
            chosen, smaller = (one, other) if order == "first" else (other, one)
            better.add(chosen or REST)
            worse.add(smaller or REST)
            left_out.update((smaller, rest) for rest in shared)
    if left_out:
        kept = np.array([of not in left_out for of in read])
        notes.append(
            f"{folder}: {(~kept).sum():,} images in {', '.join(sorted(worse))} are left out, copies of those "
            f"in {', '.join(sorted(better - worse))}; to take them instead, name their folder"
        )
        return kept
    return np.ones(len(names), bool)


def _order(pair: tuple[str, str], shared: list[tuple[str, str]], look: Looker) -> Order:
    """Which of two variants is the better one, by what their names say or, where that is not enough, by a look."""
    if all(map(COPY.search, pair)) and _rank(pair[0]) != _rank(pair[1]):
        return "first" if _rank(pair[0]) > _rank(pair[1]) else "second"
    looks = [(look(one), look(other)) for one, other in shared[:: max(1, len(shared) // LOOKS)][:LOOKS]]
    seen = [(a, b) for a, b in looks if a and b]
    if len(seen) < FEWEST:
        return ""
    first, second = (np.stack([x.pixels for x in column]) for column in zip(*seen, strict=True))
    distances = np.abs(first[:, None] - second[None]).mean((2, 3, 4))
    hits = (distances.argmin(1) == np.arange(len(seen))).sum()
    if hits < len(seen) - len(seen) // LOOKS:  # a copy is more like its own photograph than like any other
        return ""
    larger = [b.area / a.area for a, b in seen]
    close = np.median(distances.diagonal()) < CLOSE * np.median(distances)
    if close or any(map(COPY.search, pair)):
        if min(larger) > LARGER:
            return "second"
        if max(larger) < 1 / LARGER:
            return "first"
    return "same size"


def _rank(variant: str) -> int:
    """How many pixels the name of a copy says it has; those in the wild have some, but are not aligned."""
    return max((int(side) for side in re.findall(r"(\d{2,5})x\d", variant)), default=0)


def _look(open_image: Open, name: str) -> Look | None:
    try:
        with open_image(name) as image:
            area = image.width * image.height
            image.draft("RGB", (64, 64))
            if image.width * image.height > MAX_PIXELS:
                return None
            pixels = image.convert("RGB").resize((8, 8), Image.Resampling.BOX)
            return Look(np.asarray(pixels, dtype=np.float32), area)
    except Exception:  # training says what is wrong with it
        return None
