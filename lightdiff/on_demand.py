"""What only some runs need: it lies in `lightdiff/extras/`, and is imported when it is needed."""

from pkgutil import resolve_name
from typing import Any


def on_demand(name: str) -> Any:
    """What `lightdiff/extras/` has under this name, `module:function`, imported now."""
    return resolve_name(f"lightdiff.extras.{name}")
