"""What saving costs: bytes of a checkpoint, how long training waits for it, how much slower steps are meanwhile.

    nox -s saving                     # the original U-Net, 201 M parameters
    nox -s saving -- --preset tiny    # another one

Steps are those of `train-unet` on latents of 4 x 32 x 32; the share is that of the default --save-every.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F

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

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"loss": F.mse_loss(model(batch["x"], batch["t"]), batch["eps"])}


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
    parser.add_argument("--optimizer", default=LoopSettings().optimizer)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--saves", type=int, default=3)
    chosen = parser.parse_args()
    device = pick_device("auto")
    size = chosen.batch_size or (64 if device.type == "cuda" else 4)
    settings = UNetArchitecture.model_validate(preset_layer("unet", chosen.preset)["model"])
    precision = pick_precision("auto", device)
    loop = LoopSettings(batch_size=size, precision=precision, optimizer=chosen.optimizer)
    with tempfile.TemporaryDirectory(dir=".", prefix=".saving-") as name:
        metadata, whole = Metadata(stage="unet"), TrainUNetSettings(loop=loop)
        stage = Stage("unet", whole, device, Processes(), Path(name), metadata=metadata, total_steps=1000)
        stage.folder.checkpoints.mkdir()
        trainer = Trainer(Latents(settings.resolved(32), device, size), stage)  # type: ignore[arg-type]

        def step() -> float:
            return seconds(lambda: trainer.train_step(None), device)

        written = threading.Event()
        trainer.writer.on_written = written.set

        def save() -> float:
            trainer.writer.wait()
            written.clear()
            return seconds(lambda: trainer.save({}, keep_step=False, validated=True), device)

        step()
        trainer.writer.prepare(trainer.state())
        alone = [step() for _ in range(chosen.steps)]
        save()
        writing = seconds(trainer.writer.wait, device)
        waits, meanwhile = list[float](), list[float]()
        for _ in range(chosen.saves):
            waits.append(save())
            while not written.is_set():
                meanwhile.append(step())
        last = stage.folder.last
        verify = seconds(lambda: Checkpoint(last).verify(), device)
        restore = seconds(lambda: trainer.restore(Checkpoint(last).verify()), device)
        size_gb = last.stat().st_size / 1e9
    parameters = sum(p.numel() for p in trainer.model.parameters())
    share = f"{size_gb * 1e9 / parameters:.1f} bytes a parameter"
    slower = len(meanwhile) / chosen.saves * (fmean(meanwhile) - fmean(alone))
    lost = min(waits) + max(0.0, slower)
    print(f"{parameters / 1e6:.0f} M parameters, {device.type}, {precision}, batch {size}, {loop.optimizer}")
    print(f"training step            {fmean(alone):8.2f} s    {fmean(meanwhile):.2f} s while a save is written")
    print(f"a save of last and best  {min(waits) + writing:8.2f} s    last: {size_gb:.2f} GB ({share})")
    print(f"of it, training waits    {min(waits):8.2f} s")
    print(f"verify                   {verify:8.2f} s")
    print(f"verify + restore         {restore:8.2f} s")
    print(f"time lost by saving every {loop.save_every} steps: {lost / (lost + loop.save_every * fmean(alone)):.2%}")


if __name__ == "__main__":
    main()
