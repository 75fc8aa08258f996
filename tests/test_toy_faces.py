"""Toy faces: the same drawing every time, and each factor to be seen where it belongs."""

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from lightdiff.errors import UserError
from lightdiff.extras.toy_faces import (
    BEARDED_STYLES,
    CLASSES,
    HAIR_STYLES,
    MOUTHS,
    Color,
    Face,
    draw_dataset,
    draw_face,
    face_class,
    random_face,
)

PLAIN = Face(
    background=(200, 220, 240),
    skin=(240, 200, 160),
    hair_style="short",
    hair=(90, 50, 30),
    clothes=(50, 90, 170),
    iris=(40, 110, 190),
    eye_size=0.075,
    eye_openness=1.0,
    gaze=0.0,
    mouth="smile",
    mouth_width=0.11,
    eyewear="plain",
    frame=(190, 40, 50),
    beard=False,
    shift_x=0.0,
    shift_y=0.0,
    scale=1.0,
)


def pixel(image: Image.Image, x: float, y: float) -> Color:
    """The colour at a place given as fractions of the width and the height."""
    value = image.getpixel((int(x * image.width), int(y * image.height)))
    assert isinstance(value, tuple)
    r, g, b = value
    return int(r), int(g), int(b)


def changed_box(a: Face, b: Face, size: int = 64) -> tuple[float, ...]:
    """The box (left, top, right, bottom) that holds every pixel in which two faces differ, as fractions."""
    box = ImageChops.difference(draw_face(a, size), draw_face(b, size)).getbbox()
    assert box is not None, "nothing to be seen of the change"
    return tuple(edge / size for edge in box)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under the folder, by its relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_face_depends_on_seed_and_index_only() -> None:
    assert random_face(3, 7) == random_face(3, 7)
    assert draw_face(random_face(3, 7)).tobytes() == draw_face(random_face(3, 7)).tobytes()


def test_neighbouring_seeds_share_no_face() -> None:
    series = [{random_face(seed, index) for index in range(200)} for seed in (0, 1, 2)]
    assert len(set.union(*series)) == 600


def test_classes_styles_and_mouths_come_in_fair_shares() -> None:
    faces = [random_face(0, index) for index in range(2000)]
    shares = {name: n / len(faces) for name, n in Counter(map(face_class, faces)).items()}
    assert shares == pytest.approx({"plain": 0.40, "glasses": 0.35, "shades": 0.25}, abs=0.04)
    assert set(shares) == set(CLASSES)
    styles = Counter(face.hair_style for face in faces)
    assert set(styles) == set(HAIR_STYLES)
    assert min(styles.values()) > 2000 / len(HAIR_STYLES) * 0.7
    assert set(Counter(face.mouth for face in faces)) == set(MOUTHS)


@pytest.mark.parametrize("size", [16, 32, 50, 64, 65, 256])
def test_background_and_skin_show_their_colour_at_every_size(size: int) -> None:
    image = draw_face(PLAIN, size)
    assert image.size == (size, size)
    assert image.mode == "RGB"
    assert pixel(image, 0.01, 0.01) == pixel(image, 0.99, 0.01) == PLAIN.background
    assert pixel(image, 0.5, 0.48) == pytest.approx(PLAIN.skin, abs=1)
    assert pixel(image, 0.5, 0.99) == PLAIN.clothes
    assert pixel(image, 0.5, 0.27) == PLAIN.hair


def test_random_faces_have_background_in_the_upper_corners_and_skin_in_the_middle() -> None:
    for index in range(100):
        face = random_face(0, index)
        image = draw_face(face, 64)
        assert pixel(image, 0.0, 0.0) == pixel(image, 0.99, 0.0) == face.background
        # Between nose and mouth, where only a moustache can be in the way.
        x, y = 0.5 + face.shift_x, 0.53 + face.shift_y + 0.105 * face.scale
        if not face.beard:
            assert max(abs(a - b) for a, b in zip(pixel(image, x, y), face.skin, strict=True)) < 25


@pytest.mark.parametrize("eyewear", ["glasses", "shades"])
def test_eyewear_changes_the_eye_band_only(eyewear: str) -> None:
    left, top, right, bottom = changed_box(PLAIN, replace(PLAIN, eyewear=eyewear))
    assert 0.38 <= top < 0.47
    assert 0.58 < bottom <= 0.68
    assert 0.18 <= left < 0.25
    assert 0.75 < right <= 0.82


def test_clear_glasses_leave_the_eyes_and_shades_hide_them() -> None:
    pupil_rows = (0.28, 0.46, 0.48, 0.60)
    left, top, right, bottom = (int(edge * 64) for edge in pupil_rows)
    looks = [replace(PLAIN, iris=iris) for iris in ((40, 110, 190), (90, 50, 30))]
    for eyewear, visible in (("plain", True), ("glasses", True), ("shades", False)):
        a, b = (draw_face(replace(face, eyewear=eyewear), 64).crop((left, top, right, bottom)) for face in looks)
        assert (a.tobytes() != b.tobytes()) is visible


def test_the_mouth_changes_the_lower_face_only() -> None:
    for mouth in set(MOUTHS) - {PLAIN.mouth}:
        left, top, right, bottom = changed_box(PLAIN, replace(PLAIN, mouth=mouth))
        assert 0.35 < left < right < 0.65
        assert 0.6 < top < bottom < 0.82


def test_every_factor_can_be_seen_at_32_pixels() -> None:
    others = {
        "background": (10, 90, 90), "skin": (141, 90, 60), "hair_style": "long", "hair": (222, 92, 150),
        "clothes": (228, 72, 72), "iris": (52, 138, 74), "eye_size": 0.084, "eye_openness": 0.65, "gaze": 1.0,
        "mouth": "open", "mouth_width": 0.09, "eyewear": "shades", "beard": True, "shift_x": 0.03, "shift_y": 0.02,
        "scale": 1.1,
    }  # fmt: skip
    reference = draw_face(PLAIN).tobytes()
    for name, value in others.items():
        assert draw_face(replace(PLAIN, **{name: value})).tobytes() != reference, name  # type: ignore[arg-type]
    assert set(others) | {"frame"} == set(PLAIN.__dataclass_fields__)


def test_hair_styles_differ_from_one_another() -> None:
    pictures = {draw_face(replace(PLAIN, hair_style=style)).tobytes() for style in HAIR_STYLES}
    assert len(pictures) == len(HAIR_STYLES)


def test_a_beard_is_symmetric_under_every_hair_style_that_has_one() -> None:
    for style in sorted(BEARDED_STYLES):
        face = replace(PLAIN, hair_style=style, beard=True, mouth="neutral")
        lower = draw_face(face, 128).crop((0, 83, 128, 110))
        mirrored = lower.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        difference = ImageChops.difference(lower, mirrored).tobytes()
        assert sum(difference) / len(difference) < 3, style


def test_edges_are_antialiased() -> None:
    bald = replace(PLAIN, hair_style="bald", background=(0, 0, 0), skin=(200, 200, 200))
    row = [pixel(draw_face(bald), (x + 0.5) / 32, 0.30)[0] for x in range(32)]
    assert {0, 200} <= set(row)
    assert any(0 < value < 200 for value in row)


def test_a_large_picture_reduced_is_the_small_one() -> None:
    face = random_face(0, 5)
    small, large = draw_face(face, 32), draw_face(face, 256).reduce(8)
    difference = ImageChops.difference(small, large).tobytes()
    assert sum(difference) / len(difference) < 4


def test_data_set_layout_and_table(tmp_path: Path) -> None:
    draw_dataset(tmp_path, 30, seed=4, size=24)
    with (tmp_path / "factors.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(Path(row["file"]).stem) for row in rows] == list(range(30))
    assert {row["file"] for row in rows} | {"factors.csv"} == set(contents(tmp_path))
    for index, row in enumerate(rows):
        face = random_face(4, index)
        assert Path(row["file"]).parent.name == row["eyewear"] == face_class(face)
        assert row["background"] == "#{:02x}{:02x}{:02x}".format(*face.background)
        assert float(row["scale"]) == face.scale
        with Image.open(tmp_path / row["file"]) as image:
            assert image.tobytes() == draw_face(face, 24).tobytes()


def test_data_set_bytes_are_the_same_twice_and_do_not_depend_on_the_count(tmp_path: Path) -> None:
    for name, count in (("a", 20), ("b", 20), ("longer", 40)):
        draw_dataset(tmp_path / name, count, seed=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    longer = contents(tmp_path / "longer")
    images = {name: data for name, data in contents(tmp_path / "a").items() if name.endswith(".png")}
    assert images.items() <= longer.items()
    assert len(longer) == 41
    draw_dataset(tmp_path / "a", 40, seed=1)
    assert contents(tmp_path / "a") == longer


def test_a_complete_data_set_is_not_touched_and_a_broken_one_is_completed(tmp_path: Path) -> None:
    draw_dataset(tmp_path, 12)
    before = contents(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    draw_dataset(tmp_path, 12)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    next(tmp_path.rglob("00003.png")).unlink()
    draw_dataset(tmp_path, 12)
    assert contents(tmp_path) == before


def test_foreign_images_are_neither_mixed_in_nor_removed(tmp_path: Path) -> None:
    draw_dataset(tmp_path, 20, seed=0)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="other images"):
        draw_dataset(tmp_path, 20, seed=1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("count", "size"), [(0, 32), (5, 15), (5, 257)])
def test_values_out_of_range_are_refused(tmp_path: Path, count: int, size: int) -> None:
    with pytest.raises(UserError, match="toy faces"):
        draw_dataset(tmp_path / "new", count, size=size)
    assert not (tmp_path / "new").exists()
