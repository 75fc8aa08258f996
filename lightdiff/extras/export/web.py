"""A page that draws with a model in a visitor's browser, by onnxruntime-web: WebGPU where there is one, else WASM."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lightdiff.errors import UserError
from lightdiff.extras.export.folder import write_json
from lightdiff.extras.export.onnx_files import write_decoder, write_unets
from lightdiff.pipeline import Pipeline, default_sampling, min_signal, schedule_of
from lightdiff.run_folder import atomic_write
from lightdiff.runtime.progress import print_note

PAGE = Path(__file__).parent / "page"
VERSION = "1.30.0"  # of onnxruntime-web, that the page is tested with
ELSEWHERE = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{VERSION}/dist/"
RUNTIME = [
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.jspi.min.mjs",  # with WebGPU
    "ort-wasm-simd-threaded.jspi.mjs",
    "ort-wasm-simd-threaded.jspi.wasm",
]
LARGEST_DIFFERENCE = 2 / 255 * 2  # of pictures in [-1, 1], that half precision of the weights may make
LEAST_NUMBERS = 16  # of a latent: the noise of smaller ones torch draws in another way


def write_web(pipeline: Pipeline, folder: Path, runtime: Path | None = None) -> None:
    """Write the page, both networks and, where it is given, the runtime.

    Weights are stored in half precision, unless pictures then differ by more than 2/255.

    Raises:
        UserError: If the runtime's folder is not that, or latents are too small.
    """
    s = pipeline.settings
    if s.latent.channels * s.latent.height * s.latent.width < LEAST_NUMBERS:
        raise UserError("--to web: a latent has fewer than 16 numbers")
    files = runtime_files(runtime) if runtime else []
    for half in (True, False):
        write_unets(pipeline, folder, half)
        write_decoder(pipeline, folder / "vae_decoder.onnx", half)
        if not half or largest_difference(pipeline, folder) <= LARGEST_DIFFERENCE:
            break
        print_note("in half precision pictures differ by more than 2/255: weights are stored in float32")
    for path in files:
        atomic_write(folder / "runtime" / path.name, lambda temporary, path=path: shutil.copyfile(path, temporary))  # type: ignore[misc]
    for path in sorted(PAGE.iterdir()):
        atomic_write(folder / path.name, lambda temporary, path=path: shutil.copyfile(path, temporary))  # type: ignore[misc]
    write_json(folder / "model.json", page_settings(pipeline) | {"runtime": "runtime/" if files else ELSEWHERE})


def page_settings(pipeline: Pipeline) -> dict[str, Any]:
    """What the page must know of the model."""
    s, schedule = pipeline.settings, schedule_of(pipeline.settings)
    height, width = pipeline.resolution
    return {
        "title": f"A latent diffusion model of {height} x {width} pixels",
        "about": "Every picture begins as noise; the model takes the noise away, step by step.",
        "objective": s.target.objective,
        "classes": list(s.classes),
        "guide": pipeline.weak is not None,
        "latent": s.latent.model_dump(mode="json", include={"channels", "height", "width", "shift", "scale"}),
        "alpha": schedule.alpha.tolist(),
        "sigma": schedule.sigma.tolist(),
        "floor": min_signal(s),
    }


def runtime_files(folder: Path) -> list[Path]:
    """The runtime's files in a folder of the npm package onnxruntime-web.

    Raises:
        UserError: If some are missing.
    """
    home = folder / "dist" if (folder / "dist").is_dir() else folder
    if missing := [name for name in RUNTIME if not (home / name).is_file()]:
        raise UserError(
            f"--runtime {folder} has no {missing[0]}: give the folder of npm's onnxruntime-web {VERSION} "
            "('npm pack onnxruntime-web', unpacked)"
        )
    return [home / name for name in RUNTIME]


class InRuntime(nn.Module):
    """A network's graph, run by ONNX Runtime."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnxruntime

        self.session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run it."""
        names = [i.name for i in self.session.get_inputs()]
        (found,) = self.session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
        return torch.from_numpy(found)


class WithLabel(nn.Module):
    """A graph that always takes a label: that of no class where none is given."""

    def __init__(self, network: nn.Module, no_label: int) -> None:
        super().__init__()
        self.network, self.no_label = network, no_label

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Predict."""
        known = torch.full(t.shape, self.no_label) if label is None else label
        out: Tensor = self.network(x, t, known)
        return out


def largest_difference(pipeline: Pipeline, folder: Path) -> float:
    """Of the first picture of seed 0, drawn with the graphs, from the same one drawn with the networks."""
    classes = len(pipeline.settings.classes)
    unet: nn.Module = InRuntime(folder / "unet.onnx")
    unet = WithLabel(unet, classes) if classes else unet
    decoder: Any = SimpleNamespace(decoder=InRuntime(folder / "vae_decoder.onnx"))
    other = Pipeline(decoder, pipeline.vae_settings, unet, pipeline.settings, pipeline.device)
    how = default_sampling(pipeline.settings)
    pictures = [model.decode(model.sample(1, 0, how)) for model in (pipeline, other)]
    return float((pictures[0] - pictures[1]).abs().max())
