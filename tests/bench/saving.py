"""What saving costs: bytes of a checkpoint, and seconds to save it and to resume from it, beside a training step.

    nox -s saving                     # the original U-Net, 201 M parameters
    nox -s saving -- --preset tiny    # another one

Steps are those of `train-unet` on latents of 4 x 32 x 32; the share is that of the default --save-every.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from lightdiff import checkpoint
from lightdiff.checkpoint import Checkpoint, Metadata
from lightdiff.models.unet import build_unet
from lightdiff.options import preset_layer
from lightdiff.runtime.processes import Processes, pick_device, pick_precision, to_device
from lightdiff.runtime.stage import Stage
from lightdiff.settings import LoopSettings, TrainUNetSettings, UNetArchitecture
from lightdiff.training.loop import Trainer


class Latents:
    """The part of train-unet's task that a step needs, on random latents."""

    def __init__(self, model: UNetArchitecture, device: torch.device, size: int) -> None:
        self.device, self.size = device, size
        self.model = build_unet(model, 4)
        to_device(self.model, device)

    def prepare(self, batch: object, rng: torch.Generator) -> dict[str, torch.Tensor]:
        x, eps = (torch.randn(self.size, 4, 32, 32, generator=rng, device=self.device) for _ in range(2))
        return {"x": x, "t": torch.randint(1000, (self.size,), generator=rng, device=self.device), "eps": eps}

    def loss(self, model: torch.nn.Module, part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"loss": F.mse_loss(model(part["x"], part["t"]), part["eps"])}


def seconds(what: Callable[[], object], device: torch.device) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    what()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="original")
    parser.add_argument("--batch-size", type=int, default=0, help="default: 64 on a GPU, 4 on a CPU")
    parser.add_argument("--steps", type=int, default=3)
    chosen = parser.parse_args()
    device = pick_device("auto")
    size = chosen.batch_size or (64 if device.type == "cuda" else 4)
    settings = UNetArchitecture.model_validate(preset_layer("unet", chosen.preset)["model"])
    precision = pick_precision("auto", device)
    loop = LoopSettings(batch_size=size, precision=precision)
    stage = Stage("unet", TrainUNetSettings(loop=loop), device, Processes(), Path(), total_steps=1000)
    trainer = Trainer(Latents(settings.resolved(32), device, size), stage)  # type: ignore[arg-type]
    step = min(seconds(lambda: trainer.train_step(None), device) for _ in range(chosen.steps))
    with tempfile.TemporaryDirectory(dir=".", prefix=".saving-") as folder:
        path = Path(folder) / "last.safetensors"
        save = min(
            seconds(lambda: checkpoint.save(path, trainer.state(resumable=True), Metadata(stage="unet")), device)
            for _ in range(2)
        )
        verify = seconds(lambda: Checkpoint(path).verify(), device)
        restore = seconds(lambda: trainer.restore(Checkpoint(path).verify()), device)
        size_gb = path.stat().st_size / 1e9
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{parameters / 1e6:.0f} M parameters, {device.type}, {precision}, batch {size}")
    print(f"training step     {step:8.2f} s")
    print(f"save              {save:8.2f} s    {size_gb:.2f} GB ({size_gb * 1e9 / parameters:.1f} bytes a parameter)")
    print(f"verify            {verify:8.2f} s")
    print(f"verify + restore  {restore:8.2f} s")
    print(f"time lost by saving every {loop.save_every} steps: {save / (save + loop.save_every * step):.2%}")


if __name__ == "__main__":
    main()
