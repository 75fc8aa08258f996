"""Write settings.md, the page of every setting, from the settings' models. `--check` only says whether it is current.

Run it after a change of settings; it imports no torch.
"""

import re
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lightdiff.cli import COMMANDS
from lightdiff.options import default_of, extra, flag, flag_fields, format_value, panel, plain

PLAIN = "Options"  # the panel of settings without one of their own
PAGE = Path(__file__).with_name("settings.md")
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}
INTRO = """\
# Every setting

<!-- Written by make_settings.py from the settings in lightdiff/: change them there, then run that script. -->

One section per command, one table per panel of its `--help`. Each setting has one name in three places: as a flag
(`--kl-beta 1e-3`), in a settings file (`kl_beta = 1e-3` in its group, here `[loss]`), and in the `settings.json`
that a stage saves. Lists take commas: `--model.channels 64,128,256`.

The commands below also take `--settings FILE` (TOML or JSON; a saved `settings.json` is one), `--dry-run` (print the
settings as JSON and stop; a training also times a few steps, and says what it will take: parameters, memory, time) and
`--help`, which for three of them shows only what is needed first; `--help-all` shows every setting. `train-vae` and
`train-unet` take `--preset NAME` too. Later wins: defaults, preset, what an earlier stage or a stopped run saved, the
settings file, flags.
"""


def page() -> str:
    """The whole page: the sections of all commands as links, then their tables."""
    links = [f"- [{name}](#{anchor(name)}){listed(name, command.model)}" for name, command in COMMANDS.items()]
    tables = (section(name, command.model) for name, command in COMMANDS.items())
    return "\n".join([INTRO, *links, "", *tables])


def listed(name: str, model: type[BaseModel]) -> str:
    """A command's sections as links."""
    titles = [title for title in sections(model) if title != PLAIN]
    links = ", ".join(f"[{title}](#{anchor(f'{name}: {title}')})" for title in titles)
    return f": {links}" if links else ""


def anchor(heading: str) -> str:
    """The anchor of a heading, as repository browsers and MyST make it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def sections(model: type[BaseModel]) -> dict[str, list[tuple[tuple[str, ...], FieldInfo]]]:
    """The settings of a command by their panel in its help, those without one first."""
    found: dict[str, list[tuple[tuple[str, ...], FieldInfo]]] = {PLAIN: []}
    for path, field in flag_fields(model).items():
        found.setdefault(panel(model, path), []).append((path, field))
    return {title: rows for title, rows in found.items() if rows}


def section(name: str, model: type[BaseModel]) -> str:
    """A command: its purpose and its tables."""
    parts = [f"## {name}\n\n{(model.__doc__ or '').strip()}\n"]
    for title, rows in sections(model).items():
        lines = ["| Flag | Default | Values | Meaning |", "| --- | --- | --- | --- |"]
        lines += [row(model, path, field) for path, field in rows]
        group = f"### {name}: {title}\n\n" if title != PLAIN else ""
        parts.append(group + "\n".join(lines) + "\n")
    return "\n".join(parts)


def row(model: type[BaseModel], path: tuple[str, ...], field: FieldInfo) -> str:
    """A setting's row of its table."""
    default = default_of(model, path)
    shown = format_value(default.as_posix() if isinstance(default, Path) else default)
    name = flag(model, path)
    switch = field.annotation is bool and "." not in name
    spelled = f"--{name}/--no-{name}" if switch else f"--{name}"
    required = "required" if name in getattr(model, "REQUIRED", ()) else ""
    cells = [f"`{spelled}`", f"`{shown}`" if shown else required, values(field), field.description or ""]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def values(field: FieldInfo) -> str:
    """What a setting may be: its choices, its kind where that is not plain, its bounds."""
    return ", ".join([*kind(field), *bounds(field)])


def bounds(field: FieldInfo) -> list[str]:
    """The bounds of a number, each as in `>= 1`."""
    return [f"{sign} {getattr(m, name):g}" for m in field.metadata for name, sign in SIGNS.items() if hasattr(m, name)]


def kind(field: FieldInfo) -> list[str]:
    """A field's type in words; nothing for a plain text."""
    annotation = plain(field.annotation)
    if get_origin(annotation) is Literal:
        return [" ".join(f"`{choice}`" for choice in get_args(annotation))]
    if get_origin(annotation) is tuple:
        item = plain(get_args(annotation)[0])
        named = "list of names" if get_origin(item) is Literal else "list of numbers"
        items = {Path: "paths", str: "list of names"}.get(item, named)
        return ["`NAME=VALUES`" if extra(field, "repeated").startswith("NAME") else items]
    return {bool: ["`on` `off`"], int: ["whole number"], float: ["number"], Path: ["path"]}.get(annotation, [])


def main() -> int:
    """Write the page, or with --check compare it."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE.name} is not current: run {Path(__file__).name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
