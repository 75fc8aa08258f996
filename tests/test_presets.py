"""Presets: their files, the networks that come of them at each size, and the table that lists them."""

import re
import tomllib
from pathlib import Path

import pytest
from conftest import call
from parsing import dry

from lightdiff import options
from lightdiff.extras.gpu_memory import gpu_memory
from lightdiff.models.vae import VAE
from lightdiff.options import PRESETS, build, preset_layer
from lightdiff.settings import Settings, TrainUNetSettings, TrainVAESettings, UNetSettings, VAESettings

PRESET_FOLDER = Path(options.__file__).parent / "presets"


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("resolution", [32, 64, 128, 256, 512])
def test_presets_build(name: str, resolution: int) -> None:
    vae = build(TrainVAESettings, [preset_layer("vae", name, resolution)])
    unet = build(TrainUNetSettings, [preset_layer("unet", name, resolution)])
    network = vae.model.resolved(resolution)
    assert resolution % network.factor == 0
    assert network == network.resolved(resolution)
    side = resolution // network.factor
    assert len(unet.model.resolved(side).channels) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("side", [256, 512])
@pytest.mark.parametrize("name", ["base-s", "base", "base-l", "kl-f8", "original"])
def test_presets_for_a_gpu_fit_into_24_gb(name: str, side: int) -> None:
    """LPIPS is told by its published size; the U-Net works on the latents of the preset's VAE."""
    vae = build(TrainVAESettings, [preset_layer("vae", name, side), {"images": {"resolution": side}}]).resolved()
    of_latent = {"channels": vae.model.latent_channels, "height": side // vae.model.factor}
    latent = {"latent": of_latent | {"width": side // vae.model.factor}}
    unet = build(TrainUNetSettings, [preset_layer("unet", name, side), latent]).resolved()
    for settings in (vae, unet):
        memory, micro = gpu_memory(settings, "bf16"), settings.loop.micro
        assert memory.total(micro, several=micro < settings.loop.batch_size) < 24e9, type(settings).__name__


def test_there_is_no_other_preset() -> None:
    files = {path.name for path in PRESET_FOLDER.iterdir() if path.suffix == ".toml"}
    assert files == {f"{network}-{name}.toml" for network in ("vae", "unet") for name in PRESETS}


@pytest.mark.parametrize(("network", "model"), [("vae", VAESettings), ("unet", UNetSettings)])
def test_the_small_preset_is_the_default(network: str, model: type[Settings]) -> None:
    said = tomllib.loads((PRESET_FOLDER / f"{network}-small.toml").read_text(encoding="utf-8"))
    assert list(said) == ["model"]
    assert said["model"]
    assert model.model_validate(said["model"]) == model()


@pytest.mark.parametrize("size", [64, 128, 191, 192, 256, 384, 512])
def test_sections_of_a_preset_are_for_images_of_that_size_and_more(size: int) -> None:
    model = build(TrainVAESettings, [preset_layer("vae", "base", size)]).model.resolved(size)
    assert (model.encoder_width, model.factor) == (64, 16 if size >= 384 else 8 if size >= 192 else 4)
    assert model.latent_channels == (16 if size >= 384 else 4)
    assert model.decoder_blocks == ((2, 2, 3, 2) if size >= 384 else (2, 3, 2) if size >= 192 else (3,))


# --- in commands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "small", "base", "original"])
def test_every_preset_can_be_chosen(cli, tmp_path, run, name):
    vae = dry(cli, "train-vae", "--run", tmp_path / "new", "--preset", name)
    (run / "unet").rename(run / "unet-before")
    unet = dry(cli, "train-unet", "--run", run, "--preset", name)
    if name == "small":  # is the default
        assert vae == dry(cli, "train-vae", "--run", tmp_path / "new")
        assert dry(cli, "train-unet", "--run", run)["preset"] == "tiny"  # the VAE's
    assert [made["model"]["architecture"] == "original" for made in (vae, unet)] == 2 * [name == "original"]


@pytest.fixture(scope="module")
def listed():
    """What `presets` says of images of 256 px."""
    return call("presets", "--resolution", 256)


def test_presets_lists_all(listed):
    assert listed.code == 0
    lines = [line.strip("│┃ ").split() for line in listed.stdout.splitlines()]
    names = [words[0] for words in lines if "VAE" in words]
    assert names == list(PRESETS)
    assert listed.out.count("U-Net") == len(PRESETS)
    assert listed.err == ""


def test_presets_of_a_size_that_fits_none(cli):
    result = cli("presets", "--resolution", 30)
    assert (result.code, result.err) == (0, "")
    assert "needs images divisible by 8" in result.out  # the original VAE halves three times


@pytest.mark.parametrize("resolution", [0, -5])
def test_presets_of_no_size(cli, resolution):
    result = cli("presets", f"--resolution={resolution}")
    assert (result.code, result.out) == (2, "")
    assert "--resolution" in result.err


def test_presets_numbers_are_plausible(listed):
    """Parameters against a count of what is built, and the original's against what its authors said."""
    rows = [re.split(r" *[│┃] *", line)[1:-1] for line in listed.stdout.splitlines()]
    kinds = {kind: [row for row in rows if len(row) == 9 and row[1] == kind] for kind in ("VAE", "U-Net")}
    sizes = {kind: [float(row[3].removesuffix(" M")) for row in found] for kind, found in kinds.items()}
    for found in sizes.values():
        assert found[:5] == sorted(found[:5])  # tiny, small, base-s, base, base-l
    original = PRESETS.index("original")
    assert (sizes["VAE"][original], sizes["U-Net"][original]) == (21.48, 201.43)
    assert sizes["VAE"][PRESETS.index("kl-f8")] == 83.65  # as Stable Diffusion's VAE has
    for row in (*kinds["VAE"], *kinds["U-Net"]):
        fixed, image = (float(cell.removesuffix(" MB")) for cell in row[5:7])
        parameters = float(row[3].removesuffix(" M"))
        adamw = row in (kinds["VAE"][original], kinds["U-Net"][original], kinds["VAE"][PRESETS.index("kl-f8")])
        # Bytes a parameter: 20, or 16 for Muon's, which are all but some small weights, and a U-Net's time embedding
        each = 20 if adamw else 16.1 if row in kinds["VAE"] else 16.6
        assert fixed == pytest.approx(each * parameters, rel=0.02, abs=0.7)
        assert image > 0
        assert float(row[4].replace(",", "")) > 0 < float(row[8].replace(",", ""))
    chosen = build(TrainVAESettings, [preset_layer("vae", "tiny")]).model.resolved(256)
    assert f"{sum(p.numel() for p in VAE(chosen).parameters()) / 1e6:.2f}" == f"{sizes['VAE'][0]:.2f}"
