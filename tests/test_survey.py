"""What a sample of a folder says before a run: one white for all its images, and how many will be enlarged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import VAE_FLAGS, call, succeed
from numpy.typing import NDArray
from PIL import Image

from lightdiff.data import survey
from lightdiff.data.index import read_index
from lightdiff.data.loading import ImageDataset
from lightdiff.data.survey import note_sizes, with_whites
from lightdiff.extras.data import colours
from lightdiff.settings import ImageSettings
from tests.image_files import scan

RAMP = np.linspace(0, 1, 24 * 24, dtype=np.float32).reshape(24, 24)


def fill(folder: Path, *arrays: NDArray[Any], suffix: str = ".tif") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, values in enumerate(arrays):
        Image.fromarray(values).save(folder / f"{i:03d}{suffix}")
    return folder


def surveyed(folder: Path, **settings: Any) -> tuple[ImageSettings, str]:
    """The image settings with the whites found, and what was printed."""
    images, notes = ImageSettings(data=(folder,), resolution=16, **settings), list[str]()
    files = scan(images.data, 0)
    images = with_whites(images, files, notes.append)
    note_sizes(images, files, notes.append)
    return images, "\n".join(notes)


def brightness(images: ImageSettings) -> list[float]:
    """The mean of each image of the folder, of 255."""
    data = ImageDataset(scan(images.data, 0), images, seed=0, train=False)
    found = [data[0, i].x for i in range(len(data))]
    return [float(x.float().mean()) for x in found if x is not None]


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_twelve_bits_in_sixteen_have_one_white_and_dark_images_stay_dark(tmp_path: Path, suffix: str) -> None:
    scales = (4095, 3000, 400, 200, 90)
    folder = fill(tmp_path, *((RAMP * s).astype(np.uint16) for s in scales), suffix=suffix)
    images, printed = surveyed(folder)
    assert (images.integer_white, images.float_white) == (4095, 0)
    assert printed == (
        "white is 4095 in 16-bit images, as the values of 5 of them suggest; --integer-white changes that"
    )
    assert brightness(images) == pytest.approx([127.5 * s / 4095 for s in scales], abs=1)


def test_floats_that_overshoot_do_not_turn_the_others_dark(tmp_path: Path) -> None:
    folder = fill(tmp_path, *(RAMP * np.float32(s) for s in (1, 1.02, 0.3, 0.5)))
    images, printed = surveyed(folder)
    assert images.float_white == 1
    assert "white is 1 in float images" in printed
    assert brightness(images) == pytest.approx([127.5, 130, 38.25, 63.75], abs=1)


def test_one_float_image_of_another_range_is_named_and_the_rest_read_by_one_rule(tmp_path: Path) -> None:
    images, _ = surveyed(fill(tmp_path, *(RAMP * np.float32(s) for s in (255, 200, 1))))
    assert images.float_white == 255
    data = ImageDataset(scan(images.data, 0), images, seed=0, train=False)
    assert [bool(data[0, i].bad) for i in range(3)] == [False, False, True]
    assert "but white is 255 (--float-white)" in data[0, 2].bad[0][1]


def test_integers_and_floats_have_a_white_each(tmp_path: Path) -> None:
    images, printed = surveyed(fill(tmp_path, RAMP, (RAMP * 65535).astype(np.uint16), (RAMP * 255).astype(np.uint8)))
    assert (images.integer_white, images.float_white) == (65535, 1)
    assert printed.count("white is") == 2
    assert brightness(images) == pytest.approx([127.5] * 3, abs=1)


def test_a_white_that_is_given_is_kept_and_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, (RAMP * 300).astype(np.uint16))
    assert surveyed(tmp_path, integer_white=4095)[0].integer_white == 4095
    monkeypatch.setattr(colours, "highest_value", lambda image: pytest.fail("decoded"))
    surveyed(tmp_path, integer_white=4095, float_white=1)


def test_images_of_8_bits_are_not_decoded_and_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colours, "highest_value", lambda image: pytest.fail("decoded"))
    for suffix in (".png", ".tif", ".jpg"):
        folder = fill(tmp_path / suffix[1:], *[(RAMP * 255).astype(np.uint8)] * 3, suffix=suffix)
        before = ImageSettings(data=(folder,), resolution=16)
        assert surveyed(folder) == (before, "")


def test_only_a_sample_is_opened_from_all_parts_of_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "SAMPLE", 4)
    monkeypatch.setattr(colours, "DECODED", 2)
    fill(tmp_path, *((RAMP * s).astype(np.uint16) for s in [200] * 8 + [4000] * 4))
    images, printed = surveyed(tmp_path)
    assert images.integer_white == 4095
    assert "the values of 2 of them" in printed
    assert [f.path[:3] for f in survey.evenly(scan([tmp_path], 0), 4)] == ["000", "003", "007", "011"]
    assert survey.evenly([], 5) == []


def test_bad_files_do_not_disturb(tmp_path: Path) -> None:
    fill(tmp_path, (RAMP * 4000).astype(np.uint16))
    (tmp_path / "bad.tif").write_bytes(b"II*\0")
    whole = (tmp_path / "000.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[: len(whole) // 2])
    assert surveyed(tmp_path)[0].integer_white == 4095


# --- sizes --------------------------------------------------------------------------------------------------------


def test_enlarged_images_are_noted_with_their_share(tmp_path: Path) -> None:
    for i in range(10):
        Image.new("RGB", (12, 10) if i < 4 else (40, 20)).save(tmp_path / f"{i}.png")
    assert surveyed(tmp_path)[1] == (
        "40% of 10 images looked at are smaller than --resolution 16 and will be enlarged "
        "(median shorter side: 20 pixels)"
    )


def test_a_few_small_images_are_not_worth_a_word(tmp_path: Path) -> None:
    for i in range(25):
        Image.new("RGB", (16, 15) if i < 1 else (17, 16)).save(tmp_path / f"{i}.png")
    assert surveyed(tmp_path)[1] == ""


def test_large_images_that_are_no_jpegs_are_to_be_resized_once(tmp_path: Path) -> None:
    for i in range(12):
        size = (700, 512) if i < 3 else (511, 600)
        Image.new("RGB", size).save(tmp_path / f"{i}.{'jpg' if i == 0 else 'png'}")
    assert surveyed(tmp_path)[1] == (
        "17% of 12 images looked at are no JPEGs and large for --resolution 16: a core decodes about 40 PNGs of 1024 "
        "pixels a second; copies resized once load faster, as by "
        "'magick mogrify -path COPIES -resize 32x32^ *.png'"
    )
    notes = list[str]()
    note_sizes(ImageSettings(data=(tmp_path,), resolution=129), scan((tmp_path,), 0), notes.append)
    assert notes == [], "4 x 129 are more than 512"


# --- through the stages -------------------------------------------------------------------------------------------


def test_a_training_finds_white_once_and_later_stages_inherit_it(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", *((RAMP * s).astype(np.uint16) for s in range(500, 4100, 150)))
    run = tmp_path / "run"
    first = succeed("train-vae", "--run", run, "--data", data, *VAE_FLAGS)
    assert "white is 4095 in 16-bit images" in first.err
    assert json.loads((run / "vae" / "settings.json").read_text())["images"]["integer_white"] == 4095
    again = succeed("train-vae", "--run", run, "--steps", 5)
    assert "white is" not in again.err
    refused = call("train-vae", "--run", run, "--steps", 6, "--integer-white", 65535)
    assert refused.code == 2
    assert "was started with --integer-white 4095" in refused.err
    encoded = succeed("encode", "--run", run, "--device", "cpu", "--workers", 0)
    assert "white is" not in encoded.err
    assert read_index(run / "latents").images.integer_white == 4095
    refused = call("encode", "--run", run, "--integer-white", 65535)
    assert (refused.code, "--integer-white" in refused.err) == (2, True)


def test_16_bits_that_come_later_are_looked_at_when_a_run_is_resumed(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", *[(RAMP * 255).astype(np.uint8)] * 8)
    succeed("train-vae", "--run", tmp_path / "run", "--data", data, *VAE_FLAGS)
    Image.fromarray((RAMP * 4000).astype(np.uint16)).save(data / "late.tif")
    resumed = succeed("train-vae", "--run", tmp_path / "run", "--steps", 4)
    assert "white is 4095 in 16-bit images" in resumed.err


def test_train_vae_says_that_images_are_enlarged(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", *[(RAMP * 255).astype(np.uint8)] * 4)
    trained = succeed("train-vae", "--run", tmp_path / "run", "--data", data, *VAE_FLAGS, "--resolution", 32)
    assert "100% of 4 images looked at are smaller than --resolution 32 and will be enlarged" in trained.err
