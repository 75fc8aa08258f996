"""Architectures: which one a checkpoint holds stands in its settings, and a further one is a file and a row."""

import json
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from conftest import UNET_FLAGS, VAE_FLAGS, call, succeed
from torch import Tensor, nn

from lightdiff.checkpoint import Checkpoint
from lightdiff.errors import UserError
from lightdiff.models.original import OriginalUNetSettings, OriginalVAE, OriginalVAESettings
from lightdiff.models.vae import VAE, Posterior
from lightdiff.options import build, defaults, merge
from lightdiff.pipeline import Pipeline, load_vae
from lightdiff.settings import TrainUNetSettings, TrainVAESettings, UNetArchitecture, VAEArchitecture, VAESettings

CPU = torch.device("cpu")


# --- a made-up third one, as its file would be ----------------------------------------------------------------------


class PatchVAESettings(VAEArchitecture):
    """A VAE of one linear map of patches, and of another back."""

    NETWORK: ClassVar = f"{__name__}:PatchVAE"

    architecture: Literal["patches"] = "patches"
    patch: int = 4

    @property
    def factor(self) -> int:
        return self.patch


class PatchEncoder(nn.Module):
    def __init__(self, settings: PatchVAESettings) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 2 * settings.latent_channels, settings.patch, stride=settings.patch)

    def forward(self, x: Tensor) -> Posterior:
        return Posterior(*self.patches(x).chunk(2, dim=1))


class PatchDecoder(nn.Module):
    def __init__(self, settings: PatchVAESettings) -> None:
        super().__init__()
        self.patches = nn.ConvTranspose2d(settings.latent_channels, 3, settings.patch, stride=settings.patch)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.patches(z))


class PatchVAE(VAE):
    def __init__(self, settings: PatchVAESettings) -> None:
        super().__init__(settings, PatchEncoder, PatchDecoder)


class PointUNetSettings(UNetArchitecture):
    """A U-Net without a U: each pixel for itself."""

    NETWORK: ClassVar = f"{__name__}:PointUNet"

    architecture: Literal["points"] = "points"
    hidden: int = 0

    def resolved(self, latent_size: int) -> "PointUNetSettings":
        return PointUNetSettings(hidden=self.hidden or 4 * latent_size)


class PointUNet(nn.Module):
    def __init__(self, settings: PointUNetSettings, latent_channels: int, num_classes: int = 0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(latent_channels + 1, settings.hidden, 1),
            nn.SiLU(),
            nn.Conv2d(settings.hidden, latent_channels, 1),
        )

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        out: Tensor = self.net(torch.cat([x, (t / 1000).view(-1, 1, 1, 1).expand_as(x[:, :1])], dim=1))
        return out


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two rows."""
    assert __name__ in sys.modules
    monkeypatch.setitem(VAEArchitecture.ARCHITECTURES, "patches", f"{__name__}:PatchVAESettings")
    monkeypatch.setitem(UNetArchitecture.ARCHITECTURES, "points", f"{__name__}:PointUNetSettings")


@pytest.mark.usefixtures("rows")
def test_a_further_architecture_goes_through_all_stages(faces: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    vae_file, unet_file = tmp_path / "vae.toml", tmp_path / "unet.toml"
    vae_file.write_text('[model]\narchitecture = "patches"\npatch = 2\n')
    unet_file.write_text('[model]\narchitecture = "points"\n')
    vae_flags, unet_flags = (
        [flag for flag in flags if flag not in ("--preset", "tiny")] for flags in (VAE_FLAGS, UNET_FLAGS)
    )
    succeed("train-vae", "--run", run, "--data", faces, *vae_flags, "--settings", vae_file)
    succeed("train-vae", "--run", run, *vae_flags, "--steps", 4)  # resumed: what it is stands in the checkpoint
    succeed("encode", "--run", run, "--workers", 0, "--device", "cpu")
    succeed("scale", "--run", run)
    succeed("train-unet", "--run", run, *unet_flags, "--settings", unet_file)
    succeed("train-unet", "--run", run, *unet_flags, "--steps", 4)
    succeed("generate", "--run", run, "--num-images", 2, "--num-steps", 2, "--device", "cpu", "--out", tmp_path / "out")
    model = Pipeline.load(run, device="cpu")
    assert isinstance(model.vae, PatchVAE)
    assert isinstance(model.unet, PointUNet)
    assert model.settings.model == PointUNetSettings(hidden=32)
    assert model.decode(model.sample(2)).shape == (2, 3, 16, 16)
    saved = Checkpoint(run / "vae/checkpoints/last.safetensors")
    assert saved.metadata.settings["model"] == {"architecture": "patches", "latent_channels": 4, "patch": 2}
    assert saved.metadata.step == 4


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [TrainVAESettings, TrainUNetSettings])
def test_settings_are_of_the_architecture_they_name(model: type[TrainVAESettings | TrainUNetSettings]) -> None:
    for name in ("default", "original"):
        settings = build(model, [defaults(model), {"model": {"architecture": name}}])
        saved = json.loads(json.dumps(settings.to_save()))
        assert model.model_validate(saved).model == settings.model
        assert saved["model"]["architecture"] == name
    assert type(settings.model) in (OriginalVAESettings, OriginalUNetSettings)
    assert model.model_validate({"model": {}}) == model()


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ({"architecture": "gothic"}, "architecture: there is no gothic; there are default, original, kl, taesd"),
        ({"architecture": ["original"]}, "architecture: there is no ['original']"),
        (
            {"architecture": "original", "mid_blocks": 1},
            "--model.mid-blocks: a model of the kind that is chosen has no such setting",
        ),
        ({"architecture": "original", "encoder_channels": [8]}, "--model.encoder-channels: "),
        ({"architecture": "original", "encoder_channels": [8, 8, 8]}, "3 encoder_channels but 4 decoder_channels"),
    ],
)
def test_settings_of_no_architecture_are_refused(model: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as raised:
        build(TrainVAESettings, [{"model": model}])
    assert line in str(raised.value)


def test_the_originals_attention_has_4_heads() -> None:
    with pytest.raises(ValueError, match="the 4 heads of attention do not divide the last width"):
        OriginalUNetSettings(channels=(8, 8, 30))


def test_a_layer_of_another_architecture_leaves_nothing_of_the_layers_below() -> None:
    below = {"loop": {"lr": 1.0}, "model": {"architecture": "default", "mid_blocks": 3}}
    above = {"model": {"architecture": "original"}}
    assert merge(TrainVAESettings, below, above) == {"loop": {"lr": 1.0}, "model": {"architecture": "original"}}
    same = {"model": {"architecture": "default", "attention": True}}
    assert merge(TrainVAESettings, below, same)["model"] == {
        "architecture": "default",
        "mid_blocks": 3,
        "attention": True,
    }
    assert merge(TrainVAESettings, below, {"model": {"attention": True}})["model"]["architecture"] == "default"


def test_a_preset_of_another_architecture_does_not_change_a_run(run: Path) -> None:
    result = call("train-vae", "--run", run, "--preset", "original", "--steps", 9)
    assert (result.code, "this run holds another architecture" in result.err) == (2, True)


def test_flags_that_both_know_change_the_original(tmp_path: Path) -> None:
    flags = ["--run", tmp_path, "--preset", "original", "--lpips-gamma", 0, "--dry-run"]
    vae = call("train-vae", *flags, "--model.encoder-channels", "8,8", "--model.decoder-channels", "16,8")
    expected = OriginalVAESettings(encoder_channels=(8, 8), decoder_channels=(16, 8)).model_dump(mode="json")
    assert json.loads(vae.stdout[: vae.stdout.rindex("}") + 1])["model"] == expected
    other = call("train-vae", *flags, "--model.mid-blocks", 2)
    assert (other.code, "--model.mid-blocks: a model of the kind" in other.err) == (2, True)


def test_a_saved_original_is_loaded_as_one(tmp_path: Path) -> None:
    from tests.bench.cases import untrained_vae

    settings = OriginalVAESettings(encoder_channels=(8, 8), decoder_channels=(8, 8))
    saved = untrained_vae(tmp_path / "vae.safetensors", settings)
    vae, model = load_vae(saved, CPU)
    assert (type(vae), model) == (OriginalVAE, settings)
    assert type(load_vae(untrained_vae(tmp_path / "b.safetensors", VAESettings().resolved(16)), CPU)[0]) is VAE
