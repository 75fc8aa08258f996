"""What is wrong with what was typed, in words of the command line."""

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lightdiff.errors import LightdiffError, RunError, UserError, shorten
from lightdiff.options import flag, leaves


def explain(model: type[BaseModel], row: Mapping[str, Any]) -> str:
    """One of pydantic's complaints as a sentence about a flag."""
    path = tuple(part for part in row["loc"] if isinstance(part, str))
    known, message = [leaf for leaf, _ in leaves(model)], str(row["msg"]).removeprefix("Value error, ")
    if row["type"] == "extra_forbidden" and path in known:
        return f"--{flag(model, path)}: a {path[-2]} of the kind that is chosen has no such setting"
    if row["type"] == "extra_forbidden":  # only a file can be wrong here: named as files do
        near = [".".join(leaf) for leaf in sorted(known) if leaf[-1].startswith(path[-1][:3])]
        return f"unknown setting {shorten('.'.join(path))}" + (f"; similar ones: {', '.join(near)}" if near else "")
    if message.startswith("--"):  # it names what it is about
        return message
    if path not in known:  # a group, or a field without a flag
        return f"--{'.'.join(path)}{'.*' * (len(path) == 1)}: {message}" if path else f"settings: {message}"
    found = row.get("input")
    shown = shorten(",".join(map(str, found)) if isinstance(found, (list, tuple)) else found)
    return f"--{flag(model, path)}: {message}" + (f" (found {shown})" if shown not in message else "")


def unexpected(error: Exception) -> LightdiffError:
    """An error of another kind in our words: Typer's about how a command was typed, or a bug of ours."""
    if type(error).__name__ == "NoArgsIsHelpError":  # it has printed the help
        sys.exit(2)
    if format_message := getattr(error, "format_message", None):
        context: Any = getattr(error, "ctx", None)
        more = f"'{context.command_path} --help' lists what there is" if context else ""
        return UserError(format_message().rstrip("."), *filter(None, [more]))
    what = f"{type(error).__name__}: {error}"
    return RunError(what, "This should not happen; --debug before the command shows where.")


def other_setting(folder: Path, name: str, old: Any, new: Any, advice: str) -> UserError:
    """That work was begun with another value of a setting, which shapes its result."""
    if name.startswith("latent."):
        return UserError(f"{folder} was trained on other latents ({name}): choose another --run, or --restart")
    flag = flag_of(name) if name != "command" else "lightdiff"
    what = f"without {flag} {new}" if old in ("", None) else f"with {flag} {old}, not {new}"
    return UserError(f"{folder} was started {what}: {advice}")


def flag_of(name: str) -> str:
    """A setting's name as the user types it."""
    group, _, field = name.rpartition(".")
    return "--" + (f"{group}.{field}" if group == "model" else field).rstrip("_").replace("_", "-")


def check_spelling(run: Path) -> None:
    """Where there is no such run, but some of a similar name, say so instead of what is missing in it.

    Raises:
        UserError: If so, or if it is an exported folder.
    """
    from lightdiff.pipeline import EXPORTED

    if (run / EXPORTED).is_file():
        raise UserError(
            f"{run} is an exported folder, not a run: its README.md says how to draw from it, and "
            "commands that train or generate need the run that it was made of"
        )
    beside = [p.name for p in run.parent.iterdir() if p.is_dir()] if run.parent.is_dir() and not run.exists() else []
    if near := difflib.get_close_matches(run.name, beside):
        meant = " or ".join(str(run.parent / name) for name in near)
        raise UserError(f"there is no run folder {run}; did you mean {meant}?")
