"""What a training holds on a GPU, worked out from shapes alone: it takes neither a GPU nor memory.

torch's FakeTensorMode stands in for the GPU. Its tensors have a shape, a dtype and the device cuda, but no numbers, and
autocast treats them as it treats CUDA's: convolutions and matrix products in bf16, norms and losses in float32.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightdiff.extras.tables import print_table
from lightdiff.losses import VAELoss
from lightdiff.models.unet import build_unet
from lightdiff.models.vae import build_vae
from lightdiff.runtime.progress import SafeConsole
from lightdiff.settings import LPIPSNet, TrainUNetSettings, TrainVAESettings, VAELossSettings
from lightdiff.training.optimizers import optimizer_state_bytes

CARDS = (8, 24, 80, 141)  # GB
GRADIENTS = 3  # of an activation, that the backward pass has at a time: the one it is given, its own, a copy
RESERVED = 1e9  # bytes: CUDA's context, the workspaces of cuDNN and cuBLAS
UNUSED = 0.1  # of activations, on top: gaps between the allocator's blocks, or in the pool of CUDA graphs
MOST_IMAGES = 1 << 20

Forward = Callable[[int], Tensor]
"""Number of images -> their loss."""


@dataclass(frozen=True)
class GPUMemory:
    """Bytes that a training takes on a GPU."""

    weights: int
    gradients: int
    optimizer: int
    averaged: int
    lpips: int  # the weights of its network
    copies: int  # of weights, in bf16
    image: int  # activations of one image, and its gradients on the way back

    def tensors(self, images: int, several: bool) -> int:
        """Peak bytes of all tensors in a step of one micro-batch of so many images, or of several.

        On the way back, gradients of weights take the room that activations leave, unless those of an earlier
        micro-batch are there already. Muon's step needs twice as much again as its gradients, AdamW's nothing.
        """
        always = self.weights + self.optimizer + self.averaged + self.lpips
        by_muon = 2 * self.gradients - self.optimizer  # of the gradients: it keeps one average, AdamW two
        step = self.gradients + 2 * by_muon
        return always + max(self.copies + images * self.image + several * self.gradients, step)

    def total(self, images: int, several: bool) -> float:
        """The same with what is no tensor, which is assumed and not measured."""
        return self.tensors(images, several) + UNUSED * images * self.image + RESERVED

    def largest_micro_batch(self, card: float) -> int:
        """How many images a micro-batch may have at most, one of several, on a GPU of so many bytes; 0: not one."""
        return bisect_right(range(1, MOST_IMAGES), card, key=lambda images: self.total(images, several=True))

    def show(self, console: SafeConsole, micro: int, several: bool, precision: str) -> None:
        """Print what a step takes, and the largest micro-batch for each of CARDS."""
        parts = {
            "weights": self.weights,
            "their gradients": self.gradients,
            "optimizer": self.optimizer,
            "EMA": self.averaged,
            "LPIPS": self.lpips,
            "weights in bf16": self.copies,
        }
        console.print(
            f"memory of a GPU in {precision}, with micro-batches of {micro}: {self.total(micro, several) / 1e9:.3g} GB",
            f"  {', '.join(f'{name} {size / 1e6:.0f} MB' for name, size in parts.items() if size)}",
            f"  activations: {micro * self.image / 1e6:.0f} MB, {self.image / 1e6:.4g} MB an image; gradients take the "
            "room that they leave",
            f"  assumed: {RESERVED / 1e9:g} GB for CUDA and its libraries; {UNUSED:.0%} more for activations, which "
            "the allocator, or the pool of compiled graphs, leaves unused",
            sep="\n",
            soft_wrap=True,
        )
        table = Table("GPU", "largest --micro-batch")
        for size in CARDS:
            table.add_row(f"{size} GB", str(self.largest_micro_batch(size * 1e9) or "none"))
        print_table(console, table)


def gpu_memory(settings: TrainVAESettings | TrainUNetSettings, precision: str) -> GPUMemory:
    """What a training with these resolved settings takes, in fp32 or bf16."""
    loop = settings.loop
    with FakeTensorMode(), torch.device("cuda"):
        lpips: nn.Module | None = None
        if isinstance(settings, TrainVAESettings):
            lpips = lpips_network(settings.loss.lpips_net) if settings.loss.lpips_gamma else None
            model, forward = vae_pass(settings, lpips)
        else:
            model, forward = unet_pass(settings)
        with cuda_autocast() if precision == "bf16" else nullcontext():
            one, two = (held(model, partial(forward, images), loop.checkpoint_activations) for images in (1, 2))
        weights = sum(p.nbytes for p in model.parameters())
        return GPUMemory(
            weights=weights,
            gradients=sum(p.nbytes for p in model.parameters() if p.requires_grad),
            optimizer=optimizer_state_bytes(model, loop),
            averaged=weights * len(loop.ema_decay),
            lpips=sum(p.nbytes for p in lpips.parameters()) if lpips else 0,
            copies=2 * one - two,
            image=two - one,
        )


def lpips_network(net: LPIPSNet) -> nn.Module:
    """LPIPS without its weights."""
    from lightdiff.models.lpips import PerceptualLoss  # imports torchvision: 1.5 s

    lpips = PerceptualLoss(net, None)
    lpips.scaling.to("cuda")  # which lpips makes on the CPU
    return lpips


def vae_pass(s: TrainVAESettings, lpips: nn.Module | None) -> tuple[nn.Module, Forward]:
    """The VAE of resolved settings, and its loss of some images."""
    model, loss = build_vae(s.model), VAELoss(VAELossSettings(lpips_gamma=0))
    model.get_submodule("encoder").requires_grad_(not s.freeze_encoder)
    size = s.images.resolution
    latent = size.divided(s.model.factor)

    def forward(images: int) -> Tensor:
        x = torch.zeros(images, 3, *size)
        noise = torch.zeros(images, s.model.latent_channels, *latent)
        x_hat, posterior = model(x, noise)
        distance = lpips(x_hat, x).mean() if lpips else 0
        return loss(x, x_hat, posterior)["loss"] + distance

    return model, forward


def unet_pass(s: TrainUNetSettings) -> tuple[nn.Module, Forward]:
    """The U-Net of resolved settings, and its loss of some latents."""
    model = build_unet(s.model, s.latent.channels, len(s.classes))

    def forward(images: int) -> Tensor:
        x = torch.zeros(images, s.latent.channels, s.latent.height, s.latent.width)
        label = [torch.zeros(images, dtype=torch.long)] if s.classes else []
        error: Tensor = model(x, torch.zeros(images), *label) - x
        return error.square().mean()

    return model, forward


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """`torch.autocast("cuda", torch.bfloat16)`, which does nothing on a machine without a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def held(model: nn.Module, forward: Callable[[], object], recompute: bool) -> int:
    """Peak bytes between a forward pass and the end of its backward pass, without parameters and their gradients.

    With `recompute`, each checkpointable block keeps its input, and while it is computed again, all that it needs.
    """
    blocks = [block for block in model.modules() if recompute and getattr(block, "checkpointable", False)]
    kept = Kept(model)
    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(kept.enter).remove)
            hooks.callback(block.register_forward_hook(kept.leave).remove)
        with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
            forward()
    return kept.peak


def activation_bytes(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the parameters."""
    kept = Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        model(*inputs)
    return kept.nbytes


class Kept:
    """What a forward pass keeps for the backward pass, each storage once."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self.tensors: list[dict[int, Tensor]] = [
            {}
        ]  # outside of blocks that are computed again, and in the one at work
        self.nbytes = 0  # of all these
        self.peak = 0  # bytes of the backward pass at most; on its way back, what was kept later is gone

    def add(self, tensor: Tensor) -> Tensor:
        """Keep a tensor, alive, as its number stands for it only as long."""
        storage = tensor.untyped_storage()
        if not any(storage._cdata in known for known in (self.parameters, *self.tensors)):
            self.tensors[-1][storage._cdata] = tensor
            self.nbytes += storage.nbytes()
            self.peak = max(self.peak, self.nbytes + GRADIENTS * storage.nbytes())
        return tensor

    def enter(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keep the input of a block that is computed again."""
        for tensor in inputs:
            self.add(tensor)
        self.tensors.append({})

    def leave(self, block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Let all else go that such a block keeps."""
        self.nbytes -= sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.pop().values())
