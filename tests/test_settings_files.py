"""Files of settings: how they may be written, which are refused, and what becomes of their values among flags."""

from pathlib import Path
from typing import Any

import pytest
from parsing import STAGES, app_of, parsed, refused, said_wrong
from typer.testing import CliRunner

from lightdiff import options
from lightdiff.errors import UserError
from lightdiff.extras.settings_file import read_settings
from lightdiff.settings import Layer, Settings, TrainUNetSettings, TrainVAESettings


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


def test_settings_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--settings: .*b\.toml cannot be read: No such file or directory$"):
        read_settings(tmp_path / "b.toml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_settings(tmp_path)


def test_lists_may_be_typed_as_text_in_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[model]\nencoder_channels = '8, 16'\ndecoder_channels = 'none'\n")
    model = parsed(TrainVAESettings, "--settings", str(tmp_path / "a.toml")).model
    assert (model.encoder_channels, model.decoder_channels) == ((8, 16), ())
    assert refused(TrainVAESettings, {"images": {"data": "a,b"}})[0].startswith("--data: ")  # folders are no such list


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


def test_an_unknown_setting_of_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[loop]\nzeal = 1\n")
    assert said_wrong(TrainVAESettings, "--settings", str(file)) == ["unknown setting loop.zeal"]
