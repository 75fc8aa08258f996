"""What a stage tells while it runs: the live display, plain lines, metrics.jsonl, TensorBoard, grids."""

import io
import json
import math
import re
import time
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from conftest import VAE_FLAGS, call
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightdiff.data.images import to_uint8
from lightdiff.errors import UserError
from lightdiff.extras.baselines import losses_beside
from lightdiff.extras.display import BLOCKS, Display, sparkline
from lightdiff.extras.tables import print_table
from lightdiff.on_demand import on_demand
from lightdiff.pictures import grid, save_grid, save_grid_of_files, save_pairs
from lightdiff.runtime import progress
from lightdiff.runtime.progress import Reporter, SafeConsole, cut_metrics, number, trending


def drawn(display: Display, width: int = 100, encoding: str = "utf-8") -> str:
    """A display as text."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=stream, width=width, force_terminal=True, color_system=None, highlight=False).print(display)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


@pytest.fixture
def terminal(monkeypatch):
    """A terminal whose last picture can be read."""
    stream = io.StringIO()
    fake = Console(file=stream, width=100, force_terminal=True, color_system=None, highlight=False, markup=False)
    monkeypatch.setattr(progress, "console", fake)
    return stream


# --- the console ----------------------------------------------------------------------------------------------------


def printed(*things, width=80, terminal=False, **how):
    """What a console of this width prints."""
    target = SafeConsole(**how)
    target.file, target.width, target._force_terminal, target._color_system = io.StringIO(), width, terminal, None
    target.soft_wrap = not terminal
    for thing in things:
        print_table(target, thing) if isinstance(thing, Table) else target.print(thing)
    return target.file.getvalue()


HOSTILE = "a\x1b]0;title\x07\x9b31m\r\n\u202eb\u2066\u2028\x7f\udcff"
SHOWN = r"a\x1b]0;title\x07\x9b31m\r\n\u202eb\u2066\u2028\x7f\udcff"


@pytest.mark.parametrize("terminal", [True, False])
def test_no_character_of_a_name_acts_on_the_terminal(terminal):
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    display = Display(HOSTILE, 3)
    display.files["last picture"] = Path(HOSTILE)
    for thing in (HOSTILE, Text(f"x{HOSTILE}"), table, display):
        text = printed(thing, width=200, terminal=terminal)
        assert not set(text) & set(HOSTILE.replace("\n", "").replace("a", "")) - set(SHOWN)
        assert r"a\x1b]0;title" in text
    assert SHOWN in printed(HOSTILE, width=200)
    assert r"[b]\x1b" in printed(escape("[b]\x1b"), markup=True)
    assert SHOWN in str(UserError(HOSTILE))


def test_names_are_neither_markup_nor_emoji():
    assert printed("[b]x[/b] :cat: [/old]") == "[b]x[/b] :cat: [/old]\n"
    with SafeConsole(stderr=True).status("reading runs [/old]"):
        pass


def test_errors_have_a_line_for_each_argument_and_repeat_no_long_value():
    assert str(UserError("one\nline", "another")) == "one\\nline\nanother"
    assert len(str(UserError(f"no class {'x' * 9000} here"))) < 300
    path = "/".join(["folder" * 20] * 9)
    assert path in str(UserError(f"{path} is missing"))


def numbers_table():
    table = Table("channel", "mean", "std", "posterior sigma", title="Latents of the training split, all of them")
    table.add_row("0", "0.1234", "1.2345", "12345.6789")
    table.add_row("all", "-0.1234", "", "0.5")
    return table


@pytest.mark.parametrize("width", [20, 40, 80])
def test_tables_lose_no_number_in_a_narrow_terminal(width):
    text = printed(numbers_table(), width=width, terminal=True)
    assert "…" not in text
    words = text.split()
    assert all(number in words for number in ("0.1234", "1.2345", "12345.6789", "-0.1234", "0.5"))
    assert max(map(len, text.splitlines())) <= width


def test_of_a_table_with_long_paths_the_paths_are_broken():
    table = Table("setting", "value", box=None)
    table.add_row("--lr", "0.002")
    table.add_row("--data", "/folder" * 20)
    text = printed(table, width=60, terminal=True)
    assert "0.002" in text.split()
    assert "/folder" * 20 in "".join(text.split())
    assert max(map(len, text.splitlines())) <= 60


def test_no_line_is_broken_where_there_is_no_terminal():
    text = printed("a long line " * 20, width=40)
    assert text == "a long line " * 20 + "\n"
    lines = printed(numbers_table(), width=40).splitlines()
    assert lines[0].strip() == "Latents of the training split, all of them"
    assert any(all(n in line.split() for n in ("0", "0.1234", "1.2345", "12345.6789")) for line in lines)
    table = Table("setting", "value", box=None)
    table.add_row("--data", "/folder" * 20)
    assert "/folder" * 20 in printed(table, width=40)


@pytest.mark.parametrize("width", [40, 80])
def test_the_display_loses_no_number_in_a_narrow_terminal(width):
    display = Display("train-unet", 300_000, 100)
    display.done, display.now = 123_456, {"images/s": 123.4, "GB": 3.25}
    display.remember({"val_loss_band_4": 0.125, "loss": 1.0})
    display.remember({"val_loss_band_4": 0.25})
    text = drawn(display, width)
    assert all(number in text.split() for number in ("123,456/300,000", "123.4", "3.25", "0.25", "1"))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


# --- the live display -----------------------------------------------------------------------------------------------


def test_lines_above_the_display_are_broken_between_words(terminal):
    words = [f"held-out{n}" for n in range(40)]
    with Reporter("unet", 3) as reporter:
        reporter.note(" ".join(words))
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).splitlines()
    assert max(map(len, lines)) <= 100
    assert set(words) <= {word for line in lines for word in line.split()}


def test_the_display_is_not_redrawn_while_lines_above_it_are_printed(terminal):
    """It might have grown by a row between the two, and the cursor would go up one too few."""
    order = []

    def redraw():
        live.refresh()
        order.append("redrawn")

    with Reporter("unet", 3) as reporter:
        live, plain, other = reporter._display.live, reporter._display.live.console.print, Thread(target=redraw)

        def slow(*lines, **how):
            if lines == ("a line",):
                other.start()
                other.join(0.2)
                order.append("printed")
            plain(*lines, **how)

        live.console.print = slow
        reporter.note("a line")
        other.join()
    assert order == ["printed", "redrawn"]


def test_a_terminal_of_no_columns_is_one_whose_width_is_not_known(monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    console = SafeConsole()
    with console.capture() as shown:
        console.print("all of it")
    assert shown.get() == "all of it\n"


def test_a_trend_is_low_where_values_are_low():
    assert sparkline([*range(8)], 8) == BLOCKS
    assert sparkline([3, 2, 1], 8) == "█▅▁"
    assert sparkline([1, 1, 1], 8) == BLOCKS[0] * 3
    assert sparkline([1], 8) == sparkline([], 8) == sparkline([math.nan, 1], 8) == ""
    assert len(sparkline([*range(1000)], 32)) == 32


def test_a_steep_start_does_not_flatten_a_trend():
    losses = [1000.0, *(1 + 1 / i for i in range(1, 40))]
    assert len(set(sparkline(losses, 20))) > 4


def test_the_display_shows_progress_losses_and_files(tmp_path):
    display = Display("unet", 300, 100)
    display.done = 200
    for loss in (3.0, 2.0, 1.0):
        display.remember({"loss": loss})
    display.now |= {"img/s": 68.25}
    display.files["last checkpoint"] = tmp_path / "last.safetensors"
    text = drawn(display, width=200)
    assert "200/300" in text
    assert "68.2 img/s" in text
    assert re.search("^  loss +1 +█", text, re.M), "the bar has a line of its own"
    assert str(tmp_path / "last.safetensors") in text


def test_the_display_shows_the_best_validation_loss_and_no_noise():
    display = Display("vae", 300)
    for loss, lr in ((0.5, 1e-3), (0.25, 2e-3), (0.375, 3e-3)):
        display.remember(trending({"val_loss": loss, "val_psnr": 20 + loss, "lr": lr, "kl_sum": 99.0}))
    text = drawn(display, 80)
    assert re.search("val_loss +0.375 .*best 0.25$", text, re.M)
    assert "20.4 dB" in text
    assert "lr" not in text
    assert "kl_sum" not in text


def test_the_display_shows_losses_beside_those_of_the_level_alone(trained):
    settings = json.loads((trained / "unet/settings.json").read_text())
    display = on_demand("display:open_display")(progress.console, "unet", 10, 0, settings, [])
    display.remember({"loss": 0.5, "val_loss": 0.6, "val_loss_band_1": 0.7})
    text = drawn(display, 80)
    assert "0.6 (1.57)" in text
    assert "0.7 (1.29)" in text
    assert "in parentheses: what the noise level alone gives" in text
    assert "(" not in drawn(Display("vae", 10, 0, losses_beside({"loss": {}})), 80)


def test_the_display_of_a_terminal_without_unicode_has_no_trends():
    display = Display("unet", 3)
    for loss in (3.0, 2.0, 1.0):
        display.remember({"loss": loss})
    text = drawn(display, encoding="ascii")
    assert "loss  1" in text


def test_the_time_left_follows_from_what_was_done_since_the_start(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    display = Display("unet", 300, 100, _began=now)
    assert display.remaining() == "-:--:--"
    now, display.done = 160.0, 150
    assert display.remaining() == "0:03:00"  # 50 steps took a minute, and 150 are left


def test_a_terminal_sees_trends_and_files(terminal, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 4, "time": 5}\n')
    with Reporter("unet", 3, 1, tmp_path / "metrics.jsonl") as reporter:
        reporter.record({"step": 2, "loss": 2, "images_per_s": 7})
        reporter.advance(2, {"loss": 2}, {"img/s": 7})
        reporter.saved(tmp_path / "last.safetensors")
    last = terminal.getvalue()
    assert re.search("loss +2 +█▁", last)  # of a resumed run, the values before it, too
    assert "last.safetensors" in "".join(last.split())  # a long path goes on in the next line
    assert "images_per_s" not in last
    assert "time " not in last


def test_without_a_terminal_there_are_plain_lines(capsys):
    with Reporter("unet", 3) as reporter:
        reporter.advance(2, {"loss": 2.0}, {"img/s": 7.0})  # too soon for another line
        reporter.advance(3, {"loss": 1.5}, {"img/s": 7.0})
    assert capsys.readouterr().err == "unet 3/3  loss 1.5  img/s 7\n"


# --- what is written ------------------------------------------------------------------------------------------------


def test_metrics_are_cut_after_the_step_gone_on_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n' + '{"a":' * 100_000 + '\n{"st')
    cut_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    cut_metrics(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_reporter_writes_what_it_is_told(tmp_path):
    with Reporter("title", 3, 0, tmp_path / "metrics.jsonl") as reporter:
        reporter.record({"step": 1, "loss": 0.5})
        reporter.advance(1, {"loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'


def test_tensorboard_gets_scalars_pictures_and_settings(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    save_grid(tmp_path / "grid.png", torch.zeros(1, 3, 4, 4), columns=1)
    settings = {"loop.lr": 0.5, "model.channels": [1, 2], "model.width": None}
    with Reporter("title", 3, 0, tmp_path / "metrics.jsonl", settings) as reporter:
        assert not (tmp_path / "tensorboard").exists()  # importing it takes seconds
        reporter.record({"step": 1, "loss": 0.5})
        reporter.picture(tmp_path / "grid.png", 1)
    seen = EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    assert [(event.step, event.value) for event in seen.Scalars("loss")] == [(1, 0.5)]
    assert seen.Images("samples")[0].width == 64
    told = seen.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"loop.lr" in told
    assert b"[1, 2]" in told


@pytest.mark.parametrize(
    ("value", "words"), [(3.0, "3"), (0.12345, "0.123"), (123.456, "123.5"), (math.inf, "inf"), (1e-5, "1e-05")]
)
def test_numbers_are_short(value, words):
    assert number(value) == words


def test_a_grid_shows_each_image_in_its_place(tmp_path):
    x = torch.linspace(-1, 0.5, 6)[:, None, None, None].expand(6, 3, 72, 72)
    save_grid(tmp_path / "grid.png", x, columns=4)
    sheet = Image.open(tmp_path / "grid.png")
    assert sheet.size == (4 * 74 - 2, 2 * 74 - 2)
    assert sheet.getpixel((0, 0)) == (0, 0, 0)
    assert sheet.getpixel((75, 75)) == (191, 191, 191)  # the sixth image
    assert sheet.getpixel((149, 75)) == (255, 255, 255)  # nothing: the sheet


@pytest.mark.parametrize(("side", "times"), [(1, 64), (24, 3), (32, 2), (63, 2), (64, 1), (100, 1)])
def test_images_of_a_grid_are_enlarged_by_whole_numbers(side, times):
    x = torch.rand(1, 3, side, side) * 2 - 1
    picture = np.asarray(grid(x, 1))
    assert picture.shape == (side * times, side * times, 3)
    pixels = to_uint8(x[0]).movedim(0, -1).numpy()
    assert (picture == np.kron(pixels, np.ones((times, times, 1), np.uint8))).all()


@pytest.mark.parametrize("count", range(1, 41))
def test_every_image_of_a_sheet_of_pairs_is_above_its_partner(tmp_path, count):
    """Whatever their number: a last row that is not full is filled up."""
    shade = torch.arange(1, count + 1) / 64  # 1/64 and more; its partner is the negative
    x = shade[:, None, None, None].expand(count, 3, 64, 64)
    save_pairs(tmp_path / "pairs.png", x, -x, 8)
    picture = np.asarray(Image.open(tmp_path / "pairs.png"))[::66, ::66, 0].astype(int)
    columns = min(8, count)
    assert picture.shape == (2 * -(-count // columns), columns)
    above, below = picture[::2].flatten(), picture[1::2].flatten()
    wanted = to_uint8(torch.stack([shade, -shade])).int().numpy()
    assert (above[:count] == wanted[0]).all()
    assert (below[:count] == wanted[1]).all()
    assert (above[count:] == 255).all()
    assert (below[count:] == 255).all()


@pytest.mark.parametrize(
    ("classes", "rows"), [(0, [[0, 1, 2], [3, 4, 5], [6]]), (2, [[0, 2, 4], [1, 3, 5]]), (9, None)]
)
def test_a_grid_of_classes_has_a_row_for_each(tmp_path, classes, rows):
    files = [tmp_path / f"{i}.png" for i in range(7)]
    for i, file in enumerate(files):
        Image.new("RGB", (64, 64), (30 * i, 0, 0)).save(file)
    save_grid_of_files(tmp_path / "grid.png", files, classes)
    reds = np.asarray(Image.open(tmp_path / "grid.png"))[::66, ::66, 0].tolist()
    expected = rows or [[0, 1, 2], [3, 4, 5], [6]]  # fewer images than classes: as without
    assert [[red for red in row if red != 255] for row in reds] == [[30 * i for i in row] for row in expected]


# --- saying nothing -------------------------------------------------------------------------------------------------


def test_quiet_says_nothing_but_results_and_mistakes(faces, tmp_path):
    flags = ["--data", faces, "--run", tmp_path / "run", *VAE_FLAGS, "--quiet"]
    result = call("train-vae", *flags)
    assert (result.code, result.stderr) == (0, "")
    assert result.stdout.strip() == str(tmp_path / "run/vae/checkpoints/best.safetensors")
    assert call("train-vae", *flags, "--seed", 7).stderr.startswith("error:")
    assert "has its" in call("train-vae", *flags[:-1]).stderr  # and the next one speaks again


def test_a_full_disk_ends_tensorboards_files_and_nothing_else(tmp_path, monkeypatch, capsys):
    """Also where the failure is that of the writer's own thread."""
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    with Reporter("vae", 40, metrics=tmp_path / "metrics.jsonl") as reporter:
        reporter.record({"step": 1, "loss": 1.0})
        monkeypatch.setattr(RecordWriter, "write", full)
        for step in range(2, 41):
            reporter.record({"step": step, "loss": 1.0})
            time.sleep(0.01)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 40
    said = capsys.readouterr().err
    assert said.count("TensorBoard's files could not be written: No space left on device") == 1
    assert "Traceback" not in said
