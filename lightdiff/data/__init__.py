"""Images -> a list -> crops -> batches, and latents -> batches.

Read `files`, `images` and `loading`, in this order, then `latents`. What a folder of ordinary pictures does without
(archives, tables of labels, copies, colour profiles, ...) lies in `lightdiff/extras/data/`, one file an idea.
"""

from pkgutil import resolve_name
from typing import Any


def on_demand(name: str) -> Any:
    """What `lightdiff/extras/data/` has under this name, `module:function`, imported now that it is needed."""
    return resolve_name(f"lightdiff.extras.data.{name}")
