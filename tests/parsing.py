"""What a command line, or a layer of settings, leads to or is refused with."""

import json
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import typer

from lightdiff.errors import UserError
from lightdiff.extras.settings import DemoSettings
from lightdiff.options import build, command, defaults
from lightdiff.settings import (
    EncodeSettings,
    GenerateSettings,
    Layer,
    ScaleSettings,
    Settings,
    TrainUNetSettings,
    TrainVAESettings,
)

STAGES = [TrainVAESettings, EncodeSettings, ScaleSettings, TrainUNetSettings, GenerateSettings, DemoSettings]


def app_of(model: type[Settings], run: Callable[[Any], object] = lambda built: None, **more: Any) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command(model, run, **more))
    return app


def parsed(model: type[Settings], *arguments: str, **more: Any) -> Any:
    """The settings that a command line leads to."""
    seen: list[Any] = []
    typer.main.get_command(app_of(model, seen.append, **more)).main(list(arguments), standalone_mode=False)
    return seen.pop()


def said_wrong(model: type[Settings], *arguments: str) -> list[str]:
    """The lines of the message that a command line is refused with."""
    with pytest.raises(UserError) as caught:
        parsed(model, *arguments)
    return str(caught.value).splitlines()


def refused(model: type[Settings], layer: Layer) -> list[str]:
    """The lines of the message that a layer, over the defaults, is refused with."""
    with pytest.raises(UserError) as caught:
        build(model, [defaults(model), layer])
    return str(caught.value).splitlines()


def dry(cli, *args):
    """The settings that a dry run prints."""
    with patch("lightdiff.extras.estimate.estimate"):  # which is tested by itself
        result = cli(*args, "--dry-run")
    assert result.code == 0, result.stderr
    assert result.err == ""
    return json.loads(result.stdout)
