"""LPIPS, a distance between images as people see them (Zhang et al. 2018, arXiv:1801.03924), used as a loss."""

import hashlib
import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import lpips
import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights, SqueezeNet1_1_Weights, VGG16_Weights

from lightdiff.errors import UserError
from lightdiff.on_demand import on_demand

Net = Literal["vgg", "alex", "squeeze"]

logger = logging.getLogger(__name__)


class Trunk(NamedTuple):
    """An ImageNet network behind LPIPS."""

    url: str  # of torchvision's weights
    min_side: int  # least side of an image whose deepest features are still 2 x 2; at 1 x 1 padding dominates


TRUNKS: dict[Net, Trunk] = {
    "vgg": Trunk(VGG16_Weights.IMAGENET1K_V1.url, 32),
    "alex": Trunk(AlexNet_Weights.IMAGENET1K_V1.url, 47),
    "squeeze": Trunk(SqueezeNet1_1_Weights.IMAGENET1K_V1.url, 33),
}


def find_weights(net: Net, file: Path | None = None) -> Path:
    """The file with the network's ImageNet weights: `file`, else torch's cache, else downloaded into that cache.

    With several processes let one call it first, then the others. A file of other content is logged: LPIPS of other
    weights is another measure.

    Raises:
        UserError: If `file` does not exist, or the download fails.
    """
    url = TRUNKS[net].url
    if file is not None and not file.is_file():
        raise UserError(f"--lpips-weights: there is no file {file}")
    otherwise = "or name a copy with --lpips-weights FILE, or train without LPIPS with --lpips-gamma 0"
    if not (found := file or cached(url)).is_file():
        found = on_demand("download:fetched")(url, f"LPIPS needs the ImageNet weights of its {net} network", otherwise)
    with found.open("rb") as stream:  # 528 MB of VGG take half a second
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(published_hash(url)):
        logger.warning(
            f"note: {found} is not the published file of {net} (SHA-256 {published_hash(url)}..., but this is "
            f"{digest[:8]}...): if its weights are others, so is LPIPS"
        )
    return found


def cached(url: str) -> Path:
    """Where torch's cache keeps a file of weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def published_hash(url: str) -> str:
    """The first digits of the SHA-256 of published weights, in which their names end: vgg16-397923af.pth."""
    return Path(url).stem.rpartition("-")[2]


def check_finite(state: Mapping[str, Tensor], file: Path) -> None:
    """Check that weights hold neither NaN nor infinities, before anything is trained or measured with them.

    Raises:
        UserError: If they do.
    """
    if odd := [name for name, value in state.items() if not value.isfinite().all()]:
        raise UserError(f"{file} is no use: {odd[0]} holds values that are not finite; take the published weights")


def load_lpips(net: Net, weights: Path | None) -> nn.Module:
    """The frozen `lpips.LPIPS` whose trunk comes from torchvision's file and whose linear layers come with lpips.

    Without a file it is as it costs, not as it measures: its weights are random.

    Raises:
        UserError: If the file cannot be read or is another network's.
    """
    # Built on "meta": torchvision would fill 500 MB of VGG with random numbers, taken from the global generator.
    with torch.device("meta" if weights else torch.get_default_device()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")  # lpips says pretrained=
        model: nn.Module = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    if weights is None:
        return model.requires_grad_(False)
    trunk = model.get_submodule("net")
    trunk.load_state_dict(_read_trunk(net, weights, trunk.state_dict()), assign=True)
    linear = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    model.load_state_dict(torch.load(linear, map_location="cpu", weights_only=True), strict=False, assign=True)
    return model.requires_grad_(False)


def _read_trunk(net: Net, weights: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trunk's tensors under lpips's names: its slice2.5.weight is torchvision's features.5.weight."""
    try:
        if weights.suffix == ".safetensors":
            state = safetensors.torch.load_file(weights)
        else:
            state = dict(torch.load(weights, map_location="cpu", weights_only=True))
    except OSError as error:
        raise UserError(f"{weights} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # what a damaged file raises can be nearly anything
        raise _misfit(net, weights, "it is damaged or no file of weights") from error
    found = {}
    for name, tensor in expected.items():
        key = "features." + name.partition(".")[2]
        value = state.get(key)
        if not isinstance(value, Tensor):
            raise _misfit(net, weights, f"it holds no tensor {key}")
        if value.shape != tensor.shape:
            raise _misfit(net, weights, f"its {key} has shape {tuple(value.shape)}, not {tuple(tensor.shape)}")
        found[name] = value.float()
    check_finite(found, weights)
    return found


def _misfit(net: Net, weights: Path, reason: str) -> UserError:
    """The error that says which network the file does not fit, and what would."""
    fitting = f"it takes torchvision's weights, {TRUNKS[net].url}"
    return UserError(f"{weights} does not fit LPIPS's {net} network ({reason}); {fitting}")


class PerceptualLoss(nn.Module):
    """LPIPS of each pair of images, with a gradient to the images and to nothing else.

    Keep it beside the network that is trained, not in it: so neither an optimizer, an EMA nor a checkpoint sees it.
    """

    def __init__(self, net: Net, weights: Path | None) -> None:
        """Build it from a file that `find_weights` found, or, to learn what it costs, from none."""
        super().__init__()
        self.min_side = TRUNKS[net].min_side
        lpips_model = load_lpips(net, weights)
        self.scaling = lpips_model.get_submodule("scaling_layer")
        self.trunk = lpips_model.get_submodule("net")
        self.linears = nn.ModuleList(lpips_model.get_submodule("lins").children())
        self.train(False)

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """Stay in evaluation mode: lpips's linear layers have dropout."""
        return super().train(False)

    def features(self, x: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, ...]:
        """The trunk's feature maps, of an image enlarged by a whole factor if it is below `min_side`."""
        factor = math.ceil(self.min_side / min(x.shape[-2:]))
        if factor > 1:
            x = F.interpolate(x, scale_factor=float(factor), mode="bilinear")
        maps: tuple[Tensor, ...] = self.trunk(self.scaling(x))
        return maps

    def forward(self, x: Float[Tensor, "b 3 h w"], y: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """The distance of each x to its y, both in [-1, 1]: sum_l mean_hw w_l (f_l(x) - f_l(y))^2 (Eq. 1).

        f_l are the trunk's features at layer l, of length 1 over channels.
        """
        distance = x.new_zeros(len(x), dtype=torch.float32)
        maps = zip(self.features(x), self.features(y), self.linears, strict=True)
        with torch.autocast(x.device.type, enabled=False):  # the trunk may be bf16, small differences may not
            for f_x, f_y, linear in maps:
                difference = F.normalize(f_x.float(), dim=1) - F.normalize(f_y.float(), dim=1)
                distance = distance + linear(difference.square()).mean(dim=(1, 2, 3))
        return distance
