"""Pydantic settings -> command-line options, and layers of settings -> one model. Knows nothing of diffusion.

A field of a nested model becomes a flag in that model's help panel: `--lr`, or, where the nested model is called
`model`, `--model.channels`. Typer parses, pydantic judges. An option that is not given says nothing (None), so that
it does not override what a file or an earlier stage said.
"""

import csv
import inspect
import json
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import reduce
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lightdiff.errors import UserError

Layer = dict[str, Any]
DOTTED = "model"  # the nested model whose flags carry its name


def leaves(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every field that is no model itself, depth first, with its path."""
    for name, field in model.model_fields.items():
        nested = nested_model(field)
        if nested is None:
            yield (*path, name), field
        else:
            yield from leaves(nested, (*path, name))


def typed(model: type[BaseModel]) -> dict[tuple[str, ...], FieldInfo]:
    """The fields that have a flag: all but what an earlier stage fills in, and what would do nothing in this one."""
    no_flag: frozenset[str] = getattr(model, "NO_FLAG", frozenset())
    return {path: f for path, f in leaves(model) if not {path[0], ".".join(path)} & no_flag}


def nested_model(field: FieldInfo) -> type[BaseModel] | None:
    """The model a field holds, if it holds one: where there are several kinds, that of its default."""
    kind = type(field.default) if isinstance(field.default, BaseModel) else field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def flag(path: tuple[str, ...]) -> str:
    """A field's flag, without dashes: `lr`, `model.channels`."""
    name = path[-1].rstrip("_").replace("_", "-")  # class_ and from_ are words of Python
    return f"{DOTTED}.{name}" if DOTTED in path[:-1] else name


def extra(field: FieldInfo, name: str) -> str:
    """What a field says of itself beyond pydantic's words, or "": `panel`, `instead_of`, `needs`."""
    said = field.json_schema_extra
    return str(said.get(name, "")) if isinstance(said, dict) else ""


def panel(model: type[BaseModel], path: tuple[str, ...]) -> str:
    """The help panel of a field: its own, else the title of the nested model it belongs to."""
    title = "Options"
    for name in path[:-1]:
        field = model.model_fields[name]
        title = field.title or name
        model = nested_model(field) or model
    return extra(model.model_fields[path[-1]], "panel") or title


def default_of(model: type[BaseModel], path: tuple[str, ...]) -> Any:
    """A field's default within this model (a stage may differ from the nested model's own)."""
    value: Any = model.model_construct()
    for name in path:
        value = getattr(value, name)
    return value


def described(value: Any) -> str:
    """A value as help shows it and as one types it; nothing for none."""
    if value is None or value == "":
        return ""
    if isinstance(value, (tuple, list)):
        return ",".join(map(described, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def parsed_as(annotation: Any) -> Any:
    """The type Typer parses a field as: paths, and what says so, are repeated flags, other lists take commas."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    if get_origin(annotation) is tuple:
        item = get_args(annotation)[0]
        return list[Path] if item is Path else list[str] if "repeated" in getattr(item, "__metadata__", ()) else str
    return annotation


LONGEST_PAIR = 13  # of a name that also gets a --no-; with a longer one, there is no room for its description


def option(model: type[BaseModel], path: tuple[str, ...], field: FieldInfo) -> inspect.Parameter:
    """One field as a parameter that Typer makes an option of."""
    shown = described(default_of(model, path))
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [(sign, getattr(m, name)) for m in field.metadata for name, sign in signs.items() if hasattr(m, name)]
    bounds = ", ".join(f"{sign} {limit:g}" for sign, limit in limits)
    note = "; ".join(part for part in (f"default: {shown}" if shown else "", bounds) if part)
    text = (field.description or "") + (rf" \[{note}]" if note else "")  # escaped, or rich takes it for markup
    kind = parsed_as(field.annotation)
    name = flag(path)
    if kind is bool and DOTTED in path[:-1]:
        kind = Literal["on", "off"]  # a second flag --model.no-... would squeeze the help of all others
    pair = kind is bool and len(name) <= LONGEST_PAIR
    declaration = f"--{name}/--no-{name}" if pair else f"--{name}"
    metavar = "A,B,..." if kind is str and get_origin(field.annotation) is not None else None
    metavar = "NAME=..." if kind == list[str] else metavar
    if get_origin(kind) is Literal and any(not isinstance(choice, str) for choice in get_args(kind)):
        kind = type(get_args(kind)[0])  # Typer's choices are strings; pydantic judges the number
    if get_origin(kind) is Literal and DOTTED in path[:-1]:
        text, metavar = f"{', '.join(get_args(kind))}: {text}", "CHOICE"  # listed there, they squeeze the flags
    info = typer.Option(declaration, help=text, rich_help_panel=panel(model, path), show_default=False, metavar=metavar)
    return inspect.Parameter(
        "__".join(path), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def given(field: FieldInfo, value: Any) -> Any:
    """What Typer parsed, as pydantic takes it: `64,128` is split, `none` is an empty list, unless it may be a name.

    What has a comma itself stands in quotes, as in a CSV file.
    """
    kind = field.annotation
    if parsed_as(kind) is str and get_origin(kind) not in (None, Literal) and isinstance(value, str):
        empty = ("",) if str in get_args(kind) else ("", "none")
        return [] if value.strip() in empty else [p.strip() for p in next(csv.reader([value], skipinitialspace=True))]
    return value


def check_effects(
    fields: Mapping[tuple[str, ...], FieldInfo], named: Collection[tuple[str, ...]], built: BaseModel
) -> None:
    """Refuse typed flags of which one would do nothing: in place of another, or needing `name`, or `name=this|that`.

    Raises:
        UserError: If two of them say one thing, or one belongs to a setting that is off.
    """
    for path in named:
        rival, needed = ((*path[:-1], extra(fields[path], word)) for word in ("instead_of", "needs"))
        if rival in named:
            raise UserError(f"--{flag(path)} stands in place of --{flag(rival)}: give one of them")
        name, _, values = needed[-1].partition("=")
        value: Any = reduce(getattr, (*path[:-1], name), built) if name else True
        if value not in values.split("|") if values else not value:
            wanted = " ".join([f"--{flag((*path[:-1], name))}", values.replace("|", " or ")]).rstrip()
            raise UserError(f"--{flag(path)} does nothing without {wanted}")


def nest(flat: Mapping[tuple[str, ...], Any]) -> Layer:
    """{("loop", "lr"): 1} -> {"loop": {"lr": 1}}."""
    result: Layer = {}
    for path, value in flat.items():
        place = result
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = value
    return result


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Layer:
    """Two layers as one; where both speak, `above` wins. Of another architecture than that above, nothing is left."""
    if "architecture" in above and above["architecture"] != below.get("architecture", above["architecture"]):
        return dict(above)
    result = dict(below)
    if "steps" in above and "epochs" not in above:  # two ways to say one thing: epochs count unless they are 0
        result.pop("epochs", None)
    for name, value in above.items():
        old = result.get(name)
        result[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def read_settings(path: Path) -> Layer:
    """Settings from a TOML or JSON file; a saved settings.json is one.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except OSError as error:
        raise UserError(f"--settings: {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--settings: {path} is neither TOML (named .toml) nor JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"--settings: {path} holds no settings")
    inner = value.get("settings")  # beside what else is told of samples
    return inner if isinstance(inner, dict) else value


def build(model: type[BaseModel], layers: list[Layer]) -> Any:
    """One model from layers, the later ones on top.

    Raises:
        UserError: For a wrong value, naming each setting as the user types it.
    """
    whole: Layer = {}
    for layer in layers:
        whole = merge(whole, layer)
    try:
        return model.model_validate(whole)
    except ValidationError as error:
        raise UserError("\n".join(explain(model, row) for row in error.errors())) from None


def explain(model: type[BaseModel], row: Mapping[str, Any]) -> str:
    """One of pydantic's complaints as a sentence about a flag."""
    path = tuple(str(part) for part in row["loc"] if isinstance(part, str))
    message = str(row["msg"]).removeprefix("Value error, ")
    if row["type"] == "extra_forbidden":
        known = sorted(".".join(p) for p, _ in leaves(model))  # only a file can be wrong here: named as files do
        near = [name for name in known if name.split(".")[-1].startswith(path[-1][:3])]
        hint = f"; similar ones: {', '.join(near)}" if near else ""
        return f"unknown setting {'.'.join(path)}{hint}"
    shown = row.get("input")
    if isinstance(shown, (list, tuple)):
        shown = ",".join(str(v) for v in shown)
    is_leaf = any(p == path for p, _ in leaves(model))
    if message.startswith("--"):  # it names what it is about
        return message
    name = f"--{flag(path)}" if is_leaf else f"--{path[-1]}.*" if path else "settings"
    return f"{name}: {message}" + (f" (found {shown})" if is_leaf and str(shown) not in message else "")


def command(
    model: type[BaseModel],
    run: Callable[[Any], object],
    inherit: Callable[[Layer], list[Layer]] | None = None,
    preset: Callable[[str], Layer] | None = None,
    presets: tuple[str, ...] = (),
    estimate: Callable[[Any], object] | None = None,
) -> Callable[..., None]:
    """A function for Typer with an option for every field, that builds the model and calls `run`.

    Args:
        model: The settings; its docstring becomes the command's help.
        run: What to do with them.
        inherit: What has been said so far (preset, file and flags) -> layers that lie below the file's.
        preset: Name of a preset -> its layer.
        presets: Names of the presets.
        estimate: What --dry-run does with the settings, after it has printed them.
    """
    fields = typed(model)
    rehearsed = " and what they will take," if estimate else ""
    extras = [
        inspect.Parameter(
            "settings",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None, typer.Option("--settings", help="settings file, TOML or JSON; flags override it")
            ],
        ),
        inspect.Parameter(
            "dry_run",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[
                bool, typer.Option("--dry-run", help=f"print the settings as JSON{rehearsed} and stop")
            ],
        ),
    ]
    if preset:
        choice = Literal[presets]  # type: ignore[valid-type]
        note = "set of architecture settings; 'lightdiff presets' lists them"
        annotation = Annotated[choice | None, typer.Option("--preset", help=note)]
        extras.append(inspect.Parameter("preset", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

    def call(settings: Path | None = None, dry_run: bool = False, **values: Any) -> None:
        chosen = values.pop("preset", None)
        named = {tuple(name.split("__")): value for name, value in values.items() if value not in (None, [])}
        flags = nest({path: given(fields[path], value) for path, value in named.items()})
        from_file = read_settings(settings) if settings else {}
        from_file = {name: value for name, value in from_file.items() if name not in getattr(model, "NO_FILE", ())}
        lowest = [preset(chosen)] if preset and chosen else []
        below = inherit(merge(from_file, flags)) if inherit else []
        built = build(model, [defaults(model), *lowest, *below, from_file, flags])
        check_effects(fields, named, built)
        if (
            chosen
            and getattr(build(model, [defaults(model), *below, *lowest, from_file, flags]), DOTTED) != built.model
        ):
            raise UserError(
                f"--preset {chosen}: this run holds another architecture: choose another --run, or --restart"
            )
        if dry_run:
            typer.echo(json.dumps(built.model_dump(mode="json"), indent=2))
            if estimate:
                estimate(built)
        else:
            run(built)

    parameters = [*(option(model, path, field) for path, field in fields.items()), *extras]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__doc__ = model.__doc__
    return call


def defaults(model: type[BaseModel]) -> Layer:
    """The stage's own defaults as the lowest layer, so that a partial nested layer keeps them."""
    return model.model_construct().model_dump(mode="json")
