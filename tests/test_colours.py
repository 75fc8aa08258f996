"""Colours of decoded images: embedded profiles against matrices by hand, and one white for 16 bits and floats."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms

from lightdiff.data.images import BadImage, load_image
from lightdiff.extras.data import colours
from lightdiff.extras.data.colours import choose_white
from lightdiff.settings import ImageSettings

# Columns: red, green and blue in XYZ, relative to D50, as profiles have them.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
D50 = (0.9642, 1.0, 0.8249)


def number(x: float) -> bytes:
    return struct.pack(">i", round(x * 65536))


def xyz(column: Any) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(map(number, column))


def assembled(space: bytes, connection: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2, of these tags."""
    name = b"test\0"
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(78), b"wtpt": xyz(D50)} | tags
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, content in tags.items():
        table += tag + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"test", 0x02400000, kind, space, connection)
    return head + bytes(12) + b"acsp" + bytes(28) + b"".join(map(number, D50)) + bytes(48) + table + data


def profile(space: bytes, curve: float, primaries: NDArray[Any] = P3) -> bytes:
    """A profile of RGB with these primaries or of grey, with a power curve."""
    trc = b"curv" + bytes(4) + struct.pack(">IH", 1, round(curve * 256)) + bytes(2)
    tags = {b"kTRC": trc}
    if space == b"RGB ":
        tags = {b"%cXYZ" % c: xyz(primaries[:, i]) for i, c in enumerate(b"rgb")}
        tags |= {b"%cTRC" % c: trc for c in b"rgb"}
    return assembled(space, b"XYZ ", b"mntr", tags)


def inks(cyan: tuple[int, int, int]) -> bytes:
    """A profile of CMYK in which paper is white, full cyan this L, a, b (in bytes), and all else black."""
    corners = [(0, 128, 128)] * 16  # of C, M, Y, K, the last changing fastest
    corners[0], corners[8] = (255, 128, 128), cyan
    identity = b"".join(map(number, np.eye(3).ravel()))
    table = bytes(range(256)) * 4 + bytes(np.ravel(corners).tolist()) + bytes(range(256)) * 3
    return assembled(b"CMYK", b"Lab ", b"prtr", {b"A2B0": b"mft1" + bytes(4) + b"\4\3\2\0" + identity + table})


WIDE = profile(b"RGB ", 2.2)
SIXTY_FOUR = np.stack(np.meshgrid(*[np.array([0, 60, 160, 255], np.uint8)] * 3), axis=-1).reshape(8, 8, 3)


def encoded(linear: NDArray[Any]) -> NDArray[Any]:
    """Light in [0, 1] as bytes of sRGB."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def by_hand(values: NDArray[np.uint8]) -> NDArray[Any]:
    """Bytes of the wide profile as bytes of sRGB."""
    return encoded((values / 255) ** 2.2 @ P3.T @ np.linalg.inv(SRGB).T)


def lab_by_hand(lightness: float, a: float, b: float) -> NDArray[Any]:
    """CIE L*a*b*, relative to D50, as bytes of sRGB."""
    y = (lightness + 16) / 116
    roots = np.array([y + a / 500, y, y - b / 200])
    light = np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29)) * D50
    return encoded(np.linalg.inv(SRGB) @ light)


def error(image: Image.Image, expected: NDArray[Any]) -> float:
    return float(np.abs(np.asarray(image).astype(float) - expected).max())


# --- profiles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_a_wide_gamut_becomes_srgb_as_by_hand(tmp_path: Path, suffix: str) -> None:
    lossless: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(SIXTY_FOUR).save(tmp_path / f"a{suffix}", icc_profile=WIDE, **lossless)
    expected = by_hand(SIXTY_FOUR)
    assert np.abs(expected - SIXTY_FOUR).max() > 50
    assert error(load_image(tmp_path / f"a{suffix}"), expected) <= 1.5


def test_a_jpeg_is_converted_at_reduced_scale_and_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.new("RGB", (64, 32), (200, 90, 30))
    stored.save(tmp_path / "a.jpg", icc_profile=WIDE, exif=exif, quality=100)
    image = load_image(tmp_path / "a.jpg", at_least=8)
    assert image.size == (8, 16)
    assert error(image, by_hand(np.array([200, 90, 30], np.uint8))) <= 3


def test_transparent_pixels_are_converted_before_they_meet_the_background(tmp_path: Path) -> None:
    rgba = Image.fromarray(np.dstack([SIXTY_FOUR, np.full((8, 8), 255, np.uint8)]))
    rgba.putpixel((0, 0), (0, 255, 0, 0))
    rgba.save(tmp_path / "a.png", icc_profile=WIDE)
    image = load_image(tmp_path / "a.png", ImageSettings(background="#808080"))
    expected = by_hand(SIXTY_FOUR)
    expected[0, 0] = 128  # a colour in sRGB
    assert error(image, expected) <= 1.5


def test_a_palette_is_converted(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 90, 30, 20, 220, 60] + [0] * 762)
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", icc_profile=WIDE)
    assert error(load_image(tmp_path / "a.png"), by_hand(np.array([[[200, 90, 30], [20, 220, 60]]], np.uint8))) <= 1.5


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "with alpha"])
def test_grey_is_converted(tmp_path: Path, kind: str) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(ramp.astype(np.uint16) * 257 if kind == "16 bits" else ramp)
    if kind == "with alpha":
        image.putalpha(255)
    image.save(tmp_path / "a.png", icc_profile=profile(b"GRAY", 1.8))
    assert error(load_image(tmp_path / "a.png"), encoded((ramp[..., None] / 255) ** 1.8)) <= 2


def test_grey_with_a_profile_of_colours_is_converted_as_grey_colours(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png", icc_profile=profile(b"RGB ", 1.8))
    assert error(load_image(tmp_path / "a.png"), encoded((ramp[..., None] / 255) ** 1.8)) <= 1.5


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_inks_are_converted_as_their_profile_says(tmp_path: Path, suffix: str) -> None:
    image = Image.new("CMYK", (16, 8), (255, 0, 0, 0))
    image.paste((0, 0, 0, 0), (0, 0, 8, 8))
    image.save(tmp_path / f"a{suffix}", quality=100, icc_profile=inks((140, 110, 98)))
    found = np.asarray(load_image(tmp_path / f"a{suffix}")).astype(float)
    assert np.abs(found[:, :8] - 255).max() <= 3
    assert np.abs(found[:, 8:] - lab_by_hand(140 / 2.55, -18, -30)).max() <= 3
    assert np.abs(found[0, 12] - [0, 255, 255]).max() > 60  # what it is without


def test_inks_without_a_profile_are_left_to_pillow(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    image.save(tmp_path / "plain.jpg", quality=100)
    image.save(tmp_path / "foreign.jpg", quality=100, icc_profile=WIDE)  # a profile of RGB says nothing of inks
    plain, foreign = (load_image(tmp_path / f"{name}.jpg") for name in ("plain", "foreign"))
    assert error(plain, np.array([255, 0, 0])) <= 4
    assert error(foreign, np.asarray(plain).astype(float)) == 0


def test_lab_is_converted(tmp_path: Path) -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(Image.fromarray(SIXTY_FOUR), to_lab)
    assert lab is not None
    lab.save(tmp_path / "a.tif")
    found = np.asarray(load_image(tmp_path / "a.tif")).astype(int)
    assert np.abs(found - SIXTY_FOUR).mean() < 8  # a and b are rounded to integers


@pytest.mark.parametrize("kind", ["sRGB as such", "damaged", "empty", "of another kind", "text"])
def test_a_profile_that_says_nothing_leaves_the_pixels_alone(tmp_path: Path, kind: str) -> None:
    icc = {
        "sRGB as such": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        "damaged": WIDE[:200],
        "empty": b"\0",
        "of another kind": profile(b"GRAY", 1.0),
        "text": b"I am no profile" * 20,
    }[kind]
    Image.fromarray(SIXTY_FOUR).save(tmp_path / "a.png", icc_profile=icc)
    assert error(load_image(tmp_path / "a.png"), SIXTY_FOUR.astype(float)) == 0


@given(st.data())
def test_a_damaged_profile_never_costs_the_pixels(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    icc = bytearray(WIDE)
    for place in data.draw(st.lists(st.integers(0, len(icc) - 1), min_size=1, max_size=8)):
        icc[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "profile.png"
    Image.fromarray(SIXTY_FOUR).save(path, icc_profile=bytes(icc))
    assert load_image(path).size == (8, 8)


def test_a_folder_with_one_profile_builds_one_transform(tmp_path: Path) -> None:
    colours._transform.cache_clear()
    for i in range(5):
        Image.fromarray(SIXTY_FOUR).save(tmp_path / f"{i}.png", icc_profile=WIDE)
        load_image(tmp_path / f"{i}.png")
    assert colours._transform.cache_info().misses == 1


# --- 16 bits and floats -------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 1, 48 * 64, dtype=np.float32).reshape(48, 64)


def loaded(tmp_path: Path, values: NDArray[Any], **whites: float) -> NDArray[np.uint8]:
    Image.fromarray(values).save(tmp_path / "a.tif")
    settings = ImageSettings.model_validate({f"{kind}_white": white for kind, white in whites.items()})
    return np.asarray(load_image(tmp_path / "a.tif", settings))[..., 0]


@pytest.mark.parametrize("white", [1.0, 255.0, 4095.0, 65535.0])
@pytest.mark.parametrize("overshoot", [1.0, 1.02])
def test_a_float_image_that_overshoots_a_little_is_as_bright(tmp_path: Path, white: float, overshoot: float) -> None:
    found = loaded(tmp_path, RAMP * np.float32(white * overshoot))
    assert np.abs(found - (255 * RAMP * overshoot).clip(0, 255)).max() <= 0.51


def test_a_few_hot_pixels_or_dark_ones_decide_nothing(tmp_path: Path) -> None:
    values = RAMP.copy()
    values[0, 0], values[0, 1] = 300, -3
    assert np.abs(loaded(tmp_path, values) - 255 * values.clip(0, 1)).max() <= 0.51


def test_a_white_that_is_given_counts_for_every_image(tmp_path: Path) -> None:
    dark = (RAMP * 1000).astype(np.uint16)
    np.testing.assert_array_equal(loaded(tmp_path, dark, integer=4095), np.rint(dark * np.float32(255 / 4095)))
    np.testing.assert_array_equal(loaded(tmp_path, dark), np.rint(dark * np.float32(255 / 65535)))
    bright = (RAMP * 5000).astype(np.uint16)  # what exceeds white is white
    np.testing.assert_array_equal(
        loaded(tmp_path, bright, integer=4095), np.rint(bright.clip(0, 4095) * np.float32(255 / 4095))
    )
    assert loaded(tmp_path, RAMP * np.float32(0.2), float=0.2).max() == 255


@pytest.mark.parametrize(
    ("values", "whites", "reason"),
    [
        (RAMP * 255, {"float": 1}, r"pixel values from 0 to 255, but white is 1 \(--float-white\)"),
        (RAMP, {"float": 255}, r"pixel values from 0 to 1, but white is 255 \(--float-white\)"),
        (RAMP * 2 - 1, {"float": 1}, "pixel values from -1 to 1; 0 to 65535 can be read"),
        ((RAMP * 10000 - 5000).astype(np.int32), {}, "pixel values from -5000 to 5000; 0 to 65535 can be read"),
        (RAMP * np.nan, {}, "pixel values from nan to nan; 0 to 65535 can be read"),
        ((RAMP * 65535).astype(np.uint16), {"integer": 4095}, r"but white is 4095 \(--integer-white\)"),
        (RAMP * 1e6, {}, "pixel values from 0 to 1e\\+06; 0 to 65535 can be read"),
    ],
)
def test_an_image_that_does_not_fit_the_folders_white_is_named(
    tmp_path: Path, values: NDArray[Any], whites: dict[str, float], reason: str
) -> None:
    with pytest.raises(BadImage, match=reason):
        loaded(tmp_path, values, **whites)


def test_a_black_image_is_black(tmp_path: Path) -> None:
    for kind in (np.float32, np.uint16):
        assert loaded(tmp_path, np.zeros((8, 8), kind), float=1, integer=4095).max() == 0


def test_colours_of_12_bits_in_16_are_named_instead_of_read_as_nearly_black(tmp_path: Path) -> None:
    rgb = np.dstack([RAMP, RAMP[::-1], RAMP[:, ::-1]])
    for white in (65535, 4095, 1023, 255):
        values = np.rint(rgb * white).astype("<u2")
        values[0, 0] = 65535  # a hot pixel
        write_tiff(tmp_path / f"{white}.tif", values)
        alpha = np.full((*RAMP.shape, 1), 65535)
        write_png(tmp_path / f"{white}.png", np.dstack([values, alpha]))
        for suffix in ("tif", "png"):
            if white == 65535:
                assert error(load_image(tmp_path / f"65535.{suffix}"), 255 * (values / 65535)) <= 1
            else:
                with pytest.raises(BadImage, match="colours of 12 bits or fewer in 16"):
                    load_image(tmp_path / f"{white}.{suffix}")


def write_png(path: Path, values: NDArray[Any]) -> None:
    """A PNG of 16-bit colours with alpha, which Pillow cannot write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 6, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_tiff(path: Path, values: NDArray[Any], photometric: int = 2, planes: bool = False, alpha: int = 0) -> None:
    """A TIFF of what Pillow cannot write: 16-bit colours, in three planes perhaps, negatives, kinds of alpha."""
    height, width, bands = values.shape
    strips = bands if planes else 1
    counts, arrays = [values.nbytes // strips] * strips, bytearray()

    def entry(tag: int, kind: str, numbers: list[int]) -> bytes:
        data = struct.pack(f"<{len(numbers)}{kind}", *numbers)
        if len(data) > 4:
            arrays.extend(data)
            data = struct.pack("<I", start + len(arrays) - len(data))
        return struct.pack("<HHI4s", tag, {"H": 3, "I": 4}[kind], len(numbers), data)

    offsets = [200 + i * counts[0] for i in range(strips)]
    short = {256: width, 257: height, 259: 1, 262: photometric, 277: bands, 278: height, 284: 2 if planes else 1}
    short |= {338: alpha} if alpha else {}  # ExtraSamples
    start = 8 + 2 + 12 * (len(short) + 3) + 4
    entries = {tag: entry(tag, "H", [number]) for tag, number in short.items()}
    entries |= {258: entry(258, "H", [8 * values.itemsize] * bands), 273: entry(273, "I", offsets),
                279: entry(279, "I", counts)}  # fmt: skip
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries[tag] for tag in sorted(entries)) + bytes(4)
    pixels = values.transpose(2, 0, 1) if planes else values
    path.write_bytes((head + arrays).ljust(200, b"\0") + pixels.tobytes())


def test_colours_of_16_bits_in_planes_are_no_noise(tmp_path: Path) -> None:
    rgb = np.dstack([RAMP, RAMP[::-1], RAMP[:, ::-1]])
    write_tiff(tmp_path / "planes.tif", np.rint(rgb * 65535).astype("<u2"), planes=True)
    assert error(load_image(tmp_path / "planes.tif"), 255 * rgb) <= 1


@pytest.mark.parametrize(("kind", "white", "given"), [("u1", 255, 0), ("<u2", 65535, 0), ("<u2", 4095, 4095)])
def test_where_0_is_white_it_is_white_at_every_depth(tmp_path: Path, kind: str, white: int, given: int) -> None:
    write_tiff(tmp_path / "a.tif", np.rint((1 - RAMP[..., None]) * white).astype(kind), photometric=0)
    found = np.asarray(load_image(tmp_path / "a.tif", ImageSettings(integer_white=given)))
    assert np.abs(found - 255 * RAMP[..., None]).max() <= 0.6  # twice rounded


def test_grey_that_its_opacity_has_been_multiplied_into_is_read(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", np.rint(255 * np.dstack([RAMP, RAMP**0])).astype("u1"), 1, alpha=1)
    with Image.open(tmp_path / "a.tif") as image:
        assert image.mode == "La"
    assert np.abs(np.asarray(load_image(tmp_path / "a.tif"))[..., 0] - 255 * RAMP).max() <= 1


@pytest.mark.parametrize(
    ("kind", "highest", "white"),
    [
        ("float", [0.4, 1.02], 1), ("float", [3.0], 1), ("float", [0.9, 240.0], 255), ("float", [260.0], 255),
        ("float", [4000.0], 4095), ("float", [60000.0], 65535), ("float", [0.0], 1),
        ("integer", [200, 90], 255), ("integer", [3900, 1000], 4095), ("integer", [4096], 16383),
        ("integer", [900], 1023), ("integer", [30000], 65535), ("integer", [2**20], 65535),
    ],
)  # fmt: skip
def test_white_is_the_next_one_that_holds_all_images(kind: Any, highest: list[float], white: float) -> None:
    assert choose_white(kind, highest) == white
