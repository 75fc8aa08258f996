"""The pages: generated ones are current, links lead somewhere, commands have the options shown."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest
import typer
from conftest import UNET_FLAGS, VAE_FLAGS, succeed
from oracles import GOLDEN

from lightdiff.cli import app
from lightdiff.data.latents import LatentSet

ROOT = Path(__file__).parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if page.is_file()]
FENCE = re.compile(r"^( *)(```+|~~~+)([^\n]*)\n(.*?)^ *\2[`~]*[ ]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)")

SMALL = {  # put behind each command, where the last word counts: the same thing, in a second
    "train-vae": VAE_FLAGS,
    "encode": ["--workers", "0", "--device", "cpu"],
    "train-unet": UNET_FLAGS,
    "generate": ["--num-images", "2", "--num-steps", "2", "--device", "cpu"],
    "demo": ["--resolution", "16", "--count", "16", "--vae-steps", "1", "--unet-steps", "1", "--device", "cpu"],
}
INSTEAD = {  # what exists after the few steps above, or in the small checkpoints of the original scripts
    "--from-step 10000": "--from-step 2",
    "--guide-with step-10000": "--guide-with step-2",
    "runs/faces --guidance 2": "runs/faces --guidance 2 --guide-with step-2",
    "--ema 0.99": "--ema 0.9999",
    "--frames 24": "--frames 2",
    "--resolution 256": "--resolution 64",
}
ONLY_PARSED = {  # commands that are not run here, and why
    r"--nproc-per-node": "several processes: test_launch.py and test_ranks.py run them",
    r"^evaluate ": "published weights: test_evaluate.py runs it with made-up ones",
    r"--init-from runs/original": "a network of 201 million weights: test_original.py reads smaller ones",
    r"runs/borrowed": "a VAE of others: test_import_vae.py imports small ones",
    r"--to web|--track": "other libraries: nox -s hub runs the tests of both",
    r"^report --live": "it serves until Ctrl-C: test_live.py runs it",
    r"^sweep ": "it trains many times: its own tests run it",
}
WITH_EDITS = {  # what works once the lines of how-lightdiff-is-built.md are written
    "generate --run runs/demo --sampler mine --num-steps 10",
    "train-unet --run runs/sine --latents runs/demo --objective eps --schedule sine --steps 1000",
    "train-unet --run runs/back --latents runs/demo --objective back --steps 1000",
    "generate --run runs/back",
    "train-vae --data faces --run runs/tv --tv-weight 0.1",
    "train-vae --data toy.shapes --run runs/shapes --tv-weight 0.1",
    "encode --run runs/shapes",
    "train-vae --run runs/patches --data photos --settings patches.toml",
    "encode --run runs/patches",
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def make_settings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_settings", ROOT / "docs/reference/make_settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prose(text: str) -> str:
    """A page without its fenced blocks and code spans, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


@lru_cache
def anchors(page: Path) -> set[str]:
    """The anchors that a repository browser gives a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?)\s*#*$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        base = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        n, anchor = 0, base
        while anchor in found:
            n += 1
            anchor = f"{base}-{n}"
        found.add(anchor)
    return found


def commands(text: str) -> list[list[str]]:
    """The words of each lightdiff command in a page's fenced blocks, from the command's name on."""
    return [words for _, words in launched(text)]


def launched(text: str) -> list[tuple[str, list[str]]]:
    """The same, each with what starts it: nothing, or torchrun or srun with their options."""
    found = []
    for _, _, language, block in FENCE.findall(text):
        if language.strip() not in ("", "console", "bash", "sh", "shell"):
            continue
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            for part in re.split(r"&&|\|\||[;|]", line.strip().removeprefix("$ ")):
                starter = r"(?:python3? -m )?|srun (?:.* )?|torchrun .*-m (?:-- )?"
                if match := re.match(rf"({starter})lightdiff(?: (.*))?$", part.strip()):
                    words = shlex.split(match[2] or "", comments=True)
                    end = next((i for i, word in enumerate(words) if word in (">", ">>", "2>")), len(words))
                    found.append((match[1], words[:end]))
    return found


def parse(words: list[str]) -> None:
    """Let the command line parse these words, as far as that goes without running anything.

    Raises:
        LookupError: For an unknown command; what the command line raises, for a wrong, missing or unknown option.
    """
    group = typer.main.get_command(app)
    options = {name for parameter in group.params for name in parameter.opts} | {"-h", "--help"}
    while words and words[0] in options:
        words = words[1:]
    if words:
        if words[0] not in group.commands:
            raise LookupError(f"No such command {words[0]}")
        group.commands[words[0]].make_context(words[0], words[1:])


def test_settings_page_is_current() -> None:
    module = make_settings()
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run docs/reference/make_settings.py"


def test_settings_page_has_every_command_with_generated_options() -> None:
    described = set(make_settings().COMMANDS)
    group = typer.main.get_command(app)
    with_dry_run = {n for n, c in group.commands.items() if any("--dry-run" in p.opts for p in c.params)}
    assert described == with_dry_run


def test_check_tells_a_stale_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_settings()
    stale = tmp_path / "settings.md"
    stale.write_text("old", encoding="utf-8")
    monkeypatch.setattr(module, "PAGE", stale)
    monkeypatch.setattr("sys.argv", ["make_settings.py", "--check"])
    assert module.main() == 1
    assert stale.read_text(encoding="utf-8") == "old"
    monkeypatch.setattr("sys.argv", ["make_settings.py"])
    assert module.main() == 0
    monkeypatch.setattr("sys.argv", ["make_settings.py", "--check"])
    assert module.main() == 0


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            broken.append(target)
    assert not broken


@each_page
def test_names_in_links_are_those_of_the_code(page: Path) -> None:
    """A link such as [`EMA.decay_at`](ema.py) leads to a file that defines each of these names."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    missing = []
    for names, file in re.findall(r"\[`([\w.]+)`\]\(([^)#]+\.py)\)", text):
        code = (page.parent / file).read_text(encoding="utf-8")
        missing += [n for n in names.split(".") if not re.search(rf"^ *(?:(?:def|class) )?{n}\b *[(:=\[]", code, re.M)]
    assert not missing


@each_page
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = []
    for words in commands(page.read_text(encoding="utf-8")):
        if shlex.join(words) in WITH_EDITS:
            continue
        try:
            parse(words)
        except typer.Exit:  # --help, --version
            pass
        except Exception as error:
            wrong.append(f"{shlex.join(words)}: {error}")
    assert not wrong


def test_wrong_commands_are_noticed() -> None:
    assert commands("```console\nlightdiff scale --only-mu \\\n  --run a\n```\n") == [
        ["scale", "--only-mu", "--run", "a"]
    ]
    for words in (["scale", "--onlymu"], ["train-vea"], ["train-vae", "--preset", "huge"], ["generate", "--eta", "x"]):
        with pytest.raises(Exception, match=r"No such|Invalid value|is not|valid|is no number"):
            parse(words)


def runnable(page: Path) -> list[list[str]]:
    """The commands of a page that are run here."""
    found = [words for starter, words in launched(page.read_text(encoding="utf-8")) if not starter]
    skipped = "|".join(ONLY_PARSED)
    return [w for w in found if shlex.join(w) not in WITH_EDITS and not re.search(skipped, shlex.join(w))]


def smaller(words: list[str]) -> list[str]:
    """A command that does the same with next to no work."""
    line = shlex.join(words)
    for said, instead in INSTEAD.items():
        line = line.replace(said, instead)
    few = SMALL.get(words[0], [])
    if "--settings" in words:  # of an architecture that has no preset
        few = [word for word in few if word not in ("--preset", "tiny")]
    return [*shlex.split(line), *few]


def folders_made(page: list[list[str]]) -> set[str]:
    """The folders that a page's commands make from the start, so that none may be there before."""
    found: dict[str, str] = {}
    for words in page:
        run = words[words.index("--run") + 1] if "--run" in words else ""
        if words[0] == "train-vae" and "--data" in words:
            found.setdefault(run, run)
        elif words[0] == "train-unet":
            found.setdefault(run, f"{run}/unet")
        else:
            found.setdefault(run, "")
    return set(found.values()) - {""}


@pytest.fixture
def place(tmp_path: Path, trained: Path, faces: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages mention: images, finished runs, old checkpoints; it is the home folder, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("faces", "photos", "pets"):
        shutil.copytree(faces, name)
    images = sorted(faces.rglob("*.png"))
    for number, image in enumerate(images):
        scene = Path("scenes", ("coast", "forest")[number % 2])
        scene.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, scene / f"{number}.png")
    shutil.copy(images[0], "me.jpg")  # what a file is, its content says
    shutil.copy(images[1], "mask.png")
    shutil.make_archive("faces", "zip", "photos")
    shutil.make_archive("shards/faces-0", "tar", "photos")
    for name in ("runs/faces", "runs/demo"):
        shutil.copytree(trained, name)
    shutil.copytree(faces, "runs/demo/faces-32-seed-0")
    return tmp_path


MAKES_RUNS = ("train-vae", "encode", "train-unet", "import", "demo")


def run_commands(page: list[list[str]], trained: Path) -> None:
    """Run a page's commands one after the other, each made small; runs that it only looks at are there before."""
    made = {word for words in page if words[0] in MAKES_RUNS for word in words}
    for run in {word for words in page for word in words if re.fullmatch(r"runs/[\w-]+", word)} - made:
        if not Path(run).exists():
            shutil.copytree(trained, run)
    for folder in folders_made(page):
        shutil.rmtree(Path(folder).expanduser(), ignore_errors=True)
    for words in page:
        succeed(*smaller(words))


RUN_PAGES = [page for page in PAGES if runnable(page)]
LONG = {"coming-from-the-scripts.md", "objectives-and-samplers.md", "draw-what-you-want.md"}  # they take seconds more


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=pytest.mark.slow if p.name in LONG else (), id=str(p.relative_to(ROOT))) for p in RUN_PAGES],
)
def test_commands_run(page: Path, place: Path, trained: Path) -> None:
    """Every command of a page, in order, on a small set; but for demo, below, and what is only parsed."""
    for kind in ("vae", "unet") if page.name == "coming-from-the-scripts.md" else ():
        if not GOLDEN.is_dir():
            pytest.skip("needs the original scripts' checkpoints")
        shutil.copy(GOLDEN / f"original_{kind}.pth", f"{kind}.pth")
    run_commands([words for words in runnable(page) if words[0] != "demo"], trained)


@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (words,) = [words for words in runnable(ROOT / "README.md") if words[0] == "demo"]
    run_commands([words], trained)
    assert Path("runs/demo/samples/0001/grid.png").is_file()


def test_the_library_as_the_readme_shows_it(place: Path) -> None:
    (code,) = [
        code
        for _, _, language, code in FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
        if language == "python"
    ]
    names: dict[str, object] = {}
    exec(code, names)
    assert names["images"].shape[0] == 16  # type: ignore[attr-defined]


def test_commands_are_made_small() -> None:
    page = [shlex.split(line) for line in ("train-vae --run a --data b", "train-unet --run a", "train-unet --run c")]
    assert folders_made(page) == {"a", "c/unet"}
    assert folders_made([["generate", "--run", "a"], ["train-unet", "--run", "a"]]) == set()
    assert smaller(["train-vae", "--from-step", "10000"])[:3] == ["train-vae", "--from-step", "2"]
    assert launched("```sh\nsrun -n 2 lightdiff scale --run a\ncd b && lightdiff show a > c\n```") == [
        ("srun -n 2 ", ["scale", "--run", "a"]),
        ("", ["show", "a"]),
    ]


# --- the lines to write of how-lightdiff-is-built.md ----------------------------------------------------------------

BUILT = ROOT / "docs/how-lightdiff-is-built.md"


def put(file: Path, old: str, new: str) -> None:
    """Replace a line that is there once; `\\g<0>` stands for the line itself."""
    text = file.read_text(encoding="utf-8")
    found = re.findall(old, text, re.MULTILINE)
    assert len(found) == 1, (old, found)
    file.write_text(text.replace(found[0], new.replace(r"\g<0>", found[0])), encoding="utf-8")


def edited(package: Path) -> None:
    """Write the page's lines into a copy of the package, at the places that the page names."""
    blocks = [code for _, _, language, code in FENCE.findall(BUILT.read_text(encoding="utf-8")) if language == "python"]
    sampler, sampler_row, name, row, objective, schedule, betas, *others = blocks
    term, term_row, weight, layout, recognised, labels, source, source_row, architecture, architecture_row = others
    put(package / "diffusion/samplers.py", r"^SAMPLERS: .*\n", f"{sampler}\n\n\\g<0>{sampler_row}")
    put(package / "settings.py", r"^SamplerName = .*\n", name)
    put(package / "settings.py", r"^Objective = .*\n", objective)
    put(package / "diffusion/objectives.py", r"^    return \{.*\[objective\]\n", row)
    put(package / "settings.py", r"^ScheduleName = .*\n", schedule)
    put(package / "diffusion/schedules.py", r"^    else:  # auto, .*\n", f"{betas}    else:\n")
    files, layouts = package / "data/files.py", package / "data/layouts.py"
    put(layouts, r"^Layout = .*\n", layout)
    put(files, r"^SOURCES: .*\n", rf"\g<0>{source_row}")
    (package / "extras/data/shapes.py").write_text(source, encoding="utf-8")
    put(layouts, r"^    # Folders such as .*\n", rf"{recognised}\g<0>")
    put(layouts, r"^    \"plain\": .*\n", rf"{labels}\g<0>")
    put(package / "losses.py", r"^TERMS: .*\n", f"{term}\n\n\\g<0>{term_row}")
    put(package / "settings.py", r"^    lpips_gamma: .*\n", rf"\g<0>{weight}")
    (package / "models/patches.py").write_text(architecture, encoding="utf-8")
    original = r"^        \"original\": \"lightdiff.models.original:OriginalVAESettings\",\n"
    put(package / "architectures.py", original, rf"\g<0>{architecture_row}")


def test_the_lines_to_write_keep_what_is_there(tmp_path: Path) -> None:
    package = tmp_path / "lightdiff"
    shutil.copytree(ROOT / "lightdiff", package, ignore=shutil.ignore_patterns("__pycache__"))
    edited(package)
    new = {"mine", "back", "sine", "class-number", "tv", "tv_weight", ".shapes", "data.shapes:SOURCE", "patches"}
    changed = (
        "diffusion/samplers.py",
        "diffusion/objectives.py",
        "diffusion/schedules.py",
        "settings.py",
        "architectures.py",
        "data/files.py",
        "data/layouts.py",
        "losses.py",
    )
    for file in changed:
        before, after = ((root / file).read_text(encoding="utf-8") for root in (ROOT / "lightdiff", package))
        compile(after, file, "exec")
        words = [set(re.findall(r'"([^"\n]+)"', text)) for text in (before, after)]
        assert words[0] <= words[1]
        texts = {
            w
            for w in words[1]
            if any(part in w for part in ("Adams", "[a-z]", "total variation", "neighbouring", ".patches:"))
        }
        assert words[1] - words[0] <= new | {"-"} | texts


@pytest.mark.slow
def test_everything_of_ones_own_runs_as_written(place: Path, faces: Path) -> None:
    shutil.copytree(ROOT / "lightdiff", "lightdiff", ignore=shutil.ignore_patterns("__pycache__"))
    edited(Path("lightdiff"))
    Path("animals").mkdir()
    for number, image in enumerate(sorted(faces.rglob("*.png"))):
        shutil.copy(image, f"animals/{('cat', 'dog')[number % 2]}-{number:04d}.png")
    text = BUILT.read_text(encoding="utf-8")
    for file, language in (("patches.toml", "toml"), ("toy.shapes", "json")):
        (code,) = [code for _, _, found, code in FENCE.findall(text) if found == language]
        Path(file).write_text(code, encoding="utf-8")
    page = [words for words in commands(text) if shlex.join(words) in WITH_EDITS]
    assert len(page) == len(WITH_EDITS)
    code = (
        "import shlex, sys\nfrom lightdiff.cli import app\n"
        "for line in sys.stdin:\n    app(shlex.split(line), standalone_mode=False)"
    )
    lines = [shlex.join(smaller(words)) for words in [["inspect", "animals"], *page]]
    result = subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join(lines),
        env={**os.environ, "PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "class-number" in result.stdout
    assert '"tv": ' in Path("runs/shapes/vae/metrics.jsonl").read_text()
    drawn = LatentSet(Path("runs/shapes/latents")).index
    assert len(drawn) == 60
    assert {name: set(values) for name, values in drawn.labels.items()} == {"class": {"disc", "square"}}
    assert json.loads(Path("runs/patches/vae/settings.json").read_text())["model"]["patch"] == 2
    assert LatentSet(Path("runs/patches/latents")).index.shape == (4, 8, 8)
    assert Path("runs/back/samples/0001/00001.png").is_file()
    assert Path("runs/sine/unet/checkpoints/last.safetensors").is_file()
