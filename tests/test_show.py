"""What `show` and `inspect` say of a run, a stage, a checkpoint, latents and a folder of images; also as JSON."""

import json

import pytest

from lightdiff.cli import COMMANDS
from lightdiff.data.index import read_index
from lightdiff.options import flag, flag_fields


def test_show_a_run(cli, trained):
    result = cli("show", trained)
    assert (result.code, result.err) == (0, "")
    for part in ("vae/checkpoints/last.safetensors", "latents", "unet/checkpoints/last.safetensors"):
        assert str(trained / part) in result.out
    assert "vae, written by lightdiff" in result.out
    assert "val_loss" in result.out
    assert "complete" in result.out
    parts = [result.out.index(part) for part in ("health", "vae/checkpoints", "unet/checkpoints")]
    assert parts == sorted(parts)


def test_a_stage_s_folder_can_be_shown_and_drawn_with(cli, run, tmp_path):
    shown = cli("show", run / "unet").out
    assert "unet, written by lightdiff" in shown
    assert "health" not in shown  # that is of a run
    few = ("--num-images", 1, "--num-steps", 1, "--device", "cpu", "--out", tmp_path / "out")
    assert cli("generate", "--run", tmp_path, "--unet", run / "unet", *few).code == 0


@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_show_puts_settings_that_differ_first(cli, trained, stage):
    file = trained / stage / "checkpoints" / "last.safetensors"
    page = cli("show", file, "--all").stdout
    rows = [line.split() for line in page.splitlines() if line.startswith("--")]
    differs = [len(row) == 3 for row in rows]
    assert differs == sorted(differs, reverse=True)
    table = {row[0]: row[1:] for row in rows}
    assert table["--steps"] == ["3", "20000" if stage == "vae" else "50000"]
    assert table["--batch-size"] == ["6", "16" if stage == "vae" else "32"]
    assert table["--lr"] == ["0.002"]
    short = cli("show", file).stdout
    assert [line.split() for line in short.splitlines() if line.startswith("--")] == [r for r in rows if len(r) == 3]
    assert f"{len(differs) - sum(differs)} more settings are at their defaults (--all)" in short
    model = COMMANDS[f"train-{stage}"].model
    assert set(table) == {f"--{flag(model, path)}" for path in flag_fields(model) if path[0] not in model.NOT_SAVED}


def test_show_as_json(cli, trained):
    parts = json.loads(cli("show", trained, "--json").stdout)
    assert [part.get("stage", "latents") for part in parts] == ["vae", "latents", "unet"]
    assert parts[0]["path"] == str(trained / "vae" / "checkpoints" / "last.safetensors")
    assert (parts[0]["step"], parts[2]["step"]) == (3, 3)
    assert parts[2]["lineage"]["vae"] == parts[1]["vae_digest"]
    assert parts[0]["settings"]["images"]["resolution"] == 16
    file = json.loads(cli("show", trained / "vae" / "checkpoints" / "best.safetensors", "--json").stdout)
    assert [part["stage"] for part in file] == ["vae"]


@pytest.mark.parametrize("below", ["latents", ""])
def test_show_latents(cli, run, below):
    place = run / below if below else run
    parts = json.loads(cli("show", place, "--json").stdout)
    assert any("statistics" in part for part in parts)
    assert "24 images as 4 x 8 x 8" in cli("show", place).out


def test_show_latents_without_a_scale(cli, run):
    latents = run / "latents"
    read_index(latents).model_copy(update={"statistics": None}).write(latents / "index.safetensors")
    assert "run 'lightdiff scale'" in cli("show", run / "latents").out


def test_show_takes_brackets_in_names_as_they_stand(cli, run, tmp_path):
    place = run.rename(tmp_path / "run[bold]1")
    result = cli("show", place)
    assert (result.code, result.err) == (0, "")
    assert str(place) in result.out


def test_inspect_as_json(cli, faces):
    result = cli("inspect", faces, "--json")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.stdout)
    assert (report["images"], report["train"] + report["val"], report["bad"]) == (24, 24, [])
    assert report["formats"] == {"PNG": 24}
    assert cli("inspect", faces).out.count("PNG") == 1
