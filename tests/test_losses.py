"""The VAE's loss against torch.distributions and closed forms."""

import math
from typing import Any

import pytest
import torch
from oracles import normal
from pydantic import Field
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lightdiff.losses import TERMS, Term, VAELoss, kl_per_element, psnr
from lightdiff.models.vae import Posterior
from lightdiff.settings import VAELossSettings

PLAIN = VAELossSettings(lpips_gamma=0)


def posterior() -> Posterior:
    return Posterior(2 * normal(3, 4, 5, 6, seed=1), normal(3, 4, 5, 6, seed=2))


def images() -> tuple[Tensor, Tensor]:
    return normal(3, 3, 8, 10, seed=3).tanh(), normal(3, 3, 8, 10, seed=4).tanh()


def test_kl_is_that_of_torch_distributions() -> None:
    p = posterior()
    expected = kl_divergence(Normal(p.mu, torch.exp(p.logvar / 2)), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_per_element(p), expected)


def test_kl_is_zero_at_the_prior_and_positive_elsewhere() -> None:
    zeros = torch.zeros(1, 1, 2, 2)
    assert torch.equal(kl_per_element(Posterior(zeros, zeros)), zeros)
    assert bool((kl_per_element(posterior()) > 0).all())


def test_kl_is_a_mean_over_elements_and_kl_sum_a_sum_over_an_image() -> None:
    p, (x, x_hat) = posterior(), images()
    parts = VAELoss(PLAIN)(x, x_hat, p)
    element = kl_per_element(p)
    torch.testing.assert_close(parts["kl"], element.mean())
    torch.testing.assert_close(parts["kl_sum"], torch.stack([image.sum() for image in element]).mean())
    torch.testing.assert_close(parts["kl_sum"], parts["kl"] * 4 * 5 * 6)


def test_an_error_of_the_pixels_is_mse_or_l1() -> None:
    x = torch.zeros(2, 3, 4, 4)
    x_hat = x + 0.3
    x_hat[0] = -0.5
    for kind, expected in (("mse", (0.09 + 0.25) / 2), ("l1", (0.3 + 0.5) / 2)):
        settings = VAELossSettings.model_validate({"reconstruction": kind, "kl_beta": 0, "lpips_gamma": 0})
        parts = VAELoss(settings)(x, x_hat, Posterior(x, x))
        assert set(parts) == {"loss", kind, "kl", "kl_sum"}
        assert float(parts[kind]) == pytest.approx(expected)
        assert float(parts["loss"]) == pytest.approx(expected)


@pytest.mark.parametrize(("beta", "gamma"), [(0.0, 0.0), (1e-3, 0.0), (0.0, 0.5), (0.7, 2.0)])
def test_the_loss_is_the_weighted_sum(beta: float, gamma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    p, (x, x_hat) = posterior(), images()
    asked = []

    def lpips(x: Tensor, x_hat: Tensor, posterior: Posterior) -> Tensor:
        asked.append((x, x_hat))
        return (x_hat - x).abs().flatten(1).amax(1).mean()

    monkeypatch.setitem(TERMS, "lpips", Term("lpips_gamma", lambda *_: lpips))
    parts = VAELoss(VAELossSettings(kl_beta=beta, lpips_gamma=gamma))(x, x_hat, p)
    distance = (x_hat - x).abs().flatten(1).amax(1).mean()
    torch.testing.assert_close(
        parts["loss"], (x - x_hat).square().mean() + beta * kl_per_element(p).mean() + gamma * distance
    )
    assert len(asked) == (1 if gamma else 0)
    assert ("lpips" in parts) == (gamma > 0)
    if gamma:
        torch.testing.assert_close(parts["lpips"], distance)


def test_a_term_without_weight_is_not_even_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise AssertionError("made")

    monkeypatch.setitem(TERMS, "lpips", Term("lpips_gamma", fail))
    VAELoss(VAELossSettings(lpips_gamma=0))
    with pytest.raises(AssertionError, match="made"):
        VAELoss(VAELossSettings(lpips_gamma=0.1))


def test_a_term_of_ones_own_is_a_function_a_row_and_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    class MoreSettings(VAELossSettings):
        tv_weight: float = Field(0.0, ge=0, description="weight of total variation; 0 turns it off")

    def total_variation(x: Tensor, x_hat: Tensor, posterior: Posterior) -> Tensor:
        return (x_hat.diff(dim=-1).abs().mean() + x_hat.diff(dim=-2).abs().mean()) / 2

    monkeypatch.setitem(TERMS, "tv", Term("tv_weight", lambda *_: total_variation))
    p, (x, x_hat) = posterior(), images()
    without, small = (VAELoss(MoreSettings(lpips_gamma=0, tv_weight=weight))(x, x_hat, p) for weight in (0.0, 0.25))
    assert list(without) == ["loss", "mse", "kl", "kl_sum"]
    assert list(small) == ["loss", "mse", "kl", "kl_sum", "tv"]
    torch.testing.assert_close(small["loss"], without["loss"] + 0.25 * total_variation(x, x_hat, p))


def test_terms_have_names_of_their_own() -> None:
    assert not TERMS.keys() & {"loss", "mse", "l1", "kl", "kl_sum"}, "a term's name is its column in metrics.jsonl"


def test_gradients_are_those_of_the_parts() -> None:
    (x, x_hat), p = images(), posterior()
    x_hat.requires_grad_()
    mu, logvar = (t.clone().requires_grad_() for t in p)
    VAELoss(VAELossSettings(kl_beta=0.01, lpips_gamma=0))(x, x_hat, Posterior(mu, logvar))["loss"].backward()
    torch.testing.assert_close(x_hat.grad, 2 * (x_hat - x).detach() / x.numel())
    torch.testing.assert_close(mu.grad, 0.01 * mu.detach() / mu.numel())
    torch.testing.assert_close(logvar.grad, 0.01 * 0.5 * (logvar.detach().exp() - 1) / mu.numel())


def test_the_loss_is_a_mean_over_the_batch() -> None:
    # So that k micro-batches of equal size average to the whole.
    (x, x_hat), p = images(), posterior()
    vae_loss = VAELoss(VAELossSettings(kl_beta=0.1, lpips_gamma=0))
    whole = vae_loss(x, x_hat, p)
    ones = [vae_loss(x[i : i + 1], x_hat[i : i + 1], Posterior(p.mu[i : i + 1], p.logvar[i : i + 1]))
            for i in range(3)]  # fmt: skip
    for name, value in whole.items():
        torch.testing.assert_close(torch.stack([one[name] for one in ones]).mean(), value)


@pytest.mark.parametrize("error", [1.0, 0.1, 0.002])
def test_psnr_of_a_constant_error(error: float) -> None:
    x = torch.full((2, 3, 4, 5), -0.5, dtype=torch.float64)
    torch.testing.assert_close(psnr(x, x + error), torch.full((2,), 20 * math.log10(2 / error), dtype=torch.float64))


def test_psnr_is_one_number_an_image_of_what_can_be_shown() -> None:
    x = torch.ones(2, 3, 4, 4)
    x_hat = x.clone()
    x_hat[0] = -1
    x_hat[1] += 5  # shown as 1: right
    worst, best = psnr(x, x_hat).tolist()
    assert worst == pytest.approx(0)
    assert best == pytest.approx(10 * math.log10(4 * 2**40))  # finite, so that means are
