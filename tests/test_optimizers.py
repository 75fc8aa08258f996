"""Muon against the singular value decomposition and torch's own; which parameters it takes; steps left out."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightdiff.models.unet import UNet
from lightdiff.models.vae import VAE
from lightdiff.runtime.processes import Processes
from lightdiff.settings import LoopSettings, UNetSettings, VAESettings
from lightdiff.training.optimizers import Muon, deal, make_optimizers, orthogonalize, padded_sides

SHAPES = [(16, 40), (40, 16), (24, 24), (17, 300), (20, 20), (64, 576)]


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices of one shape, made orthogonal."""
    (found,) = orthogonalize([matrices], torch.ones(len(matrices), dtype=matrices.dtype))
    return found


def five_rounds(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The published iteration, as it stands there: Newton-Schulz on the whole matrices."""
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def with_values(values: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix (1, rows, columns) of random directions with these singular values, in float32."""
    u, v = (torch.linalg.qr(torch.randn(1, n, len(values), dtype=torch.float64))[0] for n in (rows, columns))
    return (u @ values.double().diag() @ v.mT).float()


def rounded_to_tf32(x: Tensor) -> Tensor:
    """float32 without the 13 bits that tensor cores leave out."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def error(found: Tensor, x: Tensor) -> float:
    """Distance from five exact rounds, relative."""
    exact = five_rounds(x.double())
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_updates_are_nearly_orthogonal_with_the_gradients_directions(shape, dtype):
    u, s, vt = torch.linalg.svd(torch.randn(3, *shape, dtype=torch.float64), full_matrices=False)
    g = u @ torch.diag(torch.linspace(0.1, 7, len(s[0]), dtype=torch.float64)) @ vt
    found = orthogonal(g.to(dtype)).double()
    within = u.mT @ found @ vt.mT  # diagonal, if the directions are the same
    close = 1e-9 if dtype == torch.float64 else 1e-4
    values = within.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(within - torch.diag_embed(values), torch.zeros_like(within), rtol=0, atol=close)
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES)
def test_updates_are_five_rounds_of_the_published_iteration(shape, scale):
    torch.manual_seed(0)
    g = scale * torch.randn(3, *shape)
    torch.testing.assert_close(orthogonal(g.double()), five_rounds(g.double()), rtol=0, atol=1e-12)
    # A Gram matrix of float32 knows small singular values to half the digits; only square matrices have some.
    assert error(orthogonal(g), g) < (3e-5 if shape[0] == shape[1] else 3e-6)


@pytest.mark.parametrize("shape", [(256, 256), (128, 1152)])
def test_steps_in_float32_are_those_of_float64(shape):
    """To 1e-6 of a weight, and of the momentum: by the published iteration."""
    torch.manual_seed(0)
    lr, decay = 1e-3, 0.01
    weight = nn.Parameter(0.05 * torch.randn(shape))
    exact, momentum = weight.detach().double(), torch.zeros(shape, dtype=torch.float64)
    muon = Muon([weight], {"lr": lr, "weight_decay": decay, "tf32": False})
    for _ in range(5):
        weight.grad = torch.randn(shape)
        muon.step()
        gradient = weight.grad.double()
        momentum = 0.95 * momentum + 0.05 * gradient
        (update,) = five_rounds((0.05 * gradient + 0.95 * momentum)[None])
        exact = (1 - lr * decay) * exact - lr * 0.2 * max(shape) ** 0.5 * update
    torch.testing.assert_close(weight.double(), exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(muon.state[weight]["exp_avg"].double(), momentum, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(48, 48), (48, 432)])
@pytest.mark.parametrize("second", [1e-1, 1e-2, 1e-3, None], ids=["1e-1", "1e-2", "1e-3", "six decades"])
def test_rounding_hurts_less_than_bf16_does_the_published_iteration(shape, second):
    """One direction outshines all others, or values spread over six decades: where Gram matrices lose most."""
    torch.manual_seed(0)
    values = torch.logspace(0, -6, 48) if second is None else torch.tensor([1.0, *[second] * 47])
    g = with_values(values, *shape)
    plainly = error(five_rounds(g, torch.bfloat16), g)
    assert error(orthogonal(g), g) < 1e-3
    bmm, baddbmm = torch.bmm, torch.baddbmm
    with (
        patch("torch.bmm", lambda x, y, out=None: bmm(*map(rounded_to_tf32, (x, y)), out=out)),
        patch("torch.baddbmm", lambda x, y, z, **by: baddbmm(x, *map(rounded_to_tf32, (y, z)), **by)),
    ):
        tf32 = orthogonal(g)  # what a GPU computes
    assert 1e-5 < error(tf32, g) < plainly
    assert torch.linalg.svdvals(tf32).max() < 1.3


def test_padding_changes_nothing():
    torch.manual_seed(0)
    blocks = [torch.randn(n, *shape, dtype=torch.float64) for n, shape in enumerate(SHAPES, start=1)]
    factors = torch.rand(sum(map(len, blocks)), dtype=torch.float64)
    together = orthogonalize(blocks, factors)
    for block, found, own in zip(blocks, together, factors.split([len(block) for block in blocks]), strict=True):
        torch.testing.assert_close(found, orthogonalize([block], own)[0], rtol=0, atol=1e-13)
        assert found.shape == block.shape


def test_gram_matrices_are_padded_to_the_sizes_that_cost_least():
    assert padded_sides([(1, 36), (10, 64), (9, 128)]) == [36, 64, 128]
    assert padded_sides([(1, 36), (10, 64), (9, 128), (4, 256)]) == [64, 64, 128, 256]
    assert padded_sides([(5, 16), (2, 100), (1, 110), (6, 400)]) == [16, 110, 110, 400]
    assert padded_sides([(3, 20)]) == [20]


@given(costs=st.lists(st.integers(1, 1000), min_size=1, max_size=60), size=st.integers(1, 12))
def test_each_matrix_is_one_processs_and_all_have_about_the_same_to_do(costs, size):
    shares = [range(len(costs))[deal(costs, Processes(rank, size))] for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(len(costs)))
    assert max(sum(costs[i] for i in share) for share in shares) <= sum(costs) / size + max(costs)


def test_a_step_does_not_depend_on_the_memory_format():
    torch.manual_seed(0)
    start = [torch.randn(32, 20, 3, 3), torch.randn(32, 20, 3, 3), torch.randn(300, 20)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(3)]
    found = []
    for channels_last in (False, True):
        weights = [nn.Parameter(p.clone()) for p in start]
        for p in weights[:2] if channels_last else []:
            p.data = p.data.to(memory_format=torch.channels_last)
        muon = Muon(weights, {"lr": 0.1, "weight_decay": 0.1, "tf32": False})
        for step in gradients:
            for p, gradient in zip(weights, step, strict=True):
                p.grad = gradient.clone()  # not as the weights lie in memory
            muon.step()
        found.append([*weights, *(muon.state[p]["exp_avg"] for p in weights)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 and later have a Muon")
def test_a_step_is_that_of_torch():
    torch.manual_seed(0)
    ours = [
        nn.Parameter(torch.randn(24, 40)),
        nn.Parameter(torch.randn(32, 4, 3, 3)),
        nn.Parameter(torch.randn(24, 40)),
    ]
    theirs = [nn.Parameter(p.detach().flatten(1).clone()) for p in ours]
    mine = Muon(ours, {"lr": 0.02, "weight_decay": 0.1, "tf32": False})
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = [p.detach().clone() for p in theirs]
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.flatten(1).clone()
        mine.step()
        reference.step()
    for p, q, start in zip(ours, theirs, before, strict=True):
        moved = (q - start).norm()
        assert (p.flatten(1) - q).norm() < 0.02 * moved  # theirs divides by the norm in bf16


def test_a_step_that_is_not_finite_changes_nothing():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(20, 30))
    muon = Muon([weight], {"lr": 0.1, "weight_decay": 0.1, "tf32": False})
    weight.grad = torch.randn_like(weight)
    muon.step()
    kept, momentum = weight.detach().clone(), muon.state[weight]["exp_avg"].clone()
    weight.grad = torch.full_like(weight, torch.nan)
    muon.found_inf = torch.ones(())
    muon.step()
    assert torch.equal(weight, kept)
    assert torch.equal(muon.state[weight]["exp_avg"], momentum)
    weight.grad = torch.randn_like(weight)
    muon.found_inf = torch.zeros(())
    muon.step()
    assert not torch.equal(weight, kept)
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("network", ["vae", "unet"])
def test_muon_takes_matrices_and_adamw_the_rest(network):
    if network == "vae":
        model = VAE(VAESettings(encoder_width=16, decoder_width=16).resolved(16))
    else:
        model = UNet(UNetSettings(width=32, blocks=1).resolved(8), 4, num_classes=20)
    muon, adamw = make_optimizers(model, LoopSettings(precision="fp32"))
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {names[id(p)] for p in muon.param_groups[0]["params"]}
    left = {names[id(p)] for p in adamw.param_groups[0]["params"]}
    assert taken | left == set(names.values())
    assert not taken & left
    assert all(p.ndim > 1 for p in muon.param_groups[0]["params"])
    ends = {"out.weight", "label.weight"} if network == "unet" else {"encoder.mu.weight", "decoder.body.0.weight"}
    time = {name for name in names.values() if name.startswith("time.") or ".time." in name}
    assert bool(time) == (network == "unet")
    assert ends | time <= left
    maps = sum(p.numel() for name, p in model.named_parameters() if name not in time)  # of layers on feature maps
    assert sum(p.numel() for p in muon.param_groups[0]["params"]) > 0.9 * maps


def test_adamw_alone_takes_everything_and_frozen_weights_nobody():
    model = VAE(VAESettings(encoder_width=16, decoder_width=16).resolved(16))
    model.encoder.requires_grad_(False)
    (alone,) = make_optimizers(model, LoopSettings(optimizer="adamw", precision="fp32"))
    assert isinstance(alone, torch.optim.AdamW)
    assert {id(p) for p in alone.param_groups[0]["params"]} == {id(p) for p in model.decoder.parameters()}
    both = make_optimizers(model, LoopSettings(precision="fp32"))
    trained = [id(p) for o in both for p in o.param_groups[0]["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.decoder.parameters())
