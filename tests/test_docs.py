"""The pages: generated ones are current, links lead somewhere, commands have the options shown."""

import importlib.util
import re
import shlex
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest
import typer

from lightdiff.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if page.is_file()]
FENCE = re.compile(r"^( *)(```+|~~~+)([^\n]*)\n(.*?)^ *\2[`~]*[ ]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)")

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
    found = []
    for _, _, language, block in FENCE.findall(text):
        if language.strip() not in ("", "console", "bash", "sh", "shell"):
            continue
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            line = line.strip().removeprefix("$ ")
            if match := re.match(r"(?:python3? -m )?lightdiff(?: (.*))?$", line):
                words = shlex.split(match[1] or "", comments=True)
                end = next((i for i, word in enumerate(words) if word in ("|", "&&", ";", ">", ">>", "2>")), len(words))
                found.append(words[:end])
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
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = []
    for words in commands(page.read_text(encoding="utf-8")):
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
        with pytest.raises(Exception, match=r"No such|Invalid value|is not|valid"):
            parse(words)
