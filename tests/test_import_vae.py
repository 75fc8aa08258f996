"""VAEs of other libraries: folders and files of diffusers and latent diffusion, whole, cut up, and made to harm."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VAE_FLAGS, call, succeed
from safetensors.torch import load_file, save_file
from test_kl import theirs

from lightdiff.checkpoint import Checkpoint
from lightdiff.errors import UserError
from lightdiff.extras.import_vae import import_model
from lightdiff.pipeline import load_vae

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
WIDTHS = (32, 64)
CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def kl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small AutoencoderKL, and the folder that diffusers saves of it. Not to be written to."""
    vae, folder = theirs(block_out_channels=WIDTHS, layers_per_block=1), tmp_path_factory.mktemp("kl") / "vae"
    vae.save_pretrained(folder)
    return vae, folder


def check_equal(run: Path, other: Any) -> None:
    """The run's VAE computes what theirs does."""
    vae, _ = load_vae(Checkpoint(run / "vae/checkpoints/best.safetensors", "vae"), CPU)
    vae.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # else sums are in another order
    x = torch.rand(1, 3, 16, 24) * 2 - 1
    with torch.inference_mode():
        found = other.encode(x)
        mu = found.latents if hasattr(found, "latents") else found.latent_dist.mean
        torch.testing.assert_close(vae.encoder(x).mu, mu, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vae.decoder(mu), other.decode(mu).sample, atol=1e-5, rtol=1e-5)


def changed(folder: Path, to: Path, **config: Any) -> Path:
    """A copy of a folder with another configuration."""
    to.mkdir(parents=True)
    (to / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    old = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(old | config))
    return to


@pytest.mark.reference
def test_folders(kl: tuple[Any, Path], tmp_path: Path) -> None:
    vae, folder = kl
    import_model(str(folder), tmp_path / "a", 16)
    check_equal(tmp_path / "a", vae)
    with pytest.raises(UserError, match="is there already: choose another --run"):
        import_model(str(folder), tmp_path / "a", 16)
    vae.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 2
    import_model(str(tmp_path / "shards"), tmp_path / "b", 16)
    check_equal(tmp_path / "b", vae)
    vae.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    import_model(str(tmp_path / "pickle"), tmp_path / "c", 16)
    check_equal(tmp_path / "c", vae)


@pytest.mark.reference
def test_within_a_pipeline_and_in_half_precision(
    kl: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = kl[1]
    changed(folder, tmp_path / "sd/vae", scaling_factor=0.3611, shift_factor=0.1159)
    half = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(half, tmp_path / "sd/vae" / WEIGHTS)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "X"],
        "text_encoder": ["transformers", "Y"],
    }
    (tmp_path / "sd/model_index.json").write_text(json.dumps(index))
    saved = Checkpoint(import_model(str(tmp_path / "sd"), tmp_path / "run", 16))
    assert "only the VAE of this pipeline is imported: its denoiser needs text" in capsys.readouterr().err
    assert saved.metadata.extra["imported"] == {"source": "sd", "scaling_factor": 0.3611, "shift_factor": 0.1159}
    assert {tensor.dtype for tensor in saved.tensors("model.").values()} == {torch.float16}
    rounded = theirs(block_out_channels=WIDTHS, layers_per_block=1)
    rounded.load_state_dict({name: tensor.float() for name, tensor in half.items()})
    check_equal(tmp_path / "run", rounded)


def in_the_scripts_names(state: dict[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    """Diffusers' tensors as latent diffusion's scripts name them."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    found = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[1:2] == ["up_blocks"]:
            parts[1:3] = ["up", str(levels - 1 - int(parts[2]))]
        if parts[1:2] == ["down_blocks"]:
            parts[1:2] = ["down"]
        ldm = ".".join(parts)
        for theirs_, scripts in {
            "mid_block.resnets.0": "mid.block_1",
            "mid_block.resnets.1": "mid.block_2",
            "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
            "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
            "mid_block.attentions.0.to_": "mid.attn_1.",
            "resnets": "block",
            "downsamplers.0": "downsample",
            "upsamplers.0": "upsample",
            "conv_shortcut": "nin_shortcut",
            "conv_norm_out": "norm_out",
        }.items():
            ldm = ldm.replace(theirs_, scripts)
        found[ldm] = tensor[:, :, None, None] if "attn_1" in ldm and tensor.ndim == 2 else tensor
    known = {*DIFFUSERS_TO_LDM_MAPPING["vae"].values()}
    assert known <= {*found}  # diffusers' own table, of the names outside of levels
    return found


@pytest.mark.reference
def test_a_single_file_of_latent_diffusion(kl: tuple[Any, Path], tmp_path: Path) -> None:
    vae, _ = kl
    inside = in_the_scripts_names(vae.state_dict(), len(WIDTHS))
    whole = {f"first_stage_model.{name}": tensor.contiguous() for name, tensor in inside.items()}
    whole |= {"model.diffusion_model.out.2.bias": torch.zeros(4), "first_stage_model.loss.logvar": torch.zeros(1)}
    save_file(whole, tmp_path / "model.safetensors")
    torch.save({"state_dict": inside | {"loss.logvar": torch.zeros(1)}, "global_step": 3}, tmp_path / "vae.ckpt")
    for number, name in enumerate(("model.safetensors", "vae.ckpt")):
        import_model(str(tmp_path / name), tmp_path / str(number), 16)
        check_equal(tmp_path / str(number), vae)


@pytest.mark.reference
def test_names_of_attention_before_diffusers_0_15(kl: tuple[Any, Path], tmp_path: Path) -> None:
    vae, folder = kl
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    to, tensors = changed(folder, tmp_path / "old"), {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        tensors[name] = tensor
    save_file(tensors, to / WEIGHTS)
    import_model(str(to), tmp_path / "run", 16)
    check_equal(tmp_path / "run", vae)


@pytest.mark.reference
def test_taesd(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1)}
    widths = {f"{side}_block_out_channels": (16, 16) for side in ("encoder", "decoder")}
    tiny = diffusers.AutoencoderTiny(**small, **widths).eval()
    tiny.save_pretrained(tmp_path / "taesd")
    import_model(str(tmp_path / "taesd"), tmp_path / "run", 16)
    check_equal(tmp_path / "run", tiny)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "holds UNet2DModel, not a VAE that can be imported"),
        ({"_class_name": "VQModel"}, "holds VQModel, not a VAE"),
        ({"_class_name": None, "architectures": ["BertModel"]}, r"\['BertModel'\] of transformers, not a VAE"),
        ({"act_fn": "gelu"}, "act_fn: there is no gelu here, only silu or swish"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "there is no AttnDownEncoderBlock2D"),
        ({"patch_size": [2, 2]}, "the option patch_size is not known here"),
        ({"in_channels": 1}, "in_channels: there is no 1 here, only 3"),
        ({"latent_channels": 8}, r"7 of another shape.*\(8, 64, 3, 3\) where \(16, 64, 3, 3\) is expected"),
        ({"use_quant_conv": False}, "2 left over, encoder.quant_conv.bias first"),
        ({"layers_per_block": 2}, "missing, encoder.down_blocks.0.resnets.1.norm1.weight first"),
        ({"norm_num_groups": 48}, "48 groups do not divide the width 32"),
        ({"block_out_channels": [10**9, 64]}, "channels"),
        ({"block_out_channels": "many"}, "block_out_channels: "),
    ],
)
def test_configurations_that_do_not_fit(
    kl: tuple[Any, Path], tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        import_model(str(changed(kl[1], tmp_path / "vae", **config)), tmp_path / "run", 16)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_files_that_are_none(kl: tuple[Any, Path], tmp_path: Path) -> None:
    run, folder = tmp_path / "run", kl[1]

    def refused(path: Path | str) -> str:
        with pytest.raises(UserError) as raised:
            import_model(str(path), run, 16)
        return str(raised.value)

    (tmp_path / "a.safetensors").write_bytes(b"x" * 100)
    assert "is damaged or no .safetensors file" in refused(tmp_path / "a.safetensors")
    assert "there is no such file" in refused(tmp_path / "none.safetensors")
    save_file({"unet.bias": torch.zeros(2)}, tmp_path / "b.safetensors")
    assert "tensors of other names (unet, ...)" in refused(tmp_path / "b.safetensors")
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"quantize.embedding.weight": torch.zeros(2, 2)}, tmp_path / "c.safetensors")
    assert "a VQ model" in refused(tmp_path / "c.safetensors")
    save_file(weights | {"encoder.conv_in.bias": torch.full((32,), float("nan"))}, tmp_path / "d.safetensors")
    assert "encoder.conv_in.bias holds what is no finite number" in refused(tmp_path / "d.safetensors")
    del weights["decoder.conv_out.bias"]
    save_file(weights, tmp_path / "e.safetensors")
    assert "1 missing, decoder.conv_out.bias first" in refused(tmp_path / "e.safetensors")
    torch.save({"state_dict": {"callback": Path}}, tmp_path / "f.ckpt")
    assert "could run code" in refused(tmp_path / "f.ckpt")
    huge = {"encoder.conv_in.weight": torch.zeros(1).expand(10**6, 10**6), "decoder.conv_out.weight": torch.zeros(1)}
    torch.save(huge, tmp_path / "g.ckpt")
    assert "more weights than its size explains" in refused(tmp_path / "g.ckpt")
    assert "neither model_index.json nor config.json" in refused(tmp_path)
    empty = changed(folder, tmp_path / "empty")
    (empty / WEIGHTS).unlink()
    assert "holds no weights" in refused(empty)
    (empty / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "../vae/x.safetensors"}}))
    assert "names no files of this folder" in refused(empty)
    (empty / "model_index.json").write_text(json.dumps({"unet": ["a", "b"]}))
    assert "a pipeline without a VAE" in refused(empty)
    assert "is no address: write hf://OWNER/NAME" in refused("hf://../secret")
    assert not run.exists()


def test_all_stages_go_on_from_an_imported_vae(kl: tuple[Any, Path], faces: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changed(kl[1], tmp_path / "other", scaling_factor=0.5)
    succeed("import", tmp_path / "other", "--run", run, "--resolution", 16)
    succeed("encode", "--run", run, "--data", faces, "--workers", 0, "--device", "cpu")
    scaled = succeed("scale", "--run", run)
    assert "The VAE came with scaling factor 0.5, shift 0; these latents have scaling factor" in scaled.err
    flags = [flag for flag in VAE_FLAGS if flag not in ("--preset", "tiny")]
    finer = ["--run", tmp_path / "finer", "--data", faces, "--init-from", run, "--freeze-encoder", "--lr", "1e-2"]
    succeed("train-vae", *finer, *flags)
    old, new = (Checkpoint(f / "vae/checkpoints/last.safetensors") for f in (run, tmp_path / "finer"))
    assert new.metadata.settings["model"] == old.metadata.settings["model"]
    for name, tensor in old.tensors("model.").items():
        assert torch.equal(tensor, new.tensor(f"model.{name}")) == name.startswith("encoder."), name
    other = call("train-vae", *finer, *flags, "--preset", "tiny", "--restart")
    assert (other.code, "or --init-from does: leave it out" in other.err) == (2, True)
