"""Settings -> options -> settings: layers, flags, files, and messages that name what the user typed."""

import json
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import typer
from hypothesis import given as arbitrary
from hypothesis import settings as profile
from hypothesis import strategies as st
from pydantic import Field, model_validator
from typer.testing import CliRunner

from lightdiff import options, settings
from lightdiff.cli import COMMANDS
from lightdiff.errors import UserError
from lightdiff.extras import settings as extras_settings
from lightdiff.extras.settings import DemoSettings
from lightdiff.extras.settings_file import read_settings
from lightdiff.models.original import OriginalUNetSettings, OriginalVAESettings
from lightdiff.options import (
    PRESETS,
    build,
    command,
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
    preset_layer,
)
from lightdiff.settings import (
    EncodeSettings,
    GenerateSettings,
    Layer,
    LoopSettings,
    ScaleSettings,
    Settings,
    TrainUNetSettings,
    TrainVAESettings,
    UNetSettings,
    VAESettings,
)

PRESET_FOLDER = Path(options.__file__).parent / "presets"
PROPERTY = profile(deadline=None, max_examples=150, derandomize=True, database=None)
STAGES = [TrainVAESettings, EncodeSettings, ScaleSettings, TrainUNetSettings, GenerateSettings, DemoSettings]


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


@pytest.mark.parametrize(
    "model", [*(row.model for row in COMMANDS.values()), OriginalVAESettings, OriginalUNetSettings]
)
def test_every_list_can_be_given_as_one_text(model: type[Settings]) -> None:
    lists = [path for path, field in leaves(model) if options.takes_commas(field)]
    complaints = [line for path in lists for line in complaints_about(model, nest({path: "1,2,3"}))]
    assert not [complaint for complaint in complaints if "valid tuple" in complaint]


def test_a_partial_layer_keeps_the_stages_own_defaults() -> None:
    loop = build(TrainUNetSettings, [defaults(TrainUNetSettings), {"loop": {"seed": 3}}]).loop
    assert (loop.seed, loop.steps, loop.lr, loop.batch_size) == (3, 50_000, 2e-3, 32)


# --- flags --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", STAGES)
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


@pytest.mark.parametrize("model", STAGES)
def test_help_names_every_flag(model: type[Settings]) -> None:
    result = CliRunner().invoke(app_of(model), ["--help"], env={"COLUMNS": "200", "TERM": "dumb"}, terminal_width=200)
    assert result.exit_code == 0
    for path in flag_fields(model):
        assert f"--{flag(model, path)}" in result.output


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


def test_booleans() -> None:
    assert parsed(TrainVAESettings, "--model.attention", "on").model.attention is True
    assert parsed(TrainVAESettings, "--model.attention", "off").model.attention is False
    assert parsed(TrainUNetSettings, "--model.zero-init", "off").model.zero_init is False
    assert parsed(TrainUNetSettings, "--model.mid-attention", "on").model.mid_attention is True
    assert parsed(TrainVAESettings, "--no-flip").images.flip is False
    assert parsed(TrainVAESettings, "--flip").images.flip is True
    assert parsed(GenerateSettings, "--ema", "0").ema == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.attention", "perhaps"],
        ["--model.attention"],
        ["--no-model.attention"],
        ["--device", "abacus"],
        ["--learning-rate", "1"],
    ],
)
def test_typer_refuses_what_cannot_be_parsed(arguments: list[str]) -> None:
    seen: list[Any] = []
    assert CliRunner().invoke(app_of(TrainVAESettings, seen.append), arguments).exit_code == 2
    assert not seen


@pytest.mark.parametrize(
    ("flag", "typed", "kind", "example"),
    [
        ("--steps", "10k", "whole number", "--steps 20000"),
        ("--steps", "1,000", "whole number", "--steps 20000"),
        ("--steps", "1.5", "whole number", "--steps 20000"),
        ("--seed", "\u0661", "whole number", "--seed 0"),  # an Arabic digit, which Python's int takes
        ("--lr", "1e-4,", "number", "--lr 0.002"),
        ("--lr", "0.1.2", "number", "--lr 0.002"),
        ("--model.mid-blocks", "two", "whole number", "--model.mid-blocks 1"),
    ],
)
def test_a_number_typed_wrongly_is_repeated_with_an_example(flag: str, typed: str, kind: str, example: str) -> None:
    (line,) = said_wrong(TrainVAESettings, flag, typed)
    assert line == f"{flag}: {typed} is no {kind}; write one as in {example}"


@pytest.mark.parametrize("arguments", [["--data", ""], ["--data="], ["--data", "a", "--data", ""], ["--run", ""]])
def test_an_empty_path_is_refused_instead_of_meaning_the_current_folder(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"^--(data|run) is empty; perhaps a variable of the shell is not set$"):
        parsed(TrainVAESettings, *arguments)


def test_a_long_value_is_not_repeated_whole() -> None:
    assert len(said_wrong(TrainVAESettings, "--steps", "9" * 9000)[0]) < 300
    assert len(refused(TrainVAESettings, {"lo op" * 9000: 1})[0]) < 300
    assert len(refused(TrainVAESettings, {f"name{i}": 1 for i in range(999)})) <= 20


@pytest.mark.parametrize(
    ("file", "arguments", "steps", "epochs"),
    [
        ("", ["--epochs", "3"], None, 3),
        ("", ["--steps", "3"], 3, 0),
        ("epochs = 2", [], None, 2),
        ("epochs = 2", ["--steps", "7"], 7, 0),
        ("steps = 2", ["--epochs", "7"], None, 7),
        ("steps = 2", ["--lr", "1"], 2, 0),
    ],
)
def test_steps_or_epochs_whichever_was_said_last(
    tmp_path: Path, file: str, arguments: list[str], steps: int | None, epochs: float
) -> None:
    (tmp_path / "a.toml").write_text(f"[loop]\n{file}\n")
    loop = parsed(TrainVAESettings, "--settings", str(tmp_path / "a.toml"), *arguments).loop
    assert loop.epochs == epochs
    assert steps is None or loop.steps == steps


def test_layers_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Layer] = []

    def inherit(said: Layer) -> Layer:
        asked.append(said)
        return {"loop": {"lr": 2.0, "clip": 2.0, "beta2": 0.2, "seed": 2}}

    file = tmp_path / "a.toml"
    file.write_text("[loop]\nclip = 3.0\nbeta2 = 0.3\n[model]\nlatent_channels = 3\n")

    def preset(family: str, name: str, size: int) -> Layer:
        assert (family, size) == ("some", 0)
        return {"loop": {"lr": 1.0, "clip": 1.0, "keep": 1}, "model": {"mid_blocks": len(name)}}

    monkeypatch.setattr(options, "preset_layer", preset)
    arguments = ["--preset", "tiny", "--settings", str(file), "--beta2", "0.4"]
    built = parsed(TrainVAESettings, *arguments, inherit=inherit, presets="some")
    assert asked == [{"loop": {"clip": 3.0, "beta2": 0.4}, "model": {"latent_channels": 3}}]
    loop = built.loop
    assert (loop.keep, loop.lr, loop.seed, loop.clip, loop.beta2) == (1, 2.0, 2, 3.0, 0.4)
    assert (built.model.latent_channels, built.model.mid_blocks, loop.steps) == (3, 4, 20_000)


@pytest.mark.parametrize("model", STAGES)
@pytest.mark.parametrize("suffix", ["json", "JSON", "settings"])
def test_what_a_dry_run_prints_can_be_read_back(model: type[Settings], suffix: str, tmp_path: Path) -> None:
    seen: list[Any] = []
    arguments = ["--run", str(tmp_path), "--dry-run"]
    result = CliRunner().invoke(app_of(model, seen.append), arguments)
    assert (result.exit_code, seen) == (0, [])
    file = tmp_path / f"saved.{suffix}"
    file.write_text(result.output)
    assert parsed(model, "--settings", str(file)) == parsed(model, "--run", str(tmp_path))


# --- groups that may hold several models -----------------------------------------------------------------------------


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


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "run = 'ä'\n[loop]\nlr = 0.5"),
        ("a.TOML", "run = 'ä'\nloop.lr = 0.5"),
        ("a.json", '{"run": "ä", "loop": {"lr": 0.5}}'),
        ("a", '{"run": "\\u00e4", "loop": {"lr": 0.5}}'),
    ],
)
def test_settings_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_settings(tmp_path / name) == {"run": "ä", "loop": {"lr": 0.5}}


def test_lists_may_be_typed_as_text_in_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[model]\nencoder_channels = '8, 16'\ndecoder_channels = 'none'\n")
    model = parsed(TrainVAESettings, "--settings", str(tmp_path / "a.toml")).model
    assert (model.encoder_channels, model.decoder_channels) == ((8, 16), ())
    assert refused(TrainVAESettings, {"images": {"data": "a,b"}})[0].startswith("--data: ")  # folders are no such list


def test_a_names_comma_is_kept_in_quotes() -> None:
    assert parsed(GenerateSettings, "--class", 'bare,"dark, round"').sampling.class_ == ("bare", "dark, round")
    assert parsed(GenerateSettings, "--class", "5'11\", b").sampling.class_ == ("5'11\"", "b")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min-snr-gamma", "5"], "--min-snr-gamma does nothing without --loss-weight min-snr"),
        (
            ["--density", "uniform", "--density-mean", "1"],
            "--density-mean does nothing without --density logit-normal",
        ),
        (["--beta-end", "0.1"], "--beta-end does nothing without --schedule linear or scaled-linear"),
        (["--label-dropout", "0.2"], "--label-dropout does nothing without --label"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(TrainUNetSettings, *flags)


@pytest.mark.parametrize(
    ("file", "flags", "message"),
    [
        ("[target]\nmin_snr_gamma = 3", [], "--min-snr-gamma does nothing without --loss-weight min-snr"),
        ("[target]\nmin_snr_gamma = 3", ["--loss-weight", "min-snr"], ""),
        ("[target]\nmin_snr_gamma = 5.0", [], ""),  # the default, as a settings.json has it
        ("label_dropout = 0.2", ["--lr", "1"], "--label-dropout does nothing without --label"),
        ("loop = 3", [], "--loop.*: "),
    ],
)
def test_values_of_a_file_that_would_do_nothing_are_refused(
    tmp_path: Path, file: str, flags: list[str], message: str
) -> None:
    (tmp_path / "a.toml").write_text(file)
    arguments = ["--settings", str(tmp_path / "a.toml"), *flags]
    if message:
        assert said_wrong(TrainUNetSettings, *arguments)[0].startswith(message)
    else:
        parsed(TrainUNetSettings, *arguments)


@pytest.mark.parametrize("model", [row.model for row in COMMANDS.values()])
def test_what_fields_say_of_other_fields_names_them(model: type[Settings]) -> None:
    for path, field in leaves(model):
        for said in (options.extra(field, "needs"), options.extra(field, "replaces")):
            assert not said or (*path[:-1], said.partition("=")[0]) in dict(leaves(model))


def test_flags_that_belong_to_a_choice_go_with_it() -> None:
    assert parsed(TrainUNetSettings, "--loss-weight", "min-snr", "--min-snr-gamma", "3").target.min_snr_gamma == 3
    flags = ["--objective", "eps", "--schedule", "scaled-linear", "--beta-end", "0.1"]
    assert parsed(TrainUNetSettings, *flags).noise.beta_end == 0.1
    assert parsed(TrainUNetSettings, "--density-std", "2").levels.density_std == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", b"lr = ", "neither TOML"),
        ("a.toml", b'{"lr": 1}', "neither TOML"),
        ("a.toml", b"lr = 1\nlr = 2", "neither TOML"),
        ("a.json", b"lr = 1", "nor JSON"),
        ("a.json", b'{"run": "a", "run": "b"}', "run is given twice"),
        ("a.json", b'{"loop": {"lr": 1, "lr": 2}}', "lr is given twice"),
        ("a.json", b'{"loop": {"lr": 1}, "loop.lr": 2}', "loop.lr is given twice"),
        ("a.json", b'{"loop": 1, "loop.lr": 2}', "loop.lr is given twice"),
        ("a.toml", b'loop.lr = 1\n"loop.lr" = 2', "loop.lr is given twice"),
        ("a.json", b'{"lr": NaN}', "NaN is no number"),
        ("a.json", b'{"lr": -Infinity}', "-Infinity is no number"),
        ("a.json", '{"run": "a"}'.encode("utf-16"), "save it as UTF-8"),
        ("a.toml", "run = 'ä'".encode("latin-1"), "save it as UTF-8"),
        ("a.json", b"", "nor JSON"),
        ("a.json", b'{"lr": "\xff"}', "nor JSON"),
        ("a.json", b"[1]", "holds no settings"),
        ("a.json", b"null", "holds no settings"),
        ("a.json", b"[" * 200_000, "nor JSON"),
        ("a.toml", b"a = " + b"[" * 20_000, "neither TOML"),
    ],
)  # fmt: skip
def test_settings_files_that_are_none(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_settings(tmp_path / name)
    assert str(caught.value).startswith(f"--settings: {tmp_path / name} ")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"loop": {"lr": 0.5, "keep": 3}}'),
        ("a.json", '\ufeff{"loop": {"lr": 0.5, "keep": 3}}'),
        ("a.json", '{"loop.lr": 0.5, "loop.keep": 3}'),
        ("a.json", '{"loop": {"lr": 0.5}, "loop.keep": 3}'),
        ("a.toml", "\ufeff[loop]\nlr = 0.5\nkeep = 3"),
        ("a.toml", '"loop.lr" = 0.5\nloop.keep = 3'),
    ],
)
def test_ways_to_write_a_settings_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_settings(tmp_path / name) == {"loop": {"lr": 0.5, "keep": 3}}


def test_settings_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--settings: .*b\.toml cannot be read: No such file or directory$"):
        read_settings(tmp_path / "b.toml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_settings(tmp_path)


# --- messages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "start", "rest"),
    [
        ({"loop": {"lr": "quick"}}, "--lr: ", "valid number"),
        ({"loop": {"lr": "0.1"}}, "--lr: ", "valid number"),
        ({"loop": {"lr": True}}, "--lr: ", "(found True)"),
        ({"loop": {"keep": True}}, "--keep: ", "(found True)"),
        ({"loop": {"batch_size": 1 << 60}}, "--batch-size: ", "too large"),
        ({"images": {"flip": 1}}, "--flip: ", "true or false"),
        ({"model": {"encoder_channels": [True, 64]}}, "--model.encoder-channels: ", "true and false"),
        ({"loop": {"lr": -1.0}}, "--lr: ", "greater than 0 (found -1.0)"),
        ({"loop": {"steps": 0}}, "--steps: ", "greater than or equal to 1"),
        ({"loop": {"steps": 1.5}}, "--steps: ", "found 1.5"),
        ({"loop": {"steps": None}}, "--steps: ", "valid integer"),
        ({"loop": {"device": "abacus"}}, "--device: ", "'auto', 'cpu', 'cuda' or 'mps' (found abacus)"),
        ({"images": {"flip": "perhaps"}}, "--flip: ", "boolean"),
        ({"images": {"random_crop": 1.5}}, "--random-crop: ", "less than or equal to 1"),
        ({"images": {"data": [1]}}, "--data: ", "found 1"),
        ({"model": {"norm": "brick"}}, "--model.norm: ", "'pixel' or 'group' (found brick)"),
        ({"model": {"mid_blocks": -1}}, "--model.mid-blocks: ", "(found -1)"),
        ({"model": {"encoder_channels": ["wide"]}}, "--model.encoder-channels: ", "(found wide)"),
        ({"model": {"encoder_channels": 64}}, "--model.encoder-channels: ", "tuple"),
        ({"model": {"encoder_channels": [0, 64]}}, "--model.encoder-channels: ", "greater than or equal to 1"),
        ({"model": {"encoder_channels": [64]}}, "--model.encoder-channels: ", "two numbers or more"),
        ({"model": {"encoder_blocks": []}}, "--model.encoder-blocks: ", "at least 1 item"),
        ({"model": {"encoder_channels": [8, 8], "decoder_channels": [8] * 3}}, "--model.*: ", "same count"),
        ({"model": {"logvar_min": 3, "logvar_max": 2}}, "--model.*: ", "not below"),
        ({"loop": 3}, "--loop.*: ", "dictionary"),
    ],
)  # fmt: skip
def test_one_wrong_value_names_its_flag(layer: Layer, start: str, rest: str) -> None:
    lines = refused(TrainVAESettings, layer)
    assert len(lines) == 1
    assert lines[0].startswith(start)
    assert rest in lines[0]
    assert "pydantic" not in lines[0]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"channels": [8]}, "--model.channels: needs a stem and at least one level: two numbers or more (found 8)"),
        ({"heads": 3, "channels": [6, 8]}, "--model.*: heads: 3 does not divide the width 8 of a level with attention"),
        ({"channels": [8, 8], "attend_levels": [1]}, "--model.*: attend_levels: there is no level 1; levels count"),
        ({"attend_levels": [-1]}, "--model.attend-levels: Input should be greater than or equal to 0 (found -1)"),
        ({"time_dim": 7}, "--model.time-dim: Input should be a multiple of 2 (found 7)"),
    ],
)
def test_wrong_u_nets(layer: Layer, message: str) -> None:
    (line,) = refused(TrainUNetSettings, {"model": layer})
    assert line.startswith(message)


FLOW_APART = "rectified flow and its schedule belong together"
NOISE_ALONE = "--zero-terminal-snr: the flow schedule ends with pure noise anyway"


@pytest.mark.parametrize(
    ("objective", "schedule", "zero_terminal_snr", "message"),
    [
        ("eps", "flow", False, FLOW_APART),
        ("v", "flow", False, FLOW_APART),
        ("flow", "linear", False, FLOW_APART),
        ("flow", "cosine", False, FLOW_APART),
        ("flow", "auto", True, NOISE_ALONE),
        ("x0", "flow", True, NOISE_ALONE),
        ("eps", "auto", True, "--zero-terminal-snr needs --objective v or x0"),
        ("eps", "linear", True, "--zero-terminal-snr needs --objective v or x0"),
        ("eps", "auto", False, ""),
        ("v", "linear", True, ""),
        ("x0", "cosine", True, ""),
        ("x0", "flow", False, ""),
        ("flow", "flow", False, ""),
    ],
)
def test_only_objectives_and_schedules_that_fit_together(
    objective: str, schedule: str, zero_terminal_snr: bool, message: str
) -> None:
    noise = {"schedule": schedule, "zero_terminal_snr": zero_terminal_snr}
    layer: Layer = {"target": {"objective": objective}, "noise": noise}
    if not message:
        assert build(TrainUNetSettings, [defaults(TrainUNetSettings), layer]).target.objective == objective
        return
    (line,) = refused(TrainUNetSettings, layer)
    assert message in line


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        ({"colour": 1}, "unknown setting colour"),
        ({"loop": {"zeal": 1}}, "unknown setting loop.zeal"),
        ({"model": {"latents": 1}}, "unknown setting model.latents; similar ones: model.latent_channels"),
        ({"loop": {"warmup": 1}}, "unknown setting loop.warmup; similar ones: loop.warmup_steps"),
        ({"lr": 1}, "unknown setting lr; similar ones: loop.lr, loop.lr_schedule"),
        ({"loop": {"batch-size": 1}}, "unknown setting loop.batch-size; similar ones: loop.batch_size"),
    ],
)
def test_unknown_settings_are_named(layer: Layer, line: str) -> None:
    assert refused(TrainVAESettings, layer) == [line]


def test_an_unknown_setting_of_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[loop]\nzeal = 1\n")
    assert said_wrong(TrainVAESettings, "--settings", str(file)) == ["unknown setting loop.zeal"]


def test_several_mistakes_are_told_at_once() -> None:
    lines = refused(
        TrainVAESettings,
        {"hue": 1, "loop": {"lr": 0, "keep": 0}, "model": {"encoder_channels": "ab", "mid_blocks": "x"}},
    )
    assert sorted(line.split(":")[0] for line in lines) == [
        "--keep", "--lr", "--model.encoder-channels", "--model.mid-blocks", "unknown setting hue",
    ]  # fmt: skip


def test_mistakes_on_the_command_line_are_told_by_flag() -> None:
    lines = said_wrong(TrainVAESettings, "--lr", "0", "--model.encoder-channels", "64,wide", "--val-share", "2")
    assert [line.split(":")[0] for line in lines] == ["--lr", "--val-share", "--model.encoder-channels"]
    assert lines[2].endswith("(found wide)")
    assert said_wrong(GenerateSettings, "--name", "a/b")[0].startswith("--name: ")
    assert said_wrong(DemoSettings, "--resolution", "20")[0].startswith("--resolution: ")


@pytest.mark.parametrize("name", ["lr", "clip", "weight-decay", "ema-decay", "epochs"])
@pytest.mark.parametrize("number", ["nan", "-inf"])
def test_numbers_that_are_none_are_refused(name: str, number: str) -> None:
    (line,) = said_wrong(TrainVAESettings, f"--{name}={number}")
    assert line.startswith(f"--{name}: ")


# --- presets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("resolution", [32, 64, 128, 256, 512])
def test_presets_build(name: str, resolution: int) -> None:
    vae = build(TrainVAESettings, [preset_layer("vae", name, resolution)])
    unet = build(TrainUNetSettings, [preset_layer("unet", name, resolution)])
    network = vae.model.resolved(resolution)
    assert resolution % network.factor == 0
    assert network == network.resolved(resolution)
    side = resolution // network.factor
    assert len(unet.model.resolved(side).channels) >= 2


def test_there_is_no_other_preset() -> None:
    files = {path.name for path in PRESET_FOLDER.iterdir() if path.suffix == ".toml"}
    assert files == {f"{network}-{name}.toml" for network in ("vae", "unet") for name in PRESETS}


@pytest.mark.parametrize(("network", "model"), [("vae", VAESettings), ("unet", UNetSettings)])
def test_the_small_preset_is_the_default(network: str, model: type[Settings]) -> None:
    said = tomllib.loads((PRESET_FOLDER / f"{network}-small.toml").read_text(encoding="utf-8"))
    assert list(said) == ["model"]
    assert said["model"]
    assert model.model_validate(said["model"]) == model()


@pytest.mark.parametrize("size", [64, 128, 191, 192, 256, 384, 512])
def test_sections_of_a_preset_are_for_images_of_that_size_and_more(size: int) -> None:
    model = build(TrainVAESettings, [preset_layer("vae", "base", size)]).model.resolved(size)
    assert (model.encoder_width, model.factor) == (64, 16 if size >= 384 else 8 if size >= 192 else 4)
    assert model.latent_channels == (16 if size >= 384 else 4)
    assert model.decoder_blocks == ((2, 2, 3, 2) if size >= 384 else (2, 3, 2) if size >= 192 else (3,))


def test_every_settings_model_is_frozen_and_described() -> None:
    kinds = [*vars(settings).values(), *vars(extras_settings).values()]
    models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)]
    assert {*STAGES, LoopSettings} <= set(models)
    for model in models:
        assert model.__doc__
        assert model.model_config["frozen"]
        assert model.model_config["extra"] == "forbid"
