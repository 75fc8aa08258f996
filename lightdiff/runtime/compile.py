"""Faster or smaller networks: torch.compile, activation checkpointing."""

import atexit
import os
import shutil
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightdiff.runtime.progress import console

GRAPHED_PARAMETERS = 50e6


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


def compile_network(network: nn.Module, device: torch.device, training: bool = True, graphs: bool = True) -> None:
    """Let a network be compiled at its first call; its tensors and their names stay as they are.

    A small network on a GPU spends its time launching kernels: there they are recorded and replayed as CUDA graphs,
    if `graphs`: each call overwrites the output of the last, so that gradients cannot be accumulated over calls.
    On a CPU, when not training, weights are laid out once as convolutions want them.
    """
    graphs = graphs and device.type == "cuda" and sum(p.numel() for p in network.parameters()) < GRAPHED_PARAMETERS
    if device.type == "cpu" and not training:
        from torch._inductor import config  # not before: it takes a second

        config.freezing = True  # as an option of this network alone it would not reach all places
    network.compile(mode="reduce-overhead" if graphs else None, dynamic=False)


def enable_activation_checkpointing(network: nn.Module) -> None:
    """Let each checkpointable block keep only its input, and compute the rest again in the backward pass.

    Memory for activations falls to a fraction; time grows by a forward pass (Chen et al. 2016, arXiv:1604.06174).
    """
    for block in network.modules():
        if getattr(block, "checkpointable", False):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
