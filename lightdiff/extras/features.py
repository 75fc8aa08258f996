"""Inception features of images, for distances between sets of them (extra `eval`)."""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from lightdiff.data.files import ImageFile
from lightdiff.data.loading import ImageBatch, ImageDataset, load_batches
from lightdiff.errors import UserError
from lightdiff.extras import not_installed
from lightdiff.extras.download import fetched
from lightdiff.models.lpips import check_finite, published_hash
from lightdiff.run_folder import open_regular
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.progress import Reporter
from lightdiff.settings import ImageSettings

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
PUBLISHED = published_hash(URL)
EVAL = ("torch-fidelity", "scikit-image")  # the extra `eval`
LAYERS = {"Mixed_7c.": "2048", "Mixed_6e.": "768"}  # by the last block that a file holds weights for


@dataclass(frozen=True)
class Features:
    """A network that computes features of images, and the name that marks measures based on it."""

    name: str  # "" for the published weights, whose Frechet distance is the FID of papers
    digest: str
    network: nn.Module
    device: torch.device

    def __call__(self, x: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Features of uint8 images."""
        found: Tensor = self.network(x)[0]
        return found

    @property
    def width(self) -> int:
        """How many features an image has."""
        return int(self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=self.device)).shape[1])

    def name_measure(self, measure: str, published: str) -> str:
        """A measure's name: that used in papers for the published weights only."""
        return published if not self.name else f"{measure} ({self.name})"

    def name_measures(self, found: dict[str, Any]) -> dict[str, Any]:
        """The same numbers, marked with the name of the features where these are not the published ones."""
        return {self.name_measure(name, name): value for name, value in found.items()}


def load_features(weights: Path | None, other: Path | None, device: torch.device, ranks: Processes) -> Features:
    """The network behind FID, with the published weights, or another file's.

    Args:
        weights: A copy of the published weights (.pth), checked by its digest; None: torch's cache, or downloaded once.
        other: Other weights of this network (.safetensors) to use instead, up to Mixed_6e or complete.
        device: Where to compute.
        ranks: One process downloads for all.

    Raises:
        UserError: If the extra is not installed, or the weights are missing or do not fit.
    """
    extractor = inception()
    otherwise = "or pass a copy with --weights FILE, or other features with --features FILE"
    file = (
        other
        or weights
        or ranks.run_on_main(lambda: fetched(URL, "FID needs Inception's published weights", otherwise))
    )
    flag = f"--features: {file}" if other else f"--weights: {file}" if weights else str(file)
    try:
        with open_regular(file) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if not other and not digest.startswith(PUBLISHED):
            raise UserError(
                f"{flag} is no copy of Inception's published weights (SHA-256 {PUBLISHED}...); "
                "pass other weights with --features, which marks the numbers with their name"
            )
        state = safetensors.torch.load_file(file) if other else torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise almost anything
        raise UserError(f"{flag} cannot be read: {error}") from None
    check_finite(state, file)
    layer = next((layer for block, layer in LAYERS.items() if any(name.startswith(block) for name in state)), "")
    if not layer:
        raise UserError(f"{flag} holds no weights of the Inception network used for FID")
    nothing = io.BytesIO()  # the library reads weights when it builds the network: give it an empty file
    torch.save({}, nothing)
    nothing.seek(0)
    kind = type("Inception", (extractor,), {"load_state_dict": lambda self, found: None})
    network: Any = kind("inception", [layer], feature_extractor_weights_path=nothing)
    try:
        missing = nn.Module.load_state_dict(network, state, strict=False).missing_keys
    except RuntimeError as error:  # of another shape
        raise UserError(f"{flag} does not fit the Inception network used for FID: {error}") from None
    needed = sorted(n for n in missing if layer == "2048" and "num_batches" not in n)
    if needed:
        raise UserError(f"{flag} has no {needed[0]}: it does not fit the Inception network used for FID")
    return Features(other.stem if other else "", digest, network.to(device), device)


def inception() -> Any:
    """The library's network class.

    Raises:
        UserError: If it is not installed.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise not_installed("evaluate", *EVAL) from None
    return FeatureExtractorInceptionV3


def process_images(
    work: Callable[[ImageBatch], None],
    files: Sequence[ImageFile],
    images: ImageSettings,
    batch_size: int,
    workers: int,
    ranks: Processes,
    what: str,
) -> None:
    """Call `work` with batches of this process's share of the readable images; display progress as `what`."""
    dataset = ImageDataset(files, images, seed=0, train=False)
    mine = ranks.share(len(files))
    order = ([(0, i) for i in mine[k : k + batch_size]] for k in range(0, len(mine), batch_size))
    with Reporter(what, len(mine)) as reporter:
        done = 0
        for batch in load_batches(dataset, order, workers):
            if len(batch.x):
                work(batch)
            done += len(batch.x) + batch.missing
            reporter.advance(done, {})


@torch.inference_mode()
def compute_features(
    features: Features,
    files: Sequence[ImageFile],
    images: ImageSettings,
    batch_size: int,
    workers: int,
    ranks: Processes,
    what: str,
) -> tuple[Float[Tensor, "n d"], list[int]]:
    """Features of the readable images, on the CPU, and their indices; the work is shared among all processes."""
    width = features.width
    rows = torch.zeros(len(files), width + 1)  # the last column: whether the image could be read

    def compute(batch: ImageBatch) -> None:
        rows[batch.index, :width] = features(batch.x.to(features.device)).float().cpu()
        rows[batch.index, width] = 1

    process_images(compute, files, images, batch_size, workers, ranks, what)
    rows = ranks.all_reduce_sum(rows)
    there = rows[:, width].nonzero().flatten()
    return rows[there, :width], there.tolist()
