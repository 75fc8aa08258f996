"""Settings -> options -> settings: layers laid over one another, flags, and groups that may hold several models."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given as arbitrary
from hypothesis import settings as profile
from hypothesis import strategies as st
from parsing import STAGES, parsed, refused, said_wrong
from pydantic import Field, model_validator

from lightdiff import options, settings
from lightdiff.cli import COMMANDS
from lightdiff.errors import UserError
from lightdiff.extras import settings as extras_settings
from lightdiff.models.original import OriginalUNetSettings, OriginalVAESettings
from lightdiff.options import (
    build,
    default_of,
    defaults,
    flag,
    flag_fields,
    format_value,
    leaves,
    merge,
    nest,
    option,
    panel,
)
from lightdiff.settings import GenerateSettings, Layer, LoopSettings, Settings, TrainUNetSettings, TrainVAESettings

PROPERTY = profile(deadline=None, max_examples=150, derandomize=True, database=None)


class Leaf(Settings):
    """Settings that hold no other ones."""

    lr: int = 0
    seed: int = 0
    steps: int = 0
    epochs: int = Field(0, json_schema_extra={"replaces": "steps"})


class Twig(Leaf):
    """Settings that hold such."""

    loop: Leaf = Leaf()
    model: Leaf = Leaf()


class Node(Leaf):
    """Settings that hold settings that hold settings."""

    loop: Twig = Twig()
    model: Twig = Twig()


def layers_of(depth: int) -> st.SearchStrategy[Layer]:
    """Layers of settings with this many groups inside one another."""
    values = st.fixed_dictionaries({}, optional=dict.fromkeys(("lr", "seed", "steps", "epochs"), st.integers(0, 9)))
    if depth == 0:
        return values
    groups = st.dictionaries(st.sampled_from(["loop", "model"]), layers_of(depth - 1))
    return st.tuples(values, groups).map(lambda pair: {**pair[0], **pair[1]})


LAYERS = layers_of(2)


def flat(layer: Layer, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Values by their paths: the inverse of `nest`."""
    rows: dict[tuple[str, ...], Any] = {}
    for name, value in layer.items():
        rows |= flat(value, (*path, name)) if isinstance(value, dict) else {(*path, name): value}
    return rows


def complaints_about(model: type[Settings], layer: Layer) -> list[str]:
    """The lines of the message that a layer is refused with; none if it is fine."""
    try:
        build(model, [layer])
    except UserError as error:
        return str(error).splitlines()
    return []


# --- layers -------------------------------------------------------------------------------------------------------


@PROPERTY
@arbitrary(LAYERS, LAYERS)
def test_the_later_layer_wins(below: Layer, above: Layer) -> None:
    before = json.dumps([below, above])
    merged, low, high = flat(merge(Node, below, above)), flat(below), flat(above)
    assert json.dumps([below, above]) == before
    for path, value in high.items():
        assert merged[path] == value
    for path in low.keys() - high.keys():
        other = {"steps"} if path[-1] == "epochs" else set()
        dropped = any((*path[:-1], name) in high for name in other)
        assert merged.get(path) == (None if dropped else low[path])
    assert merged.keys() <= low.keys() | high.keys()


@PROPERTY
@arbitrary(LAYERS, LAYERS, LAYERS)
def test_merging_is_associative(a: Layer, b: Layer, c: Layer) -> None:
    assert merge(Node, merge(Node, a, b), c) == merge(Node, a, merge(Node, b, c))


@PROPERTY
@arbitrary(LAYERS)
def test_an_empty_layer_changes_nothing(layer: Layer) -> None:
    assert merge(Node, layer, {}) == merge(Node, {}, layer) == merge(Node, layer, layer) == layer


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([{"steps": 1}, {"epochs": 2}], {"steps": 1, "epochs": 2}),
        ([{"epochs": 1}, {"steps": 2}], {"steps": 2}),
        ([{"steps": 1, "epochs": 0}, {"steps": 2}], {"steps": 2}),
        ([{"steps": 1}, {"steps": 2, "epochs": 3}], {"steps": 2, "epochs": 3}),
        ([{"steps": 1}, {"epochs": 2}, {"steps": 3}], {"steps": 3}),
        ([{"steps": 1}, {"lr": 1}, {"epochs": 2}], {"steps": 1, "lr": 1, "epochs": 2}),
        ([{"loop": {"steps": 1, "lr": 1}}, {"loop": {"epochs": 2}}], {"loop": {"steps": 1, "lr": 1, "epochs": 2}}),
        ([{"steps": 1}, {"loop": {"epochs": 2}}], {"steps": 1, "loop": {"epochs": 2}}),
    ],
)
def test_later_steps_overrule_earlier_epochs(layers: list[Layer], expected: Layer) -> None:
    whole: Layer = {}
    for layer in layers:
        whole = merge(Node, whole, layer)
    assert whole == expected


def test_a_value_replaces_a_layer_and_a_list_replaces_a_list() -> None:
    assert merge(Node, {"a": {"b": 1}}, {"a": 2}) == {"a": 2}
    assert merge(Node, {"loop": {"lr": 1}}, {"loop": 2}) == {"loop": 2}
    assert merge(Node, {"a": [1, 2]}, {"a": [3]}) == {"a": [3]}


@pytest.mark.parametrize("model", STAGES)
def test_nest_is_undone_by_flattening(model: type[Settings]) -> None:
    rows = {path: number for number, (path, _) in enumerate(leaves(model))}
    assert flat(nest(rows)) == rows


def test_nest_of_few() -> None:
    assert nest({}) == {}
    assert nest({("a",): 1, ("b", "c"): 2, ("b", "d", "e"): 3}) == {"a": 1, "b": {"c": 2, "d": {"e": 3}}}


@pytest.mark.parametrize("model", STAGES)
def test_defaults_alone_build_the_model(model: type[Settings]) -> None:
    assert build(model, []) == build(model, [defaults(model)]) == model()
    json.dumps(defaults(model))


def test_a_partial_layer_keeps_the_stages_own_defaults() -> None:
    loop = build(TrainUNetSettings, [defaults(TrainUNetSettings), {"loop": {"seed": 3}}]).loop
    assert (loop.seed, loop.steps, loop.lr, loop.batch_size) == (3, 50_000, 2e-3, 32)


def test_every_settings_model_is_frozen_and_described() -> None:
    kinds = [*vars(settings).values(), *vars(extras_settings).values()]
    models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)]
    assert {*STAGES, LoopSettings} <= set(models)
    for model in models:
        assert model.__doc__
        assert model.model_config["frozen"]
        assert model.model_config["extra"] == "forbid"


# --- flags --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [row.model for row in COMMANDS.values()])
def test_flags_are_unique_and_fields_format_value(model: type[Settings]) -> None:
    fields = dict(leaves(model))
    names = Counter(flag(model, path) for path in fields)
    names.update(["settings", "dry-run", "help"] + ["preset"] * ("preset" not in names))
    names.update(f"no-{flag(model, path)}" for path, field in fields.items() if field.annotation is bool)
    assert not [name for name, count in names.items() if count > 1]
    for path, field in fields.items():
        assert field.description, path
        assert field.description.strip().rstrip(".") == field.description, path
    assert len({"__".join(path) for path in fields}) == len(fields)


@pytest.mark.parametrize("model", STAGES)
def test_options_say_nothing_unless_given(model: type[Settings]) -> None:
    assert all(option(model, path, field).default is None for path, field in leaves(model))
    assert parsed(model) == model()


def test_flags_panels_and_defaults_of_some_fields() -> None:
    assert flag(TrainVAESettings, ("loop", "lr")) == "lr"
    assert flag(TrainVAESettings, ("images", "random_crop")) == "random-crop"
    assert flag(TrainVAESettings, ("model", "encoder_channels")) == "model.encoder-channels"
    assert panel(TrainVAESettings, ("run",)) == "Options"
    assert panel(TrainVAESettings, ("loop", "lr")) == "Training"
    assert default_of(TrainVAESettings, ("loop", "lr")) == 2e-3
    assert default_of(TrainUNetSettings, ("loop", "batch_size")) == 32


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""), ((), ""), ("", ""), ((1,), "1"), ((1, 2), "1,2"), (True, "on"), (False, "off"),
        (2e-4, "0.0002"), (1.0, "1"), (0.0, "0"), (0, "0"), (20_000, "20000"), ("cosine", "cosine"),
    ],
)  # fmt: skip
def test_defaults_as_help_shows_them(value: Any, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("64,128", (64, 128)), ("64, 128,256", (64, 128, 256)), (" 8,8 ", (8, 8)), ("none", ()), (" none ", ()),
        ("", ()),
    ],
)  # fmt: skip
def test_lists_take_commas(text: str, numbers: tuple[int, ...]) -> None:
    assert parsed(TrainVAESettings, "--model.encoder-channels", text).model.encoder_channels == numbers


@pytest.mark.parametrize(
    "model", [*(row.model for row in COMMANDS.values()), OriginalVAESettings, OriginalUNetSettings]
)
def test_every_list_can_be_given_as_one_text(model: type[Settings]) -> None:
    lists = [path for path, field in leaves(model) if options.takes_commas(field)]
    complaints = [line for path in lists for line in complaints_about(model, nest({path: "1,2,3"}))]
    assert not [complaint for complaint in complaints if "valid tuple" in complaint]


def test_no_level_is_another_thing_than_not_given() -> None:
    assert parsed(TrainUNetSettings).model.attend_levels is None
    assert parsed(TrainUNetSettings, "--model.attend-levels", "none").model.attend_levels == ()
    assert parsed(TrainUNetSettings, "--model.attend-levels", "0,2").model.attend_levels == (0, 2)


def test_lists_of_real_numbers_and_of_folders(tmp_path: Path) -> None:
    latent = TrainUNetSettings.model_validate({"latent": {"channels": 2, "shift": "0.5,-1"}}).latent
    assert latent.shift == (0.5, -1.0)
    one, two = tmp_path / "a,b", tmp_path / "c"
    assert parsed(TrainVAESettings, "--data", str(one), "--data", str(two)).images.data == (one, two)


def test_text_is_not_split() -> None:
    assert parsed(GenerateSettings, "--name", "a,b").name == "a,b"
    assert parsed(GenerateSettings, "--name", "none").name == "none"
    assert parsed(GenerateSettings, "--class", "none").sampling.class_ == ("none",)  # a class may be called that
    assert parsed(TrainVAESettings, "--background", "none").images.background == "none"


def test_a_names_comma_is_kept_in_quotes() -> None:
    assert parsed(GenerateSettings, "--class", 'bare,"dark, round"').sampling.class_ == ("bare", "dark, round")
    assert parsed(GenerateSettings, "--class", "5'11\", b").sampling.class_ == ("5'11\"", "b")


def test_booleans() -> None:
    assert parsed(TrainVAESettings, "--model.attention", "on").model.attention is True
    assert parsed(TrainVAESettings, "--model.attention", "off").model.attention is False
    assert parsed(TrainUNetSettings, "--model.zero-init", "off").model.zero_init is False
    assert parsed(TrainUNetSettings, "--model.mid-attention", "on").model.mid_attention is True
    assert parsed(TrainVAESettings, "--no-flip").images.flip is False
    assert parsed(TrainVAESettings, "--flip").images.flip is True
    assert parsed(GenerateSettings, "--ema", "0").ema == 0


def test_flags_that_belong_to_a_choice_go_with_it() -> None:
    assert parsed(TrainUNetSettings, "--loss-weight", "min-snr", "--min-snr-gamma", "3").target.min_snr_gamma == 3
    flags = ["--objective", "eps", "--schedule", "scaled-linear", "--beta-end", "0.1"]
    assert parsed(TrainUNetSettings, *flags).noise.beta_end == 0.1
    assert parsed(TrainUNetSettings, "--density-std", "2").levels.density_std == 2


# --- groups that may hold several models --------------------------------------------------------------------------


class Thing(Settings):
    """Base of the kinds: validated as such, settings become what they name."""

    kind: str = "round"

    @model_validator(mode="wrap")
    @classmethod
    def _kind(cls, value: Any, handler: Any) -> Any:
        kinds = {"round": Round, "square": Square}
        if cls is not Thing or not isinstance(value, dict):
            return handler(value)
        if value.get("kind", "round") not in kinds:
            raise ValueError("no such kind")
        return kinds[value.get("kind", "round")].model_validate(value)


class Round(Thing):
    """One kind."""

    kind: Literal["round"] = Field("round", description="kind of thing")
    radius: int = Field(1, description="half of its width")
    blocks: settings.Numbers = Field((1,), description="some numbers")


class Square(Thing):
    """Another kind."""

    kind: Literal["square"] = Field("square", description="kind of thing")
    side: int = Field(2, ge=1, description="length of a side")
    blocks: settings.Numbers = Field((2,), description="some numbers")


class Drawing(Settings):
    """A thing of one of two kinds."""

    NO_FLAG: ClassVar = frozenset({"model.kind"})

    model: Thing = Field(Round(), title="Thing", json_schema_extra={"prefix": True, "kind": "kind"})


def test_the_default_has_the_flags_and_a_file_can_choose_another(tmp_path: Path) -> None:
    square = tmp_path / "square.toml"
    square.write_text('[model]\nkind = "square"\n')
    assert [flag(Drawing, path) for path in flag_fields(Drawing)] == ["model.radius", "model.blocks"]
    assert parsed(Drawing) == Drawing()
    assert parsed(Drawing, "--model.radius", "3").model == Round(radius=3)
    assert parsed(Drawing, "--settings", str(square), "--model.blocks", "7,8").model == Square(blocks=(7, 8))
    assert said_wrong(Drawing, "--settings", str(square), "--model.radius", "3") == [
        "--model.radius: a model of the kind that is chosen has no such setting"
    ]


def test_a_layer_of_another_model_replaces_the_group() -> None:
    square: Layer = {"model": {"kind": "square", "side": 5}}
    assert build(Drawing, [{"model": {"radius": 9, "blocks": [3]}}, square]).model == Square(side=5)
    assert build(Drawing, [square, {"model": {"blocks": [3]}}]).model == Square(side=5, blocks=(3,))
    assert build(Drawing, [square, {"model": {"kind": "square", "blocks": [3]}}]).model == Square(side=5, blocks=(3,))
    assert build(Drawing, [square, {"model": {"kind": "round", "radius": 3}}]).model == Round(radius=3)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"kind": "square", "side": 0}, "--model.side: "),
        ({"kind": "flat"}, "--model.*: "),
        ({"kind": "square", "blocks": "ab"}, "--model.blocks: "),
        ({"kind": "square", "hue": 1}, "unknown setting model.hue"),
    ],
)
def test_wrong_values_of_another_model_are_named_without_it(layer: Layer, message: str) -> None:
    (line,) = refused(Drawing, {"model": layer})
    assert line.startswith(message)
