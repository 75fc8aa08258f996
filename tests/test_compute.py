"""Precision, compiling, memory: each changes how something is computed, not what."""

import copy
import os
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from pretend_gpu import TESTED_WITH, PretendGPU
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightdiff.data.latents import prefetch
from lightdiff.extras.compile import (
    PassTime,
    cache_folder,
    compile_network,
    compiler_works,
    enable_activation_checkpointing,
    pick_compile,
)
from lightdiff.models.original import OriginalVAESettings
from lightdiff.models.unet import UNet
from lightdiff.models.vae import VAE, build_vae
from lightdiff.pipeline import cast_weights
from lightdiff.runtime import processes as compute
from lightdiff.runtime.processes import autocast, keep_memory
from lightdiff.settings import UNetSettings, VAESettings
from lightdiff.training.ema import EMA

CPU = torch.device("cpu")


def a_second() -> PassTime:
    """A pass of a second, of which compiling saves a quarter."""
    return PassTime(1, 1.0, 0.0)


UNET = UNetSettings(width=16, blocks=1, time_dim=16).resolved(8)
NETWORKS = {
    "unet": (lambda: UNet(UNET, 4), (torch.randn(2, 4, 8, 8), torch.tensor([3, 500]))),
    "vae": (lambda: VAE(VAESettings(encoder_width=8, decoder_width=8, attention=True).resolved(32)),
            (torch.randn(2, 3, 32, 32), torch.randn(2, 4, 8, 8))),
    "original vae": (lambda: build_vae(OriginalVAESettings(encoder_channels=(8, 8, 16), decoder_channels=(16, 8, 8))),
                     (torch.randn(2, 3, 32, 32), torch.randn(2, 4, 8, 8))),
}  # fmt: skip


def made(name):
    """A network whose every branch does something, and what it is called with."""
    torch.manual_seed(0)
    build, inputs = NETWORKS[name]
    network = build()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network, inputs


def answer(network, inputs):
    """The network's tensor, or the image and mu of a VAE."""
    found = network(*inputs)
    return found if isinstance(found, torch.Tensor) else torch.cat([found[0].flatten(), found[1].mu.flatten()])


def gradients(network, inputs):
    """All gradients, and how many bytes were kept for them."""
    kept = 0

    def count(x):
        nonlocal kept
        kept += x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        loss = answer(network, inputs).square().mean()
    loss.backward()
    return [p.grad for p in network.parameters()], kept


@pytest.mark.parametrize("name", NETWORKS)
def test_activations_computed_again_give_the_same_gradients_in_less_memory(name):
    network, inputs = made(name)
    before, kept = gradients(network, inputs)
    again, _ = made(name)
    enable_activation_checkpointing(again)
    after, fewer = gradients(again, inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert fewer < 0.6 * kept
    assert list(again.state_dict()) == list(network.state_dict())


def test_an_average_of_a_recomputing_network_is_a_network_of_its_own():
    network, inputs = made("unet")
    enable_activation_checkpointing(network)
    ema = EMA(copy.deepcopy(network), 0.9)
    with torch.no_grad():
        before = answer(ema.model, inputs)
        for parameter in network.parameters():
            parameter.zero_()
        assert torch.equal(answer(ema.model, inputs), before)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_converted_once_give_what_converting_them_each_time_gives(name):
    network, inputs = made(name)
    network.requires_grad_(False)
    with torch.inference_mode(), autocast(CPU, "bf16"):
        before = answer(network, inputs)
        after = answer(cast_weights(network, "bf16"), inputs)
    assert torch.equal(before, after)
    assert {p.dtype for m in network.modules() if isinstance(m, nn.GroupNorm) for p in m.parameters()} <= {
        torch.float32
    }


def test_fp32_leaves_all_weights_as_they_are():
    network, _ = made("unet")
    assert {p.dtype for p in cast_weights(network, "fp32").parameters()} == {torch.float32}


def test_compiled_code_is_kept_at_home_or_where_there_is_none_until_the_process_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == str(tmp_path / "home" / ".cache" / "lightdiff" / "compiled")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert Path(cache_folder()).parent == tmp_path

    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)  # of a user who has a number alone
    assert Path(cache_folder()).parent == tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, on the way to a compiled network
def test_a_compiled_network_computes_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if not compiler_works(CPU):
        pytest.skip("there is no C++ compiler")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(2, 4, 8, 8)
    names, before = list(network.state_dict()), network(x)
    compile_network(network, CPU)
    torch.testing.assert_close(network(x), before)
    assert list(network.state_dict()) == names
    assert any(path.is_file() for path in tmp_path.rglob("*"))  # kept for the next start


@pytest.mark.slow
@pytest.mark.skipif(
    torch.__version__ < "2.8", reason="the compiler of torch 2.7 stumbles over checks of shapes in tests"
)
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_training_learns_the_same(tmp_path, monkeypatch):
    from tests.bench.cases import train_unet_step

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if not compiler_works(CPU):
        pytest.skip("there is no C++ compiler")
    model, found = {"channels": (8, 8), "blocks": 1, "time_dim": 8, "zero_init": False}, []
    for compiling in ("off", "on"):
        torch.manual_seed(0)  # of the latents
        trainer, step = train_unet_step(model, 8, 4, CPU, compile=compiling, precision="fp32", warmup_steps=0)
        losses = [float(step()["loss"]) for _ in range(4)]
        found.append((losses, torch.cat([p.detach().flatten() for p in trainer.averaged.parameters()])))
    (plain, weights), (compiled, same) = found
    assert compiled[0] == pytest.approx(plain[0], rel=1e-5)  # of the same weights
    assert compiled == pytest.approx(plain, rel=1e-3)
    # AdamW's first steps go by the gradient's sign, which rounding turns where it is about zero.
    assert (same - weights).abs().mean() < 1e-5  # a twentieth of a step of the learning rate


@pytest.mark.parametrize(("graphs", "mode"), [(True, "reduce-overhead"), (False, None)])
def test_cuda_graphs_where_they_are_asked_for(monkeypatch, graphs, mode):
    seen = []
    monkeypatch.setattr(nn.Module, "compile", lambda _, **options: seen.append(options))
    compile_network(made("unet")[0], torch.device("cuda"), graphs=graphs)
    assert seen == [{"mode": mode, "dynamic": False}]


@pytest.mark.filterwarnings("ignore")
def test_without_a_compiler_it_is_said_in_a_line_and_the_network_runs_as_it_is(monkeypatch, capsys):
    def broken(*_, **__):
        def call(*_):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand much more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    assert pick_compile("on", CPU, 10, a_second) == "off"
    said = " ".join(capsys.readouterr().err.split())
    assert "so the network is not compiled (InvalidCxxCompiler: No working C++ compiler found)" in said
    assert "and much more" not in said


@pytest.mark.parametrize("name", NETWORKS)
def test_the_time_of_a_pass_follows_from_the_flops_that_torch_counts(monkeypatch, name):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    network, inputs = made(name)
    one = [x[:1] for x in inputs]
    with FlopCounterMode(display=False) as counter:
        network(*one)
    found = PassTime.of(network, one, 7, "fp32")
    assert found.computing == pytest.approx(7 * counter.get_total_flops() / 6e10, rel=0.02)  # attention is left out
    assert found.launching == 0
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.skipif(not torch.__version__.startswith(TESTED_WITH), reason=f"made for torch {TESTED_WITH}")
def test_small_passes_wait_for_launches_and_large_ones_for_the_gpu():
    network = UNet(UNetSettings().resolved(8), 4)
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in network.modules())
    with PretendGPU():
        network.to("cuda")
        one = torch.zeros(1, 4, 8, 8, device="cuda"), torch.zeros(1, device="cuda")
        small, large = (PassTime.of(network, one, images, "bf16") for images in (32, 32_000))
    assert small.launching == large.launching == pytest.approx(layers * 8 * 5e-6)
    assert small.launch_bound
    assert not large.launch_bound
    assert small.saved(64) == 2 * (small.launching - small.computing)
    assert large.saved(64_000) == large.computing / 2


@pytest.mark.parametrize(
    ("cores", "processes", "device", "workers"),
    [(192, 8, "cuda", 16), (64, 8, "cuda", 8), (6, 1, "cuda", 6), (64, 1, "cpu", 4), (2, 1, "cpu", 0)],
)
def test_loader_workers_follow_the_cores_of_a_process(monkeypatch, cores, processes, device, workers):
    monkeypatch.setattr(compute, "usable_cores", lambda: cores)
    for name, value in {"RANK": 0, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}.items():
        monkeypatch.setenv(name, str(value))
    assert compute.pick_workers(-1, torch.device(device)) == workers
    assert compute.pick_workers(3, torch.device(device)) == 3


@pytest.mark.parametrize(
    ("name", "device", "images", "training", "wanted"),
    [("off", "cuda", 10**6, True, False), ("auto", "cpu", 10**6, True, False), ("auto", "mps", 10**6, False, False),
     ("auto", "cuda", 80, True, False), ("auto", "cuda", 81, True, True), ("auto", "cuda", 240, False, False),
     ("auto", "cuda", 241, False, True), ("auto", "cpu", 241, False, True), ("on", "cpu", 1, True, True)],
)  # fmt: skip
def test_compiling_pays_if_it_saves_more_than_a_minute(monkeypatch, name, device, images, training, wanted):
    tried = []
    monkeypatch.setattr(torch, "compile", lambda _: tried.append)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: 1)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    assert pick_compile(name, torch.device(device), images, a_second, training) == ("on" if wanted else "off")
    assert bool(tried) == wanted


def test_compiled_code_has_a_home_that_outlives_tmp(monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(torch, "compile", lambda _: lambda _: None)
    pick_compile("on", CPU, 1, a_second)
    assert os.environ.pop("TORCHINDUCTOR_CACHE_DIR").endswith("lightdiff/compiled")


def test_memory_is_kept_where_there_is_glibc(monkeypatch):
    calls = []

    class Library:
        @staticmethod
        def mallopt(what, value):
            calls.append((what, value))

    monkeypatch.setattr(compute.ctypes, "CDLL", lambda _: Library)
    keep_memory()
    assert calls == [(-4, 0), (-1, -1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h


@pytest.mark.parametrize("problem", [OSError("no library"), AttributeError("no mallopt"), TypeError("Windows")])
def test_elsewhere_memory_is_left_alone(monkeypatch, problem):
    def absent(_):
        raise problem

    monkeypatch.setattr(compute.ctypes, "CDLL", absent)
    keep_memory()


# --- background -----------------------------------------------------------------------------------------------------


def test_the_next_is_at_work_while_one_is_used():
    begun = [threading.Event() for _ in range(5)]

    def work(i):
        begun[i].set()
        return i

    for i in prefetch(lambda i=i: work(i) for i in range(5)):
        assert i == 4 or begun[i + 1].wait(5)
        assert i >= 3 or not begun[i + 2].is_set()


def test_nothing_ahead_of_nothing():
    assert list(prefetch([])) == []


def test_threads_in_the_background_have_no_helpers_and_take_none_away():
    torch.set_num_threads(2)
    assert list(prefetch([torch.get_num_threads])) == [1]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
