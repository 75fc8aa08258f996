"""The comparison elsewhere: the peer learns and sees lightdiff's images, and time and images are counted alike."""

import csv
import json
import math
from functools import partial
from itertools import repeat

import pytest
import torch
from torch import nn

from lightdiff.losses import VAELoss
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.stage import Stage
from lightdiff.settings import TrainVAESettings, VAELossSettings
from lightdiff.stages.train_vae import VAETask
from tests.bench import elsewhere, recipe_page, tuned
from tests.bench.peers import diffusers_unet, diffusers_vae


class Clock:
    """Half a second passes between two looks."""

    def __init__(self):
        self.now = 10.0

    def __call__(self):
        self.now += 0.5
        return self.now


def test_the_peer_trains_until_its_time_is_spent_and_ends_with_small_steps():
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    model = nn.Linear(1, 1)
    moved, before = [], [p.detach().clone() for p in model.parameters()]

    def loss(model, x):
        moved.append(sum((p - b).abs().sum().item() for p, b in zip(model.parameters(), before, strict=True)))
        before[:] = [p.detach().clone() for p in model.parameters()]
        return model(x).mean()  # a slope that stays: AdamW moves by its learning rate

    spent = tuned.train(model, repeat(torch.ones(3, 1)), loss, 200.0, Clock())
    assert (spent.steps, spent.images) == (399, 3 * 399)
    assert spent.seconds == pytest.approx(200, abs=1)
    assert len(spent.losses) == 10
    largest = max(moved)
    assert largest == pytest.approx(2 * tuned.LR, rel=0.2)
    assert 80 < moved.index(largest) < 140, "after the warm-up"
    assert moved[-1] < 0.01 * largest


def test_the_peers_vae_learns(monkeypatch):
    """Images of two colours each: the mean colour alone would leave their variance."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    monkeypatch.setattr(tuned, "WARMUP", 10)
    torch.manual_seed(0)
    x = torch.rand(8, 3, 1, 2).mul(1.6).sub(0.8).repeat_interleave(8, 3).expand(-1, -1, 16, -1)
    vae = diffusers_vae((16, 16), 1)
    criterion = VAELoss(VAELossSettings(lpips_gamma=0))
    spent = tuned.train(vae, repeat(x), partial(tuned.vae_loss, criterion), 40.0, Clock())
    assert spent.losses[-1] < 0.7 * float(x.var())
    assert tuned.held_out_psnr(vae.eval(), iter([x])) > 10 * math.log10(4 / (0.7 * float(x.var())))


def test_the_peers_unet_learns_and_draws_what_it_learnt(monkeypatch):
    """All latents are one: from any noise, samples land there."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    monkeypatch.setattr(tuned, "WARMUP", 10)
    torch.manual_seed(0)
    point = torch.tensor([1.0, -1.0, 0.5, 0.0])[:, None, None].expand(4, 8, 8)
    unet = diffusers_unet((32, 32), 1, 8)
    batches = tuned.latent_batches(point.expand(64, 2, -1, -1, -1), 8, seed=0)
    spent = tuned.train(unet, batches, tuned.flow_loss, 40.0, Clock())
    assert spent.losses[-1] < 0.3 * spent.losses[0]
    drawn = tuned.draw(unet.eval(), torch.randn(8, 4, 8, 8))
    torch.testing.assert_close(drawn.mean((0, 2, 3)), point[:, 0, 0], atol=0.25, rtol=0)
    assert float((drawn - point).square().mean()) < 0.25, "noise is gone"


def test_the_peer_sees_lightdiffs_images(faces, tmp_path):
    """The same crops in the same order to train on, and the same ones held out."""
    settings = TrainVAESettings.model_validate(
        {"images": {"data": [faces], "resolution": 32}, "loss": {"lpips_gamma": 0}, "loop": {"seed": 3, "workers": 0}}
    ).resolved()
    photographs = tuned.Photographs(faces, 32, seed=3)
    task = VAETask(Stage("vae", settings, torch.device("cpu"), Processes(), tmp_path), photographs.files)
    size = settings.loop.batch_size
    for ours, theirs in zip(task.batches(0, 3), photographs.batches(size), strict=False):
        torch.testing.assert_close(theirs, tuned.to_float(ours.x))
    held_out = torch.cat([x for x, _ in task.validation_batches()])
    torch.testing.assert_close(torch.cat(list(photographs.whole("val"))), held_out)


def test_the_peer_gets_the_same_budget(tmp_path, monkeypatch):
    networks = {f"{stage}_{what}": 1000 for stage in ("vae", "unet") for what in ("parameters", "steps")}
    asked = []

    def call(words):
        asked.append(words)
        said = networks | {"psnr": 25.0, "vae_cpu": 303, "unet_cpu": 517}
        (words[2] / "result.json").write_text(json.dumps(said))

    took = networks | {"vae_cpu": 302, "unet_cpu": 516, "psnr": 29.0, "frechet": 0.4}
    monkeypatch.setattr(elsewhere, "ours", lambda *_: took)
    monkeypatch.setattr(elsewhere, "call", call)
    monkeypatch.setattr(elsewhere.Work, "distance", lambda *_: 0.5)
    results = tmp_path / "rows.csv"
    words = ["scenes", "--share", "0.25", "--results", results, "--work", tmp_path]
    monkeypatch.setattr("sys.argv", ["elsewhere", *map(str, words)])
    elsewhere.main()
    (words,) = asked
    assert [words[words.index(f"--{stage}-seconds") + 1] for stage in ("vae", "unet")] == [225, 375]
    assert words[words.index("--data") + 1].name == "scenes"
    with results.open(newline="") as stream:
        assert [row["contender"] for row in csv.DictReader(stream)] == ["lightdiff", "diffusers"]
    mine, theirs = recipe_page.elsewhere_table(recipe_page.read(results)).splitlines()[2:]
    assert "| 0.400 | 0.80 |" in mine
    assert "| 0.500 |  |" in theirs


def test_a_set_that_does_not_exist_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["elsewhere", "nowhere"])
    with pytest.raises(SystemExit):
        elsewhere.main()
    assert "there is no nowhere; there are faces, scenes, pets" in capsys.readouterr().err
