"""The networks: shapes, what they start as, and parity with torch and with the original scripts."""

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from oracles import GOLDEN, needs_golden, normal
from torch import Tensor, nn

from lightdiff.checkpoint import Checkpoint
from lightdiff.errors import UserError
from lightdiff.extras.import_original import import_checkpoint
from lightdiff.models.layers import Attention, PixelNorm, ResBlock, TimeEmbedding, Upsample, attend, group_norm
from lightdiff.models.original import OriginalDecoder, OriginalUNetSettings, OriginalVAESettings, block_norm
from lightdiff.models.unet import UNet, UNetBlock, build_unet
from lightdiff.models.vae import VAE, Decoder, Encoder, Posterior, build_vae, soft_bound
from lightdiff.options import build, preset_layer
from lightdiff.pipeline import Pipeline
from lightdiff.settings import (
    SamplingSettings,
    TrainUNetSettings,
    TrainVAESettings,
    UNetArchitecture,
    UNetSettings,
    VAEArchitecture,
    VAESettings,
)

SMALL_VAE = VAESettings(encoder_width=8, decoder_width=8)
SMALL_UNET = UNetSettings(width=16, blocks=1, time_dim=32)
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


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight drawn anew, so that nothing that starts at zero or one hides a mistake."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = 0.3 if p.ndim == 1 else float(p[0].numel()) ** -0.5
            p.copy_(spread * torch.randn(p.shape, generator=rng) + (p.ndim == 1 and name.endswith("norm1.weight")))
    return model.eval().requires_grad_(False)


def levels(*t: int) -> Tensor:
    return torch.tensor(t)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


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


@pytest.mark.parametrize(
    ("channels", "groups", "expected"), [(64, 32, 32), (20, 32, 4), (36, 32, 4), (33, 32, 1), (16, 32, 16), (20, 8, 4)]
)
def test_group_norms_groups(channels: int, groups: int, expected: int) -> None:
    assert group_norm(channels, groups).num_groups == expected


@pytest.mark.parametrize(("channels", "expected"), [(32, 8), (30, 15)])
def test_the_originals_groups_have_4_channels(channels: int, expected: int) -> None:
    assert block_norm(channels).num_groups == expected


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


def test_a_residual_block_adds_to_its_input() -> None:
    def norm(width: int) -> nn.Module:
        return group_norm(width, 4)

    x = normal(2, 8, 5, 6, dtype=torch.float32)
    same, wider = ResBlock(8, 8, norm), ResBlock(8, 12, norm)
    for block in (same, wider):
        for parameter in block.conv2.parameters():
            nn.init.zeros_(parameter)
    assert torch.equal(same(x), x)
    assert torch.equal(wider(x), wider.skip(x))


def test_a_block_is_scaled_and_shifted_by_its_time() -> None:
    def norm(width: int) -> nn.Module:
        return group_norm(width, 4)

    block = randomized(ResBlock(8, 12, norm, time_dim=6)).double()
    x, time = normal(2, 8, 5, 6), normal(2, 6, seed=1)
    silu, numbers = nn.functional.silu, block.time(nn.functional.silu(time))
    h = block.norm2(block.conv1(silu(block.norm1(x))))
    h = torch.stack([h[i] * (1 + numbers[i, :12, None, None]) + numbers[i, 12:, None, None] for i in range(2)])
    torch.testing.assert_close(block(x, time), block.conv2(silu(h)) + block.skip(x))
    assert not torch.allclose(block(x, time), block(x, -time))


# --- layers against what is known ---------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_torchs(heads: int) -> None:
    ours = randomized(Attention(16, heads, lambda width: nn.Identity())).double()
    theirs = nn.MultiheadAttention(16, heads, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    x = normal(3, 16, 4, 5)
    tokens = torch.stack([x[:, :, i, j] for i in range(4) for j in range(5)], dim=1)  # (b, h*w, c), row by row
    mixed = theirs(tokens, tokens, tokens, need_weights=False)[0]
    expected = x + mixed.transpose(1, 2).reshape(3, 16, 4, 5)
    torch.testing.assert_close(ours(x), expected.detach())


@pytest.mark.parametrize("tokens", [16, 64])
def test_attention_is_two_products_and_a_softmax(tokens: int) -> None:
    q, k, v = (normal(2, 4, tokens, 8, seed=i).requires_grad_() for i in range(3))
    weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
    by_hand = weights @ v
    back = normal(*by_hand.shape, seed=3)
    expected = torch.autograd.grad(by_hand, (q, k, v), back)
    torch.testing.assert_close(attend(q, k, v), by_hand)
    torch.testing.assert_close(torch.autograd.grad(attend(q, k, v), (q, k, v), back), expected)
    singles = tuple(x.detach().float().requires_grad_() for x in (q, k, v))
    found = torch.autograd.grad(attend(*singles), singles, back.float())
    torch.testing.assert_close(found, tuple(x.float() for x in expected), rtol=1e-5, atol=1e-5)


def test_attention_on_a_cpu_is_computed_in_float32_also_where_all_else_is_bf16() -> None:
    halves = tuple(normal(2, 4, 64, 8, seed=i).bfloat16().requires_grad_() for i in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*halves)
    singles = tuple(x.detach().float().requires_grad_() for x in halves)
    exact = F.scaled_dot_product_attention(*singles)
    assert torch.equal(found, exact.bfloat16())
    back = normal(*found.shape, seed=3).bfloat16()
    expected = torch.autograd.grad(exact, singles, back.float())
    gradients = torch.autograd.grad(found, halves, back)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(gradients, expected, strict=True))


def test_attention_does_not_know_positions() -> None:
    ours = randomized(Attention(8, 2, lambda width: group_norm(width, 4))).double()
    x = normal(2, 8, 3, 4)
    torch.testing.assert_close(ours(x.flip(2).transpose(2, 3)), ours(x).flip(2).transpose(2, 3))


def test_time_is_told_by_sines_and_cosines() -> None:
    embedding = TimeEmbedding(8).double()
    t = levels(0, 1, 998, 999)
    seen: list[Tensor] = []
    embedding.linear1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert embedding(t).shape == (4, 8)
    angle = t.double()[:, None] * torch.tensor([1, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4], dtype=torch.float64)
    # atol: frequencies are kept in float32: 6e-8 of them, times 999
    torch.testing.assert_close(seen[0], torch.cat([angle.sin(), angle.cos()], 1), rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        embedding.float()(t)
    torch.testing.assert_close(seen[1].double(), seen[0], rtol=0, atol=1e-4)  # not rounded to bf16
    assert parameters(embedding) == (8 * 32 + 32) + (32 * 8 + 8)


def test_upsampling_shows_no_checkerboard_but_a_transposed_convolution_does() -> None:
    def interior(decoder: nn.Module) -> Tensor:
        found = [m for m in decoder.modules() if isinstance(m, Upsample | nn.ConvTranspose2d)]
        assert len(found) == 2
        up = randomized(found[0]).double()
        x = normal(1, 32, 1, 1).expand(1, 32, 6, 6)
        y = up(x)
        assert y.shape == (1, 16, 12, 12)
        return y[:, :, 1:-1, 1:-1]

    flat = interior(Decoder(SMALL_VAE.resolved(64)))
    torch.testing.assert_close(flat, flat[:, :, :1, :1].expand_as(flat))
    board = interior(OriginalDecoder(OriginalVAESettings(encoder_channels=(8, 8, 8), decoder_channels=(32, 16, 8))))
    assert float((board[..., 1:] - board[..., :-1]).abs().mean()) > 0.1
    torch.testing.assert_close(board[..., 2:], board[..., :-2])  # of period 2


def test_a_soft_bound_is_the_identity_well_inside() -> None:
    x = torch.linspace(-16, 6, 200, dtype=torch.float64)  # 14 from either bound: softplus is off by exp(-14)
    torch.testing.assert_close(soft_bound(x, -30.0, 20.0), x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_soft_bound_is_bounded_and_rises(dtype: torch.dtype) -> None:
    x = torch.tensor([-1e30, -1e4, *torch.linspace(-100, 100, 401).tolist(), 1e4, 1e30], dtype=dtype)
    y = soft_bound(x, -30.0, 20.0)
    assert float(y.min()) >= -30
    assert float(y.max()) <= 20 + 1e-5  # softplus(20 - (-30)) is 50 but for rounding
    assert bool((y.diff() >= 0).all())


@pytest.mark.parametrize("bounds", [(-30.0, 20.0), (-4.0, 4.0)])
def test_a_soft_bound_has_a_gradient_everywhere(bounds: tuple[float, float]) -> None:
    x = torch.linspace(bounds[0] - 80, bounds[1] + 80, 500, requires_grad=True)  # float32 ends at exp(-87)
    soft_bound(x, *bounds).sum().backward()
    assert x.grad is not None
    assert bool((x.grad > 0).all() and (x.grad <= 1).all())


def test_the_encoders_logvar_is_bounded() -> None:
    encoder = Encoder(SMALL_VAE.model_copy(update={"logvar_min": -3.0, "logvar_max": 1.0}).resolved(16))
    nn.init.constant_(encoder.logvar.weight, 1e4)
    with torch.no_grad():
        logvar = encoder(normal(2, 3, 16, 16, dtype=torch.float32)).logvar
    assert -3 <= float(logvar.min()) <= float(logvar.max()) <= 1.02  # softplus(-4) = 0.018 above
    assert float(logvar.max()) > 0.9


def test_a_posterior_is_sampled_with_its_deviation() -> None:
    p = Posterior(torch.tensor(2.0).expand(1, 1, 200, 200), torch.tensor(-1.0).expand(1, 1, 200, 200))
    z = p.sample(normal(1, 1, 200, 200, dtype=torch.float32))
    # 40,000 samples: standard errors 0.003 and 0.7 %
    assert float(z.mean()) == pytest.approx(2, abs=0.015)
    assert float(z.var()) == pytest.approx(torch.tensor(-1.0).exp().item(), rel=0.03)


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


def test_pixel_norm_is_layer_norm_of_each_pixel_alone() -> None:
    norm = randomized(PixelNorm(6)).double()
    x = normal(2, 6, 4, 5)
    y = norm(x)
    for i in range(4):
        torch.testing.assert_close(
            y[:, :, i, 2], torch.nn.functional.layer_norm(x[:, :, i, 2], (6,), norm.weight, norm.bias)
        )
    spiked = x.clone()
    spiked[:, :, 1, 1] *= 1e6  # a spike changes what becomes of its own pixel, of no other: GroupNorm's droplets
    changed = (norm(spiked) - y).abs().amax((0, 1)) > 0
    assert changed.nonzero().tolist() == [[1, 1]]
    assert norm.float()(x.bfloat16()).dtype == torch.bfloat16


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


def test_a_unet_sees_its_level() -> None:
    unet = randomized(UNet(SMALL_UNET.resolved(8), 4))
    x = normal(1, 4, 8, 8, dtype=torch.float32).expand(3, 4, 8, 8)
    eps = unet(x, levels(998, 999, 998))
    assert torch.equal(eps[0], eps[2])
    assert float((eps[0] - eps[1]).abs().max()) > 1e-4


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


# --- the original scripts' checkpoints ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("original") / "run"
    import_checkpoint(GOLDEN / "original_vae.pth", run, 64)
    import_checkpoint(GOLDEN / "original_unet.pth", run, 64)
    return run


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return safetensors.torch.load_file(GOLDEN / "original_reference.safetensors")


@needs_golden
@pytest.mark.reference
def test_an_imported_vae_computes_what_the_original_did(imported: Path, reference: dict[str, Tensor]) -> None:
    saved = Checkpoint(imported / "vae" / "checkpoints" / "best.safetensors", "vae")
    vae = build_vae(saved.settings(VAEArchitecture, "model")).eval()
    vae.load_state_dict(saved.weights())
    with torch.no_grad():
        posterior = vae.encoder(reference["vae.x"])
        decoded = vae.decoder(reference["vae.mu"])
    # atol: float32, other kernels; the soft bound of logvar is exact here in float32
    torch.testing.assert_close(posterior.mu, reference["vae.mu"], rtol=0, atol=1e-5)
    torch.testing.assert_close(posterior.logvar, reference["vae.logvar"], rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded, reference["vae.decode_mu"], rtol=0, atol=1e-5)


@needs_golden
@pytest.mark.reference
def test_an_imported_unet_computes_what_the_original_did(imported: Path, reference: dict[str, Tensor]) -> None:
    saved = Checkpoint(imported / "unet" / "checkpoints" / "last.safetensors", "unet")
    settings = TrainUNetSettings.model_validate(saved.metadata.settings)
    unet = build_unet(settings.model, settings.latent.channels).eval()
    unet.load_state_dict(saved.weights())
    with torch.no_grad():
        eps = unet(reference["unet.z"], reference["unet.t"])
        # atol: float32, other kernels
        torch.testing.assert_close(eps, reference["unet.ema_eps"], rtol=0, atol=1e-5)
        unet.load_state_dict(saved.weights(ema=0))
        assert float((unet(reference["unet.z"], reference["unet.t"]) - eps).abs().max()) > 1e-3  # the raw ones


@needs_golden
@pytest.mark.reference
def test_what_an_original_checkpoint_says_of_itself_is_kept(imported: Path) -> None:
    vae = Checkpoint(imported / "vae" / "checkpoints" / "last.safetensors", "vae").metadata
    unet = Checkpoint(imported / "unet" / "checkpoints" / "last.safetensors", "unet").metadata
    trained = TrainVAESettings.model_validate(vae.settings)
    assert (vae.step, unet.step) == (1234, 999)
    assert (trained.loss.kl_beta, trained.loss.lpips_gamma, trained.images.resolution) == (1e-3, 0.5, (64, 64))
    assert (trained.loop.batch_size, trained.loop.micro, trained.loop.seed) == (64, 16, 42)
    diffusion = TrainUNetSettings.model_validate(unet.settings)
    assert diffusion.latent.model_dump() == {
        "channels": 4, "height": 8, "width": 8, "shift": (0.0,), "scale": (0.9498,), "only_mu": True, "labels": {},
    }  # fmt: skip
    assert (diffusion.noise.schedule, diffusion.noise.timesteps) == ("cosine", 1000)
    assert (diffusion.loop.ema_decay, diffusion.loop.batch_size) == ((0.999,), 64)


@needs_golden
@pytest.mark.reference
def test_an_imported_run_draws_images(imported: Path, reference: dict[str, Tensor]) -> None:
    model = Pipeline.load(imported, device="cpu")
    assert model.resolution == (64, 64)
    torch.testing.assert_close(model.encode(reference["vae.x"]), reference["vae.mu"], rtol=0, atol=1e-5)
    z = model.sample(2, seed=1, sampling=SamplingSettings(num_steps=3))
    assert z.shape == (2, 4, 8, 8)
    alone = model.sample([1], seed=1, sampling=SamplingSettings(num_steps=3))
    # rtol, atol: float32, other kernels for other batches, and 1 / alpha = 200 in the first step
    torch.testing.assert_close(alone[0], z[1], rtol=1e-3, atol=1e-3)
    x = model.decode(z)
    assert x.shape == (2, 3, 64, 64)
    assert float(x.abs().max()) <= 1
    assert bool(x.isfinite().all())
    assert model.sample(1, sampling=SamplingSettings(num_steps=2), size=(16, 24)).shape == (1, 4, 16, 24)


@needs_golden
@pytest.mark.reference
def test_an_imported_unet_is_bound_to_its_vae(imported: Path, tmp_path: Path) -> None:
    other = torch.load(GOLDEN / "original_vae.pth", weights_only=True)
    next(iter(other["model_state_dict"].values())).mul_(1.001)
    torch.save(other, tmp_path / "other.pth")
    path = import_checkpoint(tmp_path / "other.pth", tmp_path / "run", 64)
    with pytest.raises(
        UserError, match=r"was trained on latents of VAE .*, but .* holds .*: point --vae at the right one"
    ):
        Pipeline.load(imported, vae=path, device="cpu")


@needs_golden
@pytest.mark.reference
def test_a_unet_needs_its_vae_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="import the VAE that this U-Net belongs to first, into the same --run"):
        import_checkpoint(GOLDEN / "original_unet.pth", tmp_path, 64)
    assert list(tmp_path.rglob("*.safetensors")) == []


@needs_golden
@pytest.mark.reference
def test_what_is_there_is_not_overwritten(imported: Path) -> None:
    paths = {name: path for name in ("vae", "unet") for path in (imported / name / "checkpoints").glob("*.safetensors")}
    before = {path: path.read_bytes() for path in paths.values()}
    for name in ("vae", "unet"):
        with pytest.raises(UserError, match=r"\.safetensors is there already: choose another --run$"):
            import_checkpoint(GOLDEN / f"original_{name}.pth", imported, 64)
    assert {path: path.read_bytes() for path in before} == before


@needs_golden
@pytest.mark.reference
def test_a_truncated_original_is_refused(tmp_path: Path) -> None:
    whole = (GOLDEN / "original_vae.pth").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.pth is damaged or no checkpoint of the original scripts: "):
            import_checkpoint(tmp_path / "cut.pth", tmp_path / "run", 64)
    assert not (tmp_path / "run").exists()


@needs_golden
@pytest.mark.reference
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, imported: Path) -> None:
    vae = torch.load(GOLDEN / "original_vae.pth", weights_only=True)
    vae["VAE_CFG"]["enc_channel_args"] = [16, 24, 32, 48]
    torch.save(vae, tmp_path / "vae.pth")
    with pytest.raises(UserError, match=r"its weights do not fit its configuration: \d+ (missing|of another shape)"):
        import_checkpoint(tmp_path / "vae.pth", tmp_path / "run", 64)
    unet = torch.load(GOLDEN / "original_unet.pth", weights_only=True)
    del unet["ema_state_dict"]["final_conv.bias"]
    torch.save(unet, tmp_path / "unet.pth")
    with pytest.raises(UserError, match=r"its weights do not fit its configuration: 1 missing, final_conv\.bias first"):
        import_checkpoint(tmp_path / "unet.pth", imported, 64)
    unet["UNET_CFG"]["up_channel_args"] = [64, 48, 48, 32]
    torch.save(unet, tmp_path / "unet.pth")
    with pytest.raises(UserError, match="its up_channel_args are not its down_channel_args reversed"):
        import_checkpoint(tmp_path / "unet.pth", imported, 64)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"state_dict": {}}, "is no checkpoint of the original scripts: it has no model_state_dict"),
        ([1, 2], "is no checkpoint of the original scripts: it has no model_state_dict"),
        ({"model_state_dict": {}}, "is no checkpoint of the original scripts: it has neither VAE_CFG nor UNET_CFG"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: object, text: str) -> None:
    torch.save(content, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=text):
        import_checkpoint(tmp_path / "foreign.pth", tmp_path / "run", 64)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.pth: there is no such file"):
        import_checkpoint(tmp_path / "none.pth", tmp_path / "run", 64)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    torch.save({"model_state_dict": {}, "VAE_CFG": {}, "args": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match=r"trap\.pth holds a \w+\.mkdir, which could run code"):
        import_checkpoint(tmp_path / "trap.pth", tmp_path / "run", 64)
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "trap.pth", weights_only=False)
    assert (tmp_path / "sprung").exists()  # it would have
