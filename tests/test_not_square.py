"""Images that are not square, through all stages: `--resolution 16x24`, height x width."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import UNET_FLAGS, VAE_FLAGS, succeed
from PIL import Image
from pydantic import ValidationError

from lightdiff.architectures import Size
from lightdiff.checkpoint import Checkpoint
from lightdiff.data.files import list_images
from lightdiff.data.images import frame, load_image, random_frame, to_float
from lightdiff.data.index import read_index
from lightdiff.errors import UserError
from lightdiff.extras.evidence import held_out, load_images
from lightdiff.extras.grid_pattern import PATTERN, grid_pattern
from lightdiff.extras.settings_rows import settings_rows
from lightdiff.pictures import opened
from lightdiff.pipeline import Pipeline
from lightdiff.run_folder import RunFolder
from lightdiff.runtime.progress import console
from lightdiff.settings import ImageSettings, TrainVAESettings, VAESettings, with_changes


@pytest.mark.parametrize(
    ("given", "size", "saved"),
    [
        (64, (64, 64), 64),
        ("64", (64, 64), 64),
        ("48x64", (48, 64), "48x64"),
        ([48, 64], (48, 64), "48x64"),
        ("64x64", (64, 64), 64),
    ],
)
def test_what_is_given_and_what_is_saved(given: object, size: tuple[int, int], saved: object) -> None:
    settings = ImageSettings.model_validate({"resolution": given})
    assert settings.resolution == size
    assert str(settings.resolution) == str(saved)
    assert settings.model_dump(mode="json")["resolution"] == saved  # squares as ever
    assert with_changes(settings, flip=False).resolution == size


def test_the_table_of_settings_shows_defaults_as_they_are_typed() -> None:
    for resolution, differs in ((64, []), ("48x64", [("resolution", "48x64", "64")])):
        saved = TrainVAESettings(images=ImageSettings(resolution=resolution)).to_save()
        rows = settings_rows(TrainVAESettings, saved)
        assert [tuple(row) for row in rows if row.differs] == differs


@pytest.mark.parametrize("wrong", ["4", "48x4", "48by64", "x64", 64.5, True, [1, 2, 3], "", "123456", None])
def test_what_is_no_size_is_refused(wrong: object) -> None:
    with pytest.raises(ValidationError):
        ImageSettings.model_validate({"resolution": wrong})


def test_sizes_that_do_not_divide_are_refused_with_the_nearest() -> None:
    for given, words in {
        "48x66": "48x66 is not divisible by 4; the nearest that fit: 48x64 or 48x68",
        "66": "64 or 68",
    }.items():
        settings = TrainVAESettings(images=ImageSettings(resolution=given), model=VAESettings())
        with pytest.raises(UserError, match=words + "$"):
            settings.resolved()


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 40), (64, 48), (33, 21), (7, 90), (200, 3)])
def test_the_frame_is_the_largest_centred_part_of_its_shape(width: int, height: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = frame(Image.fromarray(pixels), Size(24, 32))
    assert found.shape == (3, 24, 32)
    box = min(width, height * 32 / 24), min(height, width * 24 / 32)  # width and height, in fractions of pixels
    w, h = (max(1, round(side)) for side in box)
    left, top = (width - w) // 2, (height - h) // 2
    part = Image.fromarray(pixels[top : top + h, left : left + w])
    wanted = np.asarray(part.resize((32, 24), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(found.permute(1, 2, 0).numpy() - wanted).max() <= 1


def test_a_random_frame_has_the_shape_and_stays_within_the_centre() -> None:
    ramp = np.zeros((60, 200, 3), np.uint8)
    ramp[:, :, 0], ramp[:, :, 1] = np.arange(200), np.arange(60)[:, None]
    seen = set()
    for seed in range(40):
        x = random_frame(Image.fromarray(ramp), Size(30, 40), 0.5, False, random.Random(seed)).float()
        low, high = x[0].min() - 1, x[0].max() + 1
        assert x.shape == (3, 30, 40)
        assert low >= 60 - 2
        assert high <= 140 + 2  # the frame is 80 pixels wide
        assert (high - low) / (x[1].max() - x[1].min() + 2) == pytest.approx(4 / 3, abs=0.1)  # nothing is stretched
        seen.add((int(low), int(x[1].min())))
    assert len(seen) > 30


def test_a_very_large_image_keeps_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightdiff.data import images

    pixels = np.random.default_rng(0).integers(0, 256, (30, 80, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    settings = ImageSettings(resolution="15x40")
    whole = frame(load_image(tmp_path / "a.png", settings), settings.resolution).float()
    monkeypatch.setattr(images, "LARGE", 1000)
    reduced = frame(load_image(tmp_path / "a.png", settings, at_least=80), settings.resolution).float()
    assert (whole - reduced).abs().mean() < 8  # of 255: another filter


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, faces: Path) -> Path:
    """A run of 16 x 24 pixels that went through all stages."""
    run = tmp_path_factory.mktemp("wide") / "run"
    flags = [*VAE_FLAGS, "--resolution", "16x24", "--equivariance", 0.5]
    succeed("train-vae", "--run", run, "--data", faces, *flags)
    succeed("encode", "--run", run, "--workers", 0, "--device", "cpu")
    succeed("scale", "--run", run)
    succeed("train-unet", "--run", run, *UNET_FLAGS)
    return run


def test_all_stages(wide: Path, tmp_path: Path) -> None:
    index = read_index(RunFolder(wide).latents)
    assert index.shape[1:] == (8, 12)
    out = tmp_path / "out"
    succeed("generate", "--run", wide, "--num-images", 2, "--num-steps", 2, "--device", "cpu", "--out", out)
    assert opened(out / "00000.png").size == (24, 16)
    more = ("--num-images", 1, "--num-steps", 2, "--device", "cpu")
    succeed("generate", "--run", wide, *more, "--out", tmp_path / "other", "--resolution", "24x16")
    assert opened(tmp_path / "other" / "00000.png").size == (16, 24)
    saved = Checkpoint(RunFolder(wide).vae.best).metadata.settings["images"]["resolution"]
    assert saved == "16x24"
    assert Pipeline.load(wide, device="cpu").resolution == (16, 24)
    assert "16x24" in succeed("show", wide / "vae/checkpoints/best.safetensors").out


def test_edit_and_walk(wide: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "from.png")
    mask = np.zeros((40, 60), np.uint8)
    mask[:, 40:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    draw = ("--run", wide, "--num-images", 1, "--num-steps", 2, "--device", "cpu")
    succeed("edit", *draw, "--from", tmp_path / "from.png", "--mask", tmp_path / "mask.png", "--out", tmp_path / "edit")
    drawn = torch.from_numpy(np.array(opened(tmp_path / "edit/00000.png"))).permute(2, 0, 1)
    kept = frame(Image.fromarray(pixels), Size(16, 24))
    assert torch.equal(drawn[:, :, :15], kept[:, :, :15])
    assert not torch.equal(drawn[:, :, 17:], kept[:, :, 17:])
    walk = ("walk", "--run", wide, "--between", "1,2", "--frames", 3, "--num-steps", 2, "--device", "cpu")
    succeed(*walk, "--out", tmp_path / "walk")
    assert opened(tmp_path / "walk/00000.png").size == (24, 16)


def test_evaluate_the_vae(wide: Path, weights: Path) -> None:
    """The numbers are those of the held-out images themselves, 16 rows of 24 pixels."""
    pytest.importorskip("skimage")
    flags = ("--features", weights, "--batch-size", 4, "--workers", 0, "--device", "cpu", "--precision", "fp32")
    succeed("evaluate", "--run", wide, "--of", "vae", *flags)
    found = json.loads((wide / "evaluation/metrics.json").read_text())["vae"]
    images = read_index(RunFolder(wide).latents).images
    x = to_float(torch.stack(load_images(held_out(list_images(images, console)), images)))
    assert x.shape[1:] == (3, 16, 24)
    model = Pipeline.load(wide, device="cpu")
    error = (model.decode(model.encode(x)) - x).double()
    psnr = (10 * (4 / error.square().mean((1, 2, 3))).log10()).mean()  # images are in [-1, 1]
    assert found["PSNR (dB)"] == pytest.approx(psnr.item(), rel=1e-3)
    pattern = grid_pattern(127.5 * error.mean(0), model.vae_settings.factor)
    assert found[PATTERN] == pytest.approx(pattern, rel=1e-3) != 0
    assert "to 16x24 px, then to 299 px" in found["resampling"]


@pytest.mark.slow
def test_evaluate_samples(wide: Path, weights: Path) -> None:
    pytest.importorskip("skimage")
    flags = ("--features", weights, "--num-images", 4, "--batch-size", 4, "--workers", 0, "--device", "cpu")
    succeed("evaluate", "--run", wide, "--of", "unet", *flags)
    found = json.loads((wide / "evaluation/metrics.json").read_text())["unet"]
    assert found["samples"] == 4
    assert "to 16x24 px, then to 299 px" in found["resampling"]
    sheet = opened(wide / "evaluation/nearest.png")
    assert sheet.width > 5 * 72  # a sample and four training images of 24 px, enlarged to 72


@pytest.mark.slow
def test_the_report(wide: Path, tmp_path: Path) -> None:
    succeed("report", wide, "--out", tmp_path / "report.html", "--device", "cpu")
    assert "16x24" in (tmp_path / "report.html").read_text()
