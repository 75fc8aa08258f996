"""Distances between sets of images against closed forms, and the command on a tiny run."""

import json
import os
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import UNET_FLAGS, succeed
from oracles import normal
from PIL import Image

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.files import ImageFile, list_images
from lightdiff.data.images import to_float
from lightdiff.data.index import read_index
from lightdiff.extras import distances, evaluate
from lightdiff.extras.evidence import held_out, load_images, read_evaluation
from lightdiff.extras.features import Features
from lightdiff.extras.grid_pattern import PATTERN, grid_pattern
from lightdiff.extras.latent_facts import UnitMoments, channel_active_share, channel_kl
from lightdiff.extras.settings import EvaluateSettings
from lightdiff.models.lpips import TRUNKS, cached
from lightdiff.pipeline import Pipeline
from lightdiff.run_folder import RunFolder
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.progress import console
from lightdiff.settings import ImageSettings, VAELossSettings

pytest.importorskip("torch_fidelity")
pytest.importorskip("skimage")
CPU = torch.device("cpu")
PUBLISHED = Features("", "", torch.nn.Identity(), CPU)
OTHER = Features("mine", "", torch.nn.Identity(), CPU)
FID = ("Frechet distance", "FID")


def test_the_frechet_distance_of_normal_sets_is_its_closed_form():
    # |m1 - m2|^2 + sum (s1 - s2)^2 for diagonal covariances
    a = 2 * normal(40_000, 3, seed=1) + torch.tensor([1.0, 0.0, -1.0])
    b = normal(40_000, 3, seed=2)
    found = distances.frechet(PUBLISHED, a, b, FID)
    assert found["FID"] == pytest.approx(2 + 3, rel=0.02)  # standard errors of 40,000 samples: under 1 %
    again = distances.frechet(PUBLISHED, normal(40_000, 3, seed=3), b, FID)["FID"]
    assert 0 <= again < 0.01


def test_its_error_is_about_what_repetition_shows():
    b = normal(20_000, 2, seed=2)
    found = [distances.frechet(PUBLISHED, 1.5 * normal(400, 2, seed=10 + i) + 1, b, FID) for i in range(40)]
    spread = np.std([f["FID"] for f in found])
    assert np.mean([f["FID +-"] for f in found]) == pytest.approx(spread, rel=0.4)


def test_numbers_of_other_features_are_not_called_fid():
    a, b = normal(100, 4, seed=1), normal(100, 4, seed=2)
    names = {*distances.frechet(OTHER, a, b, FID), *distances.kernel(OTHER, a, b)}
    assert names == {f"{m} (mine){e}" for m in ("Frechet distance", "kernel distance") for e in ("", " +-")}
    assert {"KID", "KID +-"} == set(distances.kernel(PUBLISHED, a, b))
    assert OTHER.name_measures({"recall": 0.5}) == {"recall (mine)": 0.5}
    assert PUBLISHED.name_measures({"recall": 0.5}) == {"recall": 0.5}


def test_the_kernel_distance_is_unbiased():
    found = distances.kernel(PUBLISHED, normal(600, 8, seed=1), normal(600, 8, seed=2))
    assert abs(found["KID"]) < 4 * found["KID +-"]
    apart = distances.kernel(PUBLISHED, normal(600, 8, seed=1) + 1, normal(600, 8, seed=2))
    assert apart["KID"] > 10 * apart["KID +-"]


def test_precision_and_recall_separate_quality_from_variety():
    real = torch.cat([normal(300, 2, seed=1) - 20, normal(300, 2, seed=2) + 20])
    half = normal(300, 2, seed=3) - 20  # good, but of one kind only
    found = distances.precision_recall(half, real)
    assert found["precision"] > 0.9
    assert found["recall"] == pytest.approx(0.5, abs=0.06)
    off = torch.cat([real[::2], torch.full((300, 2), 500.0) + normal(300, 2, seed=4)])  # all kinds, half of it nonsense
    found = distances.precision_recall(off, real)
    assert found["precision"] == pytest.approx(0.5, abs=0.06)


def test_copies_are_distinguished_from_new_images():
    train, held_out, fresh = normal(2000, 3, seed=1), normal(1000, 3, seed=2), normal(1000, 3, seed=3)
    distance = distances.nearest_of(held_out, train)[0][:, 0]
    name = "share of samples nearer than 99% of those"
    copied = distances.nearest_of(train[:500] + 1e-4, train)
    assert copied[1][:, 0].tolist() == list(range(500))
    assert distances.copies(copied[0][:, 0], distance)[name] > 0.99
    assert distances.copies(distances.nearest_of(fresh, train)[0][:, 0], distance)[name] == pytest.approx(
        0.01, abs=0.015
    )


def test_active_units_are_those_whose_mean_varies():
    moments = UnitMoments(2, 4, 4)
    mu = torch.zeros(50, 2, 4, 4)
    mu[:, 0] = normal(50, 4, 4, dtype=torch.float32)
    mu[:, 1, :2] = normal(50, 2, 4, dtype=torch.float32)
    mu[:, 1, 2:] = 0.05 * normal(50, 2, 4, dtype=torch.float32) + 3  # variance 0.0025, below 0.01
    logvar = torch.zeros(50, 2, 4, 4)
    for part in range(0, 50, 7):
        moments.add(mu[part : part + 7, None], logvar[part : part + 7, None])
    assert channel_active_share(moments) == [1.0, 0.5]
    assert channel_kl(moments) == pytest.approx((mu.square() / 2).mean((0, 2, 3)).tolist(), rel=1e-6)  # sigma is 1


@pytest.mark.parametrize("count", [4, 7, 8, 39, 200])
def test_every_distance_has_an_error(count):
    a, b = normal(count, 3, seed=1), normal(50, 3, seed=2)
    for found in (distances.frechet(PUBLISHED, a, b, FID), distances.kernel(PUBLISHED, a, b)):
        for name, value in found.items():
            assert np.isfinite(value), name
            assert name.endswith("+-") or found[f"{name} +-"] > 0


@pytest.mark.parametrize(
    ("counts", "words"),
    [((2000, 9000), "of 2,000 images and 2,048 features says nothing; 20,480 are enough"),
     ((50_000, 4000), "of 4,000 images and 2,048 features is too high: compare it only"),
     ((20_480, 70_000), "")],
)  # fmt: skip
def test_distances_of_few_images_come_with_a_caution(counts, words):
    found = distances.caution(2048, *counts)
    assert found == {} if not words else words in found["caution"]


@pytest.mark.parametrize("counts", [(3, 50), (50, 1)])
def test_too_few_images_are_no_set(counts):
    a, b = (normal(n, 3, seed=n) for n in counts)
    assert distances.frechet(PUBLISHED, a, b, FID) == distances.kernel(PUBLISHED, a, b) == {}
    assert distances.precision_recall(a, b) == {}


def test_results_of_another_network_are_not_kept(tmp_path):
    path = tmp_path / "metrics.json"
    evaluate.store_results(path, "unet", {"network": "a", "FID": 3.0})
    evaluate.store_results(path, "unet", {"network": "a", "Frechet distance (mine)": 1.0})
    assert json.loads(path.read_text())["unet"] == {"network": "a", "FID": 3.0, "Frechet distance (mine)": 1.0}
    evaluate.store_results(path, "unet", {"network": "a", "samples": 9, "KID": 1.0})  # of other samples
    assert json.loads(path.read_text())["unet"] == {"network": "a", "samples": 9, "KID": 1.0}
    evaluate.store_results(path, "unet", {"network": "b", "Frechet distance (mine)": 2.0})
    assert json.loads(path.read_text())["unet"] == {"network": "b", "Frechet distance (mine)": 2.0}


def test_kept_features_are_of_these_images_and_this_network_alone(tmp_path):
    made = []

    def features(digest, files=("a.png", "b.png"), resolution=16):
        def measure():
            made.append(normal(2, 3, seed=len(made)))
            return made[-1], [0, 1]

        network = Features("mine", digest, torch.nn.Identity(), CPU)
        images = ImageSettings(data=(tmp_path,), resolution=resolution)
        listed = [ImageFile(0, path, "train", {}) for path in files]
        return evaluate.cached_features(tmp_path, network, listed, images, Processes(), measure)

    first = features("one")
    again = features("one")
    assert len(made) == 1
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1] == [0, 1]
    for i, other in enumerate(({"digest": "two"}, {"files": ("a.png", "c.png")}, {"resolution": 32})):
        found, _ = features(**{"digest": "one", **other})
        assert torch.equal(found, made[-1])
        assert len(made) == i + 2
    assert torch.equal(features("one")[0], made[0])


def test_lpips_is_measured_where_its_weights_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    untrained = VAELossSettings(lpips_gamma=0.0, lpips_net="alex")
    chosen = evaluate.lpips_settings(untrained, EvaluateSettings(), Processes())
    assert chosen.lpips_gamma == 0
    assert "no LPIPS, as there are no weights of alex" in " ".join(capsys.readouterr().err.split())
    named = EvaluateSettings(lpips_net="squeeze", lpips_weights=tmp_path / "w")
    chosen = evaluate.lpips_settings(untrained, named, Processes())
    assert (chosen.lpips_gamma, chosen.lpips_net, chosen.lpips_weights) == (1, "squeeze", tmp_path / "w")
    kept = cached(TRUNKS["alex"].url)
    kept.parent.mkdir(parents=True)
    kept.touch()
    chosen = evaluate.lpips_settings(untrained, EvaluateSettings(), Processes())
    assert (chosen.lpips_gamma, chosen.lpips_weights) == (1, None)


def test_ssim_is_1_for_the_same_and_less_for_others():
    x = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    assert float(evaluate.ssim(x, x)) == pytest.approx(1)
    assert float(evaluate.ssim(x, x.flip(2))) < 0.5


def test_the_command_measures_both_networks(trained, weights, run, cli):
    flags = ["--features", weights, "--num-images", 6, "--batch-size", 8, "--workers", 0, "--device", "cpu"]
    first = succeed("evaluate", "--run", run, *flags, "--precision", "fp32")
    assert first.stdout.strip() == str(run / "evaluation/metrics.json")
    found = json.loads((run / "evaluation/metrics.json").read_text())
    assert {"PSNR (dB)", "SSIM", "reconstructions' Frechet distance (made-up)"} <= set(found["vae"])
    assert len(found["vae"]["KL per channel (nats per element)"]) == 4
    assert {f"{name} (made-up)" for name in ("Frechet distance", "precision", "recall")} <= set(found["unet"])
    assert not {"FID", "precision", "recall"} & set(found["unet"])
    assert found["vae"]["which are"] == "held out"
    images = read_index(run / "latents").images
    x = to_float(torch.stack(load_images(held_out(list_images(images, console)), images)))
    model = Pipeline.load(run, device="cpu")
    error = 127.5 * (model.decode(model.encode(x)) - x).double().mean(0)
    assert found["vae"][PATTERN] == pytest.approx(grid_pattern(error, model.vae_settings.factor), rel=1e-3) != 0
    for part, files in (("vae", ["files"]), ("unet", ["files of samples", "files of training images"])):
        assert all(found[part][name].endswith(" png") for name in files)
        assert "to 16 px, then to 299 px" in found[part]["resampling"]
        assert "images and 768 features says nothing" in found[part]["caution"]
    assert first.err.count("caution: a Frechet distance of") == 2
    assert found["unet"]["samples"] == 6
    with Image.open(run / "evaluation/nearest.png") as picture:
        assert picture.height > 6 * (64 + 24)  # six samples in rows, with distances below
        assert picture.width > 5 * 64  # each beside four training images of 16 px, enlarged to 64
    again = succeed("evaluate", "--run", run, *flags, "--precision", "fp32")
    assert "training images" not in again.err.split("Samples of the U-Net")[0]  # their features were kept
    assert json.loads((run / "evaluation/metrics.json").read_text()) == found
    kept = read_evaluation(RunFolder(run))
    assert kept == found
    succeed("train-unet", "--run", run, *UNET_FLAGS, "--steps", 8)  # it is another network now
    assert set(read_evaluation(RunFolder(run))) == {"vae"}


def test_every_average_is_measured_and_so_is_a_guided_network(run, weights, cli):
    flags = ["--of", "unet", "--features", weights, "--num-images", 4, "--batch-size", 8, "--workers", 0]
    flags += ["--device", "cpu", "--run", run]
    succeed("train-unet", "--run", run, *UNET_FLAGS, "--restart", "--ema-decay", "0.9,0.5")
    best = succeed("evaluate", *flags, "--compare-ema").err
    found = json.loads((run / "evaluation/metrics.json").read_text())
    parts = ["unet --ema 0.9", "unet --ema 0.5", "unet --ema 0.0"]
    assert set(parts) <= set(found)
    distances = {name.removeprefix("unet "): found[name]["Frechet distance (made-up)"] for name in parts}
    lowest = min(distances, key=distances.__getitem__)
    assert f"lowest Frechet distance (made-up): {distances[lowest]:.4g}, with {lowest}" in best
    succeed("evaluate", *flags, "--guide-with", "step-2", "--guidance", 3)
    guided = json.loads((run / "evaluation/metrics.json").read_text())["unet"]
    assert guided["samples in"].endswith("-3.0")
    for wrong, message in (
        (["--compare-ema", "--ema", 0.5], "--compare-ema draws with each: leave out --ema and --samples"),
        (["--ema", 0.5, "--samples", run], "--ema is for samples to be drawn, not for those of --samples"),
        (["--ema", 0.7], "has 0.0, 0.9, 0.5 (0: the raw weights)"),
        (["--guidance", 2, "--samples", run], "--guidance is for samples to be drawn, not for those of --samples"),
    ):
        result = cli("evaluate", *flags, *wrong)
        assert (result.code, message in result.err) == (2, True), result.err


def test_another_precision_and_other_images_are_measured_anew(run, weights, tmp_path):
    flags = ["--features", weights, "--num-images", 4, "--batch-size", 8, "--workers", 0, "--device", "cpu"]
    succeed("evaluate", "--run", run, *flags)
    succeed("evaluate", "--run", run, *flags, "--precision", "bf16")
    numbers = json.loads((run / "evaluation/metrics.json").read_text())["unet"]
    assert len(list((run / "evaluation").glob("samples-*-4*"))) == 2
    assert numbers["samples in"].endswith("-bf16")
    images = Path(Checkpoint(run / "vae/checkpoints/best.safetensors", "vae").metadata.settings["images"]["data"][0])
    shutil.copytree(images, tmp_path / "moved")
    kept = set((run / "evaluation").glob("features-*"))
    succeed("evaluate", "--run", run, *flags, "--precision", "bf16", "--data", tmp_path / "moved")  # the same pixels
    assert json.loads((run / "evaluation/metrics.json").read_text())["unet"] == pytest.approx(numbers)
    for path in (tmp_path / "moved").rglob("*.png"):  # other pixels under the same names
        Image.eval(Image.open(path), lambda v: 255 - v).save(path)
        os.utime(path, (1, 1))
    succeed("evaluate", "--run", run, *flags, "--precision", "bf16", "--data", tmp_path / "moved")
    turned = json.loads((run / "evaluation/metrics.json").read_text())["unet"]
    name = "Frechet distance (made-up)"
    assert turned[name] != pytest.approx(numbers[name])
    assert len(set((run / "evaluation").glob("features-*")) - kept) >= 2


def test_without_a_unet_only_the_vae_is_measured(trained, weights, tmp_path, cli):
    shutil.copytree(trained / "vae", tmp_path / "run/vae")
    flags = ["--features", weights, "--workers", 0, "--device", "cpu"]
    said = succeed("evaluate", "--run", tmp_path / "run", *flags)
    assert "only the VAE is measured" in said.err
    assert set(json.loads((tmp_path / "run/evaluation/metrics.json").read_text())) == {"vae"}
    result = cli("evaluate", "--run", tmp_path / "run", *flags, "--of", "unet")
    assert (result.code, "train-unet" in result.err) == (2, True)


def test_copies_are_sought_among_all_images_or_a_note_is_printed(run, weights):
    flags = ["--features", weights, "--num-images", 4, "--workers", 0, "--device", "cpu", "--of", "unet"]
    said = succeed("evaluate", "--run", run, *flags, "--num-reference", 4)
    assert "note: the samples are compared with 4 of " in " ".join(said.err.split())
    assert "--num-reference 0 uses all" in " ".join(said.err.split())
    assert "--num-reference" not in succeed("evaluate", "--run", run, *flags, "--num-reference", 0).err


def test_other_weights_are_not_taken_for_the_published_ones(trained, weights, tmp_path, cli):
    copy = tmp_path / "copy.pth"
    torch.save(safetensors.torch.load_file(weights), copy)
    result = cli("evaluate", "--run", trained, "--device", "cpu", "--weights", copy)
    assert (result.code, "is no copy of Inception's published weights" in " ".join(result.err.split())) == (2, True)
    result = cli("evaluate", "--run", trained, "--device", "cpu", "--weights", copy, "--features", weights)
    assert (result.code, "--features replaces --weights" in " ".join(result.err.split())) == (2, True)


def test_grids_that_generate_writes_are_no_samples(run):
    flags = ["--run", run, "--num-steps", 2, "--device", "cpu", "--name", "new"]
    succeed("trajectory", *flags, "--num-images", 5, "--out", run / "drawn")
    assert {p.suffix for p in (run / "drawn").iterdir()} == {".png", ".webp", ".json"}
    assert [f.path for f in evaluate.samples_in(run / "drawn")] == [f"new-{i:05d}.png" for i in range(5)]
    succeed("walk", *flags, "--between", "0,1", "--frames", 3, "--out", run / "walk")
    assert len(evaluate.samples_in(run / "walk")) == 3


@pytest.mark.slow
def test_two_processes_find_what_one_does(run, weights):
    flags = ["--features", weights, "--num-images", 6, "--batch-size", 4, "--workers", 0, "--device", "cpu"]
    succeed("evaluate", "--run", run, *flags, "--precision", "fp32")
    alone = json.loads((run / "evaluation/metrics.json").read_text())
    for kept in (run / "evaluation").glob("features-*"):
        kept.unlink()
    succeed("evaluate", "--run", run, *flags, "--precision", "fp32", "--nproc-per-node", 2)
    for part, numbers in json.loads((run / "evaluation/metrics.json").read_text()).items():
        for name, value in numbers.items():
            expected = alone[part][name]
            assert value == (expected if isinstance(value, str) else pytest.approx(expected, rel=1e-3, abs=1e-5)), name


def test_without_weights_and_network_it_says_where_to_get_them(trained, cli, tmp_path):
    with patch("torch.hub.download_url_to_file", side_effect=OSError("no network")):
        result = cli("evaluate", "--run", trained, "--device", "cpu", TORCH_HOME=str(tmp_path))
    assert result.code == 2
    for part in ("download failed (no network)", "weights-inception-2015-12-05", "--weights FILE", "--features FILE"):
        assert part in result.err


def test_without_the_extra_it_says_how_to_install_it(trained, cli):
    with patch.dict(sys.modules, {"torch_fidelity.feature_extractor_inceptionv3": None}):
        result = cli("evaluate", "--run", trained, "--device", "cpu")
    assert (result.code, "python -m pip install torch-fidelity scikit-image" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("content", "message"), [(b"nonsense", "cannot be read"), (None, "holds no weights of the Inc")]
)
def test_a_file_of_other_weights_is_refused(trained, cli, tmp_path, content, message):
    path = tmp_path / "w.safetensors"
    if content is None:
        safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    result = cli("evaluate", "--run", trained, "--device", "cpu", "--features", path)
    assert (result.code, message in result.err) == (2, True)


def test_features_of_weights_that_are_wrong_name_their_flag(trained, cli, weights, tmp_path, monkeypatch):
    state = safetensors.torch.load_file(weights)
    name = next(n for n in state if n.endswith("conv.weight"))
    path = tmp_path / "w.safetensors"
    flags = ["--run", trained, "--device", "cpu", "--features", path]
    safetensors.torch.save_file(state | {name: state[name] * torch.nan}, path)
    assert f"{path} is no use: {name} holds values that are not finite" in cli("evaluate", *flags).err
    safetensors.torch.save_file(state | {name: state[name][..., :1].contiguous()}, path)
    assert f"--features: {path} does not fit the Inception network" in cli("evaluate", *flags).err
    cached = tmp_path / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir(parents=True)
    torch.save(state, cached)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    result = cli("evaluate", "--run", trained, "--device", "cpu", TORCH_HOME=str(tmp_path))
    assert (result.code, f"{cached} is no copy of Inception's published weights" in result.err) == (2, True)


def test_missing_samples_are_reported(trained, cli, weights, tmp_path):
    flags = ["--of", "unet", "--features", weights, "--device", "cpu", "--samples", tmp_path / "no"]
    result = cli("evaluate", "--run", trained, *flags)
    assert (result.code, f"--samples: {tmp_path / 'no'} does not exist" in result.err) == (2, True)
    (tmp_path / "no").touch()
    assert f"--samples: {tmp_path / 'no'} is no folder" in cli("evaluate", "--run", trained, *flags).err
    (tmp_path / "no").unlink()
    (tmp_path / "no").mkdir()
    assert f"--samples: {tmp_path / 'no'} holds no image" in cli("evaluate", "--run", trained, *flags).err
