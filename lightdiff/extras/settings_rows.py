"""Settings as people read them: flags with their values, what differs from the defaults first."""

import json
from functools import reduce
from operator import getitem
from typing import Any, NamedTuple

from pydantic import BaseModel

from lightdiff.options import default_of, flag, flag_fields, format_value
from lightdiff.settings import TrainUNetSettings, TrainVAESettings

MODELS: dict[str, type[TrainVAESettings | TrainUNetSettings]] = {"vae": TrainVAESettings, "unet": TrainUNetSettings}


class Row(NamedTuple):
    """One setting."""

    flag: str  # without dashes
    value: str
    default: str

    @property
    def differs(self) -> bool:
        """Whether somebody chose it."""
        return self.value != self.default


def settings_rows(model: type[BaseModel], settings: dict[str, Any]) -> list[Row]:
    """Saved settings (JSON) of a model's kind: first what differs from the defaults, then the rest.

    Settings of a single start, which are not saved, are left out, and so are those without a flag.
    """
    rows = []
    for path in flag_fields(model):
        try:
            value = reduce(getitem, path, settings)
        except KeyError:
            continue
        default = json.loads(json.dumps(default_of(model, path), default=str))
        rows.append(Row(flag(model, path), words(value), words(default)))
    return sorted(rows, key=lambda row: not row.differs)


def words(value: Any) -> str:
    """A setting's value as one types it."""
    return format_value(value) or "-"
