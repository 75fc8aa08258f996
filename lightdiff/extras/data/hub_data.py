"""hf://datasets/OWNER/NAME as a source of images: a data set of the Hugging Face Hub. Needs the extra `hub`.

It is fetched once, and read as if its local copy had been named: its Parquet files, else its tar or zip files, else the
folder. hf://datasets/OWNER/NAME/FOLDER is a part of it.
"""

from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

from PIL import Image

from lightdiff.data.files import Source, source_of
from lightdiff.data.formats import SUFFIXES
from lightdiff.data.layouts import Labels, Names
from lightdiff.data.table import Fingerprint
from lightdiff.errors import UserError, shorten
from lightdiff.extras.data.archives import ARCHIVES
from lightdiff.extras.hub import fetched, parsed

KIND = "datasets/"
FILES = (".parquet", *ARCHIVES)  # that hold many images, in the order of preference
SUFFIXES_WANTED = (*FILES, *SUFFIXES, ".csv", ".json", ".jsonl", ".cls")  # nothing that could run
WANTED = [f"*{suffix}" for lower in SUFFIXES_WANTED for suffix in (lower, lower.upper())]


@cache
def copied(place: Path) -> Path:
    """What to read of a data set's local copy, which is fetched if there is none: a pattern of files, or a folder.

    Raises:
        UserError: If the address is none, the data set has no such folder, or huggingface_hub is not installed.
        RunError: If it cannot be fetched.
    """
    address = f"hf://{place.as_posix().removeprefix('hf:').strip('/')}"
    if not address.startswith(f"hf://{KIND}"):
        raise UserError(f"--data: {shorten(address)} is no address of a data set: write hf://{KIND}OWNER/NAME")
    name, part = parsed(address.replace(KIND, "", 1))
    wanted = [f"{part}/{kind}" for kind in WANTED] if part else WANTED
    folder = fetched(address, name, wanted, repo_type="dataset") / part
    if not folder.is_dir():
        raise UserError(f"--data: {address}: {name} has no folder {part}")
    held = next((suffix for suffix in FILES if any(folder.rglob(f"*{suffix}"))), "")
    return folder / "**" / f"*{held}" if held else folder


def names(place: Path, passed_over: Counter[str]) -> Iterable[str]:
    """The names of all images."""
    return source_of(copied(place)).names(copied(place), passed_over)


def open_image(place: Path, name: str) -> AbstractContextManager[Image.Image]:
    """An image, open but not yet decoded."""
    return source_of(copied(place)).open(copied(place), name)


def fingerprint(place: Path, name: str, contents: bool = False) -> Fingerprint:
    """What tells whether an image has been changed."""
    return source_of(copied(place)).fingerprint(copied(place), name, contents)


def read(place: Path, path: Path) -> bytes:
    """A table of labels in the data set, named as if that were a folder, or elsewhere."""
    inside = copied(place) / path.relative_to(place) if place in path.parents else path
    return source_of(copied(place)).read(copied(place), inside)


def labels(place: Path, names: Names) -> Iterable[Labels] | None:
    """What the data set says of its images beside their names."""
    return source_of(copied(place)).labels(copied(place), names)


SOURCE = Source(names, open_image, fingerprint, read, labels)
