"""Muon against the singular value decomposition and torch's own; which parameters it takes; steps left out."""

import pytest
import torch
from torch import nn

from lightdiff.models.unet import UNet
from lightdiff.models.vae import VAE
from lightdiff.settings import LoopSettings, UNetSettings, VAESettings
from lightdiff.training.optimizers import Muon, make_optimizers, orthogonalize


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_updates_are_nearly_orthogonal_with_the_gradients_directions(shape, dtype):
    u, s, vt = torch.linalg.svd(torch.randn(3, *shape, dtype=torch.float64), full_matrices=False)
    g = u @ torch.diag(torch.linspace(0.1, 7, len(s[0]), dtype=torch.float64)) @ vt
    found = orthogonalize(g, dtype)
    assert found.dtype == g.dtype
    within = u.mT @ found @ vt.mT  # diagonal, if the directions are the same
    close = 1e-9 if dtype == torch.float64 else 0.05
    values = within.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(within - torch.diag_embed(values), torch.zeros_like(within), rtol=0, atol=close)
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_step_is_that_of_torch():
    torch.manual_seed(0)
    ours = [
        nn.Parameter(torch.randn(24, 40)),
        nn.Parameter(torch.randn(32, 4, 3, 3)),
        nn.Parameter(torch.randn(24, 40)),
    ]
    theirs = [nn.Parameter(p.detach().flatten(1).clone()) for p in ours]
    mine = Muon(ours, {"lr": 0.02, "weight_decay": 0.1, "dtype": torch.bfloat16})
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
    muon = Muon([weight], {"lr": 0.1, "weight_decay": 0.1, "dtype": torch.float32})
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
    assert ends <= left
    assert sum(p.numel() for p in muon.param_groups[0]["params"]) > 0.9 * sum(p.numel() for p in model.parameters())


def test_adamw_alone_takes_everything_and_frozen_weights_nobody():
    model = VAE(VAESettings(encoder_width=16, decoder_width=16).resolved(16))
    model.encoder.requires_grad_(False)
    (alone,) = make_optimizers(model, LoopSettings(optimizer="adamw", precision="fp32"))
    assert isinstance(alone, torch.optim.AdamW)
    assert {id(p) for p in alone.param_groups[0]["params"]} == {id(p) for p in model.decoder.parameters()}
    both = make_optimizers(model, LoopSettings(precision="fp32"))
    trained = [id(p) for o in both for p in o.param_groups[0]["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.decoder.parameters())
