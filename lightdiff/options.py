"""Pydantic settings -> command-line options, and layers of settings -> one model. Knows nothing of diffusion.

A field of a nested model becomes a flag in that model's help panel: `--lr`, or, where the nested field has a `prefix`,
`--model.channels`. Typer parses, pydantic judges. An option that is not given says nothing (None), so that it does not
override what a file or an earlier stage said.
"""

import inspect
import json
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial, reduce
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lightdiff.errors import UserError

Layer = dict[str, Any]
Where = tuple[str, ...]  # the names that lead to a field: ("loop", "lr")
PRESETS = ("tiny", "small", "base", "original")
LONGEST_PAIR = 13  # of a name that also gets a --no-; with a longer one, there is no room for its description


# --- fields and their flags ---------------------------------------------------------------------------------------


def plain(annotation: Any) -> Any:
    """A type without None, without what is annotated, and the first where there may be several."""
    while get_origin(annotation) in (Union, UnionType, Annotated):
        annotation = next(kind for kind in get_args(annotation) if kind is not NoneType)
    return annotation


def nested_model(field: FieldInfo) -> type[BaseModel] | None:
    """The model a field holds, if it holds one: where there are several kinds, that of its default."""
    kind = type(field.default) if isinstance(field.default, BaseModel) else field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def leaves(model: type[BaseModel], path: Where = ()) -> Iterator[tuple[Where, FieldInfo]]:
    """Every field that is no model itself, depth first, with its path."""
    for name, field in model.model_fields.items():
        nested = nested_model(field)
        if nested is None:
            yield (*path, name), field
        else:
            yield from leaves(nested, (*path, name))


def flag_fields(model: type[BaseModel]) -> dict[Where, FieldInfo]:
    """The fields that have a flag: all but what an earlier stage fills in, and what would do nothing in this one."""
    no_flag: frozenset[str] = getattr(model, "NO_FLAG", frozenset())
    return {path: f for path, f in leaves(model) if not {path[0], ".".join(path)} & no_flag}


def fields_along(model: type[BaseModel], path: Where) -> list[FieldInfo]:
    """The fields that a path leads through, the last one its own."""
    fields = []
    for name in path:
        fields.append(model.model_fields[name])
        model = nested_model(fields[-1]) or model
    return fields


def extra(field: FieldInfo | None, name: str) -> str:
    """What a field says of itself (`needs`, `replaces`, `prefix`, `kind`, `repeated`, `panel`), or ""."""
    return str(field.json_schema_extra.get(name, "")) if field and isinstance(field.json_schema_extra, dict) else ""


def flag(model: type[BaseModel], path: Where) -> str:
    """A field's flag, without dashes: `lr`, `model.channels`."""
    groups = zip(path[:-1], fields_along(model, path[:-1]), strict=True)
    prefix = "".join(f"{name}." for name, field in groups if extra(field, "prefix"))
    return prefix + path[-1].rstrip("_").replace("_", "-")  # class_ and from_ are words of Python


def panel(model: type[BaseModel], path: Where) -> str:
    """The help panel of a field: its own, else the title of the group it belongs to."""
    *groups, field = fields_along(model, path)
    return extra(field, "panel") or (groups[-1].title or path[-2] if groups else "Options")


def default_of(model: type[BaseModel], path: Where) -> Any:
    """A field's default within this model (a stage may differ from the nested model's own)."""
    return reduce(getattr, path, model.model_construct())


def format_value(value: Any) -> str:
    """A value as help shows it and as one types it; nothing for none."""
    if value is None or value == "":
        return ""
    if isinstance(value, (tuple, list)):
        return ",".join(map(format_value, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def takes_commas(field: FieldInfo) -> bool:
    """Whether a field is a list that is typed as one text, which pydantic splits: `64,128`."""
    return get_origin(plain(field.annotation)) is tuple and not extra(field, "repeated")


def typed_as(model: type[BaseModel], path: Where) -> Any:
    """The type that Typer parses a field as."""
    *groups, field = fields_along(model, path)
    kind = plain(field.annotation)
    if get_origin(kind) is tuple:
        return str if takes_commas(field) else list[plain(get_args(kind)[0])]  # type: ignore[misc]
    if kind is bool and extra(groups[-1] if groups else None, "prefix"):
        return Literal["on", "off"]  # a second flag --model.no-... would squeeze the help of all others
    if get_origin(kind) is Literal and any(not isinstance(choice, str) for choice in get_args(kind)):
        return type(get_args(kind)[0])  # Typer's choices are strings; pydantic judges the number
    return kind


def option(model: type[BaseModel], path: Where, field: FieldInfo) -> inspect.Parameter:
    """One field as a parameter that Typer makes an option of."""
    shown = format_value(default_of(model, path))
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [(sign, getattr(m, name)) for m in field.metadata for name, sign in signs.items() if hasattr(m, name)]
    bounds = ", ".join(f"{sign} {limit:g}" for sign, limit in limits)
    note = "; ".join(part for part in (f"default: {shown}" if shown else "", bounds) if part)
    text = (field.description or "") + (rf" \[{note}]" if note else "")  # escaped, or rich takes it for markup
    kind, name = typed_as(model, path), flag(model, path)
    metavar = "A,B,..." if takes_commas(field) else extra(field, "repeated") or None
    if get_origin(kind) is Literal and "." in name:
        text, metavar = f"{', '.join(get_args(kind))}: {text}", "CHOICE"  # listed there, they squeeze the flags
    declaration = f"--{name}/--no-{name}" if kind is bool and len(name) <= LONGEST_PAIR else f"--{name}"
    info = typer.Option(declaration, help=text, rich_help_panel=panel(model, path), show_default=False, metavar=metavar)
    return parameter("__".join(path), kind | None, info)


def parameter(name: str, kind: Any, info: Any, default: Any = None) -> inspect.Parameter:
    """A parameter as Typer reads it."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


# --- layers -------------------------------------------------------------------------------------------------------


def nest(flat: Mapping[Where, Any]) -> Layer:
    """{("loop", "lr"): 1} -> {"loop": {"lr": 1}}."""
    result: Layer = {}
    for path, value in flat.items():
        reduce(lambda group, name: group.setdefault(name, {}), path[:-1], result)[path[-1]] = value
    return result


def merge(model: type[BaseModel], below: Mapping[str, Any], above: Mapping[str, Any]) -> Layer:
    """Two layers of a model's settings as one; where both speak, `above` wins.

    A setting that `replaces` another is dropped when a later layer sets that other one. Of a group that may hold
    several models, settings for one replace those for another, instead of adding to them.
    """
    fields = model.model_fields
    result = {name: value for name, value in below.items() if extra(fields.get(name), "replaces") not in above}
    for name, value in above.items():
        nested = group_model(fields.get(name), result.get(name), value)
        result[name] = merge(nested, result[name], value) if nested else value
    return result


def group_model(field: FieldInfo | None, old: Any, new: Any) -> type[BaseModel] | None:
    """The model that two values of a field are both layers of; None where the new one replaces the old one."""
    if field is None or not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return None
    kinds = {layer[key] for layer in (old, new) if (key := extra(field, "kind")) in layer}
    return nested_model(field) if len(kinds) < 2 else None


def read_settings(path: Path, leave_out: Collection[str] = ()) -> Layer:
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
    inner = value.get("settings")  # in the file beside samples, one entry among others
    layer = inner if isinstance(inner, dict) else value
    return {name: said for name, said in layer.items() if name not in leave_out}


def preset_layer(family: str, name: str) -> Layer:
    """One of the packaged presets: `vae` or `unet`, and one of PRESETS."""
    return read_settings(Path(__file__).parent / "presets" / f"{family}-{name}.toml")


def defaults(model: type[BaseModel]) -> Layer:
    """A model's own defaults as a layer."""
    return model.model_construct().model_dump(mode="json")


def build(model: type[BaseModel], layers: list[Layer]) -> Any:
    """One model from its defaults and layers, the later ones on top.

    Raises:
        UserError: For a wrong value, naming each setting as the user types it.
    """
    try:
        return model.model_validate(reduce(partial(merge, model), layers, defaults(model)))
    except ValidationError as error:
        raise UserError("\n".join(explain(model, row) for row in error.errors())) from None


def explain(model: type[BaseModel], row: Mapping[str, Any]) -> str:
    """One of pydantic's complaints as a sentence about a flag."""
    path = tuple(part for part in row["loc"] if isinstance(part, str))
    known = [leaf for leaf, _ in leaves(model)]
    message = str(row["msg"]).removeprefix("Value error, ")
    if row["type"] == "extra_forbidden" and path in known:
        return f"--{flag(model, path)}: a {path[-2]} of the kind that is chosen has no such setting"
    if row["type"] == "extra_forbidden":  # only a file can be wrong here: named as files do
        near = [".".join(leaf) for leaf in sorted(known) if leaf[-1].startswith(path[-1][:3])]
        return f"unknown setting {'.'.join(path)}" + (f"; similar ones: {', '.join(near)}" if near else "")
    if message.startswith("--"):  # it names what it is about
        return message
    if path not in known:
        return f"{f'--{path[-1]}.*' if path else 'settings'}: {message}"
    found = row.get("input")
    shown = ",".join(map(str, found)) if isinstance(found, (list, tuple)) else str(found)
    return f"--{flag(model, path)}: {message}" + (f" (found {shown})" if shown not in message else "")


def rules(fields: Mapping[Where, FieldInfo]) -> dict[Where, FieldInfo]:
    """The fields that say of another one that they `replaces` it, or `needs` it: `name`, or `name=this|that`."""
    return {path: field for path, field in fields.items() if extra(field, "replaces") or extra(field, "needs")}


def check_effects(ruled: Mapping[Where, FieldInfo], typed: Collection[Where], file: Layer, built: BaseModel) -> None:
    """Refuse what would do nothing: flags, and values of a settings file that are not the default.

    Raises:
        UserError: If two flags stand for one another, or a setting belongs to another one that is off.
    """
    for path, field in ruled.items():
        if path in typed or (stated(file, path) and reduce(getattr, path, built) != default_of(type(built), path)):
            check_effect(path, field, typed, built)


def check_effect(path: Where, field: FieldInfo, typed: Collection[Where], built: BaseModel) -> None:
    """Refuse one setting that would do nothing."""
    name = partial(flag, type(built))
    rival = (*path[:-1], extra(field, "replaces"))
    if path in typed and rival in typed:
        raise UserError(f"--{name(path)} replaces --{name(rival)}: give only one of them")
    needed, _, values = extra(field, "needs").partition("=")
    other = (*path[:-1], needed)
    value: Any = reduce(getattr, other, built) if needed else True
    if value not in values.split("|") if values else not value:
        wanted = f"--{name(other)} {values.replace('|', ' or ')}".rstrip()
        raise UserError(f"--{name(path)} does nothing without {wanted}")


def stated(layer: Any, path: Where) -> bool:
    """Whether a layer says something of a field."""
    return not path or (isinstance(layer, Mapping) and path[0] in layer and stated(layer[path[0]], path[1:]))


# --- commands -----------------------------------------------------------------------------------------------------


def command(
    model: type[BaseModel],
    run: Callable[[Any], object],
    inherit: Callable[[Layer], Layer] | None = None,
    presets: str = "",
    estimate: Callable[[Any], object] | None = None,
) -> Callable[..., None]:
    """A function for Typer with an option for every field, that builds the model and calls `run`.

    Args:
        model: The settings; its docstring becomes the command's help.
        run: What to do with them.
        inherit: What file and flags say -> what an earlier stage or a stopped run saved, a layer below the file's.
        presets: The family of presets to choose from, if any.
        estimate: What --dry-run does with the settings, after it has printed them.
    """

    def call(settings: Path | None = None, preset: str = "", dry_run: bool = False, **values: Any) -> None:
        typed = {tuple(name.split("__")): value for name, value in values.items() if value not in (None, [])}
        flags, file = nest(typed), read_settings(settings, getattr(model, "NO_FILE", ())) if settings else {}
        saved = inherit(merge(model, file, flags)) if inherit else {}
        chosen = checked_preset(preset, saved) if preset else {}
        built = build(model, [chosen, saved, file, flags])
        check_effects(ruled, typed, file, built)
        if dry_run:
            typer.echo(json.dumps(built.model_dump(mode="json"), indent=2))
            if estimate:
                estimate(built)
        else:
            run(built)

    def checked_preset(name: str, saved: Layer) -> Layer:
        chosen = preset_layer(presets, name)
        of_network = {group for group, field in model.model_fields.items() if extra(field, "prefix")}
        over = merge(model, saved, chosen)
        if any(over[group] != saved[group] for group in chosen.keys() & saved.keys() & of_network):
            raise UserError(f"--preset {name}: this run holds another architecture: choose another --run, or --restart")
        return chosen

    fields = flag_fields(model)
    ruled = rules(fields)
    rehearsed = " and what they will take," if estimate else ""
    parameters = [option(model, path, field) for path, field in fields.items()]
    file_option = typer.Option("--settings", help="settings file, TOML or JSON; flags override it")
    dry_option = typer.Option("--dry-run", help=f"print the settings as JSON{rehearsed} and stop")
    parameters += [parameter("settings", Path | None, file_option), parameter("dry_run", bool, dry_option, False)]
    if presets:
        preset_option = typer.Option("--preset", help="set of architecture settings; 'lightdiff presets' lists them")
        parameters.append(parameter("preset", Literal[PRESETS] | None, preset_option))
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__doc__ = model.__doc__
    return call
