"""Pydantic settings -> command-line options, and layers of settings -> one model. Knows nothing of diffusion.

A field of a nested model becomes a flag in that model's help panel: `--lr`, or, where the nested field has a `prefix`,
`--model.channels`. Typer parses, pydantic judges. An option that is not given says nothing (None), so that it does not
override what a file or an earlier stage said.
"""

import inspect
import json
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache, partial, reduce
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lightdiff.architectures import Layer
from lightdiff.errors import UserError, shorten
from lightdiff.on_demand import on_demand

Where = tuple[str, ...]  # the names that lead to a field: ("loop", "lr")
Preset = Literal["auto", "tiny", "small", "base-s", "base", "base-l", "kl-f8", "original"]
PRESETS: tuple[Preset, ...] = get_args(Preset)[1:]
PRESETS_SHOWN = "networks and budget, 'lightdiff presets' lists them; auto: small, with a GPU base, and as the VAE's"
PRINTED = "print the settings as JSON (and, of a training, what it will take) and stop"
START, MORE = "Start here", "More"  # panels of help
OWN = ("preset", "settings", "dry-run", "help-all", "help")  # options beside the settings

NUMBERS = {int: "whole number", float: "number"}  # kinds that are typed as such
MAX_TOLD = 20  # wrong values told at once
LONGEST_PAIR = 12  # of a name that also gets a --no-; with a longer one, there is no room for its description


# --- fields and their flags ---------------------------------------------------------------------------------------


def plain(annotation: Any) -> Any:
    """A type without None, without what is annotated, and the first where there may be several."""
    while get_origin(annotation) in (Union, UnionType, Annotated):
        annotation = next(kind for kind in get_args(annotation) if kind is not NoneType)
    return annotation


def nested_model(field: FieldInfo | None) -> type[BaseModel] | None:
    """The model that a field holds, if it holds one: that of its default."""
    return type(field.default) if field and isinstance(field.default, BaseModel) else None


def leaves(model: type[BaseModel], path: Where = ()) -> Iterator[tuple[Where, FieldInfo]]:
    """Every field that is no model itself, depth first, with its path."""
    for name, field in model.model_fields.items():
        nested = nested_model(field)
        yield from leaves(nested, (*path, name)) if nested else [((*path, name), field)]


def flag_fields(model: type[BaseModel]) -> dict[Where, FieldInfo]:
    """The fields that have a flag: all but what an earlier stage fills in, and what would do nothing in this one."""
    no_flag: frozenset[str] = getattr(model, "NO_FLAG", frozenset())
    return {path: f for path, f in leaves(model) if not {path[0], ".".join(path)} & no_flag}


def lookup(model: type[BaseModel], path: Where) -> tuple[FieldInfo | None, FieldInfo]:
    """The group that a field is in, if it is in one, and the field."""
    group = model.model_fields[path[0]] if path[1:] else None
    return group, (nested_model(group) or model).model_fields[path[-1]]


def extra(field: FieldInfo | None, name: str) -> str:
    """What a field's `json_schema_extra` says of it, or "".

    `needs`: the field beside it without which it does nothing, `name`, or `name=this|that`. `replaces`: the field
    beside it that it stands for. `prefix`: that its name is part of its fields' flags. `kind`: the field that tells
    which of several models it holds. `repeated`: what each of its values is, if its flag is given several times.
    `panel`: its panel of the help.
    """
    return str(field.json_schema_extra.get(name, "")) if field and isinstance(field.json_schema_extra, dict) else ""


def flag(model: type[BaseModel], path: Where) -> str:
    """A field's flag, without dashes: `lr`, `model.channels`."""
    prefix = f"{path[0]}." if extra(lookup(model, path)[0], "prefix") else ""
    return prefix + path[-1].rstrip("_").replace("_", "-")  # class_ and from_ are words of Python


def panel(model: type[BaseModel], path: Where) -> str:
    """The help panel of a field: its own, else the title of the group it belongs to."""
    group, field = lookup(model, path)
    return extra(field, "panel") or (group and group.title) or "Options"


def default_of(model: type[BaseModel], path: Where) -> Any:
    """A field's default within this model (a stage may differ from the nested model's own)."""
    return reduce(getattr, path, all_defaults(model))


@cache
def all_defaults(model: type[BaseModel]) -> BaseModel:
    """A model with the default of every field, also of those that have to be given: only to be read."""
    return model.model_construct()


def format_value(value: Any) -> str:
    """A value as help shows it and as one types it; nothing for none."""
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):  # a named tuple has a text of its own
        return ",".join(map(format_value, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def parse_number(kind: Any, name: str, text: Any, example: str) -> Any:
    """A number as it was typed; a value of another kind as it is.

    Raises:
        UserError: If it is none.
    """
    if kind not in NUMBERS or not isinstance(text, str):
        return text
    try:
        return kind(text if text.isascii() else "")
    except ValueError:
        words = f"{shorten(text)} is no {NUMBERS[kind]}" if text else "a number is missing"
        raise UserError(f"{name}: {words}; write one as in {example}") from None


def not_empty(name: str, text: str) -> str:
    """What was typed for a path, if anything was: Path("") is the current folder."""
    if not text:
        raise UserError(f"{name} is empty; perhaps a variable of the shell is not set")
    return text


def takes_commas(field: FieldInfo) -> bool:
    """Whether a field is a list that is typed as one text, which pydantic splits: `64,128`."""
    return get_origin(plain(field.annotation)) is tuple and not extra(field, "repeated")


def option(model: type[BaseModel], path: Where, field: FieldInfo, start: Collection[str] = ()) -> inspect.Parameter:
    """One field as a parameter that Typer makes an option of; what it is not given is None.

    Those of `start` are in a panel of their own.
    """
    kind, name, written = plain(field.annotation), flag(model, path), extra(field, "repeated")
    place = START if name in start else panel(model, path)
    shown = format_value(default_of(model, path))
    hint = "required" if name in getattr(model, "REQUIRED", ()) else shown and f"default: {shown}"
    parser: Callable[[str], Any] | None = None
    text = (field.description or "") + (rf" \[{hint}]" if hint else "")  # escaped, or rich takes it for markup
    declaration = f"--{name}/--no-{name}" if kind is bool and len(name) <= LONGEST_PAIR else f"--{name}"
    if takes_commas(field) or hasattr(kind, "_fields"):
        kind = str
    elif get_origin(kind) is tuple:
        kind, parser = list[str], partial(not_empty, f"--{name}")
    elif kind is bool and "." in name:
        kind, declaration = Literal["on", "off"], f"--{name}"  # --model.no-... would squeeze the help of all others
    elif kind is Path:
        kind, parser = str, partial(not_empty, f"--{name}")
    elif kind in NUMBERS:  # `parse_number` says better than Typer what is wrong with one
        kind, parser = str, partial(parse_number, kind, f"--{name}", example=f"--{name} {shown or 1}")
    if get_origin(kind) is Literal:
        text = f"{', '.join(get_args(kind))}: {text}"
    text = f"{written}: {text}" if "=" in written else text
    info = typer.Option(
        declaration,
        help=text,
        rich_help_panel=MORE if start and place == "Options" else place,
        show_default=False,
        metavar="",  # no column of types: the default and the description show them
        parser=parser,
    )
    annotation: Any = Annotated[kind | None, info]
    return inspect.Parameter("__".join(path), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


# --- layers -------------------------------------------------------------------------------------------------------


def nest(flat: Mapping[Where, Any]) -> Layer:
    """{("loop", "lr"): 1} -> {"loop": {"lr": 1}}."""
    result: Layer = {}
    for path, value in flat.items():
        reduce(lambda group, name: group.setdefault(name, {}), path[:-1], result)[path[-1]] = value
    return result


def merge(model: type[BaseModel], *layers: Layer) -> Layer:
    """Layers of a model's settings as one, the later ones on top; none of them is changed.

    A setting that `replaces` another is dropped when a later layer sets that other one. Of a group that may hold
    several models, settings for one replace those for another, instead of adding to them.
    """
    return reduce(partial(merge_two, model), [layer for layer in layers if layer] or [{}])


def merge_two(model: type[BaseModel], below: Layer, above: Layer) -> Layer:
    """Two layers as one."""
    field = model.model_fields.get
    result = {name: value for name, value in below.items() if extra(field(name), "replaces") not in above}
    for name, value in above.items():
        group, old = None, result.get(name)
        if (known := field(name)) and isinstance(old, Mapping) and isinstance(value, Mapping):
            kind = extra(known, "kind")
            held = old.get(kind, getattr(known.default, kind, None))  # a layer that names none is of the default's kind
            group = nested_model(known) if value.get(kind, held) == held else None
        result[name] = merge_two(group, result[name], value) if group else value
    return result


def preset_layer(family: str, name: str, size: int = 0) -> Layer:
    """One of the packaged presets: `vae` or `unet`, and one of PRESETS; sections `at-N` are for N px and more."""
    layer = tomllib.loads((Path(__file__).parent / "presets" / f"{family}-{name}.toml").read_text("utf-8"))
    larger = {int(section[3:]): layer.pop(section) for section in list(layer) if section.startswith("at-")}
    for smallest in sorted(n for n in larger if n <= size):
        layer |= {group: layer.get(group, {}) | values for group, values in larger[smallest].items()}
    return layer


def checked_preset(model: type[BaseModel], family: str, name: str, saved: Layer, size: int = 0) -> Layer:
    """A preset that goes with what a stopped run saved.

    Raises:
        UserError: If that run holds another network.
    """
    chosen = preset_layer(family, name, size)
    for group in chosen.keys() & saved.keys():
        if extra(model.model_fields[group], "prefix") and merge(model, saved, chosen)[group] != saved[group]:
            also = "this run holds another architecture, or --init-from does"
            raise UserError(f"--preset {name}: {also}: leave it out, or choose another --run")
    return chosen


def defaults(model: type[BaseModel]) -> Layer:
    """The fields that a model sets in its groups otherwise than these do themselves, as a layer."""
    groups = [(name, group) for name, group in all_defaults(model) if isinstance(group, BaseModel)]
    return {name: group.model_dump(exclude_unset=True) for name, group in groups if group.model_fields_set}


def build(model: type[BaseModel], layers: list[Layer]) -> Any:
    """One model from its defaults and layers, the later ones on top.

    Raises:
        UserError: For a wrong value, naming each setting as the user types it.
    """
    try:
        return model.model_validate(merge(model, defaults(model), *layers))
    except ValidationError as error:
        raise UserError(
            *(on_demand("wrong_settings:explain")(model, row) for row in error.errors()[:MAX_TOLD])
        ) from None


def check_effects(ruled: Mapping[Where, FieldInfo], typed: Collection[Where], file: Layer, built: BaseModel) -> None:
    """Refuse what would do nothing: flags, and values of a settings file that are not the default.

    Raises:
        UserError: If two flags stand for one another, or a setting belongs to another one that is off.
    """
    name = partial(flag, type(built))
    for path, field in ruled.items():
        changed = stated(file, path) and reduce(getattr, path, built) != default_of(type(built), path)
        if path not in typed and not changed:
            continue
        rival = (*path[:-1], extra(field, "replaces"))
        if path in typed and rival in typed:
            raise UserError(f"--{name(path)} replaces --{name(rival)}: give only one of them")
        needed, _, values = extra(field, "needs").partition("=")
        other = (*path[:-1], needed)
        value: Any = reduce(getattr, other, built) if needed else True
        if value not in values.split("|") if values else not value:
            words = values.replace("|", " or ")
            raise UserError(f"--{name(path)} does nothing without --{name(other)} {words}".rstrip())


def stated(layer: Any, path: Where) -> bool:
    """Whether a layer says something of a field."""
    return not path or (isinstance(layer, Mapping) and path[0] in layer and stated(layer[path[0]], path[1:]))


# --- commands -----------------------------------------------------------------------------------------------------


def own_options(presets: bool, start: Sequence[str], hidden: int) -> list[inspect.Parameter]:
    """Options beside the settings; --help-all is shown where --help hides `hidden` settings."""
    about = partial(typer.Option, metavar="", rich_help_panel=MORE if hidden else None)

    def show(context: typer.Context, parameter: typer.CallbackParam, wanted: bool | None) -> None:
        if not wanted:
            return
        for other in context.command.params if hidden and parameter.name == "help" else ():
            other.hidden = other.opts[0].lstrip("-") not in (*start, *OWN)  # type: ignore[attr-defined]
        typer.echo(context.get_help())
        raise typer.Exit

    asked = partial(about, is_eager=True, callback=show, expose_value=False)
    first = about(help=PRESETS_SHOWN, rich_help_panel=START if hidden else None)
    rows: list[tuple[str, Any, Any]] = [("preset", Preset | None, first)] if presets else []
    rows += [("settings", Path | None, about(help="settings file, TOML or JSON; flags override it"))]
    rows += [("dry_run", bool, about("--dry-run", help=PRINTED))]
    rows += [("help_all", bool, asked("--help-all", hidden=not hidden, help=f"show the other {hidden} settings, too"))]
    rows += [("help", bool, asked("--help", "-h", help="show this page"))]
    make = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    return [make(name, default=None, annotation=Annotated[kind | None, info]) for name, kind, info in rows]


def show(built: BaseModel) -> None:
    """Print settings as JSON, those of a sweep without the ones at their defaults."""
    short = getattr(built, "SHORT", False)
    typer.echo(json.dumps(built.model_dump(mode="json", exclude_defaults=short), indent=2))


def command(
    model: type[BaseModel],
    run: Callable[[Any], object],
    inherit: Callable[[Layer], Layer] = lambda given: {},
    estimate: Callable[[Any], object] = lambda built: None,
    start: Sequence[str] = (),
    example: str = "",
    presets: str = "",
    pick: Callable[[str, Layer, Layer], tuple[str, int]] = lambda asked, saved, given: (asked, 0),
    follow: Callable[[Any], Layer] = lambda built: {},
) -> Callable[..., None]:
    """A function for Typer with an option for every field and its own --help, that builds the model and calls `run`.

    Args:
        model: The settings; its docstring becomes the command's help.
        run: What to do with them.
        inherit: What file and flags say -> what an earlier stage or a stopped run saved, a layer below the file's.
        estimate: What --dry-run does with the settings, besides printing them.
        start: The flags, without dashes, that --help shows; all if empty.
        example: A call that help shows.
        presets: The family of presets to choose from, if any.
        pick: The preset asked for, or "", what was saved and what is given -> the preset, or "", and the images' size.
        follow: Settings -> what follows from them, the layer below all others.
    """
    fields = flag_fields(model)
    ruled = {path: field for path, field in fields.items() if extra(field, "replaces") or extra(field, "needs")}

    def call(
        *, settings: Path | None = None, dry_run: bool | None = None, preset: Preset | None = None, **values: Any
    ) -> None:
        typed = {tuple(name.split("__")): value for name, value in values.items() if value not in (None, [])}
        file = on_demand("settings_file:read_settings")(settings, getattr(model, "NO_FILE", ())) if settings else {}
        given = merge(model, file, nest(typed))
        saved = inherit(given)
        asked = preset or given.get("preset")
        name, size = pick(asked if asked in PRESETS else "", saved, given)
        layers = [checked_preset(model, presets, name, saved, size) if name else {}, saved, given]
        built = build(model, [follow(build(model, layers)), *layers, {"preset": name} if name else {}])
        check_effects(ruled, typed, file, built)
        if not dry_run:
            run(built)
        else:
            for tell in (show, estimate) if presets else (estimate, show):  # of a sweep, what it varies comes first
                tell(built)

    order = sorted(fields, key=lambda path: start.index(name) if (name := flag(model, path)) in start else len(start))
    parameters = [option(model, path, fields[path], start) for path in order]
    parameters += own_options(bool(presets), start, len(fields) - len(start) if start else 0)
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__doc__ = f"{model.__doc__}\n\nExample: {example}" if example else model.__doc__
    return call
