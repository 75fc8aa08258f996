"""Lists of image files: the same everywhere, with their split and their labels."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightdiff.data import files as files_module
from lightdiff.data import formats
from lightdiff.data.files import ImageFile, find_images, list_images
from lightdiff.data.layouts import layout
from lightdiff.data.table import ImageTable
from lightdiff.errors import UserError
from lightdiff.extras.data import unread
from lightdiff.runtime.progress import console
from lightdiff.settings import ImageSettings
from tests.image_files import scan

NAMES = [f"{i:03d}.png" for i in range(200)]
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def fill(folder: Path, paths: Iterable[str]) -> Path:
    """Empty files: nothing here looks inside an image."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def splits(files: list[ImageFile]) -> dict[str, str]:
    return {file.path: file.split for file in files}


def fairface(folder: Path, paths: Iterable[str]) -> Path:
    fill(folder, paths)
    head = "file,age,gender,race,service_test\n"
    (folder / "fairface_label_train.csv").write_text(
        head + "train/1.jpg,50-59,Male,East Asian,True\ntrain/2.jpg,30-39,Female,Indian,False\n"
    )
    (folder / "fairface_label_val.csv").write_text(head + "val/1.jpg,3-9,Male,Black,False\n")
    return folder


# --- which files --------------------------------------------------------------------------------------------------


def test_images_of_every_suffix_case_and_depth_are_found_in_code_point_order(tmp_path: Path) -> None:
    wanted = ["B.JPG", "a.jpeg", "a/b/c/d.WebP", "a/z.tif", "aa.Bmp", "c.gif", "d.ppm", "e.TIFF", "f.png", "ä.png"]
    fill(tmp_path, [*wanted, "notes.txt", "png", "x.npy", ".hidden.png", ".git/x.png", "__MACOSX/._a.jpg"])
    assert [file.path for file in scan([tmp_path], 0)] == sorted(wanted)
    assert "a/b/c/d.WebP" < "a/z.tif" < "aa.Bmp"


def test_several_folders_are_mixed_in_the_order_given(tmp_path: Path) -> None:
    first, second = fill(tmp_path / "z", ["2.png", "1.png"]), fill(tmp_path / "a", ["1.png"])
    files = scan([first, second], 0)
    assert [(file.root, file.path) for file in files] == [(0, "1.png"), (0, "2.png"), (1, "1.png")]


def test_the_order_does_not_depend_on_how_the_file_system_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, ["b/1.png", "a/2.png", "a/1.png", "c.png"])
    expected, listed = scan([tmp_path], 0.5), os.scandir

    class Backwards:
        def __init__(self, path: Path) -> None:
            with listed(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name)

        def __enter__(self) -> "Backwards":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __next__(self) -> os.DirEntry[str]:
            if not self.entries:
                raise StopIteration
            return self.entries.pop()

    monkeypatch.setattr(os, "scandir", Backwards)
    assert scan([tmp_path], 0.5) == expected


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere", ["1.png"])
    data = fill(tmp_path / "data", ["z/2.png"])
    (data / "a").symlink_to(elsewhere, target_is_directory=True)
    (data / "z" / "up").symlink_to(data, target_is_directory=True)
    (data / "again").symlink_to(data / "z", target_is_directory=True)
    (data / "self").symlink_to(data / "self")
    (data / "gone.png").symlink_to(data / "nowhere.png")
    assert [file.path for file in scan([data], 0)] == ["a/1.png", "gone.png", "z/2.png"]


def test_files_are_json_friendly(tmp_path: Path) -> None:
    file = scan([fill(tmp_path, ["sea/1.png", "forest/2.png"])], 0)[1]
    assert ImageFile(**json.loads(json.dumps(asdict(file)))) == file


# --- mistakes -----------------------------------------------------------------------------------------------------


def test_mistakes_are_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--data: name a folder or an archive of images$"):
        scan([], 0.1)
    with pytest.raises(UserError, match=r"^--data: .*missing does not exist$"):
        scan([tmp_path / "missing"], 0.1)
    fill(tmp_path, ["full/1.png", "full/inner/2.png", "empty/readme.txt"])
    with pytest.raises(UserError, match=r"^--data: .*1\.png is a file; name the folder"):
        scan([tmp_path / "full" / "1.png"], 0.1)
    with pytest.raises(UserError, match=r"empty holds no image \(no file ends in \..*\.bmp, \.gif, .*\.webp\)$"):
        scan([tmp_path / "full", tmp_path / "empty"], 0.1)
    with pytest.raises(UserError, match=r"full is given twice$"):
        scan([tmp_path / "full", tmp_path / "full"], 0.1)
    with pytest.raises(UserError, match=r"inner lies inside .*full; name only one"):
        scan([tmp_path / "full" / "inner", tmp_path / "full"], 0.1)


def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, ["1.png", "secret/2.png"])
    listed = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"^--data: the folder .*secret cannot be read: Permission denied$"):
        scan([tmp_path], 0.1)


# --- split --------------------------------------------------------------------------------------------------------


def test_the_split_is_a_hash_of_the_path_wherever_the_folder_lies(tmp_path: Path) -> None:
    here, there = fill(tmp_path / "here", NAMES), fill(tmp_path / "far" / "away", NAMES)
    assert splits(scan([here], 0.25)) == splits(scan([there], 0.25))
    for name, split in splits(scan([here], 0.25)).items():
        assert (int(sha256(name.encode()).hexdigest(), 16) / 2**256 < 0.25) == (split == "val")
    assert Counter(splits(scan([here], 0.25)).values())["val"] == pytest.approx(50, abs=20)


@settings(max_examples=25, deadline=None)
@given(old=st.sets(st.integers(0, 400), min_size=5, max_size=40), new=st.sets(st.integers(0, 400), max_size=40))
def test_adding_files_moves_no_file(tmp_path_factory: pytest.TempPathFactory, old: set[int], new: set[int]) -> None:
    folder = fill(tmp_path_factory.mktemp("grow"), (f"{i}.png" for i in old))
    before = splits(scan([folder], 0.2))
    fill(folder, (f"{i}.png" for i in new))
    after = splits(scan([folder], 0.2))
    if set(before.values()) != {"val"} and sum(s == "train" for s in before.values()) > 1:
        assert before.items() <= after.items()


def test_a_larger_share_only_adds_to_validation(tmp_path: Path) -> None:
    fill(tmp_path, NAMES)
    held = [{p for p, s in splits(scan([tmp_path], share)).items() if s == "val"} for share in (0, 0.1, 0.3, 0.9)]
    assert held[0] == set()
    assert held[0] < held[1] < held[2] < held[3]


def test_there_is_always_something_to_train_on(tmp_path: Path) -> None:
    for count in (1, 2, 3):
        files = scan([fill(tmp_path / str(count), NAMES[:count])], 0.999)
        assert Counter(file.split for file in files) == Counter({"train": 1, "val": count - 1})
    trained_on = next(file.path for file in files if file.split == "train")
    assert trained_on == max(NAMES[:3], key=lambda name: sha256(name.encode()).digest())


def test_the_two_spellings_of_an_accent_fall_into_the_same_split(tmp_path: Path) -> None:
    composed = fill(tmp_path / "linux", [f"é{i}.png" for i in range(50)])
    decomposed = fill(tmp_path / "mac", [f"e\u0301{i}.png" for i in range(50)])
    assert list(splits(scan([composed], 0.5)).values()) == list(splits(scan([decomposed], 0.5)).values())


# --- layouts ------------------------------------------------------------------------------------------------------


def test_fairface_keeps_its_own_split_and_its_labels(tmp_path: Path) -> None:
    paths = ["train/1.jpg", "train/2.jpg", "train/3.jpg", "val/1.jpg"]
    files = scan([fairface(tmp_path, paths)], 0.9)
    assert find_images([tmp_path], 0.9).layouts == ["FairFace"]
    assert splits(files) == {"train/1.jpg": "train", "train/2.jpg": "train", "train/3.jpg": "train", "val/1.jpg": "val"}
    assert [file.labels for file in files] == [
        {"age": "50-59", "gender": "Male", "race": "East Asian"},
        {"age": "30-39", "gender": "Female", "race": "Indian"},
        {},
        {"age": "3-9", "gender": "Male", "race": "Black"},
    ]
    assert ImageTable.of(files).label_values()["age"] == ("3-9", "30-39", "50-59")
    assert splits(scan([tmp_path], 0))["val/1.jpg"] == "val"


def test_fairface_without_its_training_images_is_split_by_hash(tmp_path: Path) -> None:
    files = scan([fairface(tmp_path, (f"val/{i}.jpg" for i in range(1, 60)))], 0.1)
    assert 0 < sum(file.split == "val" for file in files) < 30


def test_a_broken_fairface_table_is_named(tmp_path: Path) -> None:
    fairface(tmp_path, ["train/1.jpg"])
    (tmp_path / "fairface_label_val.csv").write_text("file,age,sex\n")
    with pytest.raises(
        UserError, match=r"fairface_label_val\.csv has no column gender, race; its first line is: file,age,sex$"
    ):
        scan([tmp_path], 0.1)
    (tmp_path / "fairface_label_val.csv").write_bytes(b"file,age,gender,race\n\xff\xfe\xfa")
    with pytest.raises(UserError, match=r"fairface_label_val\.csv cannot be read"):
        scan([tmp_path], 0.1)


@pytest.mark.parametrize(
    ("paths", "word", "classes"),
    [
        (["00000.png", "00999.png", "69999.png"], "plain", []),
        (["00000/00000.png", "00000/00999.png", "69000/69999.png"], "plain", []),
        (["01000/1.png", "02000/2.png"], "plain", []),
        (["1.png", "2.png"], "plain", []),
        (["sea/1.png", "forest/deep/2.png"], "class folders", ["forest", "sea"]),
        (["sea/1.png", "forest/2.png", "3.png"], "plain", []),
        (["train/sea/1.png", "val/sea/1.png", "val/forest/1.png"], "class folders", ["forest", "sea"]),
        (["train/1.png", "val/1.png"], "plain", []),
        (["sea/00000.png", "forest/00001.png"], "class folders", ["forest", "sea"]),
        (["00000.png", "70000.png"], "plain", []),
        (["00000/01000.png"], "plain", []),
    ],
)
def test_layouts(tmp_path: Path, paths: list[str], word: str, classes: list[str]) -> None:
    files = scan([fill(tmp_path, paths)], 0)
    assert layout(files.table.names) == word
    assert ImageTable.of(files).label_values() == ({"class": tuple(classes)} if classes else {})


# --- the user's own split -----------------------------------------------------------------------------------------


def kept(folder: Path, val_share: float = 0.3) -> tuple[dict[str, set[str]], list[str]]:
    """The splits of the images in each top folder, and what is said."""
    found, splits = find_images([folder], val_share), defaultdict(set)
    for file in found.files:
        splits[file.path.split("/")[0]].add(file.split)
    return splits, found.notes


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "VALID", "Testing"),
        ("train", "validation", "test"),
        ("train2017", "val2017", "test2017"),
        ("seg_train", "seg_val", "seg_test"),
        ("DIV2K_train_HR", "DIV2K_valid_HR", "DIV2K_test_HR"),
    ],
)
@pytest.mark.parametrize("inner", ["", "sea/", "images/"])
def test_folders_for_training_validation_and_testing_keep_their_roles(
    tmp_path: Path, train: str, val: str, test: str, inner: str
) -> None:
    fill(tmp_path, [f"{split}/{inner}{i}.png" for split in (train, val, test) for i in range(40)])
    splits, notes = kept(tmp_path)
    assert splits == {train: {"train"}, val: {"val"}}
    assert notes == [
        f"{tmp_path}: split by its folders into 40 training and 40 validation images; "
        "40 images in a folder for testing are left out"
    ]
    assert kept(tmp_path, 0)[0] == splits


def test_without_a_folder_for_validation_some_training_images_are_held_out(tmp_path: Path) -> None:
    fill(tmp_path, [f"{split}/{c}/{i}.png" for split in ("train", "test") for c in ("sea", "sky") for i in range(40)])
    splits, notes = kept(tmp_path)
    assert splits == {"train": {"train", "val"}}
    assert notes == [f"{tmp_path}: 80 images in a folder for testing are left out"]
    assert {file.labels["class"] for file in scan([tmp_path], 0.3)} == {"sea", "sky"}


def test_images_for_testing_are_used_if_there_are_no_others(tmp_path: Path) -> None:
    for paths in (["test/a/{}.png", "test/b/{}.png"], ["test/{}.png", "testing/{}.png"], ["test/{}.png"]):
        folder = fill(tmp_path / str(len(paths[0])), [path.format(i) for path in paths for i in range(40)])
        assert {file.split for file in scan([folder], 0.3)} == {"train", "val"}
        assert not kept(folder)[1]


def test_a_split_one_folder_deeper_or_in_each_class_is_kept_too(tmp_path: Path) -> None:
    wanted = {"train": "train", "valid": "val"}
    for template in ("set/images/{split}/{of}/{i}.png", "set/{of}/{split}/{i}.png"):
        folder = tmp_path / str(len(template))
        fill(folder, [template.format(split=s, of=c, i=i) for s in (*wanted, "test") for c in "ab" for i in range(9)])
        files = scan([folder], 0.5)
        assert len(files) == 36
        assert all(
            wanted[next(part for part in file.path.split("/") if part in wanted)] == file.split for file in files
        )
        assert {file.labels["class"] for file in files} == {"a", "b"}


def test_a_class_of_trains_is_no_split(tmp_path: Path) -> None:
    fill(tmp_path, [f"{name}/{i}.png" for name in ("bus", "car", "train") for i in range(40)])
    splits, notes = kept(tmp_path)
    assert splits == {name: {"train", "val"} for name in ("bus", "car", "train")}
    assert not notes
    assert {file.labels["class"] for file in scan([tmp_path], 0.3)} == {"bus", "car", "train"}


def test_images_beside_a_folder_for_validation_or_testing_are_for_training(tmp_path: Path) -> None:
    fill(tmp_path, [*NAMES[:40], *(f"{split}/{i}.png" for split in ("val", "test") for i in range(9))])
    splits = kept(tmp_path)[0]
    assert splits.pop("val") == {"val"}
    assert list(splits.values()) == [{"train"}] * 40


def test_data_folders_that_are_the_halves_of_a_split_keep_their_roles(tmp_path: Path) -> None:
    folders = [fill(tmp_path / name, NAMES[:40]) for name in ("Train", "val", "test")]
    found = find_images(folders, 0.3)
    assert {(file.root, file.split) for file in found.files} == {(0, "train"), (1, "val")}
    assert found.notes == [
        f"{folders[0]}: split by its folders into 40 training and 0 validation images",
        f"{folders[1]}: split by its folders into 0 training and 40 validation images",
        f"{folders[2]}: 40 images in a folder for testing are left out",
    ]
    assert {(file.root, file.split) for file in scan(folders[::2], 0.3)} == {(0, "train"), (0, "val")}
    assert {file.split for file in scan([folders[2]], 0.3)} == {"train", "val"}


def test_a_stray_image_that_costs_the_classes_is_named(tmp_path: Path) -> None:
    folder = fill(tmp_path / "p", [f"{c}/{i}.png" for c in ("sea", "sky") for i in range(40)])
    assert not find_images([folder], 0).notes
    (note,) = find_images([fill(folder, ["cover.png"])], 0).notes
    assert note == f"{folder}: its folders are not taken for classes, as cover.png lies in none of them"
    numbered = fill(tmp_path / "numbered", ["x.png", *(f"0{c}000/{i}.png" for c in range(2) for i in range(40))])
    assert not find_images([numbered], 0).notes


# --- what is passed over ------------------------------------------------------------------------------------------


def test_what_is_passed_over_is_counted_by_kind(tmp_path: Path) -> None:
    fill(tmp_path, ["1.png", "a/2.png", "x.jp2", "y.JP2", "z.dng", "art.psd", "logo.svg", "._1.png", ".DS_Store"])
    fill(tmp_path, ["notes.txt", "labels.csv", "Thumbs.db", "README", ".git/3.png", "a/.cache/4.png"])
    for name in ("@eaDir", "a/@eaDir", "$RECYCLE.BIN", "#recycle", "__MACOSX", "System Volume Information"):
        fill(tmp_path, [f"{name}/5.png"])
    for name, head in (("2041", b"\xff\xd8\xff\xe0"), ("photo.download", b"\x89PNG\r\n\x1a\n"), ("IMG", HEIC)):
        (tmp_path / name).write_bytes(head + bytes(60))
    os.mkfifo(tmp_path / "pipe")
    found = find_images([tmp_path], 0)
    assert [file.path for file in found.files] == ["1.png", "a/2.png"]
    assert found.passed_over == {
        ".jp2": 2, ".dng": 1, ".psd": 1, ".svg": 1, "hidden file": 1, "hidden folder": 2, "Thumbs.db": 1,
        "folder @eaDir": 2, "folder $RECYCLE.BIN": 1, "folder #recycle": 1, "folder __MACOSX": 1,
        "folder System Volume Information": 1,
        "JPEG without a suffix": 1, "PNG named .download": 1, "HEIC without a suffix": 1,
    }  # fmt: skip
    assert len(found.notes) == 1
    assert found.notes[0].startswith("passed over: .jp2 (2), ")
    assert " and 7 other kinds" in found.notes[0]


def test_a_runs_own_pictures_are_no_images_wherever_the_run_lies(tmp_path: Path) -> None:
    run = ["vae/settings.json", "vae/images/step-00000010.png", "samples/0001/00000.png", "vae.old-1/images/1.png"]
    fill(tmp_path, ["1.png", "2.png", *run, *(f"runs/faces/{name}" for name in run)])
    fill(tmp_path, ["3d/vae/4.png", "3d/samples/5.png", "3d/unet/settings.png"])  # someone's classes
    found = find_images([tmp_path], 0)
    assert [file.path for file in found.files] == [
        "1.png", "2.png", "3d/samples/5.png", "3d/unet/settings.png", "3d/vae/4.png"
    ]  # fmt: skip
    assert found.passed_over == {"folder of a run of lightdiff": 6}


def test_training_and_encoding_say_it_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, ["train/1.png", "val/1.png", "a.jxl", "test/1.png"])
    list_images(ImageSettings(data=(tmp_path,)), console)
    assert capsys.readouterr().err.splitlines() == [
        "note: passed over: .jxl (1)",
        f"note: {tmp_path}: split by its folders into 1 training and 1 validation images; 1 images in a folder for "
        "testing are left out",
    ]


def test_nothing_passed_over_is_nothing_said(tmp_path: Path) -> None:
    assert find_images([fill(tmp_path, ["1.png", "notes.txt"])], 0).notes == []


def test_captions_beside_images_are_told(tmp_path: Path) -> None:
    found = find_images([fill(tmp_path, ["1.png", "1.txt", "a/2.jpg", "a/2.txt", "a/1.txt", "notes.txt"])], 0)
    assert found.notes == ["passed over: caption .txt (2)"]


def test_a_folder_of_other_pictures_alone_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no image \(.*\); passed over: \.jxl \(2\)$"):
        scan([fill(tmp_path, ["a.jxl", "b.jxl"])], 0)


def test_what_to_install_is_said_of_pictures_that_could_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "HAS_HEIC", False)
    monkeypatch.setattr(files_module, "SUFFIXES", (".jpg",))
    found = find_images([fill(tmp_path, ["1.jpg", "2.HEIC", "3.heic"])], 0)
    assert found.notes == ["passed over: .heic (2); to read HEIC: python -m pip install 'lightdiff[heic]'"]


def test_few_files_of_an_unknown_suffix_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, ["1.png", *(f"{i}.txt" for i in range(300))])
    opened: list[str] = []
    monkeypatch.setattr(unread, "open_regular", lambda path: opened.append(path) or open(path, "rb"))
    scan([tmp_path], 0)
    assert len(opened) == unread.MISSES
