"""Time of each part of a training step: the original scripts' step and ours."""

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tests.bench.cases import LARGE_UNET, SMALL_UNET, unet_step, vae_step
from tests.bench.contest import Prepare, timed

PARTS = {  # by the beginnings of torch's names for its operations
    "convolutions, backward": ("aten::convolution_backward", "aten::cudnn_convolution_backward"),
    "convolutions, forward": ("aten::mkldnn_convolution", "aten::cudnn_convolution"),
    "matrix products, attention": ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot", "aten::linear"),
    "normalisation": ("aten::native_group_norm", "aten::native_layer_norm"),
    "activations": ("aten::silu", "aten::tanh", "aten::sigmoid"),
    "AdamW": ("aten::_fused_adam", "aten::_foreach_add", "aten::addcdiv", "aten::addcmul", "aten::sqrt", "aten::div_"),
    "EMA": ("aten::lerp_", "aten::_foreach_lerp"),
    "clipping": ("aten::linalg_vector_norm", "aten::_foreach_norm"),
    "copies and conversions": ("aten::copy_", "aten::_to_copy", "aten::cat", "aten::clone"),
    "elementwise, resizing, sums": ("aten::add", "aten::mul", "aten::sub", "aten::sum", "aten::upsample", "aten::exp"),
}
REST = "the rest: Python, autograd"
STEPS = {
    "U-Net 16.5 M, 4 x 16 x 16, batch 32": partial(unet_step, model=SMALL_UNET, side=16, batch=32, steps=2),
    "U-Net 201 M, 4 x 32 x 32, batch 4": partial(unet_step, model=LARGE_UNET, side=32, batch=4, steps=1),
    "VAE 3.6 M, 64 px, batch 16": partial(vae_step, side=64, batch=16, steps=2),
}


def shares(prepare: Prepare, contender: str, device: torch.device) -> tuple[float, dict[str, float]]:
    """Milliseconds per image of a step, and the share of each part."""
    work = prepare(contender, device)
    timed(work.round, device)
    activities = {ProfilerActivity.CPU, ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU}
    with profile(activities=activities) as found:
        whole = timed(work.round, device) * 1000
    parts: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        own: Any = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        name = next(
            (part for part, names in PARTS.items() if event.key.startswith(names)), "the rest: Python, autograd"
        )
        parts[name] += own / 1000
    total = sum(parts.values())
    return whole / work.images, {name: value / total for name, value in parts.items()}


def table(device: torch.device) -> dict[str, Any]:
    """The shares of both contenders, for each kind of step."""
    return {
        title: {contender: shares(prepare, contender, device) for contender in ("original", "lightdiff")}
        for title, prepare in STEPS.items()
    }
