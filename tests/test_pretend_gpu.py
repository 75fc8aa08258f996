"""All stages on a GPU that is not there: no tensor on a wrong device, none on another process's GPU, few waits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from pretend_gpu import TESTED_WITH, PretendGPU
from torch import nn

from lightdiff.data.latents import async_copy
from lightdiff.extras.estimate import random_images, random_latents
from lightdiff.extras.gpu_memory import gpu_memory
from lightdiff.models.lpips import PerceptualLoss
from lightdiff.options import build, preset_layer
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.stage import Stage
from lightdiff.settings import TrainUNetSettings, TrainVAESettings, with_changes
from lightdiff.training.loop import Trainer
from tests.conftest import UNET_FLAGS, VAE_FLAGS, Result, call

pytestmark = [
    pytest.mark.skipif(not torch.__version__.startswith(TESTED_WITH), reason=f"made for torch {TESTED_WITH}"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]
RANKS = ((0, 1), (1, 8))  # rank, number of processes


class Alone(Processes):
    """One of several processes, the others of which are silent and agree with all that it says."""

    def run_on_main(self, work):
        return work()

    def fetch(self, find):
        return find()

    def check_same(self, what, value):
        pass

    def all_names(self, found):
        return list(found)

    def all_reduce_sum(self, value):
        return value

    def all_true(self, value):
        return value

    def all_reduce_max(self, *numbers, patient=False):
        return list(numbers)


@contextmanager
def process(rank: int, world_size: int) -> Iterator[PretendGPU]:
    """One of the processes of a machine with 8 GPUs."""

    @contextmanager
    def distributed(device: torch.device, timeout: float) -> Iterator[Processes]:
        yield Alone(rank, world_size)

    names = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    with (
        patch.dict("os.environ", {name: str(number) for name, number in names.items()} if world_size > 1 else {}),
        patch("lightdiff.runtime.stage.distributed", distributed),
        patch("lightdiff.training.loop.wrap_ddp", lambda model: model),
        PretendGPU(rank) as gpu,
    ):
        yield gpu


def on_gpu(flags: list[str], *more: object) -> list[object]:
    """A training's flags, for a GPU in bf16, its batch divisible among 8."""
    changed = {"cpu": "cuda", "fp32": "bf16", "6": "8"}
    return [*(changed.get(flag, flag) for flag in flags), "--val-every", 3, *more]


def right(result: Result, gpu: PretendGPU, rank: int) -> None:
    """A command that ended well and touched its own GPU alone."""
    assert result.code == 0, result.stderr
    assert gpu.used == {rank}


@pytest.mark.parametrize(("rank", "world_size"), RANKS)
@pytest.mark.parametrize("more", [[], ["--micro-batch", 4, "--optimizer", "adamw"]], ids=["muon", "micro-batches"])
def test_train_vae(tmp_path: Path, faces: Path, rank: int, world_size: int, more: list[object]) -> None:
    with process(rank, world_size) as gpu:
        result = call("train-vae", "--run", tmp_path / "run", "--data", faces, *on_gpu(VAE_FLAGS, *more))
    right(result, gpu, rank)


@pytest.mark.parametrize(("rank", "world_size"), RANKS)
def test_encode_and_scale(run: Path, rank: int, world_size: int) -> None:
    with process(rank, world_size) as gpu, patch("lightdiff.stages.encode.finish"):
        result = call("encode", "--run", run, "--restart", "--workers", 0, "--device", "cuda", "--shard-size", 4)
    right(result, gpu, rank)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "world_size"), RANKS)
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "mapped"])
@pytest.mark.parametrize(
    "more", [["--label", "class"], ["--micro-batch", 4, "--optimizer", "adamw"]], ids=["labels", "micro-batches"]
)
def test_train_unet(run: Path, rank: int, world_size: int, resident: bool, more: list[object]) -> None:
    share = 0.25 if resident else 0.0
    with process(rank, world_size) as gpu, patch("lightdiff.stages.train_unet.RESIDENT_SHARE", share):
        result = call("train-unet", "--run", run, "--restart", *on_gpu(UNET_FLAGS, *more))
    right(result, gpu, rank)


@pytest.mark.parametrize(
    ("rank", "world_size", "sampler"),
    [(0, 1, "dpm++2m"), *(pytest.param(1, 8, name, marks=pytest.mark.slow) for name in ("ddim", "ddpm", "heun"))],
)
def test_generate(run: Path, rank: int, world_size: int, sampler: str) -> None:
    with process(rank, world_size) as gpu:
        flags = ["--num-images", 9, "--num-steps", 3, "--sampler", sampler, "--device", "cuda", "--batch-size", 1]
        result = call("generate", "--run", run, "--out", run / "new", *flags)
    if world_size == 1:
        assert result.code == 0, result.stderr
    assert gpu.used == {rank}


def unet_trainer(**loop: object) -> tuple[Trainer, object]:
    """A training of the default U-Net for small latents, on the pretend GPU, and a batch."""
    sizes = {"batch_size": 8, "precision": "bf16", "compile": "off"} | loop
    s = TrainUNetSettings(loop=sizes, latent={"height": 8, "width": 8}).resolved()
    stage = Stage("unet", s, torch.device("cuda", 0), Processes(), Path(), total_steps=100)
    task, batch, _ = random_latents(stage)
    return Trainer(task, stage), batch


def vae_trainer(**loop: object) -> tuple[Trainer, object]:
    """The same of the default VAE at 64 px, without LPIPS; its batch lies in pinned memory."""
    sizes = {"batch_size": 8, "precision": "bf16", "compile": "off"} | loop
    s = TrainVAESettings(loop=sizes, loss={"lpips_gamma": 0}).resolved()
    stage = Stage("vae", s, torch.device("cuda", 0), Processes(), Path(), total_steps=100)
    task, batch, _ = random_images(stage)
    return Trainer(task, stage), batch.pin_memory()


@pytest.mark.parametrize("trainer_of", [unet_trainer, vae_trainer])
@pytest.mark.parametrize("loop", [{}, {"micro_batch": 4}, {"optimizer": "adamw"}, {"ema_decay": 0.0}])
def test_a_training_step_never_waits_for_the_device(trainer_of, loop: dict[str, object]) -> None:
    with PretendGPU() as gpu:
        trainer, batch = trainer_of(**loop)
        trainer.train_step(batch)  # makes the optimizers' state
        gpu.waits.clear()
        losses = trainer.train_step(batch)
        assert gpu.waits == []
        trainer.sync_metrics(losses)
        assert len(gpu.waits) == 2, "one for the numbers, one for the steps that were skipped"


@pytest.mark.parametrize("trainer_of", [unet_trainer, vae_trainer])
def test_feature_maps_stay_bf16_between_norms_and_convolutions(trainer_of) -> None:
    seen = set()

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.add((type(module).__name__, inputs[0].dtype, output.dtype))

    with PretendGPU():
        trainer, batch = trainer_of()
        for module in trainer.model.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                module.register_forward_hook(look)
        trainer.train_step(batch)
    assert {kinds[1:] for kinds in seen} == {(torch.bfloat16, torch.bfloat16)}


def step_memory(settings: TrainVAESettings | TrainUNetSettings, lpips: str = "") -> tuple[int, int]:
    """Bytes on the pretend GPU before a training step, without gradients, and at its peak."""
    name = "vae" if isinstance(settings, TrainVAESettings) else "unet"
    with PretendGPU() as gpu:
        stage = Stage(name, settings, torch.device("cuda", 0), Processes(), Path(), total_steps=100)
        task, batch = (random_images(stage) if name == "vae" else random_latents(stage))[:2]
        if lpips:
            distance = PerceptualLoss(lpips, None).to(stage.device)
            task.vae_loss.terms["lpips"] = lambda x, x_hat, posterior: distance(x_hat, x).mean()
        trainer = Trainer(task, stage)
        trainer.train_step(batch)  # makes the optimizers' state
        trainer.model.zero_grad()
        gpu.peak = before = gpu.live
        trainer.train_step(batch)
        return before, gpu.peak


@pytest.mark.parametrize(
    ("family", "preset", "side", "images", "loop", "lpips", "tolerance"),
    [
        ("vae", "small", 256, 4, {}, "", 0.15),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in [
                ("vae", "small", 256, 2, {}, "vgg", 0.15),
                ("vae", "base", 256, 4, {}, "", 0.15),
                ("unet", "small", 32, 32, {}, "", 0.15),
                ("unet", "base", 32, 32, {}, "", 0.15),
                ("unet", "small", 32, 16, {"micro_batch": 8}, "", 0.15),
                ("unet", "small", 16, 1, {"optimizer": "muon"}, "", 0.15),  # whose step takes more than the passes
                ("vae", "small", 256, 4, {"checkpoint_activations": True}, "", 0.2),
                ("unet", "small", 32, 32, {"checkpoint_activations": True}, "", 0.2),
            ]
        ),
    ],
)
def test_what_a_dry_run_tells_is_what_a_step_takes(
    family: str, preset: str, side: int, images: int, loop: dict[str, object], lpips: str, tolerance: float
) -> None:
    model = TrainVAESettings if family == "vae" else TrainUNetSettings
    loop = {"batch_size": images, "precision": "bf16", "compile": "off", "optimizer": "adamw"} | loop
    sizes = {"images": {"resolution": side}} if family == "vae" else {"latent": {"height": side, "width": side}}
    without = {"loss": {"lpips_gamma": 0}} if family == "vae" else {}
    settings = build(model, [preset_layer(family, preset), {"loop": loop}, sizes, without]).resolved()
    chosen = with_changes(settings, loss={"lpips_net": lpips}) if lpips else settings
    told = gpu_memory(chosen, "bf16")
    always, peak = step_memory(settings, lpips)
    expected = told.weights + told.optimizer + told.averaged + told.lpips
    assert expected == pytest.approx(always, rel=0.01)
    micro = settings.loop.micro
    assert told.tensors(micro, several=micro < images) - expected == pytest.approx(peak - always, rel=tolerance)


def test_live_storages_are_counted_once_and_while_they_live() -> None:
    with PretendGPU() as gpu:
        x = torch.zeros(1000, device="cuda")
        view, y = x.view(10, 100), x.bfloat16()
        assert (gpu.live, gpu.peak) == (6000, 6000)
        del x
        assert gpu.live == 6000, "a view keeps its storage"
        del view, y
        assert (gpu.live, gpu.peak) == (0, 6000)


def test_what_the_forward_pass_kept_goes_as_the_backward_pass_uses_it() -> None:
    with PretendGPU() as gpu:
        x = torch.zeros(1000, device="cuda", requires_grad=True)
        loss = x.exp().exp().exp().sum()
        gpu.peak = before = gpu.live
        assert before == 4 * 4000 + 4, "x, the three results, and the sum"
        loss.backward()
        assert gpu.live == 2 * 4000 + 4, "x, its gradient, the loss"
        assert gpu.peak < before + 2 * 4000 + 100, "a gradient arrives, a gradient leaves"


def test_what_waits_is_seen() -> None:
    with PretendGPU() as gpu:
        x, on_cpu, first = torch.ones(3, device="cuda:0"), torch.ones(3), torch.arange(2)
        waiting = [x.sum().item, x.tolist, x.cpu, torch.cuda.synchronize, lambda: on_cpu.to(x.device), lambda: x[first]]
        for wait in waiting:
            gpu.waits.clear()
            wait()
            assert len(gpu.waits) == 1
        gpu.waits.clear()
        on_cpu.pin_memory().to(x.device, non_blocking=True)
        x + 1
        assert gpu.waits == []


def test_mixed_devices_and_other_gpus_are_seen() -> None:
    with PretendGPU(rank=1) as gpu:
        x = torch.ones(3, device="cuda:1")
        assert gpu.used == {1}
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        torch.ones(3, device="cuda")
        assert gpu.used == {0, 1}, "without a number, it is that of a thread that has not set its own"


def test_copies_go_to_any_kind_of_device() -> None:
    assert async_copy(torch.ones(2), torch.device("meta")).device.type == "meta"
