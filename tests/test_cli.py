"""The command line: help, versions, completion, where a setting comes from, and what looking commands show."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import UNET_FLAGS

import lightdiff
from lightdiff import settings
from lightdiff.cli import COMMANDS as ROWS
from lightdiff.data.index import read_index
from lightdiff.options import PRESETS, flag, flag_fields, leaves

STAGES = {
    "train-vae": settings.TrainVAESettings,
    "encode": settings.EncodeSettings,
    "scale": settings.ScaleSettings,
    "train-unet": settings.TrainUNetSettings,
    "generate": settings.GenerateSettings,
}
MODELS = STAGES | {name: row.model for name, row in ROWS.items() if name not in STAGES}
COMMANDS = [*MODELS, "inspect", "show", "report", "presets", "import", "export", "pack"]
FIXED_FLAGS = (
    "--run --data --resolution --preset --steps --epochs --batch-size --micro-batch --lr --seed --device --settings "
    "--val-every --save-every --kl-beta --lpips-gamma --lpips-net --lpips-weights --only-mu --vae --latents --unet "
    "--num-images --num-steps --eta --out --name"
).split()
SHORT = ["train-vae", "train-unet", "generate"]  # --help shows only what is needed first
HEAVY = ("torch", "torchvision", "numpy", "PIL", "lpips")

ALL_HELP = f"""
import contextlib, io, json, os, sys
from lightdiff.cli import main

pages = {{}}
asked = [(), *((name, "--help-all" if name in {[*MODELS]!r} else "--help") for name in {COMMANDS!r})]
asked += [(f"short {{name}}", name, "--help") for name in {SHORT!r}]
for columns in ("200", "80", "40"):
    os.environ["COLUMNS"] = columns
    for *words, flag in [("--help",), *asked[1:]]:
        sys.argv = ["lightdiff", *words[-1:], flag]
        code, out = None, io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                main()
            except SystemExit as stop:
                code = stop.code or 0
        pages[" ".join([columns, *words[:1]])] = [code, out.getvalue()]
print(json.dumps([pages, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would change a terminal's width or colours."""
    out_of_the_way = ("TERMINAL_WIDTH", "COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS")
    kept = {name: value for name, value in os.environ.items() if name not in out_of_the_way}
    return kept | {"TERM": "xterm", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"} | changes


def python(*args: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        env=environment(**changes),
        cwd=Path(lightdiff.__file__).parent.parent,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def helped() -> tuple[dict[str, tuple[int, str]], list[str]]:
    """All pages of help, made in one fresh process, and the heavy modules that were imported for them."""
    done = python("-c", ALL_HELP)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    pages, heavy = json.loads(done.stdout)
    return pages, heavy


def flags_in(page: str) -> set[str]:
    """The flags that have a row of their own (a mention in another's help does not count)."""
    found: set[str] = set()
    for line in page.splitlines():
        row = re.match(r"│?\s*(?:\*\s+)?(?:-\w[,\s]+)?(--[\w.-]+)(?:[,/\s]+(--[\w.-]+))?", line)
        if row:
            found |= {name for name in row.groups() if name}
    return found


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["200", "80"])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_page_of_help_is_there(helped, name, columns):
    code, page = helped[0][f"{columns} {name}".strip()]
    assert code == 0
    assert f"Usage: lightdiff {name}".rstrip() in page


def test_help_imports_nothing_heavy(helped):
    assert helped[1] == []


@pytest.mark.parametrize("name", MODELS)
def test_every_setting_has_its_flag(helped, name):
    wanted = {f"--{flag(MODELS[name], path)}" for path in flag_fields(MODELS[name])} | {"--settings", "--dry-run"}
    assert wanted <= flags_in(helped[0][f"200 {name}"][1])


@pytest.mark.parametrize("name", MODELS)
def test_every_setting_is_described(helped, name):
    page = " ".join(re.sub("[│╭╮╰╯─]", " ", helped[0][f"200 {name}"][1]).split())
    for path, field in flag_fields(MODELS[name]).items():
        assert field.description, path
        assert field.description.split(";")[0].split(",")[0] in page, path


def test_what_is_read_from_the_latents_has_no_flag(helped):
    assert {"--shift", "--scale", "--only-mu"}.isdisjoint(flags_in(helped[0]["200 train-unet"][1]))


@pytest.mark.parametrize("name", MODELS)
def test_no_two_settings_share_a_flag(name):
    flags = [flag(MODELS[name], path) for path, _ in leaves(MODELS[name])]
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_no_flag_is_cut_off_at_80_columns(helped, name):
    page = helped[0][f"80 {name}".strip()][1]
    assert [line for line in page.splitlines() if "…" in line] == []
    assert max(len(line.rstrip()) for line in page.splitlines()) <= 80
    assert flags_in(page) == flags_in(helped[0][f"200 {name}".strip()][1])


@pytest.mark.parametrize("name", MODELS)
def test_no_flag_is_cut_off_at_40_columns(helped, name):
    """There, each flag stands above its description, also one with a --no-."""
    page = helped[0][f"40 {name}"][1]
    assert max(len(line) for line in page.splitlines()) <= 40
    assert flags_in(page) == flags_in(helped[0][f"200 {name}"][1])
    assert "\\[" not in page


@pytest.mark.parametrize("name", SHORT)
def test_help_begins_with_what_is_needed_first(helped, name):
    """On one screen, with an example that runs; no flag is cut in a terminal of half the usual width."""
    page = helped[0][f"80 short {name}"][1]
    wanted = [f"--{word}" for word in ROWS[name].start.split()]
    rows = re.findall(r"^│ (--[\w-]+)", page, re.MULTILINE)
    assert rows[: len(wanted)] == wanted
    assert page.index(" Start here ") < page.index(" More ")
    assert len(page.splitlines()) <= 32
    assert page == page.replace("…", "")
    hidden = int(re.search(r"the other (\d+) settings", page)[1])
    assert hidden == len(flag_fields(MODELS[name])) - len(wanted)
    example = re.search(r"Example: lightdiff (.*)", page)[1].split()
    assert {word for word in example if word.startswith("--")} <= set(wanted)
    narrow = helped[0][f"40 short {name}"][1]
    assert set(wanted) <= flags_in(narrow)


@pytest.mark.parametrize("name", MODELS)
def test_help_marks_what_is_required(helped, name):
    """Those flags, and no others; the run that is resumed, or a settings file, may say them too."""
    page = " ".join(re.sub("[│╭╮╰╯─]", " ", helped[0][f"200 {name}"][1]).split())
    wanted = {"train-vae": ["data"], "sweep": ["vary"], "edit": ["from"], "walk": ["between"]}.get(name, [])
    assert re.findall(r"--([\w-]+) (?:(?! --|\[default).)*\[required\]", page) == wanted


def test_help_shows_no_types_and_no_bounds(helped):
    pages = " ".join(page for key, (_, page) in helped[0].items() if key.split()[-1] in MODELS)
    assert re.findall(r"<(?:int|float|path|bool|str)>|; [<>]=? ", pages) == []


def test_fixed_flags_exist(helped):
    somewhere = set().union(*(flags_in(page) for _, page in helped[0].values()))
    assert set(FIXED_FLAGS) <= somewhere


def test_the_five_stages_come_first(helped):
    page = helped[0]["80"][1]
    listed = re.findall(r"^│ ([a-z][a-z-]*) ", page, flags=re.MULTILINE)
    assert listed[:5] == list(STAGES)
    assert sorted(listed) == sorted(COMMANDS)
    assert page.index("The five stages") < page.index("Looking at images and runs")


def test_a_stage_ends_with_its_time_and_the_next_command(run, cli, tmp_path):
    named, chain = tmp_path / "my faces", ["train-vae"]
    shutil.copytree(run, named)
    said = cli("scale", "--run", named)
    assert re.search(r"took 0:00:\d\d; next: lightdiff train-unet --run '[^']*/my faces'\n", said.stderr)
    assert cli("scale", "--run", named, "--quiet").err == ""
    while chain[-1] in STAGES:
        chain.append(ROWS[chain[-1]].then.removesuffix(" --run"))
    assert chain == [*STAGES, "report"]


def test_short_help_and_no_command_at_all(cli):
    assert cli("-h").code == 0
    assert "Usage: " in cli("scale", "-h").out
    nothing = cli()
    assert "train-vae" in nothing.out + nothing.err
    assert "Traceback" not in nothing.err


# --- version, python -m, completion ---------------------------------------------------------------------------------


def test_version(cli):
    result = cli("--version")
    assert (result.code, result.out, result.err) == (0, f"lightdiff {lightdiff.__version__}", "")


def test_python_dash_m():
    done = python("-m", "lightdiff", "--version")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, f"lightdiff {lightdiff.__version__}", "")


MAIN = "import sys; sys.argv[0] = 'lightdiff'; from lightdiff.cli import main; main()"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell):
    done = python("-c", MAIN, _LIGHTDIFF_COMPLETE=f"source_{shell}")
    assert done.returncode == 0, done.stderr
    assert "_LIGHTDIFF_COMPLETE" in done.stdout
    assert "lightdiff" in done.stdout


def test_show_completion_knows_the_shell_it_is_given():
    done = python("-c", MAIN, "--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert "complete -o default" in done.stdout


@pytest.mark.parametrize(
    ("words", "position", "wanted"),
    [("lightdiff tr", 1, "train-vae"), ("lightdiff train-vae --lpips-n", 2, "--lpips-net")],
)
def test_completion_completes(words, position, wanted):
    asked = {"_LIGHTDIFF_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    done = python("-c", MAIN, **asked)
    assert wanted in done.stdout.split()


# --- where a value comes from ---------------------------------------------------------------------------------------


def dry(cli, *args):
    with patch("lightdiff.extras.estimate.estimate"):  # which is tested by itself
        result = cli(*args, "--dry-run")
    assert result.code == 0, result.stderr
    assert result.err == ""
    return json.loads(result.stdout)


ROUND_TRIPS = [
    ("train-vae", "--data", "faces", "--resolution", "32", "--preset", "base", "--epochs", "2.5", "--no-flip"),
    ("train-vae", "--model.attention", "on", "--model.encoder-channels", "8,16", "--lpips-weights", "vgg.pth"),
    ("train-vae", "--preset", "original", "--background", "#102030", "--data", "a", "--data", "b"),
    ("scale", "--only-mu", "--normalize", "global", "--latents", "elsewhere"),
    ("generate", *"--name face --sampler ddim --eta 0.5 --ema 0 --out new --num-images 3".split()),
    ("demo", "--count", "20", "--seed", "3", "--device", "cpu"),
]


@pytest.mark.parametrize("args", ROUND_TRIPS, ids=" ".join)
def test_a_dry_run_can_be_given_back_as_settings(cli, tmp_path, args):
    flags = (*args, "--run", tmp_path / "run")
    first = dry(cli, *flags)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(first))
    assert dry(cli, args[0], "--settings", file) == first
    assert MODELS[args[0]].model_validate(first).model_dump(mode="json") == first
    assert not (tmp_path / "run").exists()  # a dry run makes nothing


@pytest.mark.parametrize(
    "args",
    [
        ("train-vae", "--lr", "0.01"),
        ("encode", "--dtype", "float32", "--shard-size", "5"),
        ("train-unet", "--model.attend-levels", "none", "--timesteps", "100"),
        ("train-unet", "--epochs", "3"),
    ],
    ids=" ".join,
)
def test_so_can_that_of_a_run_that_was_started(cli, run, tmp_path, args):
    first = dry(cli, *args, "--run", run)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(first))
    assert dry(cli, args[0], "--settings", file) == first


@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_the_settings_kept_in_a_run_can_be_given_back(cli, run, stage):
    saved = json.loads((run / stage / "settings.json").read_text())
    back = dry(cli, f"train-{stage}", "--settings", run / stage / "settings.json", "--run", run)
    assert {name: back[name] for name in saved} == saved | {"run": str(run)}
    anew = {"job", "restart", "from_step"} | ({"allow_missing"} if stage == "vae" else set())
    assert back.keys() - saved.keys() == anew  # said at each start


def test_flags_over_file_over_saved_run_over_preset_over_defaults(cli, run, tmp_path):
    """Each layer is added on top of the one before, and only it says something new."""
    file = tmp_path / "mine.toml"
    file.write_text("[model]\nencoder_width = 24\n[loop]\nlr = 0.03\n")

    def said(*args):
        found = dry(cli, "train-vae", *args)
        return found["model"]["encoder_width"], found["loop"]["lr"], found["loop"]["batch_size"]

    nowhere = ("--run", tmp_path / "new")
    assert said(*nowhere) == (32, 2e-3, 16)
    assert said(*nowhere, "--preset", "tiny") == (16, 2e-3, 16)
    assert said(*nowhere, "--preset", "tiny", "--settings", file) == (24, 0.03, 16)
    assert said("--run", run) == said("--run", run, "--preset", "tiny") == (16, 2e-3, 6)
    assert said("--run", run, "--preset", "tiny", "--settings", file) == (24, 0.03, 6)
    assert said("--run", run, "--preset", "tiny", "--settings", file, "--lr", "0.5") == (24, 0.5, 6)
    assert said("--run", run, "--settings", file, "--model.encoder-width", 40, "--batch-size", 7) == (40, 0.03, 7)
    refused = cli("train-vae", "--run", run, "--preset", "base", "--dry-run")  # rather than silently the saved one
    assert (refused.code, refused.out) == (2, "")
    assert "--preset base: this run holds another architecture" in refused.err


def test_a_unets_settings_have_the_same_order(cli, run, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"run": str(run), "model": {"width": 64}, "noise": {"timesteps": 50}}))
    said = dry(cli, "train-unet", "--preset", "tiny", "--settings", file, "--timesteps", 60)
    assert (said["model"]["width"], said["model"]["time_dim"], said["noise"]["timesteps"]) == (64, 128, 60)
    assert said["loop"]["steps"] == 3
    assert dry(cli, "train-unet", "--run", run)["run"] == str(run)


def test_a_stage_has_defaults_of_its_own(cli, tmp_path, run):
    assert dry(cli, "train-vae", "--run", tmp_path / "new")["loop"]["steps"] == 20_000
    (run / "unet").rename(run / "unet-before")
    said = dry(cli, "train-unet", "--run", run, "--lr", "0.1")["loop"]
    assert (said["steps"], said["lr"], said["batch_size"]) == (50_000, 0.1, 32)


def test_restart_forgets_the_saved_run(cli, run):
    said = dry(cli, "train-vae", "--run", run, "--restart")
    assert (said["restart"], said["images"]["data"], said["model"]["encoder_width"]) == (True, [], 32)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train-vae", "--steps", 3, "--epochs", 1), "--epochs replaces --steps: give only one of them"),
        (("generate", "--guidance-interval", "0,0.5"), "--guidance-interval does nothing at --guidance 1"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(cli, tmp_path, words, said):
    result = cli(*words, "--run", tmp_path / "none", "--dry-run")
    assert result.code == 2
    assert said in result.err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("command", ["encode", "scale", "train-unet", "generate"])
def test_a_run_folder_that_is_misspelled_is_named_rightly(cli, run, command):
    result = cli(command, "--run", run.with_name("rnu"))
    assert (result.code, result.err) == (
        2,
        f"error: there is no run folder {run.with_name('rnu')}; did you mean {run}?",
    )
    assert "did you mean" not in cli(command, "--run", run.with_name("other")).err


def test_another_objective_for_a_run_is_refused_as_such(cli, run):
    refused = (
        f"{run}/unet was started with --objective flow, not v: choose another --run, or leave that setting as it was"
    )
    assert cli("train-unet", "--run", run, "--objective", "v").err == f"error: {refused}"


def test_a_unet_on_another_runs_latents_finds_their_vae(cli, run, tmp_path):
    assert cli("train-unet", "--run", tmp_path / "more", "--latents", run, *UNET_FLAGS).code == 0
    few = ("--num-images", 1, "--num-steps", 1, "--device", "cpu", "--out", tmp_path / "out")
    assert cli("generate", "--run", tmp_path / "more", *few).code == 0
    assert (tmp_path / "out/00000.png").is_file()


def test_a_stage_s_folder_can_be_shown_and_drawn_with(cli, run, tmp_path):
    shown = cli("show", run / "unet").out
    assert "unet, written by lightdiff" in shown
    assert "health" not in shown  # that is of a run
    few = ("--num-images", 1, "--num-steps", 1, "--device", "cpu", "--out", tmp_path / "out")
    assert cli("generate", "--run", tmp_path, "--unet", run / "unet", *few).code == 0


def test_a_label_for_a_run_without_one_is_refused_in_words(cli, run):
    assert (
        f"error: {run}/unet was started without --label class:"
        in cli("train-unet", "--run", run, "--label", "class").err
    )


def test_the_later_of_steps_and_epochs_wins(cli, tmp_path, run):
    file = tmp_path / "mine.toml"
    file.write_text("[loop]\nepochs = 2\n")
    nowhere = ("train-vae", "--run", tmp_path / "new")
    assert dry(cli, *nowhere, "--settings", file)["loop"]["epochs"] == 2
    assert dry(cli, *nowhere, "--settings", file, "--steps", 9)["loop"]["epochs"] == 0
    assert dry(cli, *nowhere, "--settings", file, "--steps", 9)["loop"]["steps"] == 9
    assert dry(cli, "train-vae", "--run", run, "--epochs", 4)["loop"]["epochs"] == 4


def test_encode_takes_the_images_from_the_vae(cli, run, faces):
    said = dry(cli, "encode", "--run", run)["images"]
    assert (said["data"], said["resolution"], said["val_share"]) == ([str(faces)], 16, 0.2)
    assert dry(cli, "encode", "--run", run, "--no-flip")["images"] == said | {"flip": False}


def test_train_unet_takes_shape_and_scale_from_the_latents(cli, run):
    said = dry(cli, "train-unet", "--run", run)["latent"]
    index = read_index(run / "latents")
    assert (said["channels"], said["height"], said["width"]) == index.shape == (4, 8, 8)
    assert said["shift"] == index.statistics.shift
    assert said["scale"] == index.statistics.scale


# --- all five stages ------------------------------------------------------------------------------------------------


def test_all_stages_leave_what_they_should(trained):
    assert (trained / "vae" / "checkpoints" / "best.safetensors").is_file()
    assert (trained / "unet" / "checkpoints" / "last.safetensors").is_file()
    assert [json.loads(line)["step"] for line in (trained / "vae" / "metrics.jsonl").read_text().splitlines()][-1] == 3
    assert read_index(trained / "latents").statistics.count > 0
    assert sorted(p.name for p in (trained / "samples" / "0001").iterdir()) == [
        "00000.png",
        "00001.png",
        "grid.png",
        "settings.json",
    ]


def test_a_result_goes_to_stdout_and_words_to_stderr(cli, run):
    drawn = cli("generate", "--run", run, "--num-images", 1, "--num-steps", 2, "--device", "cpu", "--name", "a")
    assert drawn.code == 0
    assert drawn.stdout == f"{run / 'samples' / '0002'}\n"
    assert "1 images and a-grid.png are in" in drawn.err
    assert (run / "samples" / "0002" / "a-00000.png").is_file()
    assert cli("scale", "--run", run).stdout == f"{run / 'latents' / 'index.safetensors'}\n"


def test_the_same_command_again_says_that_nothing_is_left_to_do(cli, run):
    for args in (("train-vae",), ("encode",), ("train-unet",)):
        again = cli(*args, "--run", run)
        assert again.code == 0
        assert "already" in again.err


# --- show, presets, inspect -----------------------------------------------------------------------------------------


def test_presets_lists_all(cli):
    result = cli("presets", "--resolution", 32)
    assert result.code == 0
    lines = [line.strip("│┃ ").split() for line in result.stdout.splitlines()]
    names = [words[0] for words in lines if "VAE" in words]
    assert names == list(PRESETS)
    assert result.out.count("U-Net") == len(PRESETS)
    assert result.err == ""


def test_presets_of_a_size_that_fits_none(cli):
    result = cli("presets", "--resolution", 30)
    assert (result.code, result.err) == (0, "")
    assert "needs images divisible by 8" in result.out  # the original VAE halves three times


@pytest.mark.parametrize("resolution", [0, -5])
def test_presets_of_no_size(cli, resolution):
    result = cli("presets", f"--resolution={resolution}")
    assert (result.code, result.out) == (2, "")
    assert "--resolution" in result.err


def test_presets_numbers_are_plausible(cli):
    """Parameters against a count of what is built, and the original's against what its authors said."""
    from lightdiff.models.vae import VAE
    from lightdiff.options import build, preset_layer

    rows = [re.split(r" *[│┃] *", line)[1:-1] for line in cli("presets", "--resolution", 256).stdout.splitlines()]
    kinds = {kind: [row for row in rows if len(row) == 9 and row[1] == kind] for kind in ("VAE", "U-Net")}
    sizes = {kind: [float(row[3].removesuffix(" M")) for row in found] for kind, found in kinds.items()}
    for found in sizes.values():
        assert found[:5] == sorted(found[:5])  # tiny, small, base-s, base, base-l
    original = PRESETS.index("original")
    assert (sizes["VAE"][original], sizes["U-Net"][original]) == (21.48, 201.43)
    assert sizes["VAE"][PRESETS.index("kl-f8")] == 83.65  # as Stable Diffusion's VAE has
    for row in (*kinds["VAE"], *kinds["U-Net"]):
        fixed, image = (float(cell.removesuffix(" MB")) for cell in row[5:7])
        parameters = float(row[3].removesuffix(" M"))
        adamw = row in (kinds["VAE"][original], kinds["U-Net"][original], kinds["VAE"][PRESETS.index("kl-f8")])
        # Bytes a parameter: 20, or 16 for Muon's, which are all but some small weights, and a U-Net's time embedding
        each = 20 if adamw else 16.1 if row in kinds["VAE"] else 16.6
        assert fixed == pytest.approx(each * parameters, rel=0.02, abs=0.7)
        assert image > 0
        assert float(row[4].replace(",", "")) > 0 < float(row[8].replace(",", ""))
    chosen = build(settings.TrainVAESettings, [preset_layer("vae", "tiny")]).model.resolved(256)
    assert f"{sum(p.numel() for p in VAE(chosen).parameters()) / 1e6:.2f}" == f"{sizes['VAE'][0]:.2f}"


@pytest.mark.parametrize("name", ["tiny", "small", "base", "original"])
def test_every_preset_can_be_chosen(cli, tmp_path, run, name):
    vae = dry(cli, "train-vae", "--run", tmp_path / "new", "--preset", name)
    (run / "unet").rename(run / "unet-before")
    unet = dry(cli, "train-unet", "--run", run, "--preset", name)
    if name == "small":  # is the default
        assert vae == dry(cli, "train-vae", "--run", tmp_path / "new")
        assert dry(cli, "train-unet", "--run", run)["preset"] == "tiny"  # the VAE's
    assert [made["model"]["architecture"] == "original" for made in (vae, unet)] == 2 * [name == "original"]


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
    model = MODELS[f"train-{stage}"]
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train-vae", "--st\x1b[31mps", "3"], r"No such option: --st\x1b[31mps"),
        (["train-vae", "--device", "\x1b]0;x\x07"], r"\x1b]0;x\x07"),
        (["train-vae", "--lr", "\x1b[2J"], r"--lr: \x1b[2J is no number"),
        (["sho\x1b[31m"], r"No such command 'sho\x1b[31m'"),
        (["show", "\x1b[31mrun"], r"\x1b[31mrun does not exist"),
        (["report", "runs [/old]\x1b[31m"], r"runs [/old]\x1b[31m is no run folder"),
        (["generate", "--run", "\x1b[31mrun"], r"\x1b[31mrun"),
    ],
)
def test_control_characters_of_what_was_typed_are_shown_escaped(cli, words, message):
    result = cli(*words)
    assert result.code == 2
    assert "\x1b" not in result.stderr
    assert message.replace(r"\x1b", "\\x1b") in result.err
    assert result.stderr.startswith("error: ")


def test_mistakes_of_typing_say_where_help_is(cli):
    result = cli("train-vae", "--stepz", 3)
    assert (result.code, "--steps" in result.err, "'lightdiff train-vae --help'" in result.err) == (2, True, True)
    assert len(cli("train-vae", "--device", "x" * 5000).stderr) < 1000
    assert cli().code == 2
    assert (cli("--version").code, cli("train-vae", "--help").code) == (0, 0)
