"""What the original scripts saved and computed: imported, the networks compute the same, and draw."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from oracles import GOLDEN, needs_golden
from torch import Tensor

from lightdiff.checkpoint import Checkpoint
from lightdiff.errors import UserError
from lightdiff.extras.import_original import import_checkpoint
from lightdiff.models.unet import build_unet
from lightdiff.models.vae import build_vae
from lightdiff.pipeline import Pipeline
from lightdiff.settings import SamplingSettings, TrainUNetSettings, TrainVAESettings, VAEArchitecture


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("original") / "run"
    import_checkpoint(GOLDEN / "original_vae.pth", run, 64)
    import_checkpoint(GOLDEN / "original_unet.pth", run, 64)
    return run


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return safetensors.torch.load_file(GOLDEN / "original_reference.safetensors")


@needs_golden
@pytest.mark.reference
def test_an_imported_vae_computes_what_the_original_did(imported: Path, reference: dict[str, Tensor]) -> None:
    saved = Checkpoint(imported / "vae" / "checkpoints" / "best.safetensors", "vae")
    vae = build_vae(saved.settings(VAEArchitecture, "model")).eval()
    vae.load_state_dict(saved.weights())
    with torch.no_grad():
        posterior = vae.encoder(reference["vae.x"])
        decoded = vae.decoder(reference["vae.mu"])
    # atol: float32, other kernels; the soft bound of logvar is exact here in float32
    torch.testing.assert_close(posterior.mu, reference["vae.mu"], rtol=0, atol=1e-5)
    torch.testing.assert_close(posterior.logvar, reference["vae.logvar"], rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded, reference["vae.decode_mu"], rtol=0, atol=1e-5)


@needs_golden
@pytest.mark.reference
def test_an_imported_unet_computes_what_the_original_did(imported: Path, reference: dict[str, Tensor]) -> None:
    saved = Checkpoint(imported / "unet" / "checkpoints" / "last.safetensors", "unet")
    settings = TrainUNetSettings.model_validate(saved.metadata.settings)
    unet = build_unet(settings.model, settings.latent.channels).eval()
    unet.load_state_dict(saved.weights())
    with torch.no_grad():
        eps = unet(reference["unet.z"], reference["unet.t"])
        # atol: float32, other kernels
        torch.testing.assert_close(eps, reference["unet.ema_eps"], rtol=0, atol=1e-5)
        unet.load_state_dict(saved.weights(ema=0))
        assert float((unet(reference["unet.z"], reference["unet.t"]) - eps).abs().max()) > 1e-3  # the raw ones


@needs_golden
@pytest.mark.reference
def test_what_an_original_checkpoint_says_of_itself_is_kept(imported: Path) -> None:
    vae = Checkpoint(imported / "vae" / "checkpoints" / "last.safetensors", "vae").metadata
    unet = Checkpoint(imported / "unet" / "checkpoints" / "last.safetensors", "unet").metadata
    trained = TrainVAESettings.model_validate(vae.settings)
    assert (vae.step, unet.step) == (1234, 999)
    assert (trained.loss.kl_beta, trained.loss.lpips_gamma, trained.images.resolution) == (1e-3, 0.5, (64, 64))
    assert (trained.loop.batch_size, trained.loop.micro, trained.loop.seed) == (64, 16, 42)
    diffusion = TrainUNetSettings.model_validate(unet.settings)
    assert diffusion.latent.model_dump() == {
        "channels": 4, "height": 8, "width": 8, "shift": (0.0,), "scale": (0.9498,), "only_mu": True, "labels": {},
    }  # fmt: skip
    assert (diffusion.noise.schedule, diffusion.noise.timesteps) == ("cosine", 1000)
    assert (diffusion.loop.ema_decay, diffusion.loop.batch_size) == ((0.999,), 64)


@needs_golden
@pytest.mark.reference
def test_an_imported_run_draws_images(imported: Path, reference: dict[str, Tensor]) -> None:
    model = Pipeline.load(imported, device="cpu")
    assert model.resolution == (64, 64)
    torch.testing.assert_close(model.encode(reference["vae.x"]), reference["vae.mu"], rtol=0, atol=1e-5)
    z = model.sample(2, seed=1, sampling=SamplingSettings(num_steps=3))
    assert z.shape == (2, 4, 8, 8)
    alone = model.sample([1], seed=1, sampling=SamplingSettings(num_steps=3))
    # rtol, atol: float32, other kernels for other batches, and 1 / alpha = 200 in the first step
    torch.testing.assert_close(alone[0], z[1], rtol=1e-3, atol=1e-3)
    x = model.decode(z)
    assert x.shape == (2, 3, 64, 64)
    assert float(x.abs().max()) <= 1
    assert bool(x.isfinite().all())
    assert model.sample(1, sampling=SamplingSettings(num_steps=2), size=(16, 24)).shape == (1, 4, 16, 24)


# --- what is refused ----------------------------------------------------------------------------------------------


@needs_golden
@pytest.mark.reference
def test_an_imported_unet_is_bound_to_its_vae(imported: Path, tmp_path: Path) -> None:
    other = torch.load(GOLDEN / "original_vae.pth", weights_only=True)
    next(iter(other["model_state_dict"].values())).mul_(1.001)
    torch.save(other, tmp_path / "other.pth")
    path = import_checkpoint(tmp_path / "other.pth", tmp_path / "run", 64)
    with pytest.raises(
        UserError, match=r"was trained on latents of VAE .*, but .* holds .*: point --vae at the right one"
    ):
        Pipeline.load(imported, vae=path, device="cpu")


@needs_golden
@pytest.mark.reference
def test_a_unet_needs_its_vae_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="import the VAE that this U-Net belongs to first, into the same --run"):
        import_checkpoint(GOLDEN / "original_unet.pth", tmp_path, 64)
    assert list(tmp_path.rglob("*.safetensors")) == []


@needs_golden
@pytest.mark.reference
def test_what_is_there_is_not_overwritten(imported: Path) -> None:
    paths = {name: path for name in ("vae", "unet") for path in (imported / name / "checkpoints").glob("*.safetensors")}
    before = {path: path.read_bytes() for path in paths.values()}
    for name in ("vae", "unet"):
        with pytest.raises(UserError, match=r"\.safetensors is there already: choose another --run$"):
            import_checkpoint(GOLDEN / f"original_{name}.pth", imported, 64)
    assert {path: path.read_bytes() for path in before} == before


@needs_golden
@pytest.mark.reference
def test_a_truncated_original_is_refused(tmp_path: Path) -> None:
    whole = (GOLDEN / "original_vae.pth").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.pth is damaged or no checkpoint of the original scripts: "):
            import_checkpoint(tmp_path / "cut.pth", tmp_path / "run", 64)
    assert not (tmp_path / "run").exists()


@needs_golden
@pytest.mark.reference
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, imported: Path) -> None:
    vae = torch.load(GOLDEN / "original_vae.pth", weights_only=True)
    vae["VAE_CFG"]["enc_channel_args"] = [16, 24, 32, 48]
    torch.save(vae, tmp_path / "vae.pth")
    with pytest.raises(UserError, match=r"its weights do not fit its configuration: \d+ (missing|of another shape)"):
        import_checkpoint(tmp_path / "vae.pth", tmp_path / "run", 64)
    unet = torch.load(GOLDEN / "original_unet.pth", weights_only=True)
    del unet["ema_state_dict"]["final_conv.bias"]
    torch.save(unet, tmp_path / "unet.pth")
    with pytest.raises(UserError, match=r"its weights do not fit its configuration: 1 missing, final_conv\.bias first"):
        import_checkpoint(tmp_path / "unet.pth", imported, 64)
    unet["UNET_CFG"]["up_channel_args"] = [64, 48, 48, 32]
    torch.save(unet, tmp_path / "unet.pth")
    with pytest.raises(UserError, match="its up_channel_args are not its down_channel_args reversed"):
        import_checkpoint(tmp_path / "unet.pth", imported, 64)
