"""Copies of one photograph, at several sizes, crops or formats; and classes, which only share their names."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lightdiff.data.files import ImageFile, find_images
from lightdiff.data.layouts import Names, may_hold_copies
from lightdiff.errors import UserError
from lightdiff.extras.data import copies
from tests.image_files import scan

COUNT = 40


def photograph(seed: int) -> Image.Image:
    """Something smooth that is another picture for another seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 80), Image.Resampling.BICUBIC)


def put(path: Path, seed: int, size: int = 80) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photograph(seed).resize((size * 6 // 5, size)).save(path)


def tops(files: Iterable[ImageFile]) -> set[str]:
    return {file.path.rpartition("/")[0] for file in files}


@pytest.mark.parametrize(
    ("template", "sizes"),
    [
        ("{size}/{i:04d}.jpg", {"64": 16, "128": 32, "256": 80}),
        ("{size}/{i:04d}.jpg", {"small": 20, "original": 80}),
        ("{size}/{i:04d}.jpg", {"print": 80, "web": 30}),
        ("{size}/00000/{i:05d}.png", {"images1024x1024": 50, "thumbnails128x128": 16, "in-the-wild-images": 80}),
        ("photos/{size}/{i}.jpg", {"thumbs": 16, "large": 80}),
        ("album{size}/{i}.jpg", {"": 80, "/thumbnails": 16, "/.": 80}),
        ("album{size}/IMG_{i}.jpg", {"": 80, "/for the web": 20, "/.": 80}),
        ("large/{i:04d}_{size}.jpg", {"64": 16, "256": 80}),
        ("large{size}/{i:04d}.jpg", {"": 16, "/print": 80}),
        ("large/{i:04d}{size}.jpg", {"": 80, "_s": 16, "_m": 40}),
        ("large/{size}IMG_{i}.jpg", {"": 80, "small ": 16}),
    ],
)
def test_of_copies_at_several_sizes_the_largest_are_taken(tmp_path: Path, template: str, sizes: dict[str, int]) -> None:
    for size, side in sizes.items():
        for i in range(COUNT):
            put(tmp_path / template.format(size=size, i=i), i, side)
    found = find_images([tmp_path], 0.3)
    assert len(found.files) == COUNT
    (taken,) = tops(found.files)
    assert taken.rpartition("/")[2] not in ("thumbnails", "for the web")
    assert any(word in taken for word in ("256", "original", "print", "images1024x1024", "large", "album"))
    assert found.layouts == ["plain"]
    (note,) = found.notes
    left_out = COUNT * (len({size.strip("/.") for size in sizes}) - 1)
    assert note.startswith(f"{tmp_path}: {left_out} images in ")
    assert re.search(r"images in [*\w].* are left out, copies of those in [*\w]", note)


def test_sizes_in_the_names_of_files_are_copies_too(tmp_path: Path) -> None:
    for i in range(8):
        for end, side in (("", 80), ("-300x200", 30), ("-150x150", 16)):
            put(tmp_path / f"photo {i}{end}.jpg", i, side)
    assert [file.path for file in scan([tmp_path], 0)] == [f"photo {i}.jpg" for i in range(8)]


def test_thumbnails_are_found_among_many_folders(tmp_path: Path) -> None:
    for i in range(COUNT):
        put(tmp_path / f"album {i % 9}/trip {i % 9}/{i}.jpg", i)
        put(tmp_path / f"album {i % 9}/{i}.jpg", 100 + i)
        put(tmp_path / f"album {i % 9}/thumbs/{i}.jpg", 100 + i, 16)
    assert {Path(home).name[:4] for home in tops(scan([tmp_path], 0))} == {"albu", "trip"}


def test_a_copy_whose_original_is_not_there_is_taken(tmp_path: Path) -> None:
    for i in range(8):
        put(tmp_path / f"thumbs/{i}.jpg", i, 16)
        if i < 5:
            put(tmp_path / f"{i}.jpg", i)
    assert len(scan([tmp_path], 0)) == 8


def test_classes_whose_files_are_numbered_alike_are_classes(tmp_path: Path) -> None:
    for names in (("cats", "dogs"), ("small", "large"), ("64", "128"), ("thumbs_up", "thumbs_down")):
        folder = tmp_path / names[0]
        for k, name in enumerate(names):
            for i in range(COUNT):
                put(folder / name / f"{i:04d}.jpg", 100 * k + i, 40 + 10 * k)
        found = find_images([folder], 0.3)
        assert len(found.files) == 2 * COUNT
        assert found.layouts == ["class folders"]
        assert not found.notes


def test_copies_of_the_same_size_fall_on_the_same_side_of_the_split(tmp_path: Path) -> None:
    for i in range(COUNT):
        put(tmp_path / f"raw/IMG_{i}.png", i)
        put(tmp_path / f"edited/IMG_{i}.jpg", i)
        put(tmp_path / f"edited/IMG_{i}.webp", i)
    found = find_images([tmp_path], 0.3)
    splits: dict[str, set[str]] = {}
    for file in found.files:
        splits.setdefault(Path(file.path).stem, set()).add(file.split)
    assert len(found.files) == 3 * COUNT
    assert all(len(of) == 1 for of in splits.values())
    assert {split for of in splits.values() for split in of} == {"train", "val"}
    (note,) = found.notes
    assert note.startswith(f"{tmp_path}: edited and raw seem to hold the same photographs; both are used")


def test_an_edited_photograph_beside_the_original_falls_on_the_same_side(tmp_path: Path) -> None:
    for i in range(COUNT):
        put(tmp_path / f"IMG_{i}.jpg", i)
        put(tmp_path / f"IMG_{i}-edited.jpg", i)
    files = scan([tmp_path], 0.5)
    assert len(files) == 2 * COUNT
    assert len({(file.path.replace("-edited", ""), file.split) for file in files}) == COUNT


def test_one_photograph_in_two_formats_is_not_split_from_itself(tmp_path: Path) -> None:
    for i in range(COUNT):
        for suffix in (".jpg", ".png", ".JPEG"):
            (tmp_path / f"{i}{suffix}").touch()
    files = scan([tmp_path], 0.5)
    assert {file.split for file in files} == {"train", "val"}
    assert len({(Path(file.path).stem, file.split) for file in files}) == COUNT


def test_two_margins_of_fairface_are_asked_about(tmp_path: Path) -> None:
    for margin in ("025", "125"):
        for split in ("train", "val"):
            for i in range(5):
                put(tmp_path / f"fairface-img-margin{margin}-trainval/{split}/{i}.jpg", i)
    with pytest.raises(UserError, match=r"^--data: .* holds the same photographs in .*margin025.* and in .*margin125"):
        scan([tmp_path], 0)
    files = scan([tmp_path / "fairface-img-margin025-trainval"], 0)
    assert {(file.path[:3], file.split) for file in files} == {("tra", "train"), ("val", "val")}


def test_pictures_that_cannot_be_read_are_no_copies(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(9):
            (tmp_path / name / f"{i}.png").touch()
    found = find_images([tmp_path], 0)
    assert (len(found.files), found.layouts, found.notes) == (18, ["class folders"], [])


# --- by names alone -----------------------------------------------------------------------------------------------

PARTS = st.one_of(st.sampled_from(["small", "large", "IMG", "64x64", "a", ""]), st.integers(0, 40).map(str))
STEMS = st.lists(PARTS, min_size=1, max_size=3).flatmap(
    lambda parts: st.sampled_from("-_@ ").map(lambda s: s.join(parts))
)
HOMES = st.sampled_from(["", "", "a/", "b/", "train/", "val/a/", "64x64/a/", "margin025/", "a\n/"])
NAMES = st.builds("{}{}.{}".format, HOMES, STEMS, st.sampled_from(["jpg", "jpg", "png"]))


@given(names=st.lists(NAMES, min_size=1, max_size=16, unique=True).map(sorted))
def test_names_that_leave_no_room_for_copies_are_known_without_a_look(names: list[str]) -> None:
    """If all variants of the same name were copies, there would still be none."""
    notes = list[str]()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(copies, "_order", lambda *_: "same size")
        try:
            chosen, originals = copies.find_copies(
                Path("photos"), Names.of(names), lambda name: pytest.fail("opened"), notes
            )
            taken = chosen.all()
        except UserError:
            taken, originals = False, {}
    if not may_hold_copies(Names.of(names)):
        assert (taken, originals, notes) == (True, {}, [])


def test_ordinary_names_leave_no_room_for_copies() -> None:
    for template in ("{i}.jpg", "IMG_{i:04d}.jpg", "cats/cat-{i}.jpg", "{i:03d}_IMG.jpg"):
        assert not may_hold_copies(Names.of((template.format(i=i) for i in range(9)), in_order=True))
