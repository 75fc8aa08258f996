"""What the last lines of a stage say: its one number, and the picture to look at."""

import re
from pathlib import Path

import pytest
import torch
from conftest import succeed
from PIL import Image

from lightdiff.data.files import list_images
from lightdiff.data.images import to_float
from lightdiff.data.index import read_index
from lightdiff.extras.ending import ending
from lightdiff.extras.evidence import held_out, load_images
from lightdiff.losses import psnr
from lightdiff.pipeline import Pipeline
from lightdiff.runtime.progress import console
from lightdiff.settings import TrainVAESettings


def test_the_stages_end_with_a_number_and_a_picture(run):
    """Also where all is done already."""
    for stage in ("vae", "unet"):
        said = succeed(f"train-{stage}", "--run", run, "--device", "cpu").err
        number = r"PSNR [\d.]+ dB on held-out images" if stage == "vae" else "validation loss .* alone gives 1.57"
        picture = Path(re.search(rf"{number}; look at (\S+)", said)[1])
        assert picture == max((run / stage / "images").iterdir())
    assert re.search(r"\d\.\d bits per element of the latents", succeed("scale", "--run", run).err)
    said = succeed("generate", "--run", run, "--num-images", 1, "--num-steps", 1, "--device", "cpu").err
    assert re.search(r"[\d.]+ seconds per image, including startup", said)


def test_encode_shows_what_its_stored_latents_decode_to(run):
    said = succeed("encode", "--run", run, "--device", "cpu", "--workers", 0).err
    images = read_index(run / "latents").images
    x = to_float(torch.stack(load_images(held_out(list_images(images, console)), images)))
    model = Pipeline.load(run, device="cpu")
    expected = float(psnr(x, model.decode(model.encode(x))).mean())
    found = re.search(r"PSNR ([\d.]+) dB of (\d+) images from their stored latents; look at (\S+)", said)
    assert float(found[1]) == pytest.approx(expected, abs=0.06)  # one decimal, and float16
    assert int(found[2]) == len(x)
    with Image.open(found[3]) as picture:
        assert picture.size == (len(x) * 66 - 2, 2 * 66 - 2)


def test_what_cannot_be_read_ends_without_a_number(tmp_path):
    assert ending("train_vae", TrainVAESettings(run=tmp_path), 1.0) == ""
    assert ending("sweep", TrainVAESettings(run=tmp_path), 1.0) == ""
