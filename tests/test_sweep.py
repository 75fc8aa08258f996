"""sweep: which results are made, shared and reused; the sheets, pixel by pixel; resuming; what is refused."""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from conftest import call, succeed
from PIL import Image

from lightdiff.checkpoint import Checkpoint
from lightdiff.data.index import read_index
from lightdiff.defaults import with_intervals
from lightdiff.errors import Stopped, UserError
from lightdiff.extras.sheet import Heading, contact_sheet
from lightdiff.extras.sweep.axes import parse_axis
from lightdiff.extras.sweep.base import reset_derived
from lightdiff.settings import TrainVAESettings, with_changes

BOTH = ["--vary", "kl-beta=0.003,1", "--vary", "objective=flow,eps", "--num-images", 2, "--set", "num-steps=2"]


def made(folder: Path) -> dict[str, int]:
    """How many folders of results there are, by kind."""
    kinds = [path.name.split("-")[0] for path in folder.iterdir() if path.is_dir() and "-" in path.name]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def written(folder: Path) -> dict[str, int]:
    """When each file below a folder was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def sweep_json(folder: Path) -> dict:
    return json.loads((folder / "sweep.json").read_text())


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def base(trained, tmp_path_factory) -> Path:
    return Path(shutil.copytree(trained, tmp_path_factory.mktemp("swept") / "run"))


@pytest.fixture(scope="module")
def swept(base):
    """A VAE's setting by a U-Net's; the first value of each is the base's."""
    result = succeed("sweep", "--run", base, *BOTH)
    return base / "sweeps" / "kl-beta-by-objective", result


# --- what is made, and what is shared -----------------------------------------------------------------------------


def test_cells_share_what_comes_before_the_setting_that_differs(swept, base):
    folder, result = swept
    assert made(folder) == {"latents": 1, "samples": 4, "unet": 3, "vae": 1}  # the others are the base's
    assert "to make: 1 VAE of 3 steps, 1 set of latents, 3 U-Nets of 3 steps, 4 sets of samples" in result.err
    cells = sweep_json(folder)["cells"]
    assert [tuple(cell["values"].values()) for cell in cells] == [
        ("0.003", "flow"),
        ("0.003", "eps"),
        ("1", "flow"),
        ("1", "eps"),
    ]
    places = [cell["folders"] for cell in cells]
    assert places[0]["vae"] == places[1]["vae"] == str(base / "vae" / "checkpoints" / "best.safetensors")
    assert places[0]["latents"] == places[1]["latents"] == str(base / "latents")
    assert places[0]["unet"] == str(base / "unet" / "checkpoints" / "last.safetensors")
    assert places[2]["vae"] == places[3]["vae"] != places[0]["vae"]
    assert places[2]["latents"] == places[3]["latents"]
    assert len({place["samples"] for place in places}) == len({place["unet"] for place in places}) == 4


def test_lineage_and_settings_are_those_of_the_cell(swept, base):
    folder, _ = swept
    for cell in sweep_json(folder)["cells"]:
        beta, objective = cell["values"].values()
        vae, latents, unet = (Path(cell["folders"][kind]) for kind in ("vae", "latents", "unet"))
        vae = vae / "vae" / "checkpoints" / "best.safetensors" if vae.is_dir() else vae
        unet = unet / "unet" / "checkpoints" / "last.safetensors" if unet.is_dir() else unet
        index = read_index(latents if (latents / "index.safetensors").is_file() else latents / "latents")
        settings = Checkpoint(unet).metadata.settings
        assert Checkpoint(vae).metadata.settings["loss"]["kl_beta"] == float(beta)
        assert Checkpoint(unet).metadata.lineage == {"vae": index.vae_digest, "latents": index.digest}
        assert settings["target"]["objective"] == objective
        assert settings["noise"]["schedule"] == ("flow" if objective == "flow" else "cosine")  # follows what is varied
        assert settings["latent"]["shift"] == index.statistics.shift
        assert {name: Checkpoint(vae).metadata.metrics[name] for name in ("val_psnr", "val_loss")}.items() <= cell[
            "metrics"
        ]["vae"].items()


def test_a_repeated_sweep_makes_nothing(swept, base):
    folder, _ = swept
    before = written(folder)
    again = succeed("sweep", "--run", base, *BOTH)
    assert "nothing is left to make" in again.err
    now = written(folder)
    assert {Path(name).name for name in now if now[name] != before.get(name)} == {
        "sweep.json",
        "sheet.png",
        "sheet-reconstructions.png",
    }
    assert again.stdout == f"{folder / 'sheet-reconstructions.png'}\n{folder / 'sheet.png'}\n"


def test_more_values_keep_what_is_there_and_the_sheets_of_before(swept, base):
    folder, _ = swept
    before = pixels(Image.open(folder / "sheet.png"))
    there = {path.name for path in folder.iterdir() if (path / "done").is_file()}
    words = ["kl-beta=0.003,1,2" if word == "kl-beta=0.003,1" else word for word in BOTH]
    result = succeed("sweep", "--run", base, *words)
    assert "already made: 1 VAE of 3 steps, 1 set of latents, 3 U-Nets of 3 steps, 4 sets" in result.err
    assert "to make: 1 VAE of 3 steps, 1 set of latents, 2 U-Nets of 3 steps, 2 sets of samples" in result.err
    assert there < {path.name for path in folder.iterdir() if (path / "done").is_file()}
    assert (pixels(Image.open(folder / "sheets.old-1" / "sheet.png")) == before).all()
    assert f"the sheets of other values have been moved to {folder / 'sheets.old-1'}" in result.err


def test_a_sampler_s_setting_trains_nothing(run):
    succeed("sweep", "--run", run, "--vary", "sampler=ddim,heun", "--set", "num-steps=2", "--num-images", 1)
    assert made(run / "sweeps" / "sampler") == {"samples": 2}


def test_another_scaling_reads_the_same_latents(run):
    done = succeed("sweep", "--run", run, "--vary", "normalize=channel,global", "--num-images", 1, "--unet-steps", 1)
    folder = run / "sweeps" / "normalize"
    assert made(folder) == {"latents": 1, "samples": 2, "unet": 2}
    assert "encode " not in done.err  # nothing is encoded again
    (latents,) = folder.glob("latents-*")
    shard = "shard-00000.safetensors"
    assert (latents / "latents" / shard).samefile(run / "latents" / shard)
    assert len(read_index(latents / "latents").statistics.scale) == 1
    assert len(read_index(run / "latents").statistics.scale) == 4
    assert {cell["settings"]["train-unet"]["loop.steps"] for cell in sweep_json(folder)["cells"]} == {1}


def test_what_follows_from_a_varied_setting_follows(run):
    words = ("--vary", "model.encoder-width=16,24", "--until", "vae", "--vae-steps", 1, "--num-images", 2)
    result = succeed("sweep", "--run", run, *words)
    folder = run / "sweeps" / "model.encoder-width"
    assert made(folder) == {"vae": 2}
    found = [
        Checkpoint(vae / "vae" / "checkpoints" / "last.safetensors").metadata.settings["model"]["encoder_channels"]
        for vae in folder.glob("vae-*")
    ]
    assert sorted(found) == [[16, 16], [24, 24]]
    assert result.stdout == f"{folder / 'sheet-reconstructions.png'}\n"


def test_intervals_follow_from_the_steps_unless_they_were_chosen():
    loop = {"steps": 500, "max_passes": 0.0, "warmup_steps": 7, "val_every": 50, "save_every": 50}
    found = reset_derived(TrainVAESettings.model_validate({"loop": loop})).loop
    assert (found.warmup_steps, found.val_every, found.save_every) == (7, None, None)
    shorter = with_intervals(with_changes(found, steps=20), 20, {})
    assert (shorter.warmup_steps, shorter.val_every, shorter.save_every) == (7, 2, 2)


def test_an_interrupted_sweep_resumes(run):
    from lightdiff.stages import train_unet

    words = ("sweep", "--run", run, "--vary", "density=uniform,logit-normal", "--num-images", 1, "--unet-steps", 2)
    calls = []

    def stopping(settings):
        calls.append(settings)
        if len(calls) == 2:
            raise Stopped("stopped; run the same command again to go on", 130)
        return whole(settings)

    whole = train_unet.run
    with patch.object(train_unet, "run", stopping):
        assert call(*words).code == 130
    folder = run / "sweeps" / "density"
    assert not (folder / "sheet.png").exists()
    first = written(calls[0].run)
    result = succeed(*words)
    assert "already made: 1 U-Net of 2 steps, 1 set of samples" in result.err
    assert "to make: 1 U-Net of 2 steps, 1 set of samples" in result.err
    assert written(calls[0].run) == first


# --- the sheets ---------------------------------------------------------------------------------------------------


def test_a_cell_shows_what_generate_draws(swept, tmp_path):
    folder, _ = swept
    sheet = pixels(Image.open(folder / "sheet.png"))
    for i, cell in enumerate(sweep_json(folder)["cells"][:4]):
        place = cell["folders"]
        source = Path(place["vae"])
        words = ("--num-images", 2, "--num-steps", 2, "--device", "cpu", "--precision", "fp32")
        flags = ("--unet", place["unet"], "--vae", source, "--out", tmp_path / str(i))
        succeed("generate", "--run", tmp_path, *flags, *words)
        for name in ("00000.png", "00001.png"):
            image = Image.open(tmp_path / str(i) / name)
            assert (pixels(image) == pixels(Image.open(Path(place["samples"]) / name))).all()
            assert contains(sheet, pixels(image.resize((64, 64), Image.Resampling.NEAREST)))


def contains(whole: np.ndarray, part: np.ndarray) -> bool:
    height, width = part.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(whole, (height, width), (0, 1))[..., ::8, ::8]
    target = part[::8, ::8].transpose(2, 0, 1)
    places = np.argwhere((windows == target).all((2, 3, 4)))
    return any((whole[y : y + height, x : x + width] == part).all() for y, x in places)


def test_pictures_lie_at_the_crossing_of_their_row_and_column():
    rng = np.random.default_rng(0)

    def picture():
        return Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8))

    cells = [[[picture() for _ in range(3)] for _ in "ab"] for _ in "xyz"]
    sheet = contact_sheet("c", Heading("--rows", "xyz"), Heading("--columns", "ab"), cells, across=2)
    found = pixels(sheet)
    places = []
    for line in cells:
        for cell in line:
            for image in cell:
                part = pixels(image.resize((80, 80), Image.Resampling.NEAREST))  # 20 x 4: at least 64
                corners = np.argwhere((found[:-79, :-79] == part[0, 0]).all(2))
                here = [(y, x) for y, x in corners if (found[y : y + 80, x : x + 80] == part).all()]
                assert len(here) == 1
                places += here
    grid = np.array(places).reshape(3, 2, 3, 2)  # rows, columns, pictures, (y, x)
    assert (grid[:, :, 1, 1] - grid[:, :, 0, 1] == 82).all()
    assert (grid[:, :, 2, 0] - grid[:, :, 0, 0] == 82).all()
    assert (np.diff(grid[..., 0], axis=0) == 162 + 14).all()
    assert (np.diff(grid[..., 1], axis=1) == 162 + 14).all()
    assert (grid[:, :, 0, 0] == grid[:, :1, 0, 0]).all()
    assert sheet.height == grid[2, 0, 2, 0] + 80 + 16
    assert sheet.width == grid[0, 1, 1, 1] + 80 + 16


def test_reconstructions_are_of_the_vae_s_settings_alone(swept, base):
    folder, _ = swept
    succeed("sweep", "--run", base, *BOTH)
    sheet = Image.open(folder / "sheet-reconstructions.png")
    assert sheet.height == 16 + 14 + 2 * 24 + 3 * 64 + 2 * 14 + 16  # originals, and a row for each beta
    image = sorted((p for p in Path(data_folder(base)).rglob("*.png")), key=str)
    assert any(contains(pixels(sheet), pixels(Image.open(p).resize((64, 64), Image.Resampling.NEAREST))) for p in image)


def data_folder(base: Path) -> str:
    return json.loads((base / "vae" / "settings.json").read_text())["images"]["data"][0]


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--vary: one setting or two can be varied, each as in --vary kl-beta=1e-4,1e-2"),
        (["--vary", "kl-beta"], "--vary kl-beta: two values or more are needed, kl-beta=VALUE,VALUE"),
        (["--vary", "kl-beta=1,,2"], "--vary kl-beta=1,,2: a value is missing"),
        (["--vary", "kl-bete=1,2"], "--vary kl-bete: no stage has such a setting to vary; similar ones: kl-beta"),
        (["--vary", "train-unet.kl-beta=1,2"], "--vary train-unet.kl-beta: train-unet has no such setting"),
        (["--vary", "lr=1,2"], "--vary lr: several stages have this setting; choose one: train-vae.lr or"),
        (["--vary", "out=a,b"], "--vary out: no stage has such a setting to vary"),
        (["--vary", "kl-beta=1,-2"], "--kl-beta: Input should be greater than or equal to 0 (found -2.0)"),
        (["--vary", "objective=eps,noise"], "--objective: Input should be 'eps', 'x0', 'v' or 'flow' (found noise)"),
        (["--vary", "model.channels=32,64"], "'model.channels=32,64;64,128'"),
        (["--vary", "model.channels=32,64;48,50"], "heads: 4 does not divide the width 50"),
        (["--vary", "num-steps=10,5000"], "--num-steps: "),
        (["--vary", "guidance=1,3"], "--guidance needs a --class to guide to"),
        (["--vary", "train-vae.resolution=16,17"], "--resolution: 17 is not divisible by 2"),
        (["--vary", "kl-beta=1,2", "--vary", "kl-beta=3,4"], "--vary kl-beta: it is varied twice"),
        (["--vary", "objective=flow,x0", "--until", "vae"], "--until vae: objective belongs to train-unet"),
        (["--vary", "lpips-gamma=0,1", "--set", "lpips-weights=/nowhere"], "--lpips-weights: there is no file"),
    ],
)
def test_errors_are_reported_before_any_work(run, words, message):
    result = call("sweep", "--run", run, *words)
    assert (result.code, result.stdout) == (2, "")
    assert message in result.err
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (run / "sweeps").exists()


def test_a_dry_run_prints_what_would_be_made_and_makes_nothing(run):
    result = call("sweep", "--run", run, "--vary", "kl-beta=1e-3,1e-1", "--vary", "num-steps=1,2", "--dry-run")
    assert result.code == 0
    assert json.loads(result.stdout) == {"run": str(run), "vary": ["kl-beta=1e-3,1e-1", "num-steps=1,2"]}
    assert "to make: 2 VAEs of 3 steps, 2 sets of latents, 2 U-Nets of 3 steps, 4 sets of samples" in result.err
    assert not (run / "sweeps").exists()


def test_losses_with_different_definitions_are_no_columns(run):
    result = call("sweep", "--run", run, "--vary", "objective=flow,eps", "--num-images", "1", "--set", "num-steps=1")
    assert result.code == 0
    assert "unet val_loss" not in result.err
    assert "losses of different objectives" in result.err
    result = call("sweep", "--run", run, "--vary", "model.blocks=1,2", "--num-images", "1", "--set", "num-steps=1")
    assert "unet val_loss" in result.err


def test_a_base_that_lacks_something(run, tmp_path):
    nothing = call("sweep", "--run", tmp_path / "none", "--vary", "kl-beta=1,2")
    assert (nothing.code, "has no VAE to take settings from" in nothing.err) == (2, True)
    shutil.rmtree(run / "unet")
    no_unet = call("sweep", "--run", run, "--vary", "kl-beta=1,2")
    assert (no_unet.code, "train one first, or stop at the VAEs with --until vae" in no_unet.err) == (2, True)


@pytest.mark.parametrize(
    ("argument", "stage", "values"),
    [
        ("--kl_beta=1e-4, 1", "train-vae", (1e-4, 1.0)),
        ("model.attend-levels=none;0,1", "train-unet", ([], ["0", "1"])),
        ("train-vae.model.encoder-width=8,16", "train-vae", (8, 16)),
        ("flip=on,off", None, None),
        ("only-mu=on,off", "scale", ("on", "off")),
        ("encode.flip=on,off", "encode", ("on", "off")),
        ("class=a,b;c", "generate", (["a", "b"], ["c"])),
    ],
)
def test_names_and_values_as_they_are_typed(argument, stage, values):
    if stage is None:
        with pytest.raises(UserError, match=r"train-vae\.flip or encode\.flip"):
            parse_axis(argument)
    else:
        assert (parse_axis(argument).stage, parse_axis(argument).values) == (stage, values)
