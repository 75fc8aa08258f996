"""From an image file to a tensor: every format and mode, colours and transparency, the cut and the size."""

import os
import random
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import dataset, picture, pixels
from PIL import Image

from lightdiff.data import images
from lightdiff.data.images import BadImage, colour, frame, load_image, random_frame, to_float, to_uint8
from lightdiff.errors import UserError
from lightdiff.settings import ImageSettings

GREY16 = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1391  # 0 to 65377
EXPECTED16 = np.rint(GREY16 / 257).astype(np.uint8)


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


def test_an_unknown_background_is_the_users_mistake(tmp_path: Path) -> None:
    picture(8, 8).convert("RGBA").save(tmp_path / "image.png")
    with pytest.raises(UserError, match=r"^--background: 'whit' is no colour"):
        load_image(tmp_path / "image.png", ImageSettings(background="whit"))
    with pytest.raises(UserError, match="--background"):
        dataset(tmp_path, ["image.png"], background="#12")
    assert colour("#ff800040") == (255, 128, 0)


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


# --- large ones at a smaller scale --------------------------------------------------------------------------------


def test_a_jpeg_is_decoded_smaller_but_never_smaller_than_needed(tmp_path: Path) -> None:
    picture(400, 203).save(tmp_path / "image.jpg")
    sizes = {at_least: load_image(tmp_path / "image.jpg", at_least=at_least).size for at_least in (0, 20, 50, 101, 150)}
    assert sizes == {0: (400, 203), 20: (50, 26), 50: (100, 51), 101: (200, 102), 150: (400, 203)}


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
