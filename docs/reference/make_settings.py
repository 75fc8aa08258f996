"""Write settings.md, the page of every setting, from the settings' models. `--check` only says whether it is current.

Run it after a change of `lightdiff/settings.py`; it imports no torch.
"""

import sys
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from lightdiff import settings
from lightdiff.extras.settings import EditSettings, TrajectorySettings, WalkSettings
from lightdiff.options import DOTTED, default_of, described, flag, panel, parsed_as, typed

PAGE = Path(__file__).with_name("settings.md")
COMMANDS: dict[str, tuple[type[settings.Settings], bool]] = {  # with --preset or without
    "train-vae": (settings.TrainVAESettings, True),
    "encode": (settings.EncodeSettings, False),
    "scale": (settings.ScaleSettings, False),
    "train-unet": (settings.TrainUNetSettings, True),
    "generate": (settings.GenerateSettings, False),
    "edit": (EditSettings, False),
    "walk": (WalkSettings, False),
    "trajectory": (TrajectorySettings, False),
    "demo": (settings.DemoSettings, False),
    "evaluate": (settings.EvaluateSettings, False),
    "sweep": (settings.SweepSettings, False),
}
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}
INTRO = """\
# Every setting

<!-- Written by make_settings.py from lightdiff/settings.py: change it there, then run that script. -->

One section a command, one table a panel of its `--help`. Each setting has one name in three places: as a flag
(`--kl-beta 1e-3`), in a settings file (`kl_beta = 1e-3` in its group, here `[loss]`), and in the `settings.json`
that a stage saves. Lists take commas: `--model.channels 64,128,256`.

The commands below also take `--settings FILE` (TOML or JSON; a saved `settings.json` is one), `--dry-run` (print the
settings as JSON and stop; a training also times a few steps, and says what it will take: parameters, memory, time) and
`--help`; `train-vae` and `train-unet` take `--preset NAME` too. Later wins: defaults,
preset, what an earlier stage or a stopped run saved, the settings file, flags.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRO, *(section(name, model) for name, (model, _) in COMMANDS.items())])


def section(name: str, model: type[settings.Settings]) -> str:
    """A command: its purpose and its tables."""
    parts = [f"## {name}\n\n{(model.__doc__ or '').strip()}\n"]
    for title, rows in groupby(typed(model).items(), key=lambda leaf: panel(model, leaf[0])):
        lines = ["| Flag | Default | Values | Meaning |", "| --- | --- | --- | --- |"]
        lines += [row(model, path, field) for path, field in rows]
        group = f"### {name}: {title}\n\n" if title != "Options" else ""
        parts.append(group + "\n".join(lines) + "\n")
    return "\n".join(parts)


def row(model: type[settings.Settings], path: tuple[str, ...], field: FieldInfo) -> str:
    """A setting's row of its table."""
    default = default_of(model, path)
    shown = described(default.as_posix() if isinstance(default, Path) else default)
    cells = [f"`{spelled(path, field)}`", f"`{shown}`" if shown else "", values(field), field.description or ""]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def spelled(path: tuple[str, ...], field: FieldInfo) -> str:
    """A setting's flag as it is typed: `--flip`, `--no-flip` where it is a switch."""
    name = flag(path)
    switch = field.annotation is bool and DOTTED not in path[:-1]
    return f"--{name}/--no-{name}" if switch else f"--{name}"


def values(field: FieldInfo) -> str:
    """What a setting may be: its choices, its kind where that is not plain, its bounds."""
    pairs = [(sign, getattr(m, name, None)) for m in field.metadata for name, sign in SIGNS.items()]
    limits = [f"{sign} {bound:g}" for sign, bound in pairs if bound is not None]
    return ", ".join([*kind(field.annotation), *limits])


def kind(annotation: Any) -> list[str]:
    """An annotation in words; nothing for a plain text."""
    if get_origin(annotation) is Literal:
        return [" ".join(f"`{choice}`" for choice in get_args(annotation))]
    if get_origin(annotation) is tuple:
        if parsed_as(annotation) == list[str]:
            return ["`NAME=VALUES`"]
        return ["paths" if get_args(annotation)[0] is Path else "list of numbers"]
    if type(None) in get_args(annotation):  # optional
        return kind(Union[tuple(a for a in get_args(annotation) if a is not type(None))])  # noqa: UP007
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
