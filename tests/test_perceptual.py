"""LPIPS: the same numbers as the lpips package, and a message for every way its weights can be missing."""

import hashlib
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import get_args
from urllib.error import URLError

import lpips
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from lightdiff.data.table import ImageList, ImageTable
from lightdiff.errors import UserError
from lightdiff.extras.download import CONNECT_SECONDS
from lightdiff.models import lpips as ours
from lightdiff.models.lpips import TRUNKS, Net, PerceptualLoss, find_weights, load_lpips
from lightdiff.models.vae import build_vae
from lightdiff.options import build
from lightdiff.runtime.processes import Processes
from lightdiff.runtime.stage import Stage
from lightdiff.settings import TrainVAESettings, VAELossSettings
from lightdiff.stages.train_vae import VAETask
from lightdiff.training.loop import Trainer

MODELS: dict[Net, Callable[[], nn.Module]] = {
    "vgg": torchvision.models.vgg16,
    "alex": torchvision.models.alexnet,
    "squeeze": torchvision.models.squeezenet1_1,
}
HUB = Path(__file__).parents[2] / "shared" / "weights" / "hub"
REAL = HUB / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"


def made_up_state(net: Net) -> dict[str, Tensor]:
    """Random weights, as torchvision names them, without the classifier."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in MODELS[net]().state_dict().items()}
    rng = torch.Generator().manual_seed(1)
    fan_in = {name: max(1, shape[1:].numel()) for name, shape in shapes.items()}
    return {
        name: torch.randn(shape, generator=rng) * (2 / fan_in[name]) ** 0.5
        for name, shape in shapes.items()
        if name.startswith("features.")
    }


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of made-up SqueezeNet weights."""
    path = tmp_path_factory.mktemp("weights") / "squeeze.pth"
    torch.save(made_up_state("squeeze"), path)
    return path


@pytest.fixture
def loss(weights: Path) -> PerceptualLoss:
    """LPIPS on made-up weights."""
    return PerceptualLoss("squeeze", weights)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch cache, found through TORCH_HOME as a user would set it."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)  # what set_dir may have left
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def images(*shape: int, seed: int = 0) -> Tensor:
    """Noise in [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def by_hand(net: Net, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The lpips package's own model, its trunk filled one layer at a time."""
    with warnings.catch_warnings(), monkeypatch.context() as patch:
        warnings.simplefilter("ignore")
        for name in ("normal_", "kaiming_normal_", "kaiming_uniform_"):  # VGG's take seconds, and are overwritten
            patch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
        model: nn.Module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    for part in model.get_submodule("net").children():
        for number, layer in part.named_children():
            prefix = f"features.{number}."
            layer.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return model


def test_settings_offer_the_same_networks() -> None:
    """A new row in TRUNKS needs its name in settings.py."""
    assert get_args(VAELossSettings.model_fields["lpips_net"].annotation) == tuple(TRUNKS)


@pytest.mark.parametrize("net", TRUNKS)
def test_equals_the_lpips_package(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same weights, same distances, whatever the network."""
    state = made_up_state(net)
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    x, y = images(2, 3, 64, 72), images(2, 3, 64, 72, seed=1)
    expected = by_hand(net, state, monkeypatch)(x, y).flatten()
    assert expected.min() > 0.01
    with torch.no_grad():  # same sums in the same order but for the normalisation's eps
        torch.testing.assert_close(PerceptualLoss(net, path)(x, y), expected, rtol=1e-5, atol=1e-7)


def test_loading_leaves_the_global_generator_alone(weights: Path) -> None:
    """Turning LPIPS on must not change what else is drawn; and nothing stays on the meta device."""
    before = torch.get_rng_state()
    model = load_lpips("squeeze", weights)
    assert torch.equal(torch.get_rng_state(), before)
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"cpu"}
    assert not any(t.requires_grad for t in tensors)


def test_safetensors_file(weights: Path, tmp_path: Path, loss: PerceptualLoss) -> None:
    """The same weights in the other format give the same distance, also when stored in half precision."""
    state = torch.load(weights, weights_only=True)
    x, y = images(1, 3, 40, 40), images(1, 3, 40, 40, seed=1)
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    assert torch.equal(PerceptualLoss("squeeze", tmp_path / "w.safetensors")(x, y), loss(x, y))
    safetensors.torch.save_file({k: v.half() for k, v in state.items()}, tmp_path / "half.safetensors")
    half = PerceptualLoss("squeeze", tmp_path / "half.safetensors")
    torch.testing.assert_close(half(x, y), loss(x, y), rtol=1e-2, atol=0)  # fp16 keeps 11 bits


def test_identical_images_are_at_distance_zero(loss: PerceptualLoss) -> None:
    """One number per image, 0 for the pair that agrees."""
    x = images(2, 3, 64, 64)
    y = x.clone()
    y[1] = -y[1]
    distance = loss(x, y)
    assert distance.shape == (2,)
    assert distance[0] == 0
    assert distance[1] > 0


def test_gradient_reaches_the_image(loss: PerceptualLoss) -> None:
    """And a step against it brings the images closer."""
    x, y = images(1, 3, 32, 32).requires_grad_(), images(1, 3, 32, 32, seed=1)
    distance = loss(x, y).mean()
    distance.backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    with torch.no_grad():
        closer = loss(x - 1e-2 * x.grad / x.grad.norm(), y).mean()
    assert closer < distance


def test_gradient_is_finite_where_all_features_are_zero(loss: PerceptualLoss) -> None:
    """The length of a feature vector has no derivative there."""
    for name, buffer in loss.trunk.named_parameters():
        if name.startswith("slice1."):
            buffer.fill_(-1.0 if name.endswith("bias") else 0.0)
    x = images(1, 3, 64, 64).requires_grad_()
    loss(x, images(1, 3, 64, 64, seed=1)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_it_is_frozen(loss: PerceptualLoss) -> None:
    """Nothing in it is trained, and it stays in eval mode: lpips's linear layers have dropout."""
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    loss.train()
    assert not any(module.training for module in loss.modules())


def test_neither_optimizer_nor_average_nor_checkpoint_sees_it(
    loss: PerceptualLoss, weights: Path, tmp_path: Path
) -> None:
    """It stands beside the network that is trained, and gets no gradient of its own."""
    layer = {"images": {"resolution": 16}, "model": {"encoder_width": 16, "decoder_width": 16}}
    weighted = {"lpips_gamma": 1, "lpips_net": "squeeze", "lpips_weights": str(weights)}
    settings = build(TrainVAESettings, [layer, {"loss": weighted, "loop": {"precision": "fp32"}}]).resolved()
    task = VAETask(Stage("vae", settings, torch.device("cpu"), Processes(), tmp_path), ImageList(ImageTable.of([])))
    task.vae_loss.terms["lpips"] = lambda x, x_hat, posterior: loss(x_hat, x).mean()
    trainer = Trainer(task, task.stage)
    part = {"x": images(2, 3, 16, 16), "noise": images(2, 4, 8, 8), "change": torch.tensor([[4, 0], [4, 0]])}
    task.loss(task.model, part)["loss"].backward()
    assert all(parameter.grad is None for parameter in loss.parameters())
    own = sum(parameter.numel() for parameter in build_vae(settings.model).parameters())
    optimized = {id(p): p.numel() for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    assert sum(optimized.values()) == own
    saved = [tensor for name, tensor in trainer.state().items() if not name.startswith("optimizer.")]
    assert sum(tensor.numel() for tensor in saved) == 2 * own  # the network, and its average


@pytest.mark.parametrize("net", TRUNKS)
def test_min_side_is_the_least_with_a_map(net: Net) -> None:
    """The deepest features are 2 x 2 at min_side and a point just below."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trunk = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False).net
    side = TRUNKS[net].min_side
    assert trunk(torch.zeros(1, 3, side, side, device="meta"))[-1].shape[2:] == (2, 2)
    assert trunk(torch.zeros(1, 3, side - 1, side - 1, device="meta"))[-1].shape[2:] == (1, 1)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (32, 32), (16, 48), (33, 33)])
def test_small_images(loss: PerceptualLoss, size: tuple[int, int]) -> None:
    """An image below min_side is enlarged by a whole factor, as if the user had done so."""
    x, y = images(2, 3, *size), images(2, 3, *size, seed=1)
    factor = -(-33 // min(size))
    large = [nn.functional.interpolate(i, scale_factor=factor, mode="bilinear") if factor > 1 else i for i in (x, y)]
    distance = loss(x, y)
    assert distance.isfinite().all()
    assert torch.equal(distance, loss(*large))


def test_bf16_autocast(loss: PerceptualLoss) -> None:
    """The distance comes out in fp32, near the one computed in it, and has a gradient."""
    x, y = images(2, 3, 64, 64).requires_grad_(), images(2, 3, 64, 64, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        distance = loss(x.bfloat16(), y)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, loss(x, y), rtol=0.03, atol=0)  # bf16 keeps 8 bits
    distance.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_weights_file_given(weights: Path, tmp_path: Path) -> None:
    """The file given is the file used; one that is not there is named."""
    assert find_weights("squeeze", weights) == weights
    with pytest.raises(UserError, match=r"^--lpips-weights: there is no file .*nowhere\.pth$"):
        find_weights("squeeze", tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("net", "name"),
    [("vgg", "vgg16-397923af.pth"), ("alex", "alexnet-owt-7be5be79.pth"), ("squeeze", "squeezenet1_1-b8a52dc0.pth")],
)
def test_weights_in_torchs_cache(cache: Path, monkeypatch: pytest.MonkeyPatch, net: Net, name: str) -> None:
    """What torchvision has downloaded is used, without asking the network."""
    monkeypatch.delattr(torch.hub, "download_url_to_file")
    monkeypatch.setattr(ours, "published_hash", lambda url: EMPTY if url.endswith(name) else "")
    cache.mkdir(parents=True)
    (cache / name).touch()
    assert find_weights(net) == cache / name


EMPTY = hashlib.sha256().hexdigest()[:8]


@pytest.mark.parametrize(("net", "digits"), [("vgg", "397923af"), ("alex", "7be5be79"), ("squeeze", "b8a52dc0")])
@pytest.mark.parametrize("named", [True, False])
def test_other_weights_are_told(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, net: Net, digits: str, named: bool
) -> None:
    """By content, whatever the file's name and its way onto the machine; the published ones are no reason to speak."""
    file = ours.cached(ours.TRUNKS[net].url)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights of another training")
    assert find_weights(net, file if named else None) == file
    err = capsys.readouterr().err
    assert f"note: {file} is not the published file of {net} (SHA-256 {digits}..., but this is" in err
    assert err.count("\n") == 1
    copy = file.with_name("mine.bin")
    copy.touch()
    monkeypatch.setattr(ours, "published_hash", lambda url: EMPTY)
    assert find_weights(net, copy) == copy
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    state = made_up_state("squeeze")
    state["features.3.squeeze.weight"].view(-1)[7] = value
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth is no use: .* holds values that are not finite"):
        load_lpips("squeeze", tmp_path / "w.pth")


def test_weights_are_downloaded_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the cache, with the hash checked, in silence, with a time limit that is then put back."""
    calls = []

    def download(url: str, target: str, hash_prefix: str, progress: bool) -> None:
        calls.append((url, target, hash_prefix, progress, socket.getdefaulttimeout()))
        Path(target).touch()

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    before = socket.getdefaulttimeout()
    path = find_weights("alex")
    assert path == find_weights("alex") == cache / "alexnet-owt-7be5be79.pth"
    assert calls == [(TRUNKS["alex"].url, str(path), "7be5be79", False, CONNECT_SECONDS)]
    assert socket.getdefaulttimeout() == before


@pytest.mark.parametrize("kind", [URLError, TimeoutError, RuntimeError])
def test_failed_download(cache: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    """The message says which file to put where, and the two options that help."""

    def download(*_: object, **__: object) -> None:
        raise kind("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    before = socket.getdefaulttimeout()
    with pytest.raises(UserError) as raised:
        find_weights("vgg")
    assert str(raised.value) == (
        "LPIPS needs the ImageNet weights of its vgg network, and the download failed (no route to host): "
        "fetch https://download.pytorch.org/models/vgg16-397923af.pth elsewhere and put it at "
        f"{cache / 'vgg16-397923af.pth'}, or name a copy with --lpips-weights FILE, "
        "or train without LPIPS with --lpips-gamma 0"
    )
    assert socket.getdefaulttimeout() == before


def test_unwritable_cache(cache: Path) -> None:
    """A cache that cannot be written gives the same message, not a traceback."""
    cache.parent.parent.touch()  # a file where the folder should be
    with pytest.raises(UserError, match="--lpips-gamma 0"):
        find_weights("squeeze")


def spoil(path: Path, weights: Path, how: str) -> None:
    """Write a file that is not SqueezeNet's weights."""
    state = torch.load(weights, weights_only=True)
    content = weights.read_bytes()
    match how:
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "empty" | "empty safetensors":
            path.touch()
        case "text":
            path.write_text("<html>404</html>\n" * 9)
        case "pickle":
            torch.save(nn.Conv2d(3, 3, 1), path)
        case "list":
            torch.save([1, 2], path)
        case "values":
            torch.save(dict.fromkeys(state, 1), path)
        case "keys":
            torch.save({"classifier.1.weight": torch.zeros(1)}, path)
        case "shapes":
            torch.save(state | {"features.3.squeeze.weight": torch.zeros(2, 3, 4)}, path)


NO_WEIGHTS = "it is damaged or no file of weights"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("truncated", NO_WEIGHTS),
        ("empty", NO_WEIGHTS),
        ("empty safetensors", NO_WEIGHTS),
        ("text", NO_WEIGHTS),
        ("pickle", NO_WEIGHTS),
        ("list", NO_WEIGHTS),
        ("values", "it holds no tensor features.0.weight"),
        ("keys", "it holds no tensor features.0.weight"),
        ("shapes", "its features.3.squeeze.weight has shape (2, 3, 4), not (16, 64, 1, 1)"),
    ],
)
def test_file_that_does_not_fit(weights: Path, tmp_path: Path, how: str, reason: str) -> None:
    """One line naming the file, the network and what it takes, however the file is wrong."""
    path = tmp_path / ("wrong.safetensors" if "safetensors" in how else "wrong.pth")
    spoil(path, weights, how)
    with pytest.raises(UserError) as raised:
        PerceptualLoss("squeeze", path)
    url = "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"
    assert str(raised.value) == (
        f"{path} does not fit LPIPS's squeeze network ({reason}); it takes torchvision's weights, {url}"
    )


@pytest.mark.parametrize("name", ["missing.pth", "missing.safetensors"])
def test_file_that_is_gone(tmp_path: Path, name: str) -> None:
    """A file that vanished since `find_weights` found it is named too."""
    with pytest.raises(UserError, match=rf"{name} cannot be read: .*No such file"):
        load_lpips("squeeze", tmp_path / name)


def test_another_networks_file(weights: Path) -> None:
    """SqueezeNet's weights are not VGG's."""
    with pytest.raises(UserError, match=r"does not fit LPIPS's vgg network \(it holds no tensor features\.2\.weight"):
        load_lpips("vgg", weights)


@pytest.mark.skipif(not REAL.is_file(), reason=f"no real SqueezeNet weights at {REAL}")
def test_real_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real trunk: the lpips package's numbers, and a blurred image nearer than an unrelated one."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(HUB.parent))
    ours = PerceptualLoss("squeeze", find_weights("squeeze"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net="squeeze", verbose=False)
    smooth = nn.functional.interpolate(images(2, 3, 8, 8), size=64, mode="bicubic").clamp(-1, 1)
    noise = images(2, 3, 64, 64, seed=1)
    with torch.no_grad():  # but for the normalisation's eps the same sums
        torch.testing.assert_close(ours(smooth, noise), theirs(smooth, noise).flatten(), rtol=1e-5, atol=1e-7)
        blurred = nn.functional.avg_pool2d(smooth, 3, stride=1, padding=1, count_include_pad=False)
        assert (ours(smooth, blurred) < ours(smooth, noise)).all()
