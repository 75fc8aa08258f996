"""A settings file, TOML or JSON, as a layer of settings."""

import json
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightdiff.architectures import Layer
from lightdiff.errors import UserError, shorten


def read_settings(path: Path, leave_out: Collection[str] = ()) -> Layer:
    """Settings from a TOML or JSON file; a saved settings.json is one.

    Raises:
        UserError: If it cannot be read.
    """
    neither = f"--settings: {path} is neither TOML (named .toml) nor JSON"
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors begin with a byte order mark
        value = tomllib.loads(text) if path.suffix.lower() == ".toml" else load_json(text)
    except OSError as error:
        raise UserError(f"--settings: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{neither}: it is not in UTF-8; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{neither}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"--settings: {path} holds no settings")
    inner = value.get("settings")  # in the file beside samples, one entry among others
    layer = inner if isinstance(inner, dict) else value
    try:
        return {name: said for name, said in nest_dotted(layer).items() if name not in leave_out}
    except ValueError as error:
        raise UserError(f"--settings: {path} is contradictory: {error}") from None


def load_json(text: str) -> Any:
    """A JSON document, strictly: no key twice, which would lose the first, and no NaN or Infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{shorten(twice[0])} is given twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def nest_dotted(layer: Layer) -> Layer:
    """{"loop.lr": 1} -> {"loop": {"lr": 1}}: names may be written as messages show them.

    Raises:
        ValueError: If a setting is given both ways.
    """
    result: Layer = {name: value for name, value in layer.items() if "." not in name}
    for name in layer.keys() - result.keys():
        head, _, rest = name.partition(".")
        inner = result.get(head, {})
        if not isinstance(inner, dict) or rest in inner:
            raise ValueError(f"{shorten(name)} is given twice")
        result[head] = nest_dotted(inner | {rest: layer[name]})
    return result
