"""What lightdiff is measured against: the original scripts' way of working, and diffusers'."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

Predict = Callable[[nn.Module, Tensor, Tensor], Tensor]
EMA_DECAY = 0.999


class DenoiserSteps:
    """Steps of noise prediction as the scripts and the examples do them: one tensor after the other, in float32.

    With `bf16` the forward pass is autocast, as `accelerate launch --mixed_precision bf16` has it.
    """

    def __init__(self, model: nn.Module, predict: Predict, shape: tuple[int, ...], device: torch.device, bf16: bool):
        self.model, self.predict, self.shape, self.device, self.bf16 = model.to(device), predict, shape, device, bf16
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
        self.averaged = [p.detach().clone() for p in model.parameters()]
        self.alpha_bar = torch.cos(torch.linspace(0, 1.5, 1000, device=device)).square()
        self.items = [torch.randn(shape[1:]) for _ in range(256)]  # unpickled: one small tensor each

    def step(self) -> None:
        batch = torch.stack([self.items[i] for i in torch.randint(len(self.items), (self.shape[0],)).tolist()])
        x0 = batch.to(self.device)
        noise = torch.randn_like(x0)
        t = torch.randint(1000, (len(x0),), device=self.device)
        a = self.alpha_bar[t][:, None, None, None]
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            answer = self.predict(self.model, x_t, t)
        loss = F.mse_loss(answer.float(), noise)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average()

    def average(self) -> None:
        with torch.no_grad():
            for kept, parameter in zip(self.averaged, self.model.parameters(), strict=True):
                kept.mul_(EMA_DECAY).add_(parameter, alpha=1 - EMA_DECAY)


class DiffusersSteps(DenoiserSteps):
    """The same with diffusers' own averaging, as its training example has it."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        from diffusers.training_utils import EMAModel

        self.ema = EMAModel(self.model.parameters(), decay=EMA_DECAY, use_ema_warmup=True, foreach=False)

    def average(self) -> None:
        self.ema.step(self.model.parameters())


def diffusers_unet(channels: tuple[int, ...], blocks: int, side: int) -> nn.Module:
    """UNet2DModel with attention at its lowest level, as in diffusers' example."""
    from diffusers import UNet2DModel

    levels = len(channels) - 1
    return UNet2DModel(
        sample_size=side,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=blocks,
        down_block_types=("DownBlock2D",) * levels + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * levels,
    )


def diffusers_vae(channels: tuple[int, ...], blocks: int) -> nn.Module:
    """AutoencoderKL without its attention's size limits."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=4,
        norm_num_groups=8,
    )


class VAESteps:
    """Steps of a VAE as the scripts do them: MSE + KL + LPIPS in float32, AdamW, nothing averaged."""

    def __init__(self, model: nn.Module, reconstruct: Callable[..., Any], x: Tensor, lpips: nn.Module | None):
        self.model, self.reconstruct, self.x, self.lpips = model.to(x.device), reconstruct, x, lpips
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)

    def step(self) -> None:
        x_hat, mu, logvar = self.reconstruct(self.model, self.x)
        loss = F.mse_loss(x_hat, self.x) + 1e-3 * 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()
        if self.lpips is not None:
            loss = loss + 0.5 * self.lpips(x_hat, self.x).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Photographs(Dataset[Tensor]):
    """A folder of images the scripts' way: opened by Pillow at full size, resized, cropped, mirrored, normalised."""

    def __init__(self, folder: Path, side: int, augment: bool):
        from torchvision import transforms as tv

        self.paths = sorted(folder.iterdir())
        normalise = [tv.ToTensor(), tv.Normalize([0.5] * 3, [0.5] * 3)]
        if augment:
            enlarged = side + side // 16
            self.transform = tv.Compose(
                [tv.Resize(enlarged), tv.RandomCrop(side), tv.RandomHorizontalFlip(), *normalise]
            )
        else:
            self.transform = tv.Compose([tv.Resize(side), tv.CenterCrop(side), *normalise])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            found: Tensor = self.transform(image.convert("RGB"))
        return found


def encode_all(vae: nn.Module, folder: Path, side: int, target: Path, batch: int = 32) -> None:
    """Encode the scripts' way: the whole VAE in float32, its reconstruction thrown away, tensors pickled one by one."""
    loader = DataLoader(Photographs(folder, side, augment=False), batch_size=batch, num_workers=0)
    mus: list[Tensor] = []
    logvars: list[Tensor] = []
    with torch.no_grad():
        for x in loader:
            posterior = vae.encoder(x)
            vae.decoder(posterior.sample(torch.randn_like(posterior.mu)))
            mus += [m.clone() for m in posterior.mu.cpu()]
            logvars += [v.clone() for v in posterior.logvar.cpu()]
    write_pickle(target, mus, logvars)


def write_pickle(target: Path, mus: list[Tensor], logvars: list[Tensor]) -> None:
    """The scripts' cache of latents."""
    with target.open("wb") as stream:
        pickle.dump({"mu": mus, "logvar": logvars}, stream)


def scaling_factor(source: Path) -> float:
    """1 / std over one draw of all latents, at once in memory."""
    with source.open("rb") as stream:
        cached = pickle.load(stream)
    z = torch.stack([m + torch.exp(0.5 * v) * torch.randn_like(m) for m, v in zip(*cached.values(), strict=True)])
    return 1 / z.std().item()
