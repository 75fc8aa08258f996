"""Settings and durations as tables show them: flags with their values, those that differ from the defaults first."""

from functools import reduce
from operator import getitem
from typing import Any, NamedTuple

from pydantic import BaseModel, TypeAdapter, ValidationError

from lightdiff.checkpoint import Metadata
from lightdiff.extras.wrong_settings import flag_of
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
        """Whether it is not the default."""
        return self.value != self.default


def settings_rows(model: type[BaseModel], settings: dict[str, Any]) -> list[Row]:
    """Saved settings (JSON) of this model: first those that differ from the defaults, then the rest.

    Settings that are not saved, because they hold for one start only, and those without a flag are left out.
    """
    rows = []
    for path in flag_fields(model):
        try:
            value = reduce(getitem, path, settings)
        except (KeyError, TypeError, IndexError):  # a document need not have the groups that it should
            continue
        rows.append(Row(flag(model, path), format_setting(value), format_setting(default_of(model, path))))
    return sorted(rows, key=lambda row: not row.differs)


def format_setting(value: Any) -> str:
    """A setting's value as it is typed on the command line; "-" if empty."""
    return format_value(value) or "-"


class Change(BaseModel):
    """What was changed when a training was resumed."""

    step: int
    changed: dict[str, tuple[Any, Any]]


def settings_changes(metadata: Metadata) -> list[tuple[int, str]]:
    """Changes of settings when the training was resumed: the step, and what changed, as text."""
    try:
        history = TypeAdapter(list[Change]).validate_python(metadata.extra.get("history", []))
    except ValidationError:  # of another program, or made to harm
        return []
    return [
        (
            change.step,
            ", ".join(f"{flag_of(n) if '.' in n else n} {a} -> {b}" for n, (a, b) in change.changed.items()),
        )
        for change in history
    ]


def format_duration(seconds: float) -> str:
    """A duration with its unit."""
    for limit, unit, name in ((120, 1, "seconds"), (7200, 60, "minutes"), (172_800, 3600, "hours")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.1f} days"
