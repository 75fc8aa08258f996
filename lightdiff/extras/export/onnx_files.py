"""ONNX: both networks as graphs for ONNX Runtime, on any machine and in browsers. Needs the extra `export`."""

import logging
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightdiff.errors import RunError, UserError
from lightdiff.pipeline import Pipeline
from lightdiff.run_folder import atomic_write

TOLERANCE = 1e-4  # of ONNX Runtime's results, relative to the largest number
HALF_FROM = 256  # numbers of a weight from which on it is stored in half precision, if that is wanted
EXTRA = "--to {} needs the libraries onnx, onnxscript and onnxruntime: pip install 'lightdiff[export]'"


def check_libraries(to: str) -> None:
    """Check that what is needed is installed.

    Raises:
        UserError: If not.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError(EXTRA.format(to)) from None


class Encode(nn.Module):
    """Images -> mu, logvar, as a tuple of tensors."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Encode."""
        mu, logvar = self.encoder(image)
        return mu, logvar


def write_onnx(pipeline: Pipeline, folder: Path) -> None:
    """Write U-Nets, decoder and encoder, each checked against the network it is of."""
    write_unets(pipeline, folder)
    write_decoder(pipeline, folder / "vae_decoder.onnx")
    image = torch.rand(2, 3, *pipeline.resolution) * 2 - 1
    names = ["image"], ["mu", "logvar"]
    write(Encode(pipeline.vae.encoder), (image,), folder / "vae_encoder.onnx", *names)


def write_unets(pipeline: Pipeline, folder: Path, half: bool = False) -> None:
    """Write the U-Net, and a worse one to guide away from: x, t and, where they know classes, label -> prediction."""
    s = pipeline.settings
    latent = torch.randn(2, s.latent.channels, s.latent.height, s.latent.width)
    label = [torch.tensor([0, len(s.classes)])] if s.classes else []
    inputs = (latent, torch.tensor([0.0, s.noise.timesteps - 1.0]), *label)
    names = ["x", "t", "label"][: len(inputs)], ["prediction"]
    for name, network in (("unet", pipeline.unet), ("guide", pipeline.weak)):
        if network is not None:
            write(network, inputs, folder / f"{name}.onnx", *names, half)


def write_decoder(pipeline: Pipeline, path: Path, half: bool = False) -> None:
    """Write the decoder: z -> image."""
    s = pipeline.settings.latent
    z = torch.randn(2, s.channels, s.height, s.width)
    write(pipeline.vae.decoder, (z,), path, ["z"], ["image"], half)


def write(
    network: nn.Module, inputs: tuple[Tensor, ...], path: Path, names: list[str], results: list[str], half: bool = False
) -> None:
    """Write a network as a graph of any batch, height and width, and check it with ONNX Runtime.

    With `half`, weights are stored in half precision; all computing stays in float32.

    Raises:
        RunError: If ONNX Runtime's results differ.
    """
    import onnx

    network = network.to(memory_format=torch.contiguous_format)
    free = torch.export.Dim.AUTO
    shapes = tuple({0: torch.export.Dim("batch"), **({2: free, 3: free} if x.ndim == 4 else {})} for x in inputs)
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")  # on names of dimensions
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program: Any = torch.onnx.export(
            network, inputs, dynamo=True, input_names=names, output_names=results, dynamic_shapes=shapes, verbose=False
        )
    graph = program.model_proto
    if half:
        store_half(graph)
    atomic_write(path, lambda temporary: temporary.write_bytes(graph.SerializeToString()))
    onnx.checker.check_model(str(path))
    check(network, inputs, path, 0.02 if half else TOLERANCE)


def store_half(graph: Any) -> None:
    """Store a graph's large weights in half precision, each made float32 again where it is used."""
    import onnx
    from onnx import numpy_helper

    casts = []
    for weight in graph.graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype == np.float32 and values.size >= HALF_FROM:
            name = weight.name
            weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
            casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def check(network: nn.Module, inputs: tuple[Tensor, ...], path: Path, tolerance: float) -> None:
    """Compare ONNX Runtime's results with the network's, also for another batch.

    Raises:
        RunError: If they differ.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for batch in ([0, 1], [0, 1, 1]):
        given = [x[batch] for x in inputs]
        feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), given, strict=True)}
        with torch.inference_mode():
            wanted = network(*given)
        for found, right in zip(
            session.run(None, feed), wanted if isinstance(wanted, tuple) else (wanted,), strict=True
        ):
            difference = float((torch.from_numpy(found) - right).abs().max() / right.abs().max().clamp(min=1))
            if not difference <= tolerance:
                raise RunError(f"{path}: ONNX Runtime's result differs by {difference:.1g} from the network's")
