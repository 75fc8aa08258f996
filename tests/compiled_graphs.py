"""A command whose networks are compiled by a backend that only counts; prints the number of graphs.

By itself and not in a test: the checks of types that tests run with would cut graphs into pieces. Training a VAE
transforms latents in all ways in turn.
"""

import itertools
import sys
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import nn

from lightdiff.cli import main
from lightdiff.models.vae import LatentTransform

TRANSFORMS = [LatentTransform(quarters, turns) for quarters in (4, 3, 2, 1) for turns in (0, 1, 2, 3)]
compile_module = nn.Module.compile
graphs: list[torch.fx.GraphModule] = []


def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
    graphs.append(graph)
    return graph


def compile_counted(module: nn.Module, mode: str | None, dynamic: bool) -> None:
    compile_module(module, backend=backend, dynamic=dynamic)


if __name__ == "__main__":
    transforms = itertools.cycle(TRANSFORMS)
    with (
        patch.object(nn.Module, "compile", compile_counted),
        patch("lightdiff.extras.compile.compiler_works", lambda device: True),
        patch("lightdiff.stages.train_vae.sample_transform", lambda rng, share: next(transforms)),
    ):
        try:
            main()
        finally:
            print(f"{len(graphs)} graphs; compiler imported: {'torch._dynamo' in sys.modules}", file=sys.stderr)
