"""Exported folders: other libraries draw the same pictures from them, and lightdiff reads them again."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call, succeed
from exported import GUIDED, VAES, random_pipeline
from safetensors.torch import load_file

from lightdiff.errors import UserError
from lightdiff.extras.export import export
from lightdiff.extras.export.bundle import bundle
from lightdiff.extras.export.folder import TEMPLATES, about, write_diffusers, write_json, write_plain
from lightdiff.extras.import_vae import import_model
from lightdiff.pipeline import EXPORTED, Pipeline
from lightdiff.settings import EARLY, SamplingSettings, with_changes

WITHOUT_LIGHTDIFF = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightdiff", "pydantic", "jaxtyping"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
torch.set_num_threads(1)
"""


def run_alone(code: str, *arguments: object) -> None:
    """Run Python where lightdiff cannot be imported."""
    command = [sys.executable, "-c", WITHOUT_LIGHTDIFF + code, *map(str, arguments)]
    environment = os.environ | {"HF_HOME": f"{arguments[0]}/cache", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=str(arguments[0]), env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.reference
def test_diffusers_draws_the_same_pictures_without_lightdiff(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    pairs = [("default", "default"), ("kl", "original"), ("original", "default"), ("taesd", "default")]
    models = {"-".join(pair): random_pipeline(*pair) for pair in pairs}
    models["eps"] = random_pipeline("kl", classes=False, objective="eps")
    models |= {f"wide-{vae}": random_pipeline(vae, width=12) for vae in ("default", "kl")}
    for name, model in models.items():
        write_diffusers(model, tmp_path / name)
    code = """
for name in sys.argv[2:]:
    pipe = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    asked = {"num_steps": 4, "output_type": "pt", "num_images": 3, "seed": 5, "batch_size": 2}
    guided, plain = {"class_names": ["dog", "cat"], "guidance": 3.0}, {"sampler": "ddpm", "spacing": "karras"}
    torch.save(pipe(**asked, **(plain if name == 'eps' else guided)).images, f"{sys.argv[1]}/{name}.pt")
    size = pipe(num_images=1, num_steps=1).images[0].size
    assert size == (24 if 'wide' in name else 16, 16), size
AutoencoderKL.from_pretrained(f"{sys.argv[1]}/eps/vae")
try:
    DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/eps")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("its code was run without being trusted")
"""
    run_alone(code, tmp_path, *models)
    for name, model in models.items():
        how = (
            GUIDED
            if name != "eps"
            else GUIDED.model_copy(update={"class_": (), "guidance": 1.0, "sampler": "ddpm", "spacing": "karras"})
        )
        wanted = model.decode(model.sample(3, 5, how))
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert wanted.std() > 0.05
        difference = float((found - wanted).abs().max())
        print(f"{name}: {difference:.1e}")
        assert difference < 1e-4, name  # 1/255 of [-1, 1] is 8e-3


@pytest.mark.parametrize("vae", VAES)
@pytest.mark.parametrize("write", [write_plain, write_diffusers])
def test_an_exported_folder_is_loaded_again(tmp_path: Path, vae: str, write: Any) -> None:
    model, folder = random_pipeline(vae), tmp_path / "model"
    write(model, folder)
    write_json(folder / EXPORTED, about(model).model_dump())
    again = Pipeline.load(folder, device="cpu")
    assert again.vae_settings == model.vae_settings
    assert (again.settings.classes, again.settings.latent.shift) == (
        model.settings.classes,
        model.settings.latent.shift,
    )
    for old, new in ((model.vae, again.vae), (model.unet, again.unet)):
        for name, tensor in old.state_dict().items():
            assert torch.equal(tensor, new.state_dict()[name]), name
    assert "secret" not in (folder / EXPORTED).read_text()


def test_the_exported_kl_vae_can_be_imported(tmp_path: Path) -> None:
    model = random_pipeline("kl")
    write_diffusers(model, tmp_path / "model")
    import_model(str(tmp_path / "model"), tmp_path / "run", 16)
    found = load_file(tmp_path / "run/vae/checkpoints/best.safetensors")
    for name, tensor in model.vae.state_dict().items():
        assert torch.equal(found[f"model.{name}"], tensor)


def test_a_run_is_exported_with_a_model_card(run: Path, tmp_path: Path) -> None:
    out, trained = tmp_path / "out", run
    measured = {"unet": {"FID": 12.345, "FID +-": 0.5, "network": "a|b"}, "vae": {"PSNR": 30.0}}
    write_json(run / "evaluation/metrics.json", measured)
    words = "Drawn faces <b>, 16 px"
    succeed(
        "export", "--run", trained, "--to", "safetensors", out, "--about", words, "--license", "mit", "--samples", 2
    )
    card = (out / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "license: mit" in front
    assert 'tags: ["lightdiff", ' in front
    assert r"Drawn faces \<b\>, 16 px" in card
    assert "![The first 2 images of seed 0, none left out](samples.png)" in card
    assert {path.name for path in out.iterdir()} == {
        "README.md", "lightdiff.json", "samples.png", "unet.safetensors", "vae.safetensors",
    }  # fmt: skip
    for path in (out / "README.md", out / EXPORTED):
        assert str(trained) not in path.read_text()
    assert "| unet: FID | 12.35 +- 0.5 |" in card
    assert "| vae: PSNR | 30 |" in card
    own, exported = (Pipeline.load(place, device="cpu") for place in (trained, out))
    assert torch.equal(own.decode(own.sample(2)), exported.decode(exported.sample(2)))
    again = call("export", "--run", trained, "--to", "safetensors", out)
    assert (again.code, "is there already: choose another folder" in again.err) == (2, True)
    other = call("export", "--run", trained, "--to", "safetensors", tmp_path / "b", "--license", "GPL: v3")
    assert (other.code, "--license GPL: v3: give its short name" in other.err) == (2, True)


@pytest.mark.parametrize("to", ["safetensors", "diffusers"])
def test_the_worse_unet_of_autoguidance_is_exported(copy: Path, tmp_path: Path, to: str) -> None:
    out, narrow = tmp_path / "out", tmp_path / "narrow"
    smaller = ("--model.width", 8, "--model.blocks", 2, "--model.time-dim", 8, "--steps", 2, "--val-every", 0)
    succeed("train-unet", "--run", narrow, "--latents", copy, *smaller)
    succeed("export", out, "--run", copy, "--to", to, "--samples", 0, "--guide-with", narrow)
    guided = SamplingSettings(num_steps=4, guidance=2.0)
    own = Pipeline.load(copy, device="cpu", guide_with=narrow)
    exported = Pipeline.load(out, device="cpu", guide_with=EARLY)
    drawn = own.sample(2, 1, guided)
    assert torch.equal(drawn, exported.sample(2, 1, guided))
    assert not torch.equal(drawn, exported.sample(2, 1, with_changes(guided, guidance=1.0)))
    assert Pipeline.load(out, device="cpu").weak is None
    words = "guidance=2.0" if to == "diffusers" else 'guide_with=Path("early")'
    assert words in (out / "README.md").read_text()


def test_an_exported_folder_holds_one_model(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed("export", out, "--run", copy, "--to", "safetensors", "--samples", 0)
    for choice in ({"ema": 0.0}, {"unet": copy}, {"vae": copy}, {"guide_with": Path("step-2")}):
        with pytest.raises(UserError, match="which holds one model"):
            Pipeline.load(out, device="cpu", **choice)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="was exported without a worse U-Net"):
        Pipeline.load(out, device="cpu", guide_with=EARLY)
    for command in (("generate",), ("train-unet", "--steps", 1), ("generate", "--unet", out)):
        found = call(*command, *([] if "--unet" in command else ["--run", out]))
        assert (found.code, "is an exported folder, not a run" in " ".join(found.err.split())) == (2, True), found.err
    again = call("export", tmp_path / "again", "--run", out, "--to", "onnx", "--guide-with", "early")
    assert (again.code, "export the run that it was made of" in " ".join(again.err.split())) == (2, True)


@pytest.mark.reference
def test_diffusers_guides_with_the_worse_unet(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    succeed(
        "export", tmp_path / "model", "--run", finished, "--to", "diffusers", "--samples", 0, "--guide-with", "step-2"
    )
    code = """
pipe = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/model", trust_remote_code=True)
asked = {"num_steps": 4, "output_type": "pt", "num_images": 3, "seed": 5}
found = [pipe(**asked, guidance=2.0, guidance_interval=(0.2, 1.0)).images, pipe(**asked).images]
pipe.save_pretrained(f"{sys.argv[1]}/again")
torch.save(found, f"{sys.argv[1]}/found.pt")
"""
    run_alone(code, tmp_path)
    own = Pipeline.load(finished, device="cpu", guide_with=Path("step-2"))
    how = SamplingSettings(num_steps=4, guidance=2.0, guidance_interval=(0.2, 1.0))
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for images, asked in zip(found, (how, SamplingSettings(num_steps=4)), strict=True):
        assert float((images - own.decode(own.sample(3, 5, asked))).abs().max()) < 1e-4
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_a_checkpoint_names_its_run(trained: Path) -> None:
    run, step = (Pipeline.load(p, device="cpu") for p in (trained, trained / "unet/checkpoints/last.safetensors"))
    assert run.digests == step.digests


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "cannot be read by lightdiff"),
        ({"more": 1}, "more: "),
        ({"vae": {"architecture": "gothic"}}, "there is no gothic"),
        ({"vae": {"architecture": "kl", "channels": [8192, 8192], "latent_channels": 4}}, "does not fit its settings"),
        ({"unet": {"model": {"channels": [16, 15]}}}, "heads"),
    ],
)
def test_exported_folders_made_to_harm(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model = random_pipeline()
    write_plain(model, tmp_path)
    write_json(tmp_path / EXPORTED, about(model).model_dump() | change)
    with pytest.raises(UserError, match=message):
        Pipeline.load(tmp_path, device="cpu")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    write_json(tmp_path / EXPORTED, about(random_pipeline()).model_dump())
    with pytest.raises(UserError, match="those of onnx and web cannot be loaded again"):
        Pipeline.load(tmp_path, device="cpu")


def test_foreign_architectures_cannot_be_exported() -> None:
    with pytest.raises(UserError, match="is not one of lightdiff's: only those can be exported"):
        bundle(TEMPLATES / "vae.py", "mine.models:VAE")


def test_uploading(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up client: there is no network here."""
    called: list[Any] = []

    class Api:
        def create_repo(self, name: str, exist_ok: bool) -> None:
            called.append((name, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: str) -> str:
            called.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir())))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("lightdiff.extras.hub.library", lambda: type("Library", (), {"HfApi": Api}))
    address = export(trained, "safetensors", tmp_path / "out", samples=0, push="me/faces")
    files = ["README.md", "lightdiff.json", "unet.safetensors", "vae.safetensors"]
    assert (address, called) == ("https://hub/me/faces", [("me/faces", True), ("me/faces", files)])


def test_fetching(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(trained, "safetensors", tmp_path / "out", samples=0)
    asked: list[Any] = []

    class Library:
        @staticmethod
        def snapshot_download(name: str, allow_patterns: list[str]) -> str:
            asked.append((name, allow_patterns))
            return str(tmp_path / "out")

    monkeypatch.setattr("lightdiff.extras.hub.library", lambda: Library)
    assert Pipeline.load("hf://me/faces", device="cpu").resolution == (16, 16)
    assert asked == [("me/faces", ["*.json", "*.safetensors", "*.md"])]
