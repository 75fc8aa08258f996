"""Time of each part of a training step: the original scripts' step and ours, and ours by default."""

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from lightdiff.training.ema import EMA
from lightdiff.training.loop import Trainer
from tests.bench.cases import LARGE_UNET, SMALL_UNET, train_unet_step, train_vae_step, unet_step, vae_step
from tests.bench.contest import Prepare, Work, timed

REGIONS = {(Trainer, "_update"): "optimizer", (EMA, "update"): "EMA", (nn.utils, "clip_grad_norm_"): "clipping"}

PARTS = {  # by the beginnings of torch's names for its operations
    "convolutions, backward": ("aten::convolution_backward", "aten::cudnn_convolution_backward"),
    "convolutions, forward": ("aten::mkldnn_convolution", "aten::cudnn_convolution"),
    "attention": ("aten::_scaled_dot",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"),
    "normalisation": ("aten::native_group_norm", "aten::native_layer_norm"),
    "activations": ("aten::silu", "aten::tanh", "aten::sigmoid"),
    "optimizer": (
        "aten::_fused_adam",
        "aten::_foreach_add",
        "aten::addcdiv",
        "aten::addcmul",
        "aten::sqrt",
        "aten::div_",
    ),
    "EMA": ("aten::lerp_", "aten::_foreach_lerp"),
    "clipping": ("aten::linalg_vector_norm", "aten::_foreach_norm"),
    "copies and conversions": ("aten::copy_", "aten::_to_copy", "aten::cat", "aten::clone"),
    "elementwise, resizing, sums": ("aten::add", "aten::mul", "aten::sub", "aten::sum", "aten::upsample", "aten::exp"),
}
REST = "the rest: Python, autograd"


def default_step(optimizer: str, device: torch.device, *, family: str) -> Work:
    """Training steps of a network as a user has it by default, but for the optimizer."""
    train = (
        partial(train_vae_step, side=64, batch=16) if family == "vae" else partial(train_unet_step, side=16, batch=32)
    )
    _, step = train({}, device=device, optimizer=optimizer)
    return Work(lambda: [step() for _ in range(3)], 3)


PEERS, OPTIMIZERS = ("original", "lightdiff"), ("adamw", "muon")
STEPS: dict[str, tuple[Prepare, tuple[str, ...]]] = {
    "U-Net 16.5 M, 4 x 16 x 16, batch 32": (partial(unet_step, model=SMALL_UNET, side=16, batch=32, steps=2), PEERS),
    "U-Net 201 M, 4 x 32 x 32, batch 4": (partial(unet_step, model=LARGE_UNET, side=32, batch=4, steps=1), PEERS),
    "VAE 3.6 M, 64 px, batch 16": (partial(vae_step, side=64, batch=16, steps=2), PEERS),
    "default U-Net, 4 x 16 x 16, batch 32": (partial(default_step, family="unet"), OPTIMIZERS),
    "default VAE, 64 px, batch 16": (partial(default_step, family="vae"), OPTIMIZERS),
}


def labelled(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    """The function, whose operations the profiler finds below the name of a part."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(part):
            return function(*args, **kwargs)

    return call


def part_of(event: Any) -> str:
    """The part that an operation belongs to: by where it was called, or by its name."""
    above = event
    while above is not None:
        if above.name in REGIONS.values():
            return str(above.name)
        above = above.cpu_parent
    return next((part for part, names in PARTS.items() if event.name.startswith(names)), REST)


def shares(prepare: Prepare, contender: str, device: torch.device) -> tuple[float, dict[str, float]]:
    """Milliseconds per image of a step, and the share of each part."""
    with ExitStack() as labels:
        for (owner, name), part in REGIONS.items():
            labels.enter_context(mock.patch.object(owner, name, labelled(getattr(owner, name), part)))
        work = prepare(contender, device)
        timed(work.round, device)
        activities = {ProfilerActivity.CPU, ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU}
        with profile(activities=activities) as found:
            whole = timed(work.round, device) * 1000
    parts: dict[str, float] = defaultdict(float)
    for event in found.events() or ():
        parts[part_of(event)] += event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
    total = sum(parts.values())
    return whole / work.images, {name: value / total for name, value in parts.items()}


def table(device: torch.device) -> dict[str, Any]:
    """The shares of all contenders, for each kind of step."""
    return {
        title: {contender: shares(prepare, contender, device) for contender in contenders}
        for title, (prepare, contenders) in STEPS.items()
    }
