"""The command line: help, version, completion, what goes to which stream, and mistakes of typing."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightdiff
from lightdiff import settings
from lightdiff.cli import COMMANDS as ROWS
from lightdiff.data.index import read_index
from lightdiff.options import flag, flag_fields

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


# --- help ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_no_flag_is_cut_off_at_80_columns(helped, name):
    page = helped[0][f"80 {name}".strip()][1]
    assert [line for line in page.splitlines() if "…" in line] == []
    assert max(len(line.rstrip()) for line in page.splitlines()) <= 80
    assert flags_in(page) == flags_in(helped[0][f"200 {name}".strip()][1])


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_no_flag_is_cut_off_at_40_columns(helped, name):
    """There, each flag stands above its description, also one with a --no-."""
    page = helped[0][f"40 {name}".strip()][1]
    assert max(len(line) for line in page.splitlines()) <= 40
    assert flags_in(page) == flags_in(helped[0][f"200 {name}".strip()][1])
    assert "…" not in page
    assert name or set(COMMANDS) <= set(page.split("\n"))
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


def test_short_help_and_no_command_at_all(cli):
    assert cli("-h").code == 0
    assert "Usage: " in cli("scale", "-h").out
    nothing = cli()
    assert "train-vae" in nothing.out + nothing.err
    assert "Traceback" not in nothing.err


# --- version, python -m, completion -------------------------------------------------------------------------------


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


# --- what goes to which stream ------------------------------------------------------------------------------------


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


def test_a_stage_ends_with_its_time_and_the_next_command(run, cli, tmp_path):
    named, chain = tmp_path / "my faces", ["train-vae"]
    shutil.copytree(run, named)
    said = cli("scale", "--run", named)
    assert re.search(r"took 0:00:\d\d; next: lightdiff train-unet --run '[^']*/my faces'\n", said.stderr)
    assert cli("scale", "--run", named, "--quiet").err == ""
    while chain[-1] in STAGES:
        chain.append(ROWS[chain[-1]].then.removesuffix(" --run"))
    assert chain == [*STAGES, "report"]


def test_the_same_command_again_says_that_nothing_is_left_to_do(cli, run):
    for args in (("train-vae",), ("encode",), ("train-unet",)):
        again = cli(*args, "--run", run)
        assert again.code == 0
        assert "already" in again.err


# --- mistakes of typing -------------------------------------------------------------------------------------------


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
