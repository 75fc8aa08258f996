"""Images that cannot be read, or not in a reasonable time: each is named with a reason, and a run reports them."""

import contextlib
import io
import os
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import dataset, listed, picture
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lightdiff.data import images
from lightdiff.data.bad_files import BadFiles
from lightdiff.data.files import ImageFile
from lightdiff.data.images import BadImage, load_image
from lightdiff.errors import RunError
from lightdiff.settings import ImageSettings


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


def encoded() -> Iterator[bytes]:
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        stream = io.BytesIO()
        exif = {"exif": b"Exif\x00\x00" + Image.Exif().tobytes()} if kind == "JPEG" else {}
        picture(12, 9).save(stream, kind, **exif)
        yield stream.getvalue()


ENCODED = list(encoded())


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


# --- made to take long --------------------------------------------------------------------------------------------


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


# --- the report ---------------------------------------------------------------------------------------------------


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
