"""Which formats are read, and what is said of a picture in another one, whatever its name."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from lightdiff.data import formats
from lightdiff.data.formats import FORMATS, SUFFIXES
from lightdiff.data.images import BadImage, load_image
from lightdiff.extras.data.unread import how_to_read, picture_format


def picture() -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((32, 24), Image.Resampling.BICUBIC)


def saved(kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture().save(stream, kind, **options)
    return stream.getvalue()


def ftyp(*brands: str) -> bytes:
    body = b"".join(brand.encode() for brand in (brands[0], "\0\0\0\0", *brands[1:]))
    return (8 + len(body)).to_bytes(4, "big") + b"ftyp" + body


NOT_READ = {
    "HEIC": ftyp("heic", "mif1", "heic"),
    "AVIF": ftyp("avif", "mif1", "miaf"),
    "JPEG XL": b"\xff\x0a\x00\x00",
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "PSD": b"8BPS\0\1",
    "camera raw": b"II*\0\x10\0\0\0CR\2\0",
    "OpenEXR": b"v/1\1\2\0\0\0",
    "SVG": b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg"/>',
}


@pytest.mark.skipif(not formats.HAS_AVIF, reason="needs a Pillow that reads AVIF")
@pytest.mark.parametrize("name", ["image.avif", "image.jpg"])
def test_avif_is_read_under_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(saved("AVIF", quality=95))
    image = load_image(tmp_path / name)
    assert (image.mode, image.size) == ("RGB", (32, 24))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(picture())).mean() < 8


@pytest.fixture
def heic() -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    pillow_heif.from_pillow(picture()).save(stream, quality=95)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "image.heif", "image.jpg"])
def test_heic_is_read_under_any_name_with_the_extra(tmp_path: Path, heic: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(heic)
    image = load_image(tmp_path / name)
    assert (image.mode, image.size) == ("RGB", (32, 24))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(picture())).mean() < 8
    (tmp_path / name).write_bytes(heic[: len(heic) // 2])
    with pytest.raises(BadImage):
        load_image(tmp_path / name)


def test_heic_turned_by_its_camera_is_upright(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    turned, exif = picture().transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    pillow_heif.register_heif_opener()
    turned.save(tmp_path / "a.heic", quality=95, exif=exif.tobytes())
    image = load_image(tmp_path / "a.heic")
    assert image.size == (32, 24)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(picture())).mean() < 8


def test_the_reader_of_heic_is_imported_only_for_such_a_file(tmp_path: Path, heic: bytes) -> None:
    picture().save(tmp_path / "a.jpg")
    (tmp_path / "b.heic").write_bytes(heic)
    code = """import sys; from lightdiff.data.images import load_image
for name in ("a.jpg", "b.heic"): load_image(name); print("pillow_heif" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".heic"])
@pytest.mark.parametrize("name", NOT_READ)
def test_a_picture_of_another_format_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str
) -> None:
    monkeypatch.setattr(formats, "HAS_HEIC", False)
    monkeypatch.setattr(formats, "HAS_AVIF", False)
    monkeypatch.setattr(formats, "FORMATS", tuple(kind for kind in FORMATS if kind != "AVIF"))
    path = tmp_path / f"image{suffix}"
    path.write_bytes(NOT_READ[name] + bytes(600))
    advice = {
        "HEIC": r"python -m pip install 'lightdiff\[heic\]'",
        "AVIF": "python -m pip install --upgrade pillow",
    }.get(name, "convert them to JPEG or PNG")
    with pytest.raises(BadImage, match=f"^{name}, which is not read: {advice}$"):
        load_image(path)
    assert how_to_read(name) == advice.replace("\\", "")


@pytest.mark.parametrize("kind", ["DNG", "NEF"])
def test_a_raw_file_under_a_tiffs_name_is_not_read_as_its_thumbnail(tmp_path: Path, kind: str) -> None:
    tags = ImageFileDirectory_v2()
    if kind == "DNG":
        tags.tagtype[50706], tags[50706] = 1, b"\1\4\0\0"
    else:
        tags[254], tags[330] = 1, 8
    picture().save(tmp_path / "raw.tif", tiffinfo=tags)
    with pytest.raises(BadImage, match=r"^camera raw, which is not read: convert them to JPEG or PNG$"):
        load_image(tmp_path / "raw.tif")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>", "no image, but a web page"),
        (b"\n <HTML>", "no image, but a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull fetches the image"),
        (ftyp("qt  ", "qt  "), "no image, but a video"),
        (b"%PDF-1.7\n", "no image, but a PDF document"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X", "no image, but a macOS metadata file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG, but of a kind that is not read, or too damaged"),
        (b"I am no image", "no image, or too damaged to be recognised"),
    ],
)
def test_what_comes_under_an_images_name_is_called_by_its_own(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "image.jpg").write_bytes(content)
    with pytest.raises(BadImage) as caught:
        load_image(tmp_path / "image.jpg")
    assert reason in str(caught.value)


def test_formats_are_known_by_their_beginning() -> None:
    for kind in FORMATS:
        assert picture_format(saved(kind)[:512]).upper() == kind
        assert how_to_read(picture_format(saved(kind))) == ""
    for name, head in NOT_READ.items():
        assert picture_format(head) == name
    assert picture_format(ftyp("mif1", "mif1", "avif", "miaf")) == "AVIF"
    assert picture_format(ftyp("mif1", "mif1", "heic")) == "HEIC"
    assert picture_format(ftyp("crx ", "crx ", "isom")) == "camera raw"
    assert [picture_format(head) for head in (b"", b"text", b"<html>", ftyp("isom", "mp41"))] == [""] * 4


def test_files_are_listed_by_the_suffixes_of_formats_that_are_read() -> None:
    assert {".jpg", ".png", ".webp", ".tif"} <= set(SUFFIXES)
    assert (".avif" in SUFFIXES, ".heic" in SUFFIXES) == (formats.HAS_AVIF, formats.HAS_HEIC)
