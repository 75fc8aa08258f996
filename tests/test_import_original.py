"""Checkpoints of the original scripts, as they are really saved, and made to harm."""

import argparse
import collections
import os
import pathlib
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightdiff.checkpoint import Checkpoint
from lightdiff.errors import UserError
from lightdiff.extras.import_original import import_checkpoint
from lightdiff.models.original import OriginalUNetSettings, OriginalVAESettings
from lightdiff.models.unet import build_unet
from lightdiff.models.vae import build_vae

VAE_CFG = {
    "latent_channels": 4,
    "enc_channel_args": [8, 8],
    "dec_channel_args": [8, 8],
    "num_conv_per_enc_block": [1],
    "num_conv_per_dec_block": [1],
    "final_activation": "tanh",
}
UNET_CFG = {
    "latent_channels": 4,
    "down_channel_args": [8, 8],
    "up_channel_args": [8, 8],
    "num_res_blocks_per_level": 1,
    "time_dim": 8,
}


def vae_content() -> dict[str, Any]:
    """What the original script saves of a tiny VAE."""
    small: dict[str, Any] = {"encoder_channels": (8, 8), "decoder_channels": (8, 8)}
    network = build_vae(OriginalVAESettings(**small, encoder_blocks=(1,), decoder_blocks=(1,)))
    return {"model_state_dict": network.state_dict(), "VAE_CFG": dict(VAE_CFG), "args": {"batch_size": 4, "lr": 1e-3}}


def unet_content() -> dict[str, Any]:
    """What the original script saves of a tiny U-Net."""
    state = build_unet(OriginalUNetSettings(channels=(8, 8), blocks=1, time_dim=8), 4).state_dict()
    return {"model_state_dict": state, "ema_state_dict": state, "UNET_CFG": dict(UNET_CFG), "args": {"lr": 1e-3}}


def imported(tmp_path: Path, content: Any, name: str = "vae") -> Checkpoint:
    """The checkpoint that comes of it."""
    torch.save(content, tmp_path / f"{name}.pth")
    return Checkpoint(import_checkpoint(tmp_path / f"{name}.pth", tmp_path / "run", 16))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrapped_networks(tmp_path: Path, prefix: str) -> None:
    for name, content in (("vae", vae_content()), ("unet", unet_content())):
        state = dict(content["model_state_dict"])
        for field in ("model_state_dict", "ema_state_dict"):
            if field in content:
                content[field] = {prefix + n: tensor for n, tensor in reversed(state.items())}
        if "ema_state_dict" in content:
            content["ema_state_dict"]["n_averaged"] = torch.tensor(3)  # of torch's AveragedModel
        saved = imported(tmp_path, content, name)
        for n, tensor in state.items():
            assert torch.equal(saved.tensor(f"model.{n}"), tensor)
            assert name == "vae" or torch.equal(saved.tensor(f"ema.{n}"), tensor)


def test_a_part_compiled_alone_and_half_precision(tmp_path: Path) -> None:
    content = vae_content()
    state = content["model_state_dict"]
    content["model_state_dict"] = {n.replace("encoder.", "encoder._orig_mod.", 1): t.half() for n, t in state.items()}
    saved = imported(tmp_path, content)
    assert torch.equal(saved.tensor("model.encoder.img_to_feat.bias"), state["encoder.img_to_feat.bias"].half().float())


def test_what_training_scripts_keep_beside_the_weights(tmp_path: Path) -> None:
    content = vae_content()
    args = {"batch_size": np.int64(3), "lr": np.float32(0.5), "kl_beta": torch.tensor(0.25), "ckpt_dir": Path("a/b")}
    args |= {"data": pathlib.PureWindowsPath("c:/x"), "device": torch.device("cpu"), "dtype": torch.bfloat16}
    content["args"] = argparse.Namespace(**args)
    content["VAE_CFG"] = collections.OrderedDict(VAE_CFG, latent_channels=np.int32(4))
    content["prev_val_loss"], content["global_step"] = np.float64(0.12), np.int64(1234)
    content["history"] = collections.defaultdict(list, loss=[np.float64(1.0), np.bool_(True)])
    metadata = imported(tmp_path, content).metadata
    assert (metadata.step, metadata.settings["loop"]["batch_size"], metadata.settings["loop"]["lr"]) == (1234, 3, 0.5)
    assert metadata.settings["loss"]["kl_beta"] == 0.25


def test_names_of_older_and_newer_libraries(tmp_path: Path) -> None:
    content = vae_content() | {"prev_val_loss": np.float64(0.12), "args": {"ckpt_dir": pathlib.PurePosixPath("a/b")}}
    path = tmp_path / "vae.pth"
    torch.save(content, path)
    changes = [(b"numpy._core.multiarray", b"numpy.core.multiarray"), (b"PurePosixPath", b"WindowsPath")]
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new.pth", "w") as new:
        for name in old.namelist():
            raw = old.read(name)
            for before, after in changes:
                raw = raw.replace(b"c" + before, b"c" + after).replace(b"\n" + before, b"\n" + after)
            new.writestr(name, raw)
    assert import_checkpoint(tmp_path / "new.pth", tmp_path / "run", 16).is_file()


def test_an_old_format_is_read(tmp_path: Path) -> None:
    torch.save(vae_content(), tmp_path / "vae.pth", _use_new_zipfile_serialization=False)
    assert import_checkpoint(tmp_path / "vae.pth", tmp_path / "run", 16).is_file()


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.pth: there is no such file"):
        import_checkpoint(tmp_path / "none.pth", tmp_path / "run", 64)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"state_dict": {}}, "is no checkpoint of the original scripts: it has no model_state_dict"),
        ([1, 2], "is no checkpoint of the original scripts: it has no model_state_dict"),
        ({"model_state_dict": {}}, "is no checkpoint of the original scripts: it has neither VAE_CFG nor UNET_CFG"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: object, text: str) -> None:
    torch.save(content, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=text):
        import_checkpoint(tmp_path / "foreign.pth", tmp_path / "run", 64)


def test_another_object_is_named(tmp_path: Path) -> None:
    content = vae_content() | {"when": np.arange(3)}
    with pytest.raises(UserError, match=r"vae\.pth holds a numpy\S+, which could run code: save it anew without"):
        imported(tmp_path, content)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    torch.save({"model_state_dict": {}, "VAE_CFG": {}, "args": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match=r"trap\.pth holds a \w+\.mkdir, which could run code"):
        import_checkpoint(tmp_path / "trap.pth", tmp_path / "run", 64)
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "trap.pth", weights_only=False)
    assert (tmp_path / "sprung").exists()  # it would have


HUGE = 8192


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"VAE_CFG": VAE_CFG | {"enc_channel_args": [HUGE] * 4, "dec_channel_args": [HUGE] * 4}},
            "do not fit its conf",
        ),
        ({"VAE_CFG": VAE_CFG | {"enc_channel_args": [10**9] * 4}}, "encoder_channels.0: "),
        ({"VAE_CFG": VAE_CFG | {"enc_channel_args": [-1, 8]}}, "encoder_channels.0: "),
        ({"VAE_CFG": VAE_CFG | {"latent_channels": "x" * 9999}}, "latent_channels: "),
        ({"VAE_CFG": {}}, "'latent_channels' is missing"),
        ({"VAE_CFG": VAE_CFG | {"enc_channel_args": None}}, "VAE_CFG or args are not those"),
        ({"args": {"batch_size": [0] * 9, "accum_grad_after_k_steps": 10**12}}, "VAE_CFG or args are not those"),
        ({"args": {"batch_size": "7", "accum_grad_after_k_steps": 10**300}}, "too large"),
        ({"args": [1, 2]}, "VAE_CFG or args are not those"),
        ({"args": {"lr": float("nan")}}, "lr: "),
        ({"global_step": "many"}, "VAE_CFG or args are not those"),
        ({"model_state_dict": {"a": torch.zeros(1, device="meta")}}, "its weights are no tensors"),
    ],
)
def test_configurations_made_to_harm(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        imported(tmp_path, vae_content() | changes)
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "run").exists()


def test_tensors_larger_than_the_file_are_refused(tmp_path: Path) -> None:
    content = vae_content()
    name = "encoder.img_to_feat.weight"
    content["model_state_dict"][name] = torch.zeros(1).expand(10**6, 10**6)  # one number, claimed 10^12 times
    with pytest.raises(UserError, match="more weights than its size explains"):
        imported(tmp_path, content)
    content["model_state_dict"] = {f"{i}": torch.zeros(10**6) for i in range(1)}
    content["model_state_dict"] |= {f"{i}": content["model_state_dict"]["0"] for i in range(1, 99)}
    with pytest.raises(UserError, match="more weights than its size explains"):
        imported(tmp_path, content)


def test_a_deflated_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    torch.save(vae_content() | {"more": torch.zeros(10**6)}, tmp_path / "vae.pth")
    small = tmp_path / "small.pth"
    with zipfile.ZipFile(tmp_path / "vae.pth") as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(UserError, match=r"small\.pth is compressed"):
        import_checkpoint(small, tmp_path / "run", 16)


def test_lists_within_lists_are_not_printed(tmp_path: Path) -> None:
    """2^60 numbers in a few bytes: each list holds the one before twice."""
    bomb: list[Any] = [0]
    for _ in range(60):
        bomb = [bomb, bomb]
    with pytest.raises(UserError, match="are not those of the original scripts"):
        imported(tmp_path, vae_content() | {"VAE_CFG": VAE_CFG | {"enc_channel_args": bomb}})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(np.float64(1)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    config=st.dictionaries(st.sampled_from([*VAE_CFG]), VALUES, max_size=3),
    args=VALUES | st.dictionaries(st.sampled_from(["lr", "batch_size", "accum_grad_after_k_steps", "seed"]), VALUES),
    step=VALUES,
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stranger_gets_a_sentence(tmp_path: Path, config: Any, args: Any, step: Any) -> None:
    content = CONTENT | {"VAE_CFG": VAE_CFG | config, "args": args, "global_step": step}
    torch.save(content, tmp_path / "vae.pth")
    with suppress(UserError):
        import_checkpoint(tmp_path / "vae.pth", tmp_path / f"run-{len(list(tmp_path.iterdir()))}", 16)


CONTENT = vae_content()
