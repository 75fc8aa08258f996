"""Help of a command for narrow terminals, where Typer's tables would cut flags off."""

from textwrap import fill

import typer


def narrow_help(context: typer.Context, width: int) -> str:
    """The help in lines of at most this width, where a table would cut flags off: each flag above its description."""
    panels: dict[str, list[str]] = {}
    for option in context.command.params:
        if not option.hidden:  # type: ignore[attr-defined]
            text = str(option.help).replace("\\[", "[")  # type: ignore[attr-defined]
            indented = fill(text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
            names = " / ".join(max(same, key=len) for same in (option.opts, option.secondary_opts) if same)
            panels.setdefault(option.rich_help_panel or "Options", []).append(f"{names}\n{indented}")  # type: ignore[attr-defined]
    about = [fill(" ".join(part.split()), width) for part in str(context.command.help).split("\n\n")]
    first = [f"lightdiff {context.command.name}", *about]
    return "\n\n".join(first + [f"{title}\n\n" + "\n".join(rows) for title, rows in panels.items()])
