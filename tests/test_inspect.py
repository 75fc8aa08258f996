"""The report on a folder, against a folder whose contents are known."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lightdiff.errors import UserError
from lightdiff.extras.inspect import Report, inspect, print_report
from tests.image_files import scan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty images in two classes, of which two are copies and two cannot be read."""
    for name, count in (("sea", 20), ("forest", 10)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (40 + i, 30), (i, count, 0)).save(tmp_path / name / f"{i:02d}.png")
    Image.new("L", (300, 500), 7).save(tmp_path / "sea" / "00.png", "JPEG")
    for i in (4, 5):
        shutil.copy(tmp_path / "sea" / "03.png", tmp_path / "sea" / f"{i:02d}.png")
    (tmp_path / "forest" / "08.png").write_text("no image")
    (tmp_path / "forest" / "09.png").write_bytes((tmp_path / "forest" / "07.png").read_bytes()[:70])
    return tmp_path


def printed(report: Report, width: int = 100) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width))
    return stream.getvalue()


def test_the_report_says_what_is_there(folder: Path) -> None:
    report = inspect([folder], 0.2)
    files = scan([folder], 0.2)
    assert (report.images, report.train) == (30, sum(file.split == "train" for file in files))
    assert report.train + report.val == 30
    assert report.folders[0].model_dump() == {
        "folder": str(folder), "layout": "class folders", "images": 30, "train": report.train, "val": report.val,
    }  # fmt: skip
    assert report.formats == {"PNG": 27, "JPEG": 1}
    assert report.modes == {"RGB": 27, "L": 1}
    assert report.labels == {"class": {"sea": 20, "forest": 10}}
    assert report.unlabelled == 0


def test_sizes_are_those_of_the_readable_images(folder: Path) -> None:
    sizes = inspect([folder], 0.2).sizes
    assert sizes is not None
    assert (sizes.width.min, sizes.width.max, sizes.height.min, sizes.height.max) == (40, 300, 30, 500)
    assert sizes.shorter_side.median == 30
    assert sizes.smaller_than == {32: 27, 64: 27, 128: 27, 256: 27, 512: 28, 1024: 28}


def test_turned_photographs_count_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 20)).save(tmp_path / "a.jpg", exif=exif)
    sizes = inspect([tmp_path], 0).sizes
    assert sizes is not None
    assert (sizes.width.max, sizes.height.max) == (20, 50)


def test_duplicates_are_grouped_and_leaks_counted(folder: Path) -> None:
    names = [str(folder / "sea" / f"{i:02d}.png") for i in (3, 4, 5)]
    for val_share in (0.0, 0.2, 0.5, 0.8):
        held = {
            file.split for file in scan([folder], val_share) if file.path in {"sea/03.png", "sea/04.png", "sea/05.png"}
        }
        duplicates = inspect([folder], val_share).duplicates
        assert duplicates.groups == [names]
        assert duplicates.images == 2
        assert duplicates.leaks == (len(held) == 2)


def test_bad_files_are_named_with_a_reason(folder: Path) -> None:
    bad = inspect([folder], 0.2).bad
    assert [file.name for file in bad] == [str(folder / "forest" / name) for name in ("08.png", "09.png")]
    assert "no image" in bad[0].reason
    assert "truncated" in bad[1].reason.lower()


def test_what_is_printed(folder: Path) -> None:
    text = printed(inspect([folder], 0.2), width=300)
    for part in (
        "class folders", "PNG", "96.4%", "shorter side", "sea", "66.7%", "Duplicates by content: 2 of 30 (groups: 1)",
        "Unreadable files: 2 of 30 (6.67%)", "08.png: no image",
    ):  # fmt: skip
        assert part in text


def test_long_lists_are_cut_on_screen_only(folder: Path) -> None:
    report = inspect([folder], 0.2, max_shown=1)
    text = printed(report, width=300)
    assert len(report.bad) == 2
    assert "08.png" in text
    assert "09.png:" not in text
    assert "and 1 more" in text
    assert "1 others" in text


def test_several_folders_are_reported_apart_and_together(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    Image.new("RGB", (9, 9)).save(other / "[red].png")
    (other / "[bold].png").touch()
    report = inspect([folder, other], 0.2)
    assert [(entry.layout, entry.images) for entry in report.folders] == [("class folders", 30), ("plain", 2)]
    assert report.unlabelled == 2
    text = printed(report, width=300)
    assert "Images without a label: 2" in text
    assert "[bold].png" in text


def test_the_report_survives_json_and_odd_names(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    (tmp_path / "odd\udcff.png").touch()
    report = inspect([tmp_path], 0)
    assert Report.model_validate(json.loads(report.model_dump_json())) == report
    printed(report).encode("utf-8")


def test_what_is_passed_over_left_out_and_unlabelled_is_reported_before_training(folder: Path, cli) -> None:
    for name in ("a.jxl", "b.jxl", "@eaDir/c.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "labels.csv").write_text("file,kind\nsea/00.png,x\nsea/01.PNG,y\nsky/00.png,x\n")
    result = cli("inspect", folder, "--labels", folder / "labels.csv")
    for part in (
        "Passed over",
        ".jxl",
        "folder @eaDir",
        "1 of 3 rows of",
        "28 of 30 images have no label in",
        "01.PNG for",
    ):
        assert part in result.out
    report = json.loads(cli("inspect", folder, "--json").stdout)
    assert report["passed_over"] == {".jxl": 2, "folder @eaDir": 1}
    assert report["notes"] == ["passed over: .jxl (2), folder @eaDir (1)"]
    (folder / "labels.csv").write_text("file,kind\nsea/00.png,x,y\n")
    refused = cli("inspect", folder, "--labels", folder / "labels.csv")
    assert (refused.code, "in line 2 (3 in the first of them)" in refused.err) == (2, True)


def test_progress_is_told(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    inspect([folder], 0.2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 30) for i in range(1, 31)]


def test_white_is_found_as_training_finds_it(tmp_path: Path) -> None:
    for i in range(4):
        values = np.arange(64, dtype=np.uint16).reshape(8, 8) * (4 if i else 1)  # 8 bits in 16, and a dark one
        Image.fromarray(values).save(tmp_path / f"{i}.png")
    report = inspect([tmp_path], 0.1)
    assert report.bad == []
    assert any(note.startswith("white is 255 in 16-bit images") for note in report.notes)


def test_only_bad_files_are_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    report = inspect([tmp_path], 0)
    assert report.sizes is None
    assert "Unreadable files: 1 of 1" in printed(report)


def test_a_missing_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--data: .* does not exist"):
        inspect([tmp_path / "nowhere"], 0.1)
