"""A peer at its best: diffusers' AutoencoderKL and UNet2DModel, trained for some processor time, and drawn from.

`python -m tests.bench.tuned FOLDER --data IMAGES --resolution R --vae-seconds S --unet-seconds S --samples N
--lpips-weights FILE` writes both networks, the samples and `result.json` to the folder. What docs/recipe.md found to
help and diffusers' parts allow, the peer has too: the VAE's loss and its weights, training on mu, rectified flow with
logit-normal levels, a shift and a scale for each channel, bf16 where it is faster, AdamW with warm-up, clipping and a
cosine to 0, averaged weights warmed up. Networks, averaging, density of levels and Euler's 50 steps are diffusers', and
so are the blocks a level: one in the VAE, two in the U-Net. Images are read, cropped, mirrored and ordered by
lightdiff, so that both see the same ones at the same cost.

A training ends with the step in which its processor time is spent, and its learning rate follows that time: no short
run has to tell how many steps it buys. Encoding, validation and drawing are not in the budget. It needs
`pip install diffusers`.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightdiff.data.files import list_images
from lightdiff.data.images import to_float, to_uint8
from lightdiff.data.latents import Scaling
from lightdiff.data.layouts import Split
from lightdiff.data.loading import ImageDataset, load_batches
from lightdiff.data.order import Order
from lightdiff.losses import VAELoss, psnr
from lightdiff.models.vae import Posterior
from lightdiff.pictures import save_grid, save_pairs, save_png
from lightdiff.runtime.processes import autocast, pick_precision
from lightdiff.runtime.progress import console
from lightdiff.settings import ImageSettings, LoopSettings, Size, TrainUNetSettings, TrainVAESettings, VAELossSettings
from tests.bench.peers import diffusers_unet, diffusers_vae

VAE_WIDTHS, VAE_BLOCKS = (32, 64, 96), 1
UNET_WIDTHS, UNET_BLOCKS = (64, 128, 192), 2
LR, WARMUP, EMA_DECAY = 1e-3, 100, 0.9999
EULER_STEPS = 50
AT_A_TIME = 100  # images that are encoded or drawn
LOOP: LoopSettings = TrainUNetSettings().loop  # batch, beta2, weight decay and clipping are those of lightdiff
DEVICE = torch.device("cpu")
Loss = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Spent:
    """What a training took, and its mean loss after each tenth of the time."""

    steps: int
    images: int
    seconds: float
    losses: list[float]


def train(
    model: nn.Module,
    batches: Iterator[Tensor],
    loss: Loss,
    seconds: float,
    clock: Callable[[], float] = time.process_time,
) -> Spent:
    """Train until `seconds` have passed by the clock, and leave the averaged weights in the model."""
    from diffusers.training_utils import EMAModel

    began, precision = clock(), pick_precision("auto", DEVICE)
    betas = (0.9, LOOP.beta2)
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas, weight_decay=LOOP.weight_decay, fused=True)
    ema = EMAModel(model.parameters(), EMA_DECAY, use_ema_warmup=True, power=3 / 4, foreach=True)
    images, found = 0, list[tuple[float, float]]()
    for x in batches:
        share = (clock() - began) / seconds
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (len(found) + 1) / WARMUP) * (1 + math.cos(math.pi * share)) / 2
        with autocast(DEVICE, precision):
            value = loss(model, x)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), LOOP.clip)
        optimizer.step()
        ema.step(model.parameters())
        images += len(x)
        found.append((share, value.item()))
    ema.copy_to(model.parameters())
    tenths = [[value for share, value in found if int(10 * share) == tenth] for tenth in range(10)]
    means = [round(sum(values) / len(values), 4) for values in tenths if values]
    return Spent(len(found), images, clock() - began, means)


# --- VAE ----------------------------------------------------------------------------------------------------------


class Photographs:
    """Images as lightdiff reads them: framed, in its splits; those to train on cropped, mirrored and in its order."""

    def __init__(self, folder: Path, side: int, seed: int) -> None:
        """List the images."""
        self.settings, self.seed = ImageSettings(data=(folder,), resolution=Size(side, side)), seed
        self.files = list_images(self.settings, console)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Batches to train on, without end."""
        images = self._images("train", train=True)
        order = Order(len(images), self.seed)
        loaded = load_batches(images, (order.batch_at(i * size, size) for i in count()), workers=0)
        return (to_float(batch.x) for batch in loaded)

    def whole(self, split: Split) -> Iterator[Tensor]:
        """Every image of a split once, as it is."""
        images = self._images(split, train=False)
        parts = torch.arange(len(images)).split(AT_A_TIME)
        return (to_float(batch.x) for batch in load_batches(images, [[(0, i) for i in p.tolist()] for p in parts], 0))

    def _images(self, split: Split, train: bool) -> ImageDataset:
        return ImageDataset(self.files.of_split(split), self.settings, self.seed, train=train)


def vae_loss(criterion: VAELoss, model: nn.Module, x: Tensor) -> Tensor:
    """Lightdiff's loss of a VAE of diffusers."""
    x_hat, posterior = reconstructed(model, x)
    return criterion(x, x_hat, posterior)["loss"]


def reconstructed(model: Any, x: Tensor) -> tuple[Tensor, Posterior]:
    """Reconstructions from a draw of the posterior, and that."""
    found = model.encode(x).latent_dist
    x_hat = model.decode(found.sample()).sample
    return x_hat.float(), Posterior(found.mean.float(), found.logvar.float())


@torch.inference_mode()
def held_out_psnr(model: nn.Module, images: Iterator[Tensor]) -> float:
    """Mean PSNR (dB) as lightdiff's validation has it: of draws of the posterior."""
    precision = pick_precision("auto", DEVICE)
    with autocast(DEVICE, precision):
        return float(torch.cat([psnr(x, reconstructed(model, x)[0]) for x in images]).mean())


@torch.inference_mode()
def encode(model: Any, images: Iterator[Tensor]) -> Tensor:
    """Mu of every image and of its mirror image, (n, 2, c, h, w)."""
    with autocast(DEVICE, pick_precision("auto", DEVICE)):
        pairs = [[model.encode(side).latent_dist.mean.float() for side in (x, x.flip(3))] for x in images]
    return torch.cat([torch.stack(pair, 1) for pair in pairs])


# --- U-Net --------------------------------------------------------------------------------------------------------


def latent_batches(x0: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches of clean latents (n, 2, c, h, w), each item once an epoch, half of them mirrored."""
    order = Order(len(x0), seed)
    for i in count():
        items = torch.tensor([item for _, item in order.batch_at(i * size, size)])
        yield x0[items, torch.randint(2, (size,))]


def flow_loss(model: nn.Module, x0: Tensor) -> Tensor:
    """Mean squared error of the velocity eps - x0 at logit-normal levels (Esser et al. 2024, arXiv:2403.03206)."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    eps = torch.randn_like(x0)
    sigma = compute_density_for_timestep_sampling("logit_normal", len(x0), 0.0, 1.0)
    x_t = x0 + sigma[:, None, None, None] * (eps - x0)
    return F.mse_loss(model(x_t, 1000 * sigma).sample.float(), eps - x0)


@torch.inference_mode()
def draw(model: nn.Module, noise: Tensor) -> Tensor:
    """Clean latents from noise, by Euler's method."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(EULER_STEPS)
    x = noise
    for t in scheduler.timesteps:
        with autocast(DEVICE, pick_precision("auto", DEVICE)):
            velocity = model(x, t.expand(len(x))).sample
        x = scheduler.step(velocity.float(), t, x).prev_sample
    return x


# --- both ---------------------------------------------------------------------------------------------------------


def run(
    home: Path, data: Path, side: int, loss: VAELossSettings, seconds: tuple[float, float], samples: int, seed: int
) -> dict[str, Any]:
    """Train both networks for these seconds, draw, and return what the row says of it."""
    torch.manual_seed(seed)
    images, batch = Photographs(data, side, seed), TrainVAESettings().loop.batch_size
    vae: Any = diffusers_vae(VAE_WIDTHS, VAE_BLOCKS)
    vae_spent = train(vae, images.batches(batch), partial(vae_loss, VAELoss(loss)), seconds[0])
    vae.eval().save_pretrained(home / "vae")
    print(vae_spent, flush=True)
    x = next(images.whole("val"))[:16]
    with torch.inference_mode():
        save_pairs(home / "reconstructions.png", x, vae(x).sample, 8)
    accuracy = held_out_psnr(vae, images.whole("val"))

    mu = encode(vae, images.whole("train"))
    std, mean = torch.std_mean(mu, (0, 1, 3, 4))
    scaling = Scaling(mean, 1 / std)
    unet: Any = diffusers_unet(UNET_WIDTHS, UNET_BLOCKS, mu.shape[-1])
    unet_spent = train(unet, latent_batches(scaling.to_x0(mu), LOOP.batch_size, seed), flow_loss, seconds[1])
    unet.eval().save_pretrained(home / "unet")
    print(unet_spent, flush=True)

    drawn = []
    for start in range(0, samples, AT_A_TIME):
        z = scaling.to_z(draw(unet, torch.randn(min(AT_A_TIME, samples - start), *mu.shape[2:])))
        with torch.inference_mode(), autocast(DEVICE, pick_precision("auto", DEVICE)):
            drawn.append(vae.decode(z).sample.float())
    pictures = torch.cat(drawn)
    save_grid(home / "grid.png", pictures[:64], 8)
    for i, picture in enumerate(to_uint8(pictures)):
        save_png(home / "images" / f"{i:05d}.png", picture)
    row: dict[str, Any] = {"psnr": round(accuracy, 2)}
    for name, network, spent in (("vae", vae, vae_spent), ("unet", unet, unet_spent)):
        row |= {f"{name}_parameters": sum(p.numel() for p in network.parameters()), f"{name}_losses": spent.losses}
        row |= {f"{name}_steps": spent.steps, f"{name}_images": spent.images, f"{name}_cpu": round(spent.seconds)}
    return row


def main() -> None:
    """Train, draw and write down what was spent."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("home", type=Path, metavar="FOLDER")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--vae-seconds", type=float, required=True)
    parser.add_argument("--unet-seconds", type=float, required=True)
    parser.add_argument("--lpips-weights", type=Path, required=True, help="of SqueezeNet")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    loss = VAELossSettings(lpips_net="squeeze", lpips_weights=chosen.lpips_weights)
    seconds = (chosen.vae_seconds, chosen.unet_seconds)
    row = run(chosen.home, chosen.data, chosen.resolution, loss, seconds, chosen.samples, chosen.seed)
    (chosen.home / "result.json").write_text(json.dumps(row))


if __name__ == "__main__":
    main()
