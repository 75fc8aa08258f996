"""Copies of one photograph among the images of a source: left out, or at least not split from each other.

Two folders hold copies if their images share names and look alike. cats/0001.jpg and dogs/0001.jpg do not.
"""

import itertools
import math
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from lightdiff.data.layouts import places
from lightdiff.errors import UserError

Open = Callable[[str], AbstractContextManager[Image.Image]]
Looker = Callable[[str], "Look | None"]
Order = Literal["first", "second", "same size", ""]

# Words that name a copy whatever the pictures look like: crops, as FFHQ's and FairFace's, do not look alike.
COPY = re.compile(r"(?<![a-z])thumb(nail)?s?(?![a-z])|\d{2,5}x\d{2,5}|in-the-wild", re.IGNORECASE)
MARGIN = re.compile(r"(margin|padding)[-_]?\d|^\d\.\d+$", re.IGNORECASE)  # of FairFace's crops

SIZE = re.compile(
    rf"{COPY.pattern}|(?<![a-z])(tiny|small|medium|large|full|orig(inals?)?|previews?|(hi|low?)-?res)(?![a-z])|\dpx$",
    re.IGNORECASE,
)
# photo-300x200.jpg or photo-edited.jpg, of photo.jpg
SIZE_IN_NAME = re.compile(r"[-_.](\d{2,5}x\d{2,5}|thumb(nail)?|edited)\.\w+$", re.IGNORECASE | re.MULTILINE)
# The last part of a file's name, as in 1_small.jpg, and the first, as in small_1.jpg
LAST = re.compile(r"[-_@ ]([^-_@ /.\n]+)(?=\.\w+$)", re.MULTILINE)
FIRST = re.compile(r"(?:^|(?<=/))([^-_@ /.\n]+)[-_@ ](?=[^/\n]*$)", re.MULTILINE)
MAX_VARIANTS = 6  # more folders than a photograph has sizes are classes
LOOKS = 8  # photographs that are compared,
FEWEST = 4  # or as many, where there are fewer
CLOSE = 0.2  # between two sizes of a picture, of the difference of two pictures
MAX_PIXELS = 50e6  # that are decoded for a look
LARGER = 1.2  # times as many pixels


class Copies(NamedTuple):
    """The images to take, which of them are copies of others that are taken, and what is to be said."""

    kept: list[str]
    of: dict[str, str]
    notes: list[str]

    def first(self, name: str) -> str:
        """The image that decides on which side of the split this one and all its copies fall."""
        while name in self.of:
            name = self.of[name]
        return name


class Look(NamedTuple):
    """The pixels of a picture, reduced to 8 x 8, and its area."""

    pixels: npt.NDArray[np.float32]
    area: int


def find_copies(folder: Path, names: Sequence[str], open_image: Open) -> Copies:
    """Find the copies among a source's images.

    Of copies at several sizes the largest are taken. Where they have one size all are, on one side of the split.

    Raises:
        UserError: Only the user can say which of them to take.
    """
    found = Copies(list(names), {}, [])
    suffix = posixpath.splitext(names[0])[1]
    if not all(name.endswith(suffix) for name in names):
        stems = dict[str, str]()
        for name in names:
            if (first := stems.setdefault(posixpath.splitext(name)[0], name)) != name:  # 1.png, after 1.jpg
                found.of[name] = first
    look = lru_cache(maxsize=None)(partial(_look, open_image))
    for read in (_by_words, _by_top, _by_child, partial(_by_part, LAST), partial(_by_part, FIRST)):
        _judge(found, folder, read(found.kept), look, read is _by_words)
    return found


def _by_words(names: Sequence[str]) -> list[tuple[str, str]]:
    """The words in each path that name a size, and the rest of the path, which copies share; empty if none has any."""
    homes = {name.rpartition("/")[0] for name in names}
    sized = any(_is_size(part) for home in homes for part in home.split("/"))
    if not sized and not SIZE_IN_NAME.search("\n".join(names)):
        return []
    split = {}
    for home in homes:
        parts = home.split("/")
        sizes = [part for part in parts if _is_size(part)]
        split[home] = "/".join(sizes), "/".join(part for part in parts if part not in sizes)
    read = []
    for name in names:
        home, _, file = name.rpartition("/")
        variant, rest = split[home]
        if size := SIZE_IN_NAME.search(file):
            word = re.sub(r"\d+", "00", size[1])  # all sizes are one variant
            read.append((posixpath.join(variant, f"*-{word}"), f"{rest}/{file[: size.start()]}"))
        else:
            read.append((variant, f"{rest}/{posixpath.splitext(file)[0]}"))
    return read


def _by_top(names: Sequence[str]) -> list[tuple[str, str]]:
    """The first folder of each path, split folders aside, and the rest of the path; empty if there are many folders."""
    lie = places(names)
    if not 1 < len({place.folders[:1] for place in set(lie)}) <= MAX_VARIANTS:
        return []
    read = {place: ("".join(place.folders[:1]), "/".join((place.role, *place.folders[1:]))) for place in set(lie)}
    stems = (posixpath.splitext(posixpath.basename(name))[0] for name in names)
    return [(read[place][0], f"{read[place][1]}/{stem}") for place, stem in zip(lie, stems, strict=True)]


def _by_child(names: Sequence[str]) -> list[tuple[str, str]]:
    """The folder of each image whose parent holds images too, and the rest of the path; empty if there is none."""
    homes = {name.rpartition("/")[0] for name in names}
    read = {}
    for home in homes:
        parent, _, child = home.rpartition("/")
        read[home] = (child, parent) if home and parent in homes else ("", home)
    if not any(child for child, _ in read.values()):
        return []
    parts = (name.rpartition("/") for name in names)
    return [(read[home][0], f"{read[home][1]}/{posixpath.splitext(file)[0]}") for home, _, file in parts]


def _by_part(pattern: re.Pattern[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """A part of each file's name, and the rest of its path; empty if the part is the same in all, or of many kinds."""
    parts = pattern.findall("\n".join(names))
    kinds = set(parts)
    numbers = set(filter(str.isdigit, kinds))
    kinds -= numbers if len(numbers) > MAX_VARIANTS else set()  # 0001, 0002, ...
    if not kinds or len(kinds) > MAX_VARIANTS or (len(set(parts)) == 1 and len(parts) == len(names)):
        return []
    cut = []
    for name in names:
        part = pattern.search(name)
        chosen = part if part and part[1] in kinds else None
        stem = posixpath.splitext(name)[0]
        rest = posixpath.splitext(name[: chosen.start()] + name[chosen.end() :])[0] if chosen else stem
        cut.append((stem, f"*{chosen[1]}*" if chosen else "", rest))
    others = {rest for _, part, rest in cut if part}
    return [("", stem) if stem in others else (part, rest) for stem, part, rest in cut]  # IMG_1, beside small IMG_1


def _judge(found: Copies, folder: Path, read: list[tuple[str, str]], look: Looker, by_words: bool) -> None:
    """Look at each two variants that share paths; leave out the images of the smaller one, and say so."""
    images: dict[str, dict[str, str]] = defaultdict(dict)  # by variant and the rest of the path
    for name, (variant, rest) in zip(found.kept, read, strict=bool(read)):
        images[variant][rest] = name
    if len(images) > MAX_VARIANTS:
        return
    smaller, left_out = dict[str, str](), set[tuple[str, str]]()
    for pair in itertools.combinations(sorted(images), 2):
        shared = [rest for rest in images[pair[0]] if rest in images[pair[1]]]
        if not shared:
            continue
        if by_words and all(map(MARGIN.search, pair)):
            one, other = (f"{folder / _home(images[variant][shared[0]], variant)}" for variant in pair)
            raise UserError(f"--data: {one} and {other} hold the same photographs: name only one of them")
        order = _order(pair, [(images[pair[0]][rest], images[pair[1]][rest]) for rest in shared], look, by_words)
        if order == "same size":
            for rest in shared:
                first, second = (found.first(images[variant][rest]) for variant in pair)
                if first != second:
                    found.of[second] = first
            one, other = (variant or "the rest" for variant in pair)
            found.notes.append(
                f"{folder}: {one} and {other} seem to hold the same photographs; both are used, and none is split from "
                "its copy"
            )
        elif order:
            better, worse = pair if order == "first" else pair[::-1]
            smaller[worse] = better
            left_out.update((worse, rest) for rest in shared)
    if left_out:
        kept = [name for name, of in zip(found.kept, read, strict=True) if of not in left_out]
        taken = sorted({variant or "the rest" for variant in smaller.values()} - smaller.keys())
        count, those = len(found.kept) - len(kept), ", ".join(sorted(smaller))
        found.notes.append(
            f"{folder}: {count:,} images in {those} are left out, copies of those in {', '.join(taken)}; "
            "to take them instead, name their folder"
        )
        found.kept[:] = kept


def _home(name: str, variant: str) -> str:
    """The folder that makes an image one of this variant."""
    folders, words = name.split("/")[:-1], variant.split("/")
    while folders and folders[-1] not in words:
        folders.pop()
    return "/".join(folders)


def _order(pair: tuple[str, str], shared: list[tuple[str, str]], look: Looker, by_words: bool) -> Order:
    """Which of two variants is the better one, by what their names say or, where that is not enough, by a look."""
    first_rank, second_rank = map(_rank, pair)
    if by_words and first_rank is not None and second_rank is not None and first_rank != second_rank:
        return "first" if first_rank > second_rank else "second"
    chosen = shared[:: max(1, len(shared) // LOOKS)][:LOOKS]
    looks = [(look(one), look(other)) for one, other in chosen]
    seen = [(a, b) for a, b in looks if a and b]
    if len(seen) < FEWEST:
        return ""
    first, second = (np.stack([x.pixels for x in column]) for column in zip(*seen, strict=True))
    distances = np.abs(first[:, None] - second[None]).mean((2, 3, 4))
    hits = (distances.argmin(1) == np.arange(len(seen))).sum()
    if hits < len(seen) - len(seen) // LOOKS:  # a copy is more like its own photograph than like any other
        return ""
    larger = [b.area / a.area for a, b in seen]
    if np.median(distances.diagonal()) < CLOSE * np.median(distances) or all(
        _is_size(variant) for variant in pair if variant
    ):
        if min(larger) > LARGER:
            return "second"
        if max(larger) < 1 / LARGER:
            return "first"
    return "same size"


def _is_size(folder: str) -> bool:
    """Whether a folder's name says how large its pictures are: a word, or a number such as 64, 224 or 1024."""
    number = int(folder) if re.fullmatch("[1-9][0-9]{1,3}", folder) else 1
    return bool(SIZE.search(folder) or MARGIN.search(folder)) or number % 32 == 0


def _rank(variant: str) -> float | None:
    """How good pictures are, if a folder's name tells: best those of no size, then the aligned ones of most pixels."""
    if not COPY.search(variant):
        return None if variant else math.inf
    return max((int(side) for side in re.findall(r"(\d{2,5})x\d", variant)), default=1)


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
