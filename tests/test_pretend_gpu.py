"""All stages on a GPU that is not there: no tensor on a wrong device, none on another process's GPU, few waits."""

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from pretend_gpu import TESTED_WITH, PretendGPU
from torch import nn

from lightdiff.data.latents import async_copy
from lightdiff.extras.estimate import random_images, random_latents
from lightdiff.extras.gpu_memory import gpu_memory
from lightdiff.models.lpips import PerceptualLoss
from lightdiff.models.unet import build_unet
from lightdiff.models.vae import build_vae
from lightdiff.options import build, preset_layer
from lightdiff.runtime.processes import Processes, autocast, pick_device, to_device
from lightdiff.runtime.stage import Stage
from lightdiff.settings import LoopSettings, StageSettings, TrainUNetSettings, TrainVAESettings, with_changes
from lightdiff.training.loop import Trainer
from lightdiff.training.optimizers import Muon, muon_params
from tests.bench.cases import random_squeezenet
from tests.conftest import UNET_FLAGS, VAE_FLAGS, Result, call, succeed

pytestmark = [
    pytest.mark.skipif(not torch.__version__.startswith(TESTED_WITH), reason=f"made for torch {TESTED_WITH}"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]
RANKS = ((0, 1), (1, 8))  # rank, number of processes


@contextmanager
def process(rank: int, world_size: int) -> Iterator[PretendGPU]:
    """One of the processes of a machine with 8 GPUs."""

    @contextmanager
    def distributed(device: torch.device, settings: StageSettings) -> Iterator[Processes]:
        yield Processes(rank, world_size)  # which exchanges nothing

    names = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    with (
        patch.dict("os.environ", {name: str(number) for name, number in names.items()} if world_size > 1 else {}),
        patch("lightdiff.extras.several.group.distributed", distributed),
        patch("lightdiff.extras.several.worker.fail", lambda error, tell: None),  # which would end this process
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


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "world_size"), RANKS)
def test_train_vae_with_lpips(tmp_path: Path, faces: Path, rank: int, world_size: int) -> None:
    lpips = ["--lpips-gamma", 0.1, "--lpips-net", "squeeze", "--lpips-weights", random_squeezenet(tmp_path)]
    with process(rank, world_size) as gpu:
        result = call("train-vae", "--run", tmp_path / "run", "--data", faces, *on_gpu(VAE_FLAGS, *lpips))
    right(result, gpu, rank)


def waits(gpu: PretendGPU) -> Counter[str]:
    """What has waited, by file, but for weights on their way to the GPU."""
    return Counter(re.sub(r":\d+$", "", what) for what in gpu.waits if "processes.py" not in what)


@pytest.mark.parametrize(("rank", "world_size"), RANKS)
def test_encode_and_scale(run: Path, rank: int, world_size: int) -> None:
    flags = ["--restart", "--workers", 0, "--device", "cuda", "--shard-size", 4, "--batch-size", 2]
    with process(rank, world_size) as gpu, patch("lightdiff.stages.encode.finish"):
        result = call("encode", "--run", run, *flags)
    right(result, gpu, rank)
    batches = 2 * 6 if world_size == 1 else 2  # 24 images make 6 shards, dealt out
    assert waits(gpu) == {"a copy to cpu at encode.py": batches}, "the latents, once a batch"


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


@pytest.fixture(scope="module")
def labelled(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose U-Net knows classes. Not to be written to."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("labelled") / "run"))
    succeed("train-unet", "--run", run, *UNET_FLAGS, "--label", "class", "--restart")
    return run


SCALING = {"a copy to cuda at latents.py": 2}  # the latents' shift and scale
DRAWING = {  # command -> what waits beside a copy of the images, once a batch
    "generate --sampler dpm++2m": SCALING,
    "generate --sampler ddim": SCALING,
    "generate --sampler ddpm": SCALING,
    "generate --sampler heun": SCALING,
    "generate --class glasses --guidance 3": SCALING,
    "edit --from FACE": SCALING | {"a copy to cuda at pipeline.py": 1},
    "edit --from FACE --mask MASK": SCALING | {"a copy to cuda at pipeline.py": 1, "a copy to cuda at edit.py": 1},
    "walk --between 0,1 --frames 9": SCALING,
}


@pytest.mark.parametrize("command", DRAWING)
@pytest.mark.parametrize(("rank", "world_size"), [RANKS[0], pytest.param(*RANKS[1], marks=pytest.mark.slow)])
def test_drawing_waits_once_a_batch(
    labelled: Path, faces: Path, tmp_path: Path, command: str, rank: int, world_size: int
) -> None:
    Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
    face = sorted(faces.rglob("*.png"))[0]
    words = command.replace("FACE", str(face)).replace("MASK", str(tmp_path / "mask.png")).split()
    count = [] if words[0] == "walk" else ["--num-images", 9]
    flags = ["--num-steps", 3, "--device", "cuda", "--batch-size", 3 if world_size == 1 else 1]
    with process(rank, world_size) as gpu:
        result = call(*words, "--run", labelled, "--out", tmp_path / "new", *count, *flags)
    if world_size == 1:  # else the others' images are missing in the end
        assert result.code == 0, result.stderr
    assert gpu.used == {rank}
    drawn = sorted(path.name for path in (tmp_path / "new").glob("0*.png"))
    assert drawn == [f"{i:05d}.png" for i in (range(9) if world_size == 1 else [rank])]
    assert waits(gpu) == DRAWING[command] | {"a copy to cpu at pipeline.py": 3 if world_size == 1 else 1}


def settings_of(family: str, preset: str, side: int, **loop: object) -> TrainVAESettings | TrainUNetSettings:
    """A training's settings in bf16, without LPIPS, for images or latents of this side."""
    model = TrainVAESettings if family == "vae" else TrainUNetSettings
    sizes = {"images": {"resolution": side}} if family == "vae" else {"latent": {"height": side, "width": side}}
    without = {"loss": {"lpips_gamma": 0}} if family == "vae" else {}
    layers = [preset_layer(family, preset), sizes, without, {"loop": {"precision": "bf16", "compile": "off"} | loop}]
    return build(model, layers).resolved()


def trainer_of(settings: TrainVAESettings | TrainUNetSettings) -> tuple[Trainer, object]:
    """A training on the pretend GPU, and a batch."""
    family, random_batch = (
        ("vae", random_images) if isinstance(settings, TrainVAESettings) else ("unet", random_latents)
    )
    stage = Stage(family, settings, torch.device("cuda", 0), Processes(), Path(), total_steps=100)
    task, batch = random_batch(stage)[:2]
    return Trainer(task, stage), batch.pin_memory() if family == "vae" else batch


@pytest.mark.parametrize(("family", "side"), [("unet", 8), ("vae", 64)])
@pytest.mark.parametrize("loop", [{}, {"micro_batch": 4}, {"optimizer": "adamw"}, {"ema_decay": ()}])
def test_a_training_step_never_waits_for_the_device(family: str, side: int, loop: dict[str, object]) -> None:
    with PretendGPU() as gpu:
        trainer, batch = trainer_of(settings_of(family, "small", side, **({"batch_size": 8} | loop)))
        trainer.train_step(batch)  # makes the optimizers' state
        gpu.waits.clear()
        losses = trainer.train_step(batch)
        assert gpu.waits == []
        trainer.sync_metrics(losses)
        assert len(gpu.waits) == 2, "one for the numbers, one for the steps that were skipped"


@pytest.mark.parametrize(("family", "side"), [("unet", 8), ("vae", 64)])
def test_feature_maps_stay_bf16_between_norms_and_convolutions(family: str, side: int) -> None:
    seen = set()

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.add((type(module).__name__, inputs[0].dtype, output.dtype))

    with PretendGPU():
        trainer, batch = trainer_of(settings_of(family, "small", side, batch_size=8))
        for module in trainer.model.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                module.register_forward_hook(look)
        trainer.train_step(batch)
    assert {kinds[1:] for kinds in seen} == {(torch.bfloat16, torch.bfloat16)}


KERNELS = {  # operations that a training step launches on a GPU; a call on many tensors is one. They may only fall
    ("vae", 64): {"forward and backward": 404, "clipping": 8, "optimizers": 113, "EMA": 1},
    ("unet", 16): {"forward and backward": 923, "clipping": 8, "optimizers": 126, "EMA": 1},
}
SLACK = 0.05  # a bound further than this above its figure is to be lowered


@pytest.mark.slow
@pytest.mark.parametrize(("family", "side"), KERNELS)
def test_a_training_step_launches_few_operations(family: str, side: int) -> None:
    with PretendGPU() as gpu:
        trainer, batch = trainer_of(settings_of(family, "small", side, batch_size=2))
        trainer.train_step(batch)  # makes the optimizers' state
        trainer.model.zero_grad()
        whole = trainer.task.prepare(batch, torch.Generator())
        launched: dict[str, Counter[str]] = {}
        with gpu.counted() as launched["forward and backward"]:
            with autocast(trainer.stage.device, "bf16"):
                losses = trainer.task.loss(trainer.network, whole)
            losses["loss"].backward()
        with gpu.counted() as launched["clipping"]:
            norm = nn.utils.clip_grad_norm_(trainer.trained.values(), 1.0)
        finite = norm.isfinite()
        with gpu.counted() as launched["optimizers"]:
            trainer._update(finite)
        with gpu.counted() as launched["EMA"]:
            for ema in trainer.emas:
                ema.update(trainer.model, trainer.step)
    for part, bound in KERNELS[family, side].items():
        count = launched[part].total()
        assert count <= bound, f"{part}: {count}, at most {bound} allowed: {launched[part].most_common(20)}"
        assert count >= bound * (1 - SLACK), f"{part}: {count}, well below {bound}: lower the bound"


def step_memory(settings: TrainVAESettings | TrainUNetSettings, lpips: str = "") -> tuple[int, int]:
    """Bytes on the pretend GPU before a training step, without gradients, and at its peak."""
    with PretendGPU() as gpu:
        trainer, batch = trainer_of(settings)
        if lpips:
            distance = PerceptualLoss(lpips, None).to(trainer.stage.device)
            trainer.task.vae_loss.terms["lpips"] = lambda x, x_hat, posterior: distance(x_hat, x).mean()
        trainer.train_step(batch)  # makes the optimizers' state
        trainer.model.zero_grad()
        gpu.peak = before = gpu.live
        trainer.train_step(batch)
        return before, gpu.peak


@pytest.mark.parametrize(
    ("family", "preset", "side", "images", "loop", "lpips"),
    [
        ("vae", "small", 256, 4, {}, ""),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in [
                ("vae", "small", 256, 2, {}, "vgg"),
                ("vae", "base", 256, 4, {}, ""),
                ("unet", "small", 32, 32, {}, ""),
                ("unet", "base", 32, 32, {}, ""),
                ("unet", "small", 32, 16, {"micro_batch": 8}, ""),
                ("unet", "small", 16, 1, {"optimizer": "muon"}, ""),  # whose step takes more than the passes
                ("vae", "small", 256, 4, {"checkpoint_activations": True}, ""),
                ("unet", "small", 32, 32, {"checkpoint_activations": True}, ""),
            ]
        ),
    ],
)
def test_what_a_dry_run_tells_is_what_a_step_takes(
    family: str, preset: str, side: int, images: int, loop: dict[str, object], lpips: str
) -> None:
    settings = settings_of(family, preset, side, **({"batch_size": images, "optimizer": "adamw"} | loop))
    chosen = with_changes(settings, loss={"lpips_net": lpips}) if lpips else settings
    told = gpu_memory(chosen, "bf16")
    always, peak = step_memory(settings, lpips)
    expected = told.weights + told.optimizer + told.averaged + told.lpips
    assert expected == pytest.approx(always, rel=0.01)
    micro = settings.loop.micro
    assert told.tensors(micro, several=micro < images) - expected == pytest.approx(peak - always, rel=0.15)


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


def test_on_a_gpu_convolutions_are_channels_last_chosen_by_trial_and_without_tf32(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with PretendGPU():
        to_device(network := nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)), pick_device("cuda"))
    # 1 x 1, too, as their gradients are where images are: DDP warns where strides differ, even of a size of 1
    assert [layer.weight.stride() for layer in network] == [(27, 1, 9, 3), (8, 1, 8, 8)]
    assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_saving_waits_for_the_device_once() -> None:
    with PretendGPU() as gpu:
        trainer, batch = trainer_of(settings_of("unet", "small", 8, batch_size=8))
        trainer.train_step(batch)
        gpu.waits.clear()
        trainer.writer.start(trainer.state(), lambda copies: None)
        trainer.writer.wait()
        assert len(gpu.waits) == 1


MUON_LAUNCHES = {  # a step of Muon; these figures may only fall
    "vae-small": 105,
    "vae-base": 117,
    "vae-original": 111,
    "unet-small": 119,
    "unet-base": 119,
    "unet-original": 143,
}


@pytest.mark.parametrize("preset", MUON_LAUNCHES)
def test_launches_of_muon(preset: str) -> None:
    network, name = preset.split("-")
    settings = TrainVAESettings if network == "vae" else TrainUNetSettings
    model = settings.model_validate({"model": preset_layer(network, name)["model"]}).resolved().model
    with torch.device("meta"):
        built = build_vae(model) if network == "vae" else build_unet(model, 4)
    with PretendGPU() as gpu:
        weights = [torch.zeros(p.shape, device="cuda:0") for p in muon_params(built, LoopSettings())]
        muon = Muon(weights, {"lr": 1e-3, "weight_decay": 0.01, "tf32": True})
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        muon.found_inf = torch.zeros((), device="cuda:0")
        muon.init_state()
        gpu.waits.clear()
        with gpu.counted() as launches:
            muon.step()
        assert sum(launches.values()) <= MUON_LAUNCHES[preset]
        assert gpu.waits == []


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
