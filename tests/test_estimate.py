"""--dry-run of the two trainings: its numbers against analytic counts and a real run."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import UNET_FLAGS, VAE_FLAGS
from torch import nn

from lightdiff.checkpoint import Checkpoint
from lightdiff.extras.estimate import batch_seconds, process_memory
from lightdiff.extras.gpu_memory import CARDS, GPUMemory
from lightdiff.extras.settings_rows import format_duration
from lightdiff.models.vae import VAE
from lightdiff.settings import TrainUNetSettings, VAESettings
from lightdiff.training.loop import Trainer
from tests.image_files import scan


def test_a_vae_is_estimated_and_nothing_is_written(cli, faces, tmp_path):
    result = cli("train-vae", "--run", tmp_path / "run", "--data", faces, *VAE_FLAGS, "--dry-run")
    assert result.code == 0, result.stderr
    json.loads(result.stdout)  # what is printed there is still settings alone
    assert not (tmp_path / "run").exists()
    settings = VAESettings(encoder_width=16, decoder_width=16)
    assert "an image of 3 x 16 x 16 -> latents of 4 x 8 x 8" in result.err
    model = VAE(settings.model_validate(json.loads(result.stdout)["model"]).resolved(16))
    parameters = sum(p.numel() for p in model.parameters())
    assert f"{parameters / 1e6:.2f} M parameters" in result.err
    flops = 2 * sum(work for _, work in convolutions(model, torch.zeros(1, 3, 16, 16), torch.zeros(1, 4, 8, 8)))
    found = re.search(r"per image: ([\d.]+) GFLOP", result.err)
    assert found is not None
    assert float(found[1]) == pytest.approx(flops / 1e9, rel=0.02)
    assert "3 steps of 6 images take" in result.err


def test_activation_memory_is_what_the_graph_holds(cli, faces, tmp_path):
    flags = ["--data", faces, *VAE_FLAGS, "--resolution", 64, "--dry-run"]
    result = cli("train-vae", "--run", tmp_path / "run", *flags)
    model = VAE(VAESettings.model_validate(json.loads(result.stdout)["model"]).resolved(64))
    found = re.search(r"([\d.]+) MB of activations", result.err)
    assert found is not None
    kept = kept_bytes(model, torch.zeros(1, 3, 64, 64), torch.zeros(1, 4, 16, 16))
    assert float(found[1]) == pytest.approx(kept / 1e6, rel=0.02)


def kept_bytes(model: nn.Module, *inputs: torch.Tensor) -> int:
    """Memory that a call's graph holds, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in parameters)


def convolutions(model: nn.Module, *inputs: torch.Tensor) -> list[tuple[str, int]]:
    """Multiplications of each convolution in a call: output elements times input channels times kernel."""
    found: list[tuple[str, int]] = []

    def count(name: str):
        def hook(module: nn.Conv2d, given: object, out: torch.Tensor) -> None:
            kernel = module.kernel_size[0] * module.kernel_size[1]
            found.append((name, out.numel() * module.in_channels * kernel))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count(name))
    with torch.no_grad():
        model(*inputs)
    return found


@pytest.mark.slow
def test_the_memory_of_a_training_on_a_cpu_is_told(faces, tmp_path):
    flags = ["--run", tmp_path / "run", "--data", faces, "--device", "cpu", "--resolution", 64, "--preset", "small"]
    flags += ["--steps", 8, "--batch-size", 24, "--lpips-gamma", 0, "--workers", 0, "--log-every", 8]
    words = [sys.executable, "-m", "lightdiff", "train-vae", *map(str, flags)]
    said = [subprocess.run(line, capture_output=True, text=True, check=True) for line in ([*words, "--dry-run"], words)]
    found = re.search(r"memory: ([\d.]+) GB", said[0].stderr)
    assert found is not None
    numbers = json.loads((tmp_path / "run" / "vae" / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(found[1]) * 1e3 == pytest.approx(numbers["memory_mb"], rel=0.15)


@pytest.mark.parametrize("images", [8, 20, 64])
def test_memory_rises_evenly_with_the_images_of_a_pass(images):
    assert process_memory({4: 1400, 8: 1800}, images) == pytest.approx(1000 + 100 * images)
    assert process_memory({4: 1400}, 4) == 1400


def test_a_unet_is_estimated(run, cli):
    before = Checkpoint(run / "unet/checkpoints/last.safetensors")
    result = cli("train-unet", "--run", run, *UNET_FLAGS, "--steps", 500, "--dry-run")
    assert result.code == 0, result.stderr
    parameters = sum(t.numel() for t in before.tensors("model.").values())
    assert f"unet: {parameters / 1e6:.2f} M parameters; an image of 4 x 8 x 8" in result.err
    assert "500 steps of 6 images take" in result.err
    assert Checkpoint(run / "unet/checkpoints/last.safetensors").settings(TrainUNetSettings).loop.steps == 3


@pytest.mark.parametrize("whole", [4, 6, 32, 500])
def test_a_step_takes_time_of_its_own_and_for_each_image(whole):
    timed = lambda size: 0.5 + 0.02 * size  # noqa: E731
    assert batch_seconds(4, whole, timed, timed(4)) == pytest.approx(timed(whole))


def test_a_large_batch_is_not_timed_as_a_whole():
    asked = []

    def timed(size):
        asked.append(size)
        return 1.0 * size

    assert batch_seconds(4, 64, timed, 4.0) == pytest.approx(64)
    assert asked == [8]


def test_epochs_are_estimated_where_the_images_are_known(cli, faces, run, tmp_path):
    flags = [*VAE_FLAGS, "--epochs", 3, "--dry-run"]
    flags.remove("--steps")
    flags.remove("3")
    result = cli("train-vae", "--run", tmp_path / "new", "--data", faces, *flags)
    trained_on = sum(file.split == "train" for file in scan([faces], 0.2))
    steps = round(3 * trained_on / 6)
    said = f"{steps} steps of 6 images ({steps * 6 / trained_on:.3g} passes over {trained_on} images) take"
    assert said in result.err, result.err
    assert "how long an epoch takes" in cli("train-vae", "--run", tmp_path / "new", *flags).err
    flags = [*UNET_FLAGS[:2], *UNET_FLAGS[4:], "--epochs", 3, "--dry-run", "--restart"]
    result = cli("train-unet", "--run", run, *flags)
    assert said in result.err, result.err
    del flags[flags.index("--epochs") : flags.index("--epochs") + 2]  # then at most 300 passes
    assert f"{300 * trained_on // 6} steps of 6 images (300 passes" in cli("train-unet", "--run", run, *flags).err


@pytest.mark.parametrize(("steps", "words"), [(30, "90 seconds"), (100, "5 minutes"), (6000, "5 hours")])
@pytest.mark.parametrize("command", ["train-vae", "train-unet"])
def test_a_training_takes_as_long_as_its_steps(run, cli, faces, monkeypatch, command, steps, words):
    now = [0.0]

    def half_a_second_an_image(trainer, batch):
        now[0] += 0.5 * trainer.loop.batch_size
        return {}

    monkeypatch.setattr("lightdiff.extras.estimate.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Trainer, "train_step", half_a_second_an_image)
    flags = ["--data", faces, *VAE_FLAGS] if command == "train-vae" else UNET_FLAGS
    result = cli(command, "--run", run, *flags, "--steps", steps, "--dry-run")
    assert result.code == 0, result.stderr
    assert "2 images/s" in result.err
    assert f"{steps} steps of 6 images take {words}" in result.err


def test_lpips_without_weights_is_left_out_with_a_note(cli, faces, tmp_path):
    flags = [*VAE_FLAGS, "--lpips-gamma", "0.1", "--lpips-net", "squeeze", "--dry-run"]
    result = cli("train-vae", "--run", tmp_path / "run", "--data", faces, *flags, TORCH_HOME=str(tmp_path))
    assert (result.code, "LPIPS is left out of the estimate" in result.err) == (0, True), result.stderr


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@without_gpu
def test_what_a_gpu_will_hold_is_told_without_one(cli, faces, tmp_path):
    flags = ["--data", faces, "--resolution", 32, "--batch-size", 8, "--micro-batch", 2, "--device", "cuda"]
    result = cli("train-vae", "--run", tmp_path / "run", *flags, "--dry-run", TORCH_HOME=str(tmp_path))
    assert result.code == 0, result.stderr
    model = VAE(VAESettings.model_validate(json.loads(result.stdout)["model"]).resolved(32))
    megabytes = round(sum(4 * p.numel() for p in model.parameters()) / 1e6)
    assert "memory of a GPU in bf16, with micro-batches of 2: " in result.err
    assert f"weights {megabytes} MB, their gradients {megabytes} MB" in result.err
    assert f"EMA {megabytes} MB, LPIPS 59 MB" in result.err, "14.7 M parameters of VGG, though none are downloaded"
    assert all(f"{size} GB" in result.err for size in CARDS)
    count = sum(file.split == "train" for file in scan([faces], 0.05))
    assert f"no GPU here: nothing is timed; {300 * count // 8} steps of 8 images" in result.err
    flops = float(re.search(r"image: ([\d.]+) GFLOP", result.err)[1]) * 1e9
    hours = float(re.search(r": ([\d.e-]+) GPU hours", result.err)[1])
    assert hours == pytest.approx(3 * flops * (300 * count // 8) * 8 / 1e14 / 3600, rel=0.06)  # two digits
    assert "images/s" not in result.err
    leaner = [*flags, "--ema-decay", 0, "--lpips-gamma", 0, "--precision", "fp32", "--dry-run"]
    told = cli("train-vae", "--run", tmp_path / "run", *leaner).err
    assert "memory of a GPU in fp32" in told
    assert not re.search("EMA [0-9]|LPIPS [0-9]|weights in bf16", told)


@without_gpu
def test_processes_share_what_a_gpu_will_hold(run, cli):
    flags = ["--run", run, "--preset", "tiny", "--batch-size", 16, "--device", "cuda", "--dry-run", "--restart"]
    assert "with micro-batches of 16" in cli("train-unet", *flags).err
    assert "with micro-batches of 4" in cli("train-unet", *flags, "--nproc-per-node", 4).err


def test_the_largest_micro_batch_fits_and_no_larger_one():
    memory = GPUMemory(weights=3, gradients=10**9, optimizer=5, averaged=7, lpips=11, copies=13, image=10**7)
    card = 8e9
    images = memory.largest_micro_batch(card)
    assert memory.total(images, several=True) <= card < memory.total(images + 1, several=True)
    assert memory.largest_micro_batch(memory.total(1, several=True)) == 1
    assert memory.largest_micro_batch(memory.total(1, several=True) - 1) == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3 seconds"), (300, "5 minutes"), (9000, "2 hours"), (400_000, "4.6 days")]
)
def test_durations_with_units(seconds, text):
    assert format_duration(seconds) == text
