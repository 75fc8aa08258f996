"""From image files to tensors: every format and mode, framing, batches, and files that cannot be read."""

import contextlib
import io
import itertools
import multiprocessing
import os
import pickle
import random
import struct
import subprocess
import sys
import textwrap
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lightdiff.data import images
from lightdiff.data.bad_files import BadFiles
from lightdiff.data.files import ImageFile
from lightdiff.data.images import BadImage, colour, frame, load_image, random_frame, to_float, to_uint8
from lightdiff.data.loading import ImageDataset, load_batches
from lightdiff.errors import RunError, UserError
from lightdiff.settings import ImageSettings

GREY16 = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1391  # 0 to 65377
EXPECTED16 = np.rint(GREY16 / 257).astype(np.uint8)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth colourful image, so that JPEG keeps it well."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(image).astype(np.int64)


def listed(names: list[str]) -> list[ImageFile]:
    return [ImageFile(0, name, "train", {}) for name in names]


def dataset(folder: Path, names: list[str], train: bool = True, **settings: Any) -> ImageDataset:
    return ImageDataset(listed(names), ImageSettings(data=(folder,), resolution=16, **settings), seed=3, train=train)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight good images, 0.png to 7.png."""
    for i in range(8):
        picture(40, 30, i).save(tmp_path / f"{i}.png")
    return tmp_path


EIGHT = [f"{i}.png" for i in range(8)]


# --- formats and modes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "tolerance"),
    [(".jpg", 4), (".JPEG", 4), (".png", 0), (".PNG", 0), (".webp", 4), (".bmp", 0), (".TIF", 0), (".tiff", 0),
     (".ppm", 0), (".gif", 10)],
)  # fmt: skip
def test_every_format_is_read(tmp_path: Path, suffix: str, tolerance: int) -> None:
    original, path = picture(24, 18), tmp_path / f"image{suffix}"
    original.save(path, quality=95)
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (24, 18))
    # On average: JPEG, WebP and GIF cost something.
    assert np.abs(pixels(image) - pixels(original)).mean() <= tolerance


@pytest.mark.parametrize(
    ("mode", "suffix"), [("1", ".png"), ("L", ".png"), ("L", ".jpg"), ("P", ".png"), ("P", ".bmp"), ("CMYK", ".tif"),
                         ("YCbCr", ".tif"), ("1", ".tif"), ("RGBX", ".tif")],
)  # fmt: skip
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    original, path = picture(24, 18).convert(mode), tmp_path / f"image{suffix}"
    original.save(path)
    image = load_image(path)
    assert image.mode == "RGB"
    assert np.abs(pixels(image) - pixels(original.convert("RGB"))).max() <= (8 if suffix == ".jpg" else 1)


def test_a_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    assert pixels(load_image(tmp_path / "red.jpg"))[4, 4] == pytest.approx([255, 0, 0], abs=4)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "big-endian.tif", "integer.tif", "float.tif", "grey.pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "big-endian.tif":
        Image.fromarray(GREY16.astype(">u2")).save(path)
    elif name == "integer.tif":
        Image.fromarray(GREY16.astype(np.int32)).save(path)
    elif name == "float.tif":
        Image.fromarray(GREY16.astype(np.float32)).save(path)
    elif name == "grey.pgm":
        path.write_bytes(b"P5 8 6 65535\n" + GREY16.astype(">u2").tobytes())
    else:
        Image.fromarray(GREY16).save(path)
    for channel in range(3):
        np.testing.assert_array_equal(np.asarray(load_image(path))[..., channel], EXPECTED16)


def test_sixteen_bit_colour_is_scaled_to_eight(tmp_path: Path) -> None:
    values = np.stack([GREY16, GREY16[::-1], GREY16[:, ::-1]], axis=2)
    write_png(tmp_path / "colour.png", values)
    image = pixels(load_image(tmp_path / "colour.png"))
    assert np.abs(image - values / 257).max() <= 1  # Pillow drops the low byte, which costs up to one


@pytest.mark.parametrize(("white", "scale"), [(1.0, 255.0), (255.0, 1.0), (65535.0, 1 / 257)])
def test_floats_are_taken_to_end_at_1_255_or_65535(tmp_path: Path, white: float, scale: float) -> None:
    values = np.linspace(0, white, 48, dtype=np.float32).reshape(6, 8)
    Image.fromarray(values).save(tmp_path / "float.tif")
    image = np.asarray(load_image(tmp_path / "float.tif"))[..., 0]
    np.testing.assert_array_equal(image, np.rint(values * np.float32(scale)).astype(np.uint8))


@pytest.mark.parametrize("values", [[0.0, np.nan], [-1.0, 1.0], [0.0, 1e6]])
def test_floats_without_a_known_range_are_refused(tmp_path: Path, values: list[float]) -> None:
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(BadImage, match=r"^pixel values from .* to .*; 0 to 65535 can be read$"):
        load_image(tmp_path / "float.tif")


def test_transparent_pixels_show_the_background(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (4, 2), (10, 20, 30, 255))
    rgba.putpixel((1, 0), (255, 255, 255, 0))
    rgba.putpixel((2, 0), (200, 100, 0, 128))
    rgba.save(tmp_path / "rgba.png")
    image = load_image(tmp_path / "rgba.png", ImageSettings(background="#ff8000"))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 128, 0)]
    assert image.getpixel((2, 0)) == pytest.approx((227, 114, 0), abs=1)  # half of each
    assert load_image(tmp_path / "rgba.png").getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["LA.png", "P.png", "P.gif", "L.png", "RGB.png", "I;16.png", "rgba.webp", "rgba.tif"])
def test_every_kind_of_transparency_is_seen(tmp_path: Path, kind: str) -> None:
    mode, path = kind.split(".")[0], tmp_path / kind
    if mode == "LA":
        Image.new("LA", (4, 4), (90, 0)).save(path)
    elif mode == "I;16":
        write_png(path, np.full((4, 4, 1), 5000, np.uint16), transparent=5000)
    elif mode == "rgba":
        Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(path)
    else:
        image = Image.new(mode, (4, 4), (7, 7, 7) if mode == "RGB" else 7)
        if mode == "P":
            image.putpalette([5] * 768)
        image.save(path, transparency=(7, 7, 7) if mode == "RGB" else 7)
    assert load_image(path, ImageSettings(background="blue")).getpixel((0, 0)) == (0, 0, 255)


def test_palettes_with_partly_transparent_colours(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0] + [0] * 762)
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=bytes([255, 0]))
    assert [load_image(tmp_path / "palette.png").getpixel((x, 0)) for x in (0, 1)] == [
        (255, 0, 0),
        (255, 255, 255),
    ]


def test_the_first_frame_of_several_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 6), name) for name in ("red", "lime", "blue")]
    for suffix in ("gif", "tif", "webp", "png"):
        path = tmp_path / f"many.{suffix}"
        lossless: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **lossless)
        assert load_image(path).getpixel((3, 3)) == (255, 0, 0), suffix


def test_a_photograph_with_a_second_image_inside_is_read(tmp_path: Path) -> None:
    picture(64, 48).save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[picture(64, 48, 1)])
    image = load_image(tmp_path / "phone.jpg", at_least=20)
    assert image.size == (32, 24)
    assert np.abs(pixels(image) - pixels(picture(64, 48).resize((32, 24)))).max() < 12


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_respected(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste("red", (0, 0, 16, 8))
    # How a camera stores the upright picture; the tag says how to undo it.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"turned{suffix}", exif=exif)
    image = load_image(tmp_path / f"turned{suffix}")
    assert image.size == (32, 16)
    assert np.abs(pixels(image) - pixels(upright))[[3, 3, 12, 12], [4, 28, 4, 28]].max() < 30


def test_damaged_exif_data_does_not_cost_the_picture(tmp_path: Path) -> None:
    picture(24, 18).save(tmp_path / "image.jpg", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01")
    assert load_image(tmp_path / "image.jpg").size == (24, 18)


def test_pillow_warns_nobody_in_any_thread(tmp_path: Path) -> None:
    for i in range(4):
        picture(24, 18).save(tmp_path / f"{i}.jpg", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01")
    code = """
        from multiprocessing.pool import ThreadPool
        from lightdiff.data.images import load_image
        print(ThreadPool(4).map(lambda i: load_image(f"{i}.jpg").size, range(4)))
        """
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", textwrap.dedent(code)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=600, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == f"{[(24, 18)] * 4}\n", done.stderr
    assert "PIL" not in done.stderr
    assert "EXIF" not in done.stderr


def test_a_jpeg_is_decoded_smaller_but_never_smaller_than_needed(tmp_path: Path) -> None:
    picture(400, 203).save(tmp_path / "image.jpg")
    sizes = {at_least: load_image(tmp_path / "image.jpg", at_least=at_least).size for at_least in (0, 20, 50, 101, 150)}
    assert sizes == {0: (400, 203), 20: (50, 26), 50: (100, 51), 101: (200, 102), 150: (400, 203)}


def test_an_unknown_background_is_the_users_mistake(tmp_path: Path) -> None:
    picture(8, 8).convert("RGBA").save(tmp_path / "image.png")
    with pytest.raises(UserError, match=r"^--background: 'whit' is no colour"):
        load_image(tmp_path / "image.png", ImageSettings(background="whit"))
    with pytest.raises(UserError, match="--background"):
        dataset(tmp_path, ["image.png"], background="#12")
    assert colour("#ff800040") == (255, 128, 0)


# --- bad files ----------------------------------------------------------------------------------------------------


def write_png(path: Path, values: np.ndarray[Any, np.dtype[np.uint16]], transparent: int | None = None) -> None:
    """A 16-bit PNG of (height, width, channels), which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2 if channels == 3 else 0, 0, 0, 0)
    extra = chunk(b"tRNS", struct.pack(">H", transparent)) if transparent is not None else b""
    data = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def make_bad(folder: Path) -> dict[str, str]:
    """Bad files of many kinds, with the reason expected of each."""
    picture(64, 64).save(folder / "whole.jpg", quality=95)
    picture(64, 64).save(folder / "whole.png")
    picture(64, 64).save(folder / "whole.tif", compression="tiff_lzw")
    for suffix in ("jpg", "png", "tif"):
        data = (folder / f"whole.{suffix}").read_bytes()
        (folder / f"truncated.{suffix}").write_bytes(data[: len(data) // 2])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("I am no image")
    (folder / "page.jpg").write_text("<html><body>404 not found</body></html>")
    (folder / "zero.ppm").write_bytes(b"P6 0 0 255\n")
    (folder / "folder.png").mkdir()
    return {
        "truncated.jpg": "truncated",
        "truncated.png": "truncated",
        "truncated.tif": "damaged",
        "empty.png": "empty",
        "text.png": "no image",
        "page.jpg": "no image",
        "zero.ppm": "damaged",
        "folder.png": "directory",
        "vanished.jpg": "No such file",
    }


def test_bad_files_are_told_with_a_reason_and_without_a_folder(tmp_path: Path) -> None:
    for name, reason in make_bad(tmp_path).items():
        with pytest.raises(BadImage, match=reason) as caught:
            load_image(tmp_path / name)
        assert str(caught.value), name
        assert str(tmp_path) not in str(caught.value)
        assert "\n" not in str(caught.value)


@given(st.data())
def test_damaged_bytes_end_in_an_image_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    broken = bytearray(data.draw(st.sampled_from(ENCODED)))
    for place in data.draw(st.lists(st.integers(0, len(broken) - 1), min_size=1, max_size=8)):
        broken[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(broken[: data.draw(st.integers(1, len(broken)))])
    with contextlib.suppress(BadImage):  # anything else fails
        assert load_image(path).mode == "RGB"


def encoded() -> Iterator[bytes]:
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        stream = io.BytesIO()
        exif = {"exif": b"Exif\x00\x00" + Image.Exif().tobytes()} if kind == "JPEG" else {}
        picture(12, 9).save(stream, kind, **exif)
        yield stream.getvalue()


ENCODED = list(encoded())


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".gif"])
def test_an_image_of_more_pixels_than_the_setting_is_a_bad_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"large{suffix}"
    picture(400, 300).save(path)
    assert load_image(path, ImageSettings(max_megapixels=0.12)).size == (400, 300)
    with pytest.raises(BadImage, match=r"^400 x 300 pixels, 0\.12 million, are more than --max-megapixels 0\.1$"):
        load_image(path, ImageSettings(max_megapixels=0.1))
    item = dataset(tmp_path, [path.name], train=False, max_megapixels=0.1)[0, 0]
    assert item.bad[0][1].endswith("more than --max-megapixels 0.1")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be of this size, whatever it holds."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000)))]
    parts = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_bomb_is_refused_by_its_header_in_our_words_and_warns_nobody(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(2**30, 2**30))
    (tmp_path / "large.png").write_bytes(png_header(20000, 15000))  # 300 million: between Pillow's two limits
    for name in ("bomb.png", "large.png"):
        with pytest.raises(BadImage, match=r"more .*--max-megapixels 256") as caught:
            load_image(tmp_path / name)
        assert "MAX_IMAGE_PIXELS" not in str(caught.value)


def test_a_photo_of_108_megapixels_is_read_at_reduced_scale(tmp_path: Path) -> None:
    picture(12000, 9000).save(tmp_path / "phone.jpg", quality=50)
    image = load_image(tmp_path / "phone.jpg", at_least=128)
    assert image.size == (1500, 1125)
    assert np.abs(pixels(image) - pixels(picture(1500, 1125))).mean() < 4


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "F"])
def test_another_large_image_is_reduced_before_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(images, "LARGE", 100_000)
    image = picture(400, 300).convert(mode)
    Image.fromarray(np.asarray(image) / np.float32(255)).save(tmp_path / "a.tif") if mode == "F" else image.save(
        tmp_path / "a.tif"
    )
    small = load_image(tmp_path / "a.tif", at_least=70)
    assert small.size == (75, 75)
    whole = load_image(tmp_path / "a.tif")
    assert whole.size == (400, 300)
    assert np.abs(pixels(small) - pixels(whole.reduce(4, (50, 0, 350, 300)))).max() <= 1
    assert (frame(small, 16).int() - frame(whole, 16).int()).abs().max() <= 3


def scans(side: int, more: int, mode: str = "RGB") -> bytes:
    """A progressive JPEG of one colour whose last scan is repeated."""
    stream = io.BytesIO()
    Image.new(mode, (side, side), 128).save(stream, "JPEG", progressive=True)
    *before, last = stream.getvalue()[:-2].split(b"\xff\xda")
    return b"\xff\xda".join([*before, last, *[last] * more]) + b"\xff\xd9"


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_of_hundreds_of_scans_is_named_before_it_is_decoded(tmp_path: Path, mode: str) -> None:
    (tmp_path / "slow.jpg").write_bytes(scans(1000, 500, mode))
    with pytest.raises(BadImage, match=r"^a JPEG of 5\d\d scans, made to take long; at most 100 are read$"):
        load_image(tmp_path / "slow.jpg", at_least=8)
    (tmp_path / "good.jpg").write_bytes(scans(1000, 0, mode))
    assert load_image(tmp_path / "good.jpg", at_least=8).size == (125, 125)


def test_what_follows_a_photo_is_not_counted_as_its_scans(tmp_path: Path) -> None:
    picture(64, 48).save(tmp_path / "motion.jpg", progressive=True)
    clip = np.random.default_rng(0).integers(0, 256, 2**23, dtype=np.uint8).tobytes()  # 128 times the bytes of a marker
    (tmp_path / "motion.jpg").write_bytes((tmp_path / "motion.jpg").read_bytes() + clip)
    assert load_image(tmp_path / "motion.jpg", at_least=16).size == (32, 24)
    picture(64, 48).save(tmp_path / "plain.jpg")
    (tmp_path / "plain.jpg").write_bytes((tmp_path / "plain.jpg").read_bytes() + scans(8, 500))
    assert load_image(tmp_path / "plain.jpg", at_least=16).size == (32, 24)


def test_of_a_photo_that_gigabytes_follow_few_are_read(tmp_path: Path) -> None:
    picture(64, 48).save(tmp_path / "huge.jpg", progressive=True)
    os.truncate(tmp_path / "huge.jpg", 2**36)  # zeros, which take no room
    tracemalloc.start()
    assert load_image(tmp_path / "huge.jpg", at_least=16).size == (32, 24)
    assert tracemalloc.get_traced_memory()[1] < 2**30
    tracemalloc.stop()


def test_a_ppm_that_would_take_minutes_is_named(tmp_path: Path) -> None:
    for name, side in (("small", 40), ("large", 2100)):
        row = np.arange(3 * side, dtype=">u2") * (65535 // (3 * side))
        (tmp_path / f"{name}.ppm").write_bytes(b"P6 %d %d 65535\n" % (side, side) + row.tobytes() * side)
    assert load_image(tmp_path / "small.ppm").size == (40, 40)
    with pytest.raises(BadImage, match="a PPM of values that are no bytes, too large to read in a reasonable time"):
        load_image(tmp_path / "large.ppm")
    picture(2100, 2100).save(tmp_path / "bytes.ppm")
    assert load_image(tmp_path / "bytes.ppm").size == (2100, 2100)


def test_megabytes_of_text_do_no_harm_and_what_unpacks_to_more_is_refused_in_our_words(tmp_path: Path) -> None:
    for name, size in (("history", 2**22), ("bomb", 2**27)):
        text = PngInfo()
        text.add_text("Comment", " " * size, zip=True)
        picture(8, 8).save(tmp_path / f"{name}.png", pnginfo=text)
    assert load_image(tmp_path / "history.png").size == (8, 8)
    with pytest.raises(BadImage, match="more text or too large a colour profile") as caught:
        load_image(tmp_path / "bomb.png")
    assert "MAX_TEXT" not in str(caught.value)


def test_warnings_neither_leak_nor_stay_off(tmp_path: Path) -> None:
    make_bad(tmp_path)
    paths = [tmp_path / name for name in ("whole.png", "text.png", "truncated.jpg", "whole.tif")] * 50

    def load(path: Path) -> None:
        try:
            load_image(path)
        except BadImage:
            pass

    before = list(warnings.filters)
    with ThreadPool(4) as pool:
        pool.map(load, paths)
    assert warnings.filters == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_is_no_fault_of_the_file_is_not_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    picture(8, 8).save(tmp_path / "image.png")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(images, "to_rgb", fail)
    with pytest.raises(error):
        load_image(tmp_path / "image.png")


# --- framing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(64, 64), (100, 60), (60, 100), (61, 33), (16, 16), (300, 7), (1, 1)])
def test_every_shape_becomes_a_square(width: int, height: int) -> None:
    x = frame(picture(width, height), 16)
    assert (x.shape, x.dtype, x.is_contiguous()) == ((3, 16, 16), torch.uint8, True)


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (128, 32)])
def test_the_frame_is_the_centre_crop_of_the_resized_image(width: int, height: int) -> None:
    image = picture(width, height)
    scale = 16 / min(width, height)
    resized = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 16) // 2, (resized.height - 16) // 2
    by_hand = torch.from_numpy(np.array(resized.crop((left, top, left + 16, top + 16)))).permute(2, 0, 1)
    # Rounded once here and twice there.
    assert (frame(image, 16).int() - by_hand.int()).abs().max() <= 1


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = picture(16, 16)
    np.testing.assert_array_equal(frame(image, 16).permute(1, 2, 0).numpy(), np.asarray(image))


def test_a_random_crop_is_a_piece_of_the_frame_at_the_same_size() -> None:
    # A horizontal ramp: the value of a pixel tells where it comes from.
    ramp = Image.fromarray(np.tile(np.linspace(0, 250, 300, dtype=np.uint8)[None, :, None], (200, 1, 3)))
    whole = frame(ramp, 20).float()
    widths, lefts = [], []
    for seed in range(200):
        x = random_frame(ramp, 20, 0.5, False, random.Random(seed)).float()
        widths.append(float((x[0, 10, -1] - x[0, 10, 0]) / (whole[0, 10, -1] - whole[0, 10, 0])))
        lefts.append(float(x[0, 10, 0]))
        assert whole.min() - 1 <= x.min() <= x.max() <= whole.max() + 1
    assert 0.47 < min(widths) < 0.55
    assert 0.95 < max(widths) < 1.03
    assert max(lefts) - min(lefts) > 0.3 * float(whole.max() - whole.min())


def test_without_crop_and_flip_training_sees_the_frame() -> None:
    image = picture(50, 30)
    for seed in range(5):
        assert random_frame(image, 16, 1.0, False, random.Random(seed)).equal(frame(image, 16))


def test_the_mirror_comes_half_of_the_time() -> None:
    image = picture(50, 30)
    straight, mirrored = frame(image, 16), frame(image, 16).flip(2)
    seen = [random_frame(image, 16, 1.0, True, random.Random(seed)) for seed in range(200)]
    assert all(x.equal(straight) or x.equal(mirrored) for x in seen)
    assert sum(x.equal(mirrored) for x in seen) == pytest.approx(100, abs=30)


@pytest.mark.parametrize(("side", "resolution"), [(31, 16), (64, 64), (90, 64), (40, 64), (257, 32)])
def test_resizing_is_pillows(side: int, resolution: int) -> None:
    image = picture(side + 9, side)
    square = image.crop((4, 0, 4 + side, side))
    expected = np.array(square.resize((resolution, resolution), Image.Resampling.BICUBIC)).astype(int)
    found = frame(image, resolution).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - expected).max() <= 1  # both round their weights to integers, to different ones


def test_training_cuts_from_the_original_not_from_a_reduced_image(tmp_path: Path) -> None:
    # One-pixel stripes, cut at half of the frame and not resized: they stay black and white.
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 255
    image = Image.fromarray(stripes)

    class Chosen(random.Random):
        def randint(self, a: int, b: int) -> int:
            return 16 if (a, b) == (16, 32) else 4

    x = random_frame(image, 16, 0.5, False, Chosen())
    np.testing.assert_array_equal(x.permute(1, 2, 0).numpy(), stripes[4:20, 4:20])


def test_bytes_to_floats_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    x = to_float(every)
    assert (x.dtype, float(x[0]), float(x[-1])) == (torch.float32, -1.0, 1.0)
    assert to_uint8(x).equal(every)
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0039])).tolist() == [0, 255, 128]
    assert to_uint8(x.bfloat16()).dtype == torch.uint8


# --- data set and batches -----------------------------------------------------------------------------------------


def test_augmentation_is_a_function_of_seed_epoch_and_index(folder: Path) -> None:
    data = dataset(folder, EIGHT, random_crop=0.7)
    first = {place: data[place].x for place in ((0, 0), (0, 1), (1, 0))}
    assert all(
        torch.equal(x, again) for place, x in first.items() if x is not None and (again := data[place].x) is not None
    )
    same = ImageDataset([ImageFile(0, "0.png", "train", {})] * 4, data.settings, seed=3, train=True)
    other = ImageDataset([ImageFile(0, "0.png", "train", {})] * 4, data.settings, seed=4, train=True)
    seen = [d[place].x for d in (same, other) for place in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({x.numpy().tobytes() for x in seen if x is not None}) == 8


def test_validation_ignores_the_epoch_and_equals_the_frame(folder: Path) -> None:
    data = dataset(folder, EIGHT, train=False, random_crop=0.5)
    for epoch in (0, 1):
        x = data[epoch, 5].x
        assert x is not None
        assert x.equal(frame(load_image(folder / "5.png"), 16))


def test_training_and_validation_read_a_large_jpeg_at_the_same_scale(tmp_path: Path) -> None:
    picture(640, 480).save(tmp_path / "large.jpg")
    train, val = (dataset(tmp_path, ["large.jpg"], t, random_crop=1, flip=False) for t in (True, False))
    a, b = train[4, 0].x, val[0, 0].x
    assert a is not None
    assert b is not None
    assert a.equal(b)
    assert dataset(tmp_path, ["large.jpg"]).at_least == 32
    assert dataset(tmp_path, ["large.jpg"], random_crop=0.1).at_least == 160


def test_batches_are_the_same_whatever_the_workers(folder: Path) -> None:
    (folder / "2.png").write_text("bad")
    order = [[(0, 2), (0, 7)], [(0, 1), (1, 2), (1, 3)], [(1, 0)]]
    results = []
    for workers in (0, 2):
        global_state = torch.get_rng_state()
        results.append(list(load_batches(dataset(folder, EIGHT), order, workers)))
        assert torch.get_rng_state().equal(global_state)
    for plain, parallel in zip(*results, strict=True):
        assert plain.x.equal(parallel.x)
        assert plain.index.equal(parallel.index)
        assert (plain.bad, plain.missing) == (parallel.bad, parallel.missing)
    assert [batch.index.tolist() for batch in results[0]] == [[3, 7], [1, 3, 3], [0]]
    reason = "no image, or too damaged to be recognised"
    assert [batch.bad for batch in results[0]] == [[(2, reason)], [(2, reason)], []]


def test_an_endless_order_is_read_a_little_ahead_only(folder: Path) -> None:
    asked = []

    def order() -> Iterator[list[tuple[int, int]]]:
        for i in range(10**9):
            asked.append(i)
            yield [(i, i % 8)]

    stream = load_batches(dataset(folder, EIGHT), order(), workers=1)
    assert [next(stream).index.tolist() for _ in range(3)] == [[0], [1], [2]]
    assert len(asked) <= 3 + 2 + 1


def test_workers_outlive_a_signal_to_all_and_end_with_their_batches(folder: Path) -> None:
    others = set(multiprocessing.active_children())
    data = dataset(folder, EIGHT, train=False)
    stream = load_batches(data, [[(0, i)] for i in range(8)], workers=1)
    found = [next(stream).x]
    workers = set(multiprocessing.active_children()) - others
    for worker in workers:
        subprocess.run(["sh", "-c", f"kill -INT {worker.pid}; kill -TERM {worker.pid}"], check=True)
    found += [batch.x for batch in stream]
    assert len(workers) == 1
    assert set(multiprocessing.active_children()) == others
    assert torch.cat(found).equal(torch.cat([batch.x for batch in load_batches(data, [[(0, i) for i in range(8)]], 0)]))


def run_program(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """What a program of its own does with `data`, the eight images."""
    before = f"""
        from pathlib import Path
        from lightdiff.data.loading import ImageDataset, ImageFile, ImageSettings, load_batches
        files = [ImageFile(0, f"{{i}}.png", "train", {{}}) for i in range(8)]
        images = ImageSettings(data=({str(folder)!r},), resolution=16)
        data = ImageDataset(files, images, seed=0, train=True)
        """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(before) + textwrap.dedent(code)],
        cwd=Path(__file__).parents[1], timeout=600, capture_output=True, text=True,
    )  # fmt: skip


def test_a_program_that_ends_in_the_middle_leaves_no_worker_and_does_not_hang(folder: Path) -> None:
    done = run_program(
        folder,
        """
        stream = load_batches(data, ([(i, i % 8)] for i in range(10**9)), workers=2)
        print(next(stream).index.tolist())
        """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0]\n", "")


def test_data_sets_can_be_sent_to_spawned_processes(folder: Path) -> None:
    data = dataset(folder, EIGHT)
    copy = pickle.loads(pickle.dumps(data))
    a, b = data[2, 3].x, copy[2, 3].x
    assert a is not None
    assert a.equal(b)


def test_validation_leaves_bad_images_out(folder: Path) -> None:
    (folder / "0.png").write_text("bad")
    (folder / "1.png").write_text("bad")
    data = dataset(folder, EIGHT, train=False)
    assert data[0, 0].x is None
    some, none = load_batches(data, [[(0, 0), (0, 3)], [(0, 0), (0, 1)]], workers=0)
    assert (some.x.shape, some.index.tolist(), some.missing) == ((1, 3, 16, 16), [3], 1)
    assert (none.x.shape, none.x.dtype, none.index.tolist(), none.missing) == ((0, 3, 16, 16), torch.uint8, [], 2)
    assert [index for index, _ in none.bad] == [0, 1]
    assert data.collate([]).x.shape == (0, 3, 16, 16)


def test_the_next_image_stands_in_and_the_last_is_followed_by_the_first(folder: Path) -> None:
    for name in ("6.png", "7.png"):
        (folder / name).write_text("bad")
    item = dataset(folder, EIGHT)[0, 6]
    assert (item.index, [index for index, _ in item.bad]) == (0, [6, 7])
    assert item.x is not None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_without_a_readable_image_ends_the_run(folder: Path, workers: int) -> None:
    for name in EIGHT:
        (folder / name).write_text("bad")
    with pytest.raises(RunError, match=r"3\.png cannot be read \(no image, .*\), nor can the 7 images after it"):
        next(load_batches(dataset(folder, EIGHT), [[(0, 3)]], workers))
    report = folder / "bad-files.txt"
    files = listed(EIGHT)
    bad = BadFiles(report, len(files), max_bad=0.5)
    with pytest.raises(RunError, match="8 of 8 images"):
        next(load_batches(dataset(folder, EIGHT), [[(0, 3)]], workers, lambda found: bad.add(files, found)))
    assert len(report.read_text().splitlines()) == 8


def test_a_dying_worker_is_told_when_its_batch_is_due_and_not_before(folder: Path) -> None:
    others = set(multiprocessing.active_children())
    stream = load_batches(dataset(folder, EIGHT), ([(i, 0)] for i in range(10**9)), workers=1)
    next(stream)
    (worker,) = set(multiprocessing.active_children()) - others
    worker.kill()
    worker.join()
    time.sleep(0.1)  # the time of a step, or of saving: nothing is raised here
    with pytest.raises(RunError, match=r"^loading images failed: DataLoader worker .*need memory, .*--workers 0"):
        list(itertools.islice(stream, 100))


@pytest.mark.skipif(sys.platform == "win32", reason="batches go through sockets with a path on POSIX alone")
def test_a_batch_that_a_worker_cannot_send_ends_the_run_instead_of_being_waited_for(folder: Path) -> None:
    # Job schedulers set TMPDIR to long paths; the path of a socket has at most 107 characters.
    done = run_program(
        folder,
        """
        import tempfile
        long = data.settings.data[0] / ("long" * 25)
        long.mkdir()
        tempfile.tempdir = str(long)
        next(load_batches(data, [[(0, 0)], [(0, 1)]], workers=1))
        """,
    )
    assert done.stderr.splitlines()[-1] == (
        "lightdiff.errors.RunError: loading images failed: AF_UNIX path too long (worker processes need memory, "
        "room in /dev/shm, open files (ulimit -n) and a short TMPDIR; --workers 0 does without them)"
    )


# --- report of bad files ------------------------------------------------------------------------------------------


def test_bad_files_are_listed_once_and_counted(tmp_path: Path) -> None:
    report = tmp_path / "vae" / "bad-files.txt"
    files = listed([f"{i}.png" for i in range(100)])
    bad = BadFiles(report, len(files), max_bad=0.03)
    bad.add(files, [])
    assert not report.exists()
    bad.add(files, [(4, "truncated"), (9, "no image")])
    bad.add(files, [(4, "truncated"), (4, "truncated")])
    assert bad.count == 2
    assert report.read_text() == "0\t4.png\ttruncated\n0\t9.png\tno image\n"


def test_the_run_stops_as_soon_as_the_share_is_exceeded(tmp_path: Path) -> None:
    report = tmp_path / "bad-files.txt"
    files = listed([f"{i}.png" for i in range(100)])
    bad = BadFiles(report, len(files), max_bad=0.29)
    bad.add(files, [(i, "damaged") for i in range(29)])  # exactly the share is tolerated
    with pytest.raises(RunError) as caught:
        bad.add(files, [(50, "damaged")])
    message = str(caught.value)
    assert "30 of 100 images (30.00%) cannot be read, more than --max-bad 0.29" in message
    assert "0.png: damaged" in message
    assert str(report) in message
    assert len(report.read_text().splitlines()) == 30


def test_a_resumed_run_goes_on_with_the_report(tmp_path: Path) -> None:
    report, names = tmp_path / "bad-files.txt", ["a.png", "b.png", "c\td.png", "é\udcff.png"]
    files = listed(names + [f"{i}.png" for i in range(96)])
    BadFiles(report, len(files), max_bad=1).add(files, [(0, "x"), (2, "y"), (3, "z")])
    resumed = BadFiles(report, len(files), max_bad=1)
    assert resumed.count == 3
    resumed.add(files, [(2, "y"), (1, "new"), (3, "z")])
    assert resumed.count == 4
    assert len(report.read_bytes().splitlines()) == 4


def test_two_processes_share_one_report(tmp_path: Path) -> None:
    report, names = tmp_path / "bad-files.txt", ["a.png", "b.png", "c.png"]
    files = listed(names + [f"{i}.png" for i in range(97)])
    one, two = (BadFiles(report, len(files), max_bad=0.02) for _ in range(2))
    one.add(files, [(0, "x")])
    two.add(files, [(0, "x"), (1, "x")])
    with pytest.raises(RunError, match="3 of 100"):
        one.add(files, [(2, "x")])
    assert report.read_text() == "0\ta.png\tx\n0\tb.png\tx\n0\tc.png\tx\n"


def test_a_bad_file_is_the_same_wherever_its_folder_lies(tmp_path: Path) -> None:
    files = [ImageFile(root, "a.png", "train", {}) for root in (0, 1)] + listed([f"{i}.png" for i in range(98)])
    report = tmp_path / "bad-files.txt"
    report.write_text("/home/me/photos/a.png\tof another version\n")
    BadFiles(report, len(files), max_bad=0.02).add(files, [(0, "truncated")])
    later = BadFiles(report, len(files), max_bad=0.02)  # knows no folders: theirs may be others by now
    later.add(files, [(0, "truncated")])
    assert later.count == 1
    later.add(files, [(1, "empty")])
    assert later.count == 2
