"""The layers that networks are made of, against torch's and against formulas written out."""

import pytest
import torch
import torch.nn.functional as F
from networks import SMALL_VAE, levels, parameters, randomized
from oracles import normal
from torch import Tensor, nn

from lightdiff.models.layers import Attention, PixelNorm, ResBlock, TimeEmbedding, Upsample, attend, group_norm
from lightdiff.models.original import OriginalDecoder, OriginalVAESettings, block_norm
from lightdiff.models.vae import Decoder, Posterior, soft_bound

# --- blocks -------------------------------------------------------------------------------------------------------


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


# --- norms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "groups", "expected"), [(64, 32, 32), (20, 32, 4), (36, 32, 4), (33, 32, 1), (16, 32, 16), (20, 8, 4)]
)
def test_group_norms_groups(channels: int, groups: int, expected: int) -> None:
    assert group_norm(channels, groups).num_groups == expected


@pytest.mark.parametrize(("channels", "expected"), [(32, 8), (30, 15)])
def test_the_originals_groups_have_4_channels(channels: int, expected: int) -> None:
    assert block_norm(channels).num_groups == expected


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


# --- attention ----------------------------------------------------------------------------------------------------


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


# --- the posterior ------------------------------------------------------------------------------------------------


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


def test_a_posterior_is_sampled_with_its_deviation() -> None:
    p = Posterior(torch.tensor(2.0).expand(1, 1, 200, 200), torch.tensor(-1.0).expand(1, 1, 200, 200))
    z = p.sample(normal(1, 1, 200, 200, dtype=torch.float32))
    # 40,000 samples: standard errors 0.003 and 0.7 %
    assert float(z.mean()) == pytest.approx(2, abs=0.015)
    assert float(z.var()) == pytest.approx(torch.tensor(-1.0).exp().item(), rel=0.03)
