"""Tables of labels: what fits them, whom they name, and what is said of them."""

import csv
import io
import json
import unicodedata
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightdiff.data.files import find_images
from lightdiff.data.layouts import Labels
from lightdiff.errors import UserError
from tests.image_files import scan

HEAD = "file,class,note\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "p", [f"{i}.jpg" for i in range(1, 6)])


def fill(folder: Path, paths: list[str]) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def table(folder: Path, text: str | bytes, name: str = "l.csv") -> Path:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder / name


def labels(folders: Path | list[Path], path: Path | None) -> dict[str, Labels]:
    files = scan(folders if isinstance(folders, list) else [folders], 0, table=path)
    return {f"{file.root}/{file.path}": file.labels for file in files if file.labels}


def notes(folder: Path, path: Path | None) -> list[str]:
    return find_images([folder], 0, table=path).notes


# --- rows that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1.jpg,a,b\n2.jpg,a,b,c\n", "has 3 columns, but other numbers of cells in line 3 (4 in the first of them)"),
        ("1.jpg,a\n2.jpg,a,b\n", "in line 2 (2 in"),
        ("1.jpg,a,b\n\n2.jpg,Doe, Jane,b\n", "in line 4 (4 in the first of them); a cell that holds ',' needs quotes"),
        ("1,a\n2,a\n3,a\n4,a\n5,a\n", "in lines 2, 3, 4 and 2 more (2 in"),
        ('1.jpg,"a,b\n2.jpg,c,d\n', "has a quote that is left open or stands in the middle of a cell: line 2"),
        ('1.jpg,"a,b\n2.jpg,c,d"\n', "a quote that is left open or stands in the middle of a cell: lines 2, 3"),
        ('1.jpg,"a\n2.jpg,b\n3.jpg",b,c\n', "a quote that is left open or stands in the middle of a cell: lines 2, 4"),
        ('1.jpg,a"b,c\n', "a quote that is left open or stands in the middle of a cell: line 2"),
        ('1.jpg,"a"b,c\n', "a quote that is left open or stands in the middle of a cell: line 2"),
        ('1.jpg,5" pipe,6" pipe\n', "a quote that is left open or stands in the middle of a cell: line 2"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_by_its_line(folder: Path, tmp_path: Path, rows: str, message: str) -> None:
    for newline in ("\n", "\r\n", "\r"):
        with pytest.raises(UserError, match=r"^--labels: .*l\.csv has ") as refused:
            scan([folder], 0, table=table(tmp_path, (HEAD + rows).replace("\n", newline)))
        assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "l.csv has no column file"),
        ("name,class\n1.jpg,a\n", "l.csv has no column file; its first line is: name,class"),
        ("file,class,class\n1.jpg,a,b\n", "l.csv has two columns class"),
        (b"file,class\n1.jpg,\xe9\n", "l.csv cannot be read: line 2 is not UTF-8"),
    ],
)
def test_a_table_that_cannot_be_understood_is_refused(
    folder: Path, tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(UserError) as refused:
        scan([folder], 0, table=table(tmp_path, text))
    assert message in str(refused.value)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_other_programs_are_read(
    folder: Path, tmp_path: Path, newline: str, delimiter: str, encoding: str
) -> None:
    rows = [["note", "file", "class"], ['"a, b;\tc"', "1.jpg", ' "say ""é""" '], ["", "2.jpg", "x"], [""]]
    text = newline.join(delimiter.join(row) for row in rows)
    found = labels(folder, table(tmp_path, text.encode(encoding)))
    assert found == {"0/1.jpg": {"note": "a, b;\tc", "class": 'say "é"'}, "0/2.jpg": {"class": "x"}}


def test_the_separator_is_the_one_beside_the_column_file(folder: Path, tmp_path: Path) -> None:
    path = table(tmp_path, "file\tnote, long, and more\n1.jpg\ta, b\n")
    assert labels(folder, path) == {"0/1.jpg": {"note, long, and more": "a, b"}}


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.tuples(CELLS, CELLS), min_size=5, max_size=5),
    delimiter=st.sampled_from(",;\t"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_whatever_a_writer_of_tables_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, values: list[tuple[str, str]], delimiter: str, quoting: Literal[0, 1]
) -> None:
    folder = fill(tmp_path_factory.mktemp("p"), [f"{i}.jpg" for i in range(5)])
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter, quoting=quoting)
    writer.writerow(["file", "one", "other"])
    writer.writerows([f"{i}.jpg", *row] for i, row in enumerate(values))
    read = {file.path: file.labels for file in scan([folder], 0, table=table(folder, stream.getvalue()))}
    for i, row in enumerate(values):
        wanted = {name: unicodedata.normalize("NFC", v.strip()) for name, v in zip(("one", "other"), row, strict=True)}
        assert read.get(f"{i}.jpg", {}) == {name: value for name, value in wanted.items() if value}


# --- whom a row names ---------------------------------------------------------------------------------------------


def test_letter_case_of_suffixes_and_slashes_and_unicode_forms_do_not_matter(tmp_path: Path) -> None:
    folder = fill(tmp_path / "p", ["a/1.JPG", "a/2.jpg", unicodedata.normalize("NFD", "a/é.png"), "a/5.jpg"])
    rows = ["./a/1.jpg,x", r"a\2.JPG,x", "a/é.png,x", "b/../a//5.jpg,x"]
    assert len(labels(folder, table(tmp_path, "\n".join(["file,class", *rows])))) == 4


def test_values_and_column_names_have_one_unicode_form(tmp_path: Path) -> None:
    folder = fill(tmp_path / "p", ["1.jpg", "2.jpg"])
    forms = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    path = table(tmp_path, f"file,{forms[1]}\n1.jpg,{forms[0]}\n2.jpg,{forms[1]}\n")
    assert labels(folder, path) == {f"0/{i}.jpg": {forms[0]: forms[0]} for i in (1, 2)}
    folder = fill(tmp_path / "q", [f"{form}{i}/1.jpg" for i, form in zip((1, 2), forms, strict=True)])
    assert {label["class"] for label in labels(folder, None).values()} == {f"{forms[0]}1", f"{forms[0]}2"}


def test_exact_names_come_before_those_that_are_only_alike(tmp_path: Path) -> None:
    folder = fill(tmp_path / "p", ["1.jpg", "1.JPG"])
    path = table(tmp_path, "file,class\n1.jpg,a\n1.JPG,b\n")
    assert labels(folder, path) == {"0/1.JPG": {"class": "b"}, "0/1.jpg": {"class": "a"}}
    with pytest.raises(UserError, match=r"l\.csv, line 2: 1\.Jpg can be .* or .*; write that path"):
        scan([folder], 0, table=table(tmp_path, "file,class\n1.Jpg,a\n"))


def test_names_may_be_absolute_or_count_from_the_tables_own_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    path = table(tmp_path / "tables", f"file,class\n{folder}/1.jpg,a\n../p/2.jpg,a\np/3.jpg,a\n4.jpg,a\n")
    assert len(labels(folder, path)) == 4
    (tmp_path / "link").symlink_to(folder)
    assert len(labels(tmp_path / "link", path)) == 3  # p/3.jpg is no name of link/3.jpg


def test_rows_are_matched_in_the_folder_that_they_name(tmp_path: Path) -> None:
    folders = [fill(tmp_path / name, ["1.jpg", "2.jpg"]) for name in "AB"]
    with pytest.raises(UserError, match=r"line 2: 1\.jpg can be .*A/1\.jpg or .*B/1\.jpg; write that path"):
        scan(folders, 0, table=table(tmp_path, "file,class\n1.jpg,a\n"))
    rows = f"file,class\nA/1.jpg,a\nB/1.jpg,b\n{folders[1]}/2.jpg,c\n"
    assert labels(folders, table(tmp_path, rows)) == {
        "0/1.jpg": {"class": "a"}, "1/1.jpg": {"class": "b"}, "1/2.jpg": {"class": "c"},
    }  # fmt: skip
    inside = table(folders[1], "file,class\n1.jpg,b\n")
    assert labels(folders, inside) == {"1/1.jpg": {"class": "b"}}


def test_one_image_twice_with_different_labels_is_refused_however_it_is_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"l\.csv, line 3, names \./1\.JPG again, with different labels"):
        scan([folder], 0, table=table(tmp_path, "file,class\n1.jpg,a\n./1.JPG,b\n"))
    assert len(labels(folder, table(tmp_path, "file,class\n1.jpg,a\n./1.JPG,a\n"))) == 1


# --- what is said -------------------------------------------------------------------------------------------------


def test_rows_without_an_image_and_images_without_a_row_are_counted(folder: Path, tmp_path: Path) -> None:
    path = table(tmp_path, "file,class\n1.jpg,a\n7.jpg,b\n8.jpg,b\n2.jpg,\n3.JPG,a\n")
    assert notes(folder, path) == [
        f"2 of 5 rows of {path} name no image (line 3: 7.jpg)",
        f"1 of 5 rows of {path} spell an image's name differently (line 6: 3.JPG for 3.jpg)",
        f"3 of 5 images have no label in {path} (such as 2.jpg)",
    ]


def test_a_row_without_a_file_is_one_that_names_no_image(folder: Path, tmp_path: Path) -> None:
    path = table(tmp_path, "file,class\n,b\n,\n1.jpg,a\n2.jpg,a\n3.jpg,a\n4.jpg,a\n5.jpg,a\n")
    assert notes(folder, path) == [f"1 of 6 rows of {path} name no image (line 2: )"]


def test_rows_of_images_for_testing_have_an_image(tmp_path: Path) -> None:
    folder = fill(tmp_path / "p", ["train/1.jpg", "train/2.jpg", "test/1.jpg"])
    found = notes(folder, table(tmp_path, "file,class\ntrain/1.jpg,a\ntrain/2.jpg,a\ntest/1.jpg,b\n"))
    assert found == [f"{folder}: 1 images in a folder for testing are left out"]


def test_a_label_of_nearly_as_many_values_as_images_is_noted(tmp_path: Path) -> None:
    folder = fill(tmp_path / "p", [f"{i}.jpg" for i in range(20)])
    rows = "".join(f"{i}.jpg,{i % 2},{i}\n" for i in range(20))
    assert notes(folder, table(tmp_path, f"file,class,id\n{rows}")) == [
        "id has 20 values for 20 images: hardly a class"
    ]


# --- StyleGAN's dataset.json --------------------------------------------------------------------------------------


def stylegan(folder: Path, pairs: object) -> Path:
    return table(folder, json.dumps({"labels": pairs}), "dataset.json")


def test_stylegans_table_is_a_table(folder: Path, tmp_path: Path) -> None:
    path = stylegan(tmp_path, [["1.jpg", 3], ["2.jpg", 0], ["3.jpg", None]])
    assert labels(folder, path) == {"0/1.jpg": {"class": "3"}, "0/2.jpg": {"class": "0"}}


def test_stylegans_table_among_the_images_gives_their_labels(tmp_path: Path) -> None:
    for inner in ("", "deeper/"):
        folder = fill(tmp_path / f"of{inner}", [f"{inner}00000/img{i:08d}.png" for i in range(3)])
        stylegan(folder / inner, [[f"00000/img{i:08d}.png", i % 2] for i in range(4)])
        found = find_images([folder], 0)
        assert found.layouts == ["StyleGAN"]
        assert [file.labels["class"] for file in found.files] == ["0", "1", "0"]
        assert found.notes == [
            f"1 of 4 rows of {folder / inner / 'dataset.json'} name no image (entry 4: 00000/img00000003.png)"
        ]


@pytest.mark.parametrize("text", ['{"labels": null}', '{"labels": []}', '{"images": [{"id": 1}]}', "[", ""])
def test_another_dataset_json_among_the_images_is_no_table(folder: Path, text: str) -> None:
    path = table(folder, text, "dataset.json")
    assert find_images([folder], 0).layouts == ["plain"]
    with pytest.raises(UserError, match=r"dataset\.json (has no labels: StyleGAN's are|cannot be read)"):
        scan([folder], 0, table=path)


def test_labels_that_are_no_classes_are_refused(folder: Path) -> None:
    path = stylegan(folder, [["1.jpg", 1], ["2.jpg", [0.1, 0.9]]])
    with pytest.raises(UserError, match=r"^--data: .*has an entry 2 that is not a file and its class: \[\"2\.jpg\""):
        scan([folder], 0)
    with pytest.raises(UserError, match=r"^--labels: .*has an entry 2"):
        scan([folder], 0, table=path)


# --- FairFace's tables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["", "inner/", "above", "far/inner/"])
def test_fairfaces_tables_are_found_beside_its_folders_or_above(tmp_path: Path, where: str) -> None:
    data = tmp_path / "p"
    folder = data / ("" if where == "above" else where)
    fill(folder, [f"{split}/{i}.jpg" for split in ("train", "val") for i in (1, 2)])
    for split in ("train", "val"):
        rows = "".join(f"{split}/{i}.jpg,3-9,Male,{split},False\n" for i in (1, 2))
        home = tmp_path if where == "above" else data
        table(home, f"file,age,gender,race,service_test\n{rows}", f"fairface_label_{split}.csv")
    found = find_images([data], 0.5)
    assert found.layouts == ["FairFace"]
    assert {(file.split, *file.labels.items()) for file in found.files} == {
        (split, ("age", "3-9"), ("gender", "Male"), ("race", split)) for split in ("train", "val")
    }


def test_the_table_of_hugging_faces_image_folder_is_read(tmp_path: Path) -> None:
    fill(tmp_path, ["1.jpg", "2.jpg"])
    (tmp_path / "metadata.csv").write_text("file_name,kind\n1.jpg,a\n2.jpg,b\n")
    found = scan([tmp_path], 0, table=tmp_path / "metadata.csv")
    assert [file.labels for file in found] == [{"kind": "a"}, {"kind": "b"}]


# --- Hugging Face's metadata.jsonl ----------------------------------------------------------------------------------


def test_lines_of_json_are_a_table(folder: Path) -> None:
    """Texts and whole numbers are labels, other values are not; names count as in other tables."""
    rows = [
        {"file_name": "1.jpg", "kind": " cat ", "year": 1999, "score": 0.5, "boxes": [1], "none": None},
        {"kind": "dog", "file_name": "p/2.JPG"},
        {"file_name": "3.jpg"},
    ]
    path = table(folder, "\n\n".join(map(json.dumps, rows)) + "\r\n", "metadata.jsonl")
    assert labels(folder, path) == {"0/1.jpg": {"kind": "cat", "year": "1999"}, "0/2.jpg": {"kind": "dog"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file_name": "1.jpg"}\n{"kind": "cat"}', r"metadata\.jsonl has no file_name in line 2"),
        ('{"file_name": 3}', "has no file_name in line 1"),
        ("[1]", "has no file_name in line 1"),
        ('{"file_name": "1.jpg"', "cannot be read: "),
    ],
)
def test_lines_of_json_that_do_not_fit_are_named(folder: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        labels(folder, table(folder, text, "metadata.jsonl"))


def test_a_table_that_is_not_read_is_named(folder: Path) -> None:
    path = table(folder, '{"file_name": "1.jpg", "kind": "cat"}\n', "metadata.jsonl")
    assert notes(folder, None) == [f"{path} is not read; to have labels from it: --labels {path}"]
    assert not any("is not read" in note for note in notes(folder, path))
