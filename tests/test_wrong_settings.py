"""Wrong settings: each is refused before any work, in one line that names what the user typed."""

from typing import Any

import pytest
from parsing import app_of, parsed, refused, said_wrong
from typer.testing import CliRunner

from lightdiff import options
from lightdiff.cli import COMMANDS
from lightdiff.errors import UserError
from lightdiff.extras.settings import DemoSettings
from lightdiff.options import build, defaults, leaves
from lightdiff.settings import GenerateSettings, Layer, Settings, TrainUNetSettings, TrainVAESettings

# --- on the command line ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["lr", "clip", "weight-decay", "ema-decay", "epochs"])
@pytest.mark.parametrize("number", ["nan", "-inf"])
def test_numbers_that_are_none_are_refused(name: str, number: str) -> None:
    (line,) = said_wrong(TrainVAESettings, f"--{name}={number}")
    assert line.startswith(f"--{name}: ")


@pytest.mark.parametrize("arguments", [["--data", ""], ["--data="], ["--data", "a", "--data", ""], ["--run", ""]])
def test_an_empty_path_is_refused_instead_of_meaning_the_current_folder(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"^--(data|run) is empty; perhaps a variable of the shell is not set$"):
        parsed(TrainVAESettings, *arguments)


def test_a_long_value_is_not_repeated_whole() -> None:
    assert len(said_wrong(TrainVAESettings, "--steps", "9" * 9000)[0]) < 300
    assert len(refused(TrainVAESettings, {"lo op" * 9000: 1})[0]) < 300
    assert len(refused(TrainVAESettings, {f"name{i}": 1 for i in range(999)})) <= 20


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


@pytest.mark.parametrize("model", [row.model for row in COMMANDS.values()])
def test_what_fields_say_of_other_fields_names_them(model: type[Settings]) -> None:
    for path, field in leaves(model):
        for said in (options.extra(field, "needs"), options.extra(field, "replaces")):
            assert not said or (*path[:-1], said.partition("=")[0]) in dict(leaves(model))


def test_mistakes_on_the_command_line_are_told_by_flag() -> None:
    lines = said_wrong(TrainVAESettings, "--lr", "0", "--model.encoder-channels", "64,wide", "--val-share", "2")
    assert [line.split(":")[0] for line in lines] == ["--lr", "--val-share", "--model.encoder-channels"]
    assert lines[2].endswith("(found wide)")
    assert said_wrong(GenerateSettings, "--name", "a/b")[0].startswith("--name: ")
    assert said_wrong(DemoSettings, "--resolution", "20")[0].startswith("--resolution: ")


# --- in any layer -------------------------------------------------------------------------------------------------


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


def test_several_mistakes_are_told_at_once() -> None:
    lines = refused(
        TrainVAESettings,
        {"hue": 1, "loop": {"lr": 0, "keep": 0}, "model": {"encoder_channels": "ab", "mid_blocks": "x"}},
    )
    assert sorted(line.split(":")[0] for line in lines) == [
        "--keep", "--lr", "--model.encoder-channels", "--model.mid-blocks", "unknown setting hue",
    ]  # fmt: skip
