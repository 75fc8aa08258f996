"""ONNX files: ONNX Runtime computes what the networks do, for other batches and sizes, too."""

from pathlib import Path

import numpy as np
import pytest
import torch
from exported import random_pipeline

from lightdiff.errors import RunError
from lightdiff.extras.export.onnx_files import check, store_half, write_onnx
from lightdiff.pipeline import Pipeline

pytest.importorskip("onnxscript", reason="onnxscript is not installed: nox -s hub runs these")
onnx = pytest.importorskip("onnx", reason="onnx is not installed: nox -s hub runs these")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: nox -s hub runs these")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.onnx and onnxscript, on themselves


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Path]:
    """A model with classes, and its files."""
    model, folder = random_pipeline("kl"), tmp_path_factory.mktemp("onnx")
    model.weak = random_pipeline("kl", "original").unet
    write_onnx(model, folder)
    return model, folder


@pytest.mark.slow
@pytest.mark.reference
@torch.inference_mode()
def test_equal_at_other_sizes(exported: tuple[Pipeline, Path]) -> None:
    model, folder = exported
    run = {
        name: onnxruntime.InferenceSession(folder / f"{name}.onnx")
        for name in ("unet", "guide", "vae_decoder", "vae_encoder")
    }
    x, t, label = torch.randn(3, 4, 16, 12), torch.tensor([0.0, 500.5, 999.0]), torch.tensor([0, 3, 1])
    assert model.weak is not None
    for name, unet in (("unet", model.unet), ("guide", model.weak)):
        (found,) = run[name].run(None, {"x": x.numpy(), "t": t.numpy(), "label": label.numpy()})
        np.testing.assert_allclose(found, unet(x, t, label), atol=1e-4)
    (image,) = run["vae_decoder"].run(None, {"z": x.numpy()})
    np.testing.assert_allclose(image, model.vae.decoder(x), atol=1e-4)
    mu, logvar = run["vae_encoder"].run(None, {"image": image})
    wanted = model.vae.encoder(torch.from_numpy(image))
    np.testing.assert_allclose(mu, wanted.mu, atol=1e-4)
    np.testing.assert_allclose(logvar, wanted.logvar, atol=1e-4)


@pytest.mark.slow
def test_half_precision_halves_the_file(exported: tuple[Pipeline, Path], tmp_path: Path) -> None:
    model, folder = exported
    graph = onnx.load(folder / "unet.onnx")
    store_half(graph)
    onnx.save(graph, tmp_path / "half.onnx")
    half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    kinds = {w.data_type for w in graph.graph.initializer if np.prod(w.dims) >= 256}
    assert (half in kinds, whole in kinds) == (True, False)
    assert (tmp_path / "half.onnx").stat().st_size < (folder / "unet.onnx").stat().st_size
    x, t, label = torch.randn(1, 4, 8, 8), torch.tensor([9.0]), torch.tensor([1])
    (found,) = onnxruntime.InferenceSession(tmp_path / "half.onnx").run(
        None, {"x": x.numpy(), "t": t.numpy(), "label": label.numpy()}
    )
    with torch.inference_mode():
        difference = (torch.from_numpy(found) - model.unet(x, t, label)).abs().max()
    assert 0 < difference < 0.02


@pytest.mark.slow
def test_another_network_is_found_out(exported: tuple[Pipeline, Path]) -> None:
    other, folder = random_pipeline("kl"), exported[1]
    other.vae.decoder.conv_in.bias.add_(1.0)  # type: ignore[union-attr, operator]
    with pytest.raises(RunError, match="differs by"):
        check(other.vae.decoder, (torch.randn(2, 4, 8, 8),), folder / "vae_decoder.onnx", 1e-4)
