"""The networks whole: shapes, widths that follow the size, what they start as, and that samples do not mix."""

import pytest
import torch
from networks import SMALL_UNET, SMALL_VAE, levels, parameters, randomized
from oracles import normal
from torch import Tensor, nn

from lightdiff.models.layers import Attention
from lightdiff.models.original import OriginalUNetSettings, OriginalVAESettings
from lightdiff.models.unet import UNet, UNetBlock, build_unet
from lightdiff.models.vae import VAE, Decoder, Encoder, build_vae
from lightdiff.options import build, preset_layer
from lightdiff.settings import (
    TrainUNetSettings,
    TrainVAESettings,
    UNetArchitecture,
    UNetSettings,
    VAEArchitecture,
    VAESettings,
)

ORIGINAL_VAE = OriginalVAESettings(encoder_channels=(8, 8, 16), decoder_channels=(16, 16, 8))
VAES: dict[str, VAEArchitecture] = {
    "default": SMALL_VAE,
    "group norm": SMALL_VAE.model_copy(update={"norm": "group"}),
    "attention": SMALL_VAE.model_copy(update={"attention": True, "mid_blocks": 2}),
    "no middle": SMALL_VAE.model_copy(update={"attention": True, "mid_blocks": 0}),
    "original": ORIGINAL_VAE,
    "blocks": SMALL_VAE.model_copy(update={"encoder_blocks": (2, 1), "decoder_blocks": (1, 3), "latent_channels": 7}),
}
UNETS: dict[str, UNetArchitecture] = {
    "default": SMALL_UNET,
    "no attention": SMALL_UNET.model_copy(update={"attend_levels": (), "mid_attention": False}),
    "original": OriginalUNetSettings(channels=(16, 16, 32), blocks=3, time_dim=32),
}


# --- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (32, 32), (64, 48), (128, 128)])
@pytest.mark.parametrize("kind", VAES)
def test_vae_shapes(kind: str, size: tuple[int, int]) -> None:
    settings = VAES[kind].resolved(min(size))
    vae, (h, w) = build_vae(settings), size
    assert settings.factor == (2 if min(size) < 32 and kind != "original" else 4)
    x = normal(2, 3, h, w, dtype=torch.float32).clamp(-1, 1)
    latent = (2, settings.latent_channels, h // settings.factor, w // settings.factor)
    with torch.no_grad():
        x_hat, posterior = vae(x, torch.zeros(latent))
    assert posterior.mu.shape == posterior.logvar.shape == latent
    assert x_hat.shape == x.shape


def test_256_px_are_halved_three_times() -> None:
    settings = VAESettings().resolved(256)
    with torch.device("meta"):
        posterior = Encoder(settings)(torch.zeros(1, 3, 256, 256))
    assert posterior.mu.shape == (1, 4, 32, 32)


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (16, 16), (16, 24), (32, 32), (32, 8)])
@pytest.mark.parametrize("kind", UNETS)
def test_unet_shapes(kind: str, size: tuple[int, int]) -> None:
    unet = build_unet(UNETS[kind].resolved(max(size)), latent_channels=5)
    with torch.no_grad():
        eps = unet(normal(2, 5, *size, dtype=torch.float32), levels(0, 999))
    assert eps.shape == (2, 5, *size)


@pytest.mark.parametrize("width", [20, 36])
def test_any_width_can_be_built(width: int) -> None:
    x = normal(1, 3, 16, 16, dtype=torch.float32)
    vae = VAE(VAESettings(encoder_width=width, decoder_width=width).resolved(16))
    unet = UNet(UNetSettings(width=width, blocks=1, time_dim=16).resolved(8), 4)
    with torch.no_grad():
        posterior = vae.encoder(x)
        assert vae.decoder(posterior.mu).shape == x.shape
        assert unet(posterior.mu, levels(3)).shape == posterior.mu.shape
    assert isinstance(unet.norm, nn.GroupNorm)
    assert unet.norm.num_groups == 4  # the common divisor with 32


@pytest.mark.parametrize("size", [(6, 8), (8, 10), (7, 7), (1, 5)])
def test_latents_of_any_size_go_through_halvings_that_round_up(size: tuple[int, int]) -> None:
    unet = UNet(UNetSettings(channels=(8, 8, 8), blocks=1, time_dim=8, heads=1, zero_init=False), 4)
    out = unet(torch.randn(1, 4, *size), levels(0))
    assert out.shape == (1, 4, *size)
    assert out.isfinite().all()


@pytest.mark.parametrize("size", [(6, 8), (8, 10), (7, 7)])
def test_latents_that_cannot_be_halved_are_refused(size: tuple[int, int]) -> None:
    unet = build_unet(OriginalUNetSettings(channels=(8, 8, 8), blocks=1, time_dim=8), 4)
    with pytest.raises(ValueError, match=f"^latents of {size[0]} x {size[1]} are not divisible by 4$"):
        unet(torch.zeros(1, 4, *size), levels(0))


# --- what settings resolve to -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolution", "encoder", "decoder"),
    [
        (16, (32, 32), (64, 32)),
        (31, (32, 32), (64, 32)),
        (32, (32, 32, 64), (128, 64, 32)),
        (128, (32, 32, 64), (128, 64, 32)),
        (191, (32, 32, 64), (128, 64, 32)),
        (192, (32, 32, 64, 128), (128, 128, 64, 32)),
        (512, (32, 32, 64, 128), (128, 128, 64, 32)),
    ],
)
def test_vae_widths_follow_the_size(resolution: int, encoder: tuple[int, ...], decoder: tuple[int, ...]) -> None:
    resolved = VAESettings().resolved(resolution)
    assert (resolved.encoder_channels, resolved.decoder_channels) == (encoder, decoder)
    assert resolved.resolved(64) == resolved
    assert resolved.factor == 2 ** (len(encoder) - 1)


def test_vae_widths_given_on_one_side_decide_the_other() -> None:
    assert VAESettings(encoder_channels=(8, 16, 24, 32, 40)).resolved(64).decoder_channels == (128, 128, 128, 64, 32)
    assert VAESettings(decoder_channels=(24, 8), encoder_width=5).resolved(512).encoder_channels == (5, 5)


@pytest.mark.parametrize(
    ("latent", "channels", "attended"),
    [
        (4, (64, 64), (0,)),
        (7, (64, 64), (0,)),
        (8, (64, 64), (0,)),
        (12, (64, 64), ()),
        (16, (64, 64, 128), (1,)),
        (18, (64, 64), ()),
        (20, (64, 64, 128), (1,)),
        (32, (64, 64, 128, 192), (1, 2)),
        (64, (64, 64, 128, 192), (2,)),
    ],
)
def test_unet_widths_and_attention_follow_the_latent(
    latent: int, channels: tuple[int, ...], attended: tuple[int, ...]
) -> None:
    resolved = UNetSettings().resolved(latent)
    assert resolved.channels == channels
    assert resolved.attend_levels == attended
    assert resolved.resolved(8) == resolved


def test_what_is_given_is_kept() -> None:
    given = UNetSettings(channels=(8, 16, 24), attend_levels=(), heads=2)
    assert given.resolved(32) == given
    assert UNetSettings(attend_levels=(0,)).resolved(32).attend_levels == (0,)


def test_attention_sits_at_the_levels_named() -> None:
    unet = UNet(UNetSettings(channels=(8, 8, 8), blocks=2, attend_levels=(1,), heads=2, time_dim=8), 4)
    sides: list[int] = []
    for module in unet.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    unet(torch.zeros(1, 4, 16, 16), levels(0))
    assert sides == [8, 8, 4, 8, 8]  # level 1 going down, the middle, level 1 going up


def test_settings_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no level 2; levels count from 0"):
        UNetSettings(channels=(8, 8, 8), attend_levels=(2,))
    with pytest.raises(ValueError, match="heads: 4 does not divide the width 10"):
        UNetSettings(width=10).resolved(8)
    with pytest.raises(ValueError, match="3 encoder_channels but 2 decoder_channels; both need the same count"):
        VAESettings(encoder_channels=(8, 8, 8), decoder_channels=(8, 8))
    with pytest.raises(ValueError, match=r"logvar_min 3\.0 is not below logvar_max 2\.0"):
        VAESettings(logvar_min=3, logvar_max=2)


# --- how many parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
def test_the_decoder_is_larger_than_the_encoder(preset: str, resolution: int) -> None:
    settings = build(TrainVAESettings, [preset_layer("vae", preset)]).model.resolved(resolution)
    with torch.device("meta"):
        vae = VAE(settings)
    assert parameters(vae.decoder) > parameters(vae.encoder)


def test_the_original_preset_has_the_original_size() -> None:
    vae_settings = build(TrainVAESettings, [preset_layer("vae", "original")]).model.resolved(256)
    unet_settings = build(TrainUNetSettings, [preset_layer("unet", "original")]).model.resolved(32)
    with torch.device("meta"):
        vae, unet = build_vae(vae_settings), build_unet(unet_settings, vae_settings.latent_channels)
        z = vae.encoder(torch.zeros(1, 3, 256, 256)).mu
        assert unet(z, torch.zeros(1, dtype=torch.long)).shape == z.shape == (1, 4, 32, 32)
    millions = [round(parameters(m) / 1e6, 1) for m in (vae.encoder, vae.decoder, unet)]
    assert millions == [16.2, 5.3, 201.4]


# --- what networks start as ---------------------------------------------------------------------------------------


def test_a_zero_initialised_unet_says_exactly_zero() -> None:
    unet = UNet(SMALL_UNET.resolved(16), 4)
    assert torch.equal(unet(normal(2, 4, 16, 16, dtype=torch.float32), levels(5, 900)), torch.zeros(2, 4, 16, 16))
    plain = UNet(SMALL_UNET.model_copy(update={"zero_init": False}).resolved(16), 4)
    assert float(plain(normal(2, 4, 16, 16, dtype=torch.float32), levels(5, 900)).detach().std()) > 0.01


def test_its_residual_branches_start_as_the_identity() -> None:
    unet = UNet(SMALL_UNET.resolved(16), 4)
    time, tried = normal(2, 32, dtype=torch.float32), 0
    for module in unet.modules():
        if isinstance(module, UNetBlock) and isinstance(module.block.skip, nn.Identity):
            x = normal(2, module.block.conv1.in_channels, 4, 4, dtype=torch.float32)
            assert torch.equal(module(x, time), x)
            tried += module.attention is not None
    assert tried > 0


def test_it_learns_from_the_first_step_on() -> None:
    unet = UNet(SMALL_UNET.resolved(8), 4)
    x = normal(2, 4, 8, 8, dtype=torch.float32)
    (unet(x, levels(1, 2)) - 1).square().mean().backward()
    moved = [name for name, p in unet.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0]
    assert moved == ["out.weight", "out.bias"]
    nn.init.ones_(unet.out.weight)
    unet.zero_grad()
    (unet(x, levels(1, 2)) - 1).square().mean().backward()
    assert all(p.grad is not None for p in unet.parameters())


# --- what goes in and comes out -----------------------------------------------------------------------------------


def test_the_encoders_logvar_is_bounded() -> None:
    encoder = Encoder(SMALL_VAE.model_copy(update={"logvar_min": -3.0, "logvar_max": 1.0}).resolved(16))
    nn.init.constant_(encoder.logvar.weight, 1e4)
    with torch.no_grad():
        logvar = encoder(normal(2, 3, 16, 16, dtype=torch.float32)).logvar
    assert -3 <= float(logvar.min()) <= float(logvar.max()) <= 1.02  # softplus(-4) = 0.018 above
    assert float(logvar.max()) > 0.9


def test_a_vae_decodes_what_it_sampled() -> None:
    vae = randomized(VAE(SMALL_VAE.resolved(16)))
    x, noise = normal(2, 3, 16, 16, dtype=torch.float32), normal(2, 4, 8, 8, seed=1, dtype=torch.float32)
    x_hat, posterior = vae(x, noise)
    torch.testing.assert_close(x_hat, vae.decoder(posterior.mu + (posterior.logvar / 2).exp() * noise))
    assert not torch.allclose(x_hat, vae.decoder(posterior.mu))


def test_outputs_fill_the_range_of_images() -> None:
    body = {}
    for output in ("none", "tanh", "sigmoid"):
        decoder = randomized(Decoder(SMALL_VAE.model_copy(update={"output": output}).resolved(16)))
        body[output] = decoder(20 * normal(2, 4, 8, 8, dtype=torch.float32))
    x = body["none"]
    assert float(x.abs().max()) > 0.5
    torch.testing.assert_close(body["tanh"], x.tanh())
    torch.testing.assert_close(body["sigmoid"], (x / 2).tanh())  # 2 sigmoid(x) - 1 = tanh(x / 2)
    assert float(body["sigmoid"].min()) < 0 < float(body["sigmoid"].max())


def test_a_unet_sees_its_level() -> None:
    unet = randomized(UNet(SMALL_UNET.resolved(8), 4))
    x = normal(1, 4, 8, 8, dtype=torch.float32).expand(3, 4, 8, 8)
    eps = unet(x, levels(998, 999, 998))
    assert torch.equal(eps[0], eps[2])
    assert float((eps[0] - eps[1]).abs().max()) > 1e-4


# --- equivalences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VAES)
def test_a_vaes_batch_of_8_is_8_batches_of_1(kind: str) -> None:
    vae = randomized(build_vae(VAES[kind].resolved(16))).double()
    x = normal(8, 3, 16, 16)
    whole = vae.encoder(x)
    images = vae.decoder(whole.mu.double())
    for i in range(8):
        one = vae.encoder(x[i : i + 1])
        # atol: computed in float64, answered in float32
        torch.testing.assert_close(one.mu[0], whole.mu[i], rtol=0, atol=1e-6)
        torch.testing.assert_close(one.logvar[0], whole.logvar[i], rtol=0, atol=1e-6)
        torch.testing.assert_close(vae.decoder(whole.mu[i : i + 1].double())[0], images[i], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", UNETS)
def test_a_unets_batch_of_8_is_8_batches_of_1(kind: str) -> None:
    unet = randomized(build_unet(UNETS[kind].resolved(8), 4)).double()
    answers: list[Tensor] = []
    last = unet.final_conv if kind == "original" else unet.out
    last.register_forward_hook(lambda module, inputs, output: answers.append(output))  # before it is float32
    x, t = normal(8, 4, 8, 8), levels(0, 1, 5, 99, 500, 500, 998, 999)
    unet(x, t)
    for i in range(8):
        unet(x[i : i + 1], t[i : i + 1])
    torch.testing.assert_close(torch.cat(answers[1:]), answers[0], rtol=1e-10, atol=1e-10)
    assert len({tuple(row.flatten()[:4].tolist()) for row in answers[0]}) == 8


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_autocast_to_bf16_stays_close_and_answers_in_float32() -> None:
    vae = randomized(build_vae(VAES["attention"].resolved(32)))
    unet = randomized(UNet(SMALL_UNET.resolved(8), 4))
    x, z = normal(2, 3, 32, 32, dtype=torch.float32), normal(2, 4, 8, 8, seed=1, dtype=torch.float32)
    exact = [*vae.encoder(x), vae.decoder(z), unet(z, levels(3, 900))]
    with torch.autocast("cpu", torch.bfloat16):
        rough = [*vae.encoder(x), vae.decoder(z), unet(z, levels(3, 900))]
    for a, b in zip(rough, exact, strict=True):
        assert a.dtype == b.dtype == torch.float32
        # bf16 has 8 bits, 0.4 % a rounding; some tens of layers
        assert 0 < relative(a, b) < 0.03
