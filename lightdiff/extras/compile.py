"""Faster or smaller networks: torch.compile, activation checkpointing."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightdiff.runtime.processes import autocast
from lightdiff.runtime.progress import console, print_note
from lightdiff.settings import Compile

if TYPE_CHECKING:
    from lightdiff.runtime.stage import Stage, Trainable
    from lightdiff.stages.generate import Samples
    from lightdiff.training.loop import Task

GPU_FLOPS, CPU_FLOPS = 1e14, 3e10  # reached in a second: a third of an A100's bf16 peak; by a core of a CPU
LAYER_SECONDS = 8 * 5e-6  # to launch a layer: the default networks' 62 launch 547 kernels, each in about 5 us
COMPILE_SECONDS = 60.0  # that compiling takes


class PassTime(NamedTuple):
    """About how many seconds a forward pass takes: to compute, and, on a GPU, to launch its kernels from Python."""

    images: int
    computing: float
    launching: float

    @classmethod
    def of(cls, network: nn.Module, inputs: Sequence[Tensor], images: int, precision: str) -> "PassTime":
        """Of a pass of this many images, from a pass of one, whose `inputs` are on the device.

        torch.utils.flop_counter finds the same, but imports the compiler, which takes seconds.
        """
        layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
        flops, device = 0, inputs[0].device

        def count(layer: Any, x: tuple[Tensor], output: Tensor) -> None:
            nonlocal flops
            pixels = x[0] if isinstance(layer, nn.ConvTranspose2d) else output
            flops += 2 * images * pixels.numel() * layer.weight.numel() // len(layer.weight)

        hooks = [layer.register_forward_hook(count) for layer in layers]
        with torch.no_grad(), autocast(device, precision):
            network(*inputs)
        for hook in hooks:
            hook.remove()
        if device.type == "cpu":
            return cls(images, flops / (CPU_FLOPS * torch.get_num_threads()), 0.0)
        return cls(images, flops / GPU_FLOPS, len(layers) * LAYER_SECONDS)

    @property
    def launch_bound(self) -> bool:
        """Whether the GPU waits for Python."""
        return self.launching > self.computing

    def saved(self, images: int) -> float:
        """What compiling saves of passes of these many images: waiting for launches, or a quarter of computing.

        The latter as fused kernels read less; on CPUs, a sixth to two fifths were measured (docs/benchmarks.md).
        """
        return images / self.images * max(self.launching - self.computing, self.computing / 4)


def pick_compile(
    name: Compile, device: torch.device, images: int, one_pass: Callable[[], PassTime], training: bool = True
) -> Literal["on", "off"]:
    """Whether to compile a network that so many images will go through, a pass taking as long as `one_pass` says.

    `auto` compiles where that saves more time than it takes; in training, an image takes three passes, as the way back
    takes two. On a CPU, training gains nothing: convolutions take most of its time, and stay as they are. Where
    there is no compiler, a line says so and nothing is compiled.
    """
    if name == "auto":
        able = device.type == "cuda" or (device.type == "cpu" and not training)
        name = "on" if able and one_pass().saved((3 if training else 1) * images) > COMPILE_SECONDS else "off"
    return "on" if name == "on" and compiler_works(device) else "off"


def pick_for_training(asked: Compile, stage: "Stage[Any]", task: "Trainable") -> Literal["on", "off"]:
    """Whether to compile the network of a training."""
    images = stage.total_steps * stage.loop.batch_size // stage.processes.world_size
    return pick_compile(asked, stage.device, images, partial(pass_of_training, stage, task))


def pass_of_training(stage: "Stage[Any]", task: "Trainable") -> PassTime:
    """How long the network takes for as many images as it sees at a time, in this process."""
    share = -(-stage.loop.batch_size // stage.processes.world_size)
    return PassTime.of(task.model, task.example, min(stage.loop.micro, share), stage.loop.precision)


def compile_training(stage: "Stage[Any]", task: "Task") -> None:
    """Compile the networks of a training."""
    one_pass = stage.processes.world_size == 1 and stage.loop.micro == stage.loop.batch_size
    graphs = one_pass and pass_of_training(stage, task).launch_bound
    for network in task.networks:
        compile_network(network, stage.device, graphs=graphs)


def pick_for_sampling(asked: Compile, samples: "Samples") -> Literal["on", "off"]:
    """Whether to compile the network that images are generated with."""
    s, stage = samples.settings, samples.stage
    images = s.num_images * s.sampling.num_steps // stage.processes.world_size  # through the U-Net
    return pick_compile(asked, stage.device, images, partial(pass_of_sampling, samples), training=False)


def pass_of_sampling(samples: "Samples") -> PassTime:
    """How long the U-Net takes for as many images as are generated at a time."""
    pipeline, device = samples.pipeline, samples.stage.device
    shape = (1, pipeline.settings.latent.channels, *samples.size)
    example = torch.zeros(shape, device=device), torch.zeros(1, device=device)
    return PassTime.of(pipeline.unet, example, samples.settings.batch_size, pipeline.precision)


def compile_sampling(samples: "Samples") -> None:
    """Compile the network that images are generated with."""
    pipeline, device = samples.pipeline, samples.stage.device
    compile_network(pipeline.unet, device, training=False, graphs=pass_of_sampling(samples).launch_bound)
    if pipeline.weak:  # without a graph, which would overwrite what the other one returns
        compile_network(pipeline.weak, device, training=False)


def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile works here; if not, a line says why."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache_folder()
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Triton, an unknown Python: any number of kinds
        reason = str(error).strip().splitlines()[0]
        console.print(f"torch.compile does not work here, so the network is not compiled ({reason})", soft_wrap=True)
        return False
    return True


def cache_folder() -> str:
    """Where compiled code is kept: below the home folder or, where there is none to write to, until this process ends.

    In a container, a user may have a number alone: no name, which torch's own default needs, and no home.
    """
    with suppress(OSError, RuntimeError):
        folder = Path.home() / ".cache" / "lightdiff" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return str(folder)
    passing = tempfile.mkdtemp(prefix="lightdiff-")
    atexit.register(shutil.rmtree, passing, ignore_errors=True)
    return passing


def compile_network(network: nn.Module, device: torch.device, training: bool = True, graphs: bool = False) -> None:
    """Let a network be compiled at its first call, and again for each other shape; its tensors' names stay.

    With `graphs`, kernels are recorded and replayed as CUDA graphs, for where launching takes longer than computing:
    each call overwrites the output of the last, so that gradients cannot be accumulated over calls. On a CPU, when not
    training, weights are laid out once as convolutions want them.
    """
    if device.type == "cpu" and not training:
        from torch._inductor import config  # not before: it takes a second

        config.freezing = True  # as an option of this network alone it would not reach all places
    network.compile(mode="reduce-overhead" if graphs else None, dynamic=False)


def note_recompiled(known: int) -> int:
    """The number of graphs compiled so far; a line says if they are more than were `known`, 0 at first."""
    from torch._dynamo.utils import counters  # not before: torch's compiler takes seconds to import

    graphs = int(counters["stats"]["unique_graphs"])
    if 0 < known < graphs:
        print_note(f"{graphs - known} more compiled for shapes that are new: {graphs} graphs")
    return graphs


def enable_activation_checkpointing(network: nn.Module) -> None:
    """Let each checkpointable block keep only its input, and compute the rest again in the backward pass.

    Memory for activations falls to a fraction; time grows by a forward pass (Chen et al. 2016, arXiv:1604.06174).
    """
    for block in network.modules():
        if getattr(block, "checkpointable", False):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
