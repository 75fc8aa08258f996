"""What pydantic says of wrong settings, in words of the command line."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from lightdiff.errors import shorten
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
