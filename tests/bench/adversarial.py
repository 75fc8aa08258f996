"""Whether an adversarial loss would pay: a trained VAE's decoder trained on with one, and as long without.

`python -m tests.bench.adversarial VAE [--unet RUN] [--weight W ...] [--seconds S] [--work FOLDER]` freezes the encoder,
so latents and U-Net stay as they are, and spends the same processor time on both: a step with a discriminator costs
more, so there are fewer of them. Then it prints, of the VAE as it was and of both, PSNR of images held out and how far
decoded photographs and, with a U-Net, samples are from photographs, as in docs/recipe.md.

The discriminator judges patches (Isola et al. 2017, arXiv:1611.07004) by the hinge loss, with spectral normalisation
(Miyato et al. 2018, arXiv:1802.05957). Its weight is adaptive, and it starts late, as in VQGAN (Esser et al. 2021,
arXiv:2012.09841, Eq. 6 and 7).
"""

import argparse
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lightdiff.checkpoint import Checkpoint, load_weights
from lightdiff.data.files import list_images
from lightdiff.data.images import frame, load_image, to_float, to_uint8
from lightdiff.models.vae import VAE, LatentTransform
from lightdiff.pictures import save_grid, save_png
from lightdiff.pipeline import Pipeline, load_vae
from lightdiff.runtime.processes import Processes, pick_device, pick_precision
from lightdiff.runtime.progress import console
from lightdiff.runtime.stage import Stage
from lightdiff.settings import TrainVAESettings, with_changes
from lightdiff.stages.train_vae import VAETask
from lightdiff.training.loop import Tensors, Trainer
from tests.bench.recipe import Work, left_out

WIDTHS = (3, 32, 64, 128)
SHOWN = (8, 3)  # columns and rows of the picture of each decoder
COUNT = 1000  # images a distance is measured with
TRIAL = 10  # steps that the time of a step is found by
T = TypeVar("T", bound=VAETask)
STARTS = 0.1  # share of the steps after which the decoder is told what the discriminator says


def discriminator() -> nn.Module:
    """Images (b, 3, h, w) -> how real each patch looks (b, 1, h/8, w/8)."""
    layers: list[nn.Module] = []
    for a, b in pairwise(WIDTHS):
        layers += [spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(WIDTHS[-1], 1, 3, padding=1)))


class AdversarialTask(VAETask):
    """A VAE whose loss has a discriminator's share, which learns beside it."""

    def oppose(self, weight: float, lr: float, starts_at: int) -> None:
        """Begin with a new discriminator."""
        self.weight, self.starts_at, self.calls = weight, starts_at, 0
        torch.manual_seed(self.settings.loop.seed)
        self.judge = discriminator()
        self.judge_optimizer = torch.optim.AdamW(self.judge.parameters(), lr, (0.5, 0.9), weight_decay=0)

    def loss(self, model: nn.Module, batch: Tensors) -> Tensors:
        """The VAE's loss plus the adversarial term; trains the discriminator by one step."""
        x = batch["x"]
        x_hat, posterior = model(x, batch["noise"], LatentTransform(4, 0))
        losses = self.vae_loss(x, x_hat, posterior)

        self.judge.requires_grad_(True)
        real, made = self.judge(x).float(), self.judge(x_hat.detach()).float()
        judged = (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2
        self.judge_optimizer.zero_grad(set_to_none=True)
        judged.backward()  # type: ignore[no-untyped-call]
        self.judge_optimizer.step()
        self.judge.requires_grad_(False)

        self.calls += 1
        if self.calls > self.starts_at:
            fooled = -self.judge(x_hat).float().mean()
            last = model.decoder.body[-1].weight  # type: ignore[index, union-attr]
            (by_error,) = torch.autograd.grad(losses["loss"], last, retain_graph=True)
            (by_judge,) = torch.autograd.grad(fooled, last, retain_graph=True)
            adaptive = (by_error.norm() / (by_judge.norm() + 1e-4)).clamp(max=1e4).detach()
            losses["loss"] = losses["loss"] + self.weight * adaptive * fooled
        return losses | {"judged": judged}


class Contest:
    """One trained VAE, and what becomes of its decoder."""

    def __init__(self, saved: Checkpoint, lr: float, scratch: Path) -> None:
        """Read settings and images once for all."""
        self.saved, self.device, self.scratch = saved, pick_device("cpu"), scratch
        settings = saved.settings(TrainVAESettings)
        precision = pick_precision("auto", self.device)
        loop = with_changes(settings.loop, lr=lr, workers=0, compile="off", precision=precision)
        images = with_changes(settings.images, max_bad=0.0)
        self.settings = with_changes(settings, loop=loop, images=images, init_from=saved.path, freeze_encoder=True)
        self.files = list_images(settings.images, console)

    def task(self, kind: type[T]) -> T:
        """A task that starts from the trained weights."""
        task = kind(Stage("vae", self.settings, self.device, Processes(), self.scratch), self.files)
        load_weights(task.model, self.saved, self.saved.weights_prefix())
        return task

    def train(self, task: VAETask, steps: int) -> tuple[VAE, float]:
        """The averaged network after `steps` steps, and the processor time they took."""
        task.stage.total_steps = steps
        trainer = Trainer(task, task.stage)
        began = time.process_time()
        for batch in task.batches(0, steps):
            losses = trainer.train_step(batch)
            if trainer.step % 100 == 0:
                said = ", ".join(f"{name} {float(value):.4f}" for name, value in losses.items())
                print(f"step {trainer.step}: {said}", flush=True)
        network: VAE = trainer.averaged  # type: ignore[assignment]
        return network.requires_grad_(False).eval(), time.process_time() - began


def judged(decode: Callable[[Tensor], Tensor], z: dict[str, Tensor], work: Work, home: Path) -> dict[str, float]:
    """How far from photographs decoded latents of each kind are; the images are kept."""
    found = {}
    for kind, latents in z.items():
        images = torch.cat([decode(part) for part in torch.split(latents, 50)])
        for i, image in enumerate(to_uint8(images)):
            save_png(home / kind / f"{i:05d}.png", image)
        save_grid(home / f"{kind}.png", images[: SHOWN[0] * SHOWN[1]], SHOWN[0])
        found[kind] = work.distance(home / kind, COUNT)
    return found


def main() -> None:
    """Train on both ways, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("vae", type=Path, help="checkpoint")
    parser.add_argument("--unet", type=Path, help="run folder of a U-Net on its latents")
    parser.add_argument("--seconds", type=float, default=300.0, help="of processor time, each")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the decoder")
    parser.add_argument("--judge-lr", type=float, default=5e-4, help="of the discriminator")
    parser.add_argument("--weight", type=float, nargs="+", default=[0.5], help="of the adversarial loss")
    parser.add_argument("--work", type=Path, default=Path("runs/recipe"), help="where images are kept")
    chosen = parser.parse_args()
    work = Work(chosen.work.absolute())
    saved = Checkpoint(chosen.vae, "vae")
    contest = Contest(saved, chosen.lr, work.home("adversarial"))

    plain, opposed = contest.task(VAETask), contest.task(AdversarialTask)
    opposed.oppose(chosen.weight[0], chosen.judge_lr, 0)
    turns = [[contest.train(task, TRIAL)[1] / TRIAL for task in (plain, opposed)] for _ in range(3)]
    costs = [median(turn[i] for turn in turns) for i in (0, 1)]
    steps = [int(chosen.seconds / cost) for cost in costs]
    print(f"a step takes {costs[0]:.3f} s, with a discriminator {costs[1]:.3f} s", flush=True)

    side = contest.settings.images.resolution
    x = torch.stack([to_float(frame(load_image(path), side)) for path in left_out(COUNT)])
    trained, _ = load_vae(saved, contest.device)
    with torch.inference_mode():
        z = {"decoded": torch.cat([trained.encoder(part).mu for part in torch.split(x, 50)])}
        if chosen.unet:
            pipeline = Pipeline.load(chosen.unet, vae=chosen.vae, precision="auto")
            parts = [pipeline.sample(range(i, i + 100)) for i in range(0, COUNT, 100)]
            z["samples"] = torch.cat(parts)

    arms: list[tuple[str, int, float | None]] = [("as it was", 0, None), ("trained on", steps[0], None)]
    arms += [(f"adversarial {weight:g}", steps[1], weight) for weight in chosen.weight]
    for name, count, weight in arms:
        if weight is None:
            task = contest.task(VAETask)
        else:
            task = contest.task(AdversarialTask)
            task.oppose(weight, chosen.judge_lr, int(STARTS * count))
        vae, seconds = contest.train(task, count)
        task.model = vae
        home = work.home("adversarial", chosen.vae, name, chosen.seconds, chosen.lr, chosen.judge_lr)
        with torch.inference_mode():
            distances = judged(vae.decoder, z, work, home)
        result = {"steps": count, "seconds": round(seconds), "psnr": round(task.validate(vae)["psnr"], 2), **distances}
        print(f"{name}: {result}", flush=True)


if __name__ == "__main__":
    main()
