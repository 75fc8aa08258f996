"""Help for narrow terminals, where Typer's tables would cut flags and words off."""

from shutil import get_terminal_size
from textwrap import fill
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

NARROW = 60  # columns of a terminal below which help is no table


class Narrow:
    """Prints the help of a command of Typer's that is mixed with this: in a narrow terminal without a table."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        width = get_terminal_size().columns
        if width < NARROW:
            formatter.write(narrow_help(ctx, width) + "\n")
        else:
            super().format_help(ctx, formatter)  # type: ignore[misc]


class ReadableCommand(Narrow, TyperCommand):
    """A command whose help can be read in any terminal."""


class ReadableGroup(Narrow, TyperGroup):
    """All commands."""


def narrow_help(context: typer.Context, width: int) -> str:
    """The help in lines of at most this width: each flag, argument or command above its description."""
    command: Any = context.command
    panels: dict[str, list[str]] = {}
    for one in command.get_params(context):
        if not getattr(one, "hidden", False):
            names = " / ".join(max(same, key=len) for same in (one.opts, one.secondary_opts) if same)
            is_flag = names.startswith("-")
            hint = f" [{'required' if one.required else f'default: {one.default}'}]" if describes_default(one) else ""
            panel = one.rich_help_panel or ("Options" if is_flag else "Arguments")
            row = entry(names if is_flag else one.metavar or one.name, one.help + hint, width)
            panels.setdefault(panel, []).append(row)
    for name, one in getattr(command, "commands", {}).items():
        panels.setdefault(one.rich_help_panel or "Commands", []).append(entry(name, one.help.split("\n\n")[0], width))
    about = [fill(" ".join(part.split()), width) for part in str(command.help).split("\n\n")]
    first = [context.command_path, *about]
    return "\n\n".join(first + [f"{title}\n\n" + "\n".join(rows) for title, rows in panels.items()])


def describes_default(one: Any) -> bool:
    """Whether Typer would add to an option's description that it is required, or its default."""
    return bool(one.required or (one.show_default and one.default not in (None, False, "")))


def entry(name: str, text: str, width: int) -> str:
    """A name above its description."""
    text = " ".join(text.replace("\\[", "[").split())
    indented = fill(text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return f"{name}\n{indented}"
