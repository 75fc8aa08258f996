"""AutoencoderKL's layout: equal to diffusers' own class, with random weights."""

from typing import Any

import pytest
import torch

from lightdiff.models.kl import KLVAE, KLVAESettings
from lightdiff.settings import VAEArchitecture

pytestmark = pytest.mark.reference
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of small widths: diffusers' configuration, and ours
    "SD 1": ({}, {}),
    "SDXL, one level less": ({"block_out_channels": (32, 64, 64)}, {"channels": (32, 64, 64)}),
    "FLUX.1": (
        {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
        {"latent_channels": 16, "quant_conv": False, "post_quant_conv": False},
    ),
    "without attention": (
        {"mid_block_add_attention": False, "layers_per_block": 1},
        {"mid_attention": False, "blocks": 1},
    ),
    "other groups": ({"norm_num_groups": 8}, {"groups": 8}),
}


def theirs(**config: Any) -> Any:
    """Diffusers' class with random weights; norms and biases, too, as those of a new network would hide mistakes."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    widths = config.setdefault("block_out_channels", (32, 64, 128, 128))
    config = {"layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * len(widths)} | config
    vae = diffusers.AutoencoderKL(up_block_types=("UpDecoderBlock2D",) * len(widths), **config).eval()
    torch.manual_seed(0)
    for name, parameter in vae.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.05)
    return vae


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_equal_to_diffusers(shape: str) -> None:
    config, settings = SHAPES[shape]
    other = theirs(**config)
    vae = KLVAE(KLVAESettings(**{"channels": (32, 64, 128, 128)} | settings)).eval()
    vae.load_state_dict({renamed(name): tensor for name, tensor in other.state_dict().items()})
    x = torch.rand(2, 3, 40, 48) * 2 - 1
    posterior, wanted = vae.encoder(x), other.encode(x).latent_dist
    torch.testing.assert_close(posterior.mu, wanted.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(posterior.logvar, wanted.logvar, atol=1e-5, rtol=1e-5)
    assert posterior.mu.std() > 0.01
    z = torch.randn_like(posterior.mu)
    torch.testing.assert_close(vae.decoder(z), other.decode(z).sample, atol=1e-5, rtol=1e-5)


def renamed(name: str) -> str:
    """Diffusers' name of a tensor -> ours."""
    return {"quant_conv": "encoder.", "post_quant_conv": "decoder."}.get(name.split(".")[0], "") + name


def test_the_preset_has_the_size_of_stable_diffusions() -> None:
    settings = VAEArchitecture.model_validate({"architecture": "kl"})
    assert isinstance(settings, KLVAESettings)
    with torch.device("meta"):
        vae = KLVAE(settings)
        assert vae.encoder(torch.zeros(1, 3, 256, 256)).mu.shape == (1, 4, 32, 32)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863  # as of stabilityai/sd-vae-ft-mse


def test_groups_that_do_not_divide_a_width_are_refused() -> None:
    with pytest.raises(ValueError, match="32 groups do not divide the width 48"):
        KLVAESettings(channels=(32, 48))


def test_logvar_is_clamped_as_there() -> None:
    vae = KLVAE(KLVAESettings(channels=(32,)))
    torch.nn.init.constant_(vae.encoder.quant_conv.bias, 99.0)  # type: ignore[arg-type]
    assert vae.encoder(torch.zeros(1, 3, 8, 8)).logvar.max() == 20
