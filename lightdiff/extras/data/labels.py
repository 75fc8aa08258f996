"""Tables of labels: read row by row, every one that does not fit refused, and matched with the images they name."""

import csv
import json
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from lightdiff.data.files import read_in_folder
from lightdiff.data.layouts import TABLES, Labels, Names, Read, common_folder
from lightdiff.errors import UserError

FAIRFACE_LABELS = ("age", "gender", "race")
Labelled = dict[tuple[int, str], Labels]  # by the number of the source and the image's name
FEW = 10  # images, of which nothing is said about the number of a label's values
SHOWN = 3  # lines of a table that a message names


class Row(NamedTuple):
    """One row of a table: where it stands in it, the image it names, and the labels it gives."""

    where: str
    file: str
    labels: Labels


def _read_rows(table: Path, raw: bytes, columns: Sequence[str]) -> list[Row]:
    """The rows of a CSV table, of StyleGAN's dataset.json, or of a .jsonl of Hugging Face, that name a file."""
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"line {1 + raw[: error.start].count(10)} is not UTF-8") from error
    read = {".json": _rows_of_json, ".jsonl": _rows_of_lines}.get(table.suffix.lower())
    rows = read(text) if read else _rows_of_csv(text, columns)
    return [row for row in rows if row.file or row.labels]


def _text(text: str) -> str:
    """A name without blanks around it, in the one Unicode form in which names are compared."""
    return unicodedata.normalize("NFC", text.strip())


def _rows_of_csv(text: str, columns: Sequence[str]) -> list[Row]:
    lines = re.split("\r\n|\n|\r", text)
    first = lines[0]
    delimiter = max(",;\t", key=lambda d: ("file" in (name.strip(' "') for name in first.split(d)), first.count(d)))
    cell = rf' *"(?:[^"]|"")*" *|[^"{delimiter}]*'
    fitting = re.compile(f"(?:{cell})(?:{delimiter}(?:{cell}))*")
    quotes = [number for number, line in enumerate(lines, 1) if '"' in line and not fitting.fullmatch(line)]
    if quotes:
        raise UserError(f"has a quote that is left open or stands in the middle of a cell: {_listed(quotes)}")
    cells = list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True))  # a line a row: no quote is open
    header = [_text(name) for name in cells[0]]
    if "file" not in header:  # as Hugging Face calls it
        header = ["file" if name == "file_name" else name for name in header]
    names = [name for name in header if name]  # the column of a table's index has none
    missing = {"file", *columns}.difference(names)
    if missing:
        raise UserError(f"has no column {', '.join(sorted(missing))}; its first line is: {first.strip()[:200]}")
    if len(names) < 2:
        raise UserError("has no column but file; it needs one for each label")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"has two columns {twice[0]}")
    wrong = [n for n, row in enumerate(cells, 1) if len(row) != len(header) and lines[n - 1].strip()]
    if wrong:
        raise UserError(
            f"has {len(header)} columns, but other numbers of cells in {_listed(wrong)} ({len(cells[wrong[0] - 1])} in "
            f"the first of them); a cell that holds {delimiter!r} needs quotes"
        )
    at = header.index("file")
    named = [(i, name) for i, name in enumerate(header) if i != at and (name in columns if columns else name)]
    return [
        Row(f"line {number}", row[at].strip(), {name: _text(row[i]) for i, name in named if _text(row[i])})
        for number, row in enumerate(cells[1:], 2)
        if lines[number - 1].strip()
    ]


def _rows_of_json(text: str) -> list[Row]:
    """StyleGAN's {"labels": [["00000/img00000000.png", 3], ...]}."""
    document = json.loads(text)
    pairs = document.get("labels") if isinstance(document, dict) else None
    if not pairs or not isinstance(pairs, list):
        raise UserError('has no labels: StyleGAN\'s are {"labels": [["00000/img00000000.png", 3], ...]}')
    rows = []
    for number, pair in enumerate(pairs, 1):
        match pair:
            case [str(file), None]:
                rows.append(Row(f"entry {number}", file, {}))
            case [str(file), int() | str() as value] if not isinstance(value, bool):
                rows.append(Row(f"entry {number}", file, {"class": _text(str(value))}))
            case _:
                raise UserError(f"has an entry {number} that is not a file and its class: {json.dumps(pair)[:200]}")
    return rows


def _rows_of_lines(text: str) -> list[Row]:
    """Hugging Face's metadata.jsonl, an object a line: its texts and whole numbers are labels."""
    rows = []
    for number, line in ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()):
        found = json.loads(line)
        file = found.pop("file_name", None) if isinstance(found, dict) else None
        if not isinstance(file, str):
            raise UserError(f'has no file_name in line {number}; one is {{"file_name": "1.png", "kind": "cat"}}')
        labels = {name: _text(str(value)) for name, value in found.items() if isinstance(value, (str, int))}
        rows.append(Row(f"line {number}", file, {name: value for name, value in labels.items() if value}))
    return rows


def _listed(lines: Sequence[int]) -> str:
    """The first of these lines, and how many more there are."""
    more = f" and {len(lines) - SHOWN:,} more" if len(lines) > SHOWN else ""
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(map(str, lines[:SHOWN]))}{more}"


class Images:
    """The images of one source, found by the names that tables use."""

    def __init__(self, folder: Path, names: Names) -> None:
        """Index the names by their comparable form."""
        self.folder, self.names = folder, set(names)
        self.by_key: dict[str, list[str]] = {}
        for name in self.names:
            self.by_key.setdefault(_key(name), []).append(name)
        start = common_folder(names).split("/")[:-1]
        # Tables may count from the source, or from the folder inside it that holds all images.
        self.starts = ["/".join((*start[:depth], "")) for depth in range(len(start) + 1)]
        self.places = [f"{place.as_posix()}/" for place in {folder.absolute(), folder.resolve()}]

    def find(self, file: str, table: Path) -> list[str]:
        """The images that a table's name can mean; more than one if only letter case or Unicode tell them apart."""
        if file in self.names:
            return [file]
        path = posixpath.normpath(file.replace("\\", "/"))
        absolute = path if re.match("/|[A-Za-z]:/", path) else f"{table.absolute().parent.as_posix()}/{path}"
        beside = posixpath.normpath(absolute)
        below = [beside.removeprefix(place) for place in self.places if beside.startswith(place)]
        tried = [*(start + path for start in self.starts), path.removeprefix(f"{self.folder.name}/"), *below]
        return next((found for name in tried if (found := self.by_key.get(_key(name)))), [])


def _key(name: str) -> str:
    """A name in the form in which names are compared: in one Unicode form, its suffix in lower case."""
    stem, suffix = posixpath.splitext(name)
    return (stem if stem.isascii() else unicodedata.normalize("NFC", stem)) + suffix.lower()


def read_labels(table: Path, flag: str, sources: Mapping[int, Images], notes: list[str], read: Read) -> Labelled:
    """The labels that a table gives to the images of some sources, by the number of the source and the image's name.

    A table inside a folder speaks of that folder alone. FairFace's has columns that are no labels.

    Args:
        table: The file.
        flag: What named it.
        sources: The images, by the numbers of their sources.
        notes: Takes what is to be said.
        read: Reads it.

    Raises:
        UserError: It cannot be read, lacks columns, has rows that do not fit it, names no image that is there, one
            twice with different labels, or one that could be several.
    """
    try:
        rows = _read_rows(table, read(table), FAIRFACE_LABELS if flag == "--data" and table.name in TABLES[:2] else ())
    except UserError as error:
        raise UserError(f"{flag}: {table} {error}") from None
    except (OSError, csv.Error, ValueError, RecursionError) as error:
        raise UserError(f"{flag}: the table {table} cannot be read: {error}") from error
    inside = {root: images for root, images in sources.items() if images.folder.resolve() in table.resolve().parents}
    labels, unmatched, respelt = Labelled(), list[str](), list[str]()
    for row in rows:
        found = [(root, name) for root, images in (inside or sources).items() for name in images.find(row.file, table)]
        if len(found) > 1:
            one, other = (sources[root].folder / name for root, name in found[:2])
            raise UserError(f"{flag}: {table}, {row.where}: {row.file} can be {one} or {other}; write that path")
        if not found:
            unmatched.append(f"{row.where}: {row.file}")
        elif labels.setdefault(found[0], row.labels) != row.labels:
            raise UserError(f"{flag}: {table}, {row.where}, names {row.file} again, with different labels")
        elif posixpath.basename(found[0][1]) != re.split(r"[/\\]", row.file)[-1]:
            respelt.append(f"{row.where}: {row.file} for {found[0][1]}")
    if not labels and flag == "--labels":
        first = next(iter(sources.values()))
        example = f"it has {rows[0].file if rows else 'none'}, there is {min(first.names)}"
        raise UserError(f"{flag}: {table} names no image of {first.folder}: {example}")
    for which, what in ((unmatched, "name no image"), (respelt, "spell an image's name differently")):
        if which:
            notes.append(f"{len(which):,} of {len(rows):,} rows of {table} {what} ({which[0]})")
    for name in sorted({name for given in labels.values() for name in given}):
        values = [given[name] for given in labels.values() if name in given]
        if len(values) >= FEW and len(set(values)) > len(values) / 2:
            notes.append(f"{name} has {len(set(values)):,} values for {len(values):,} images: hardly a class")
    return labels


# --- of a source, and of all --------------------------------------------------------------------------------------


def own_tables(found: Mapping[Path, bytes], folder: Path, names: Names) -> list[Path]:
    """Those of the tables found, nearest first, that speak of these images.

    FairFace's need its folders train/ or val/, StyleGAN's needs labels.
    """
    fairface = [table for table in found if table.name in TABLES[:2]]
    if fairface and any(re.search("(^|/)(train|val)/", f"{folder.name}/{name}") for name in names):
        return [table for table in fairface if table.parent == fairface[0].parent]
    for table, text in found.items():
        if table.name == TABLES[-1] and folder in table.parents:
            return [table] if re.match(rb'\s*\{\s*"labels"\s*:\s*\[\s*\[\s*"', text) else []
    return []


def labels_of_tables(
    tables: Sequence[Path], folder: Path, names: Names, read: Read, notes: list[str]
) -> dict[str, Labels]:
    """The labels that a source's own tables give to its images, by their names."""
    images = {0: Images(folder, names)}
    rows = [read_labels(table, "--data", images, notes, read) for table in tables]
    return {name: labels for found in rows for (_, name), labels in found.items()}


def labels_of_one_table(
    table: Path,
    folders: Sequence[Path],
    listed: Sequence[Names],
    used: Sequence[Names],
    notes: list[str],
) -> list[Iterable[Labels]]:
    """The labels that the table of --labels gives to the images of each source that are used.

    `listed` are the names that it may use: how many of those used have none is noted.
    """
    images = {root: Images(*pair) for root, pair in enumerate(zip(folders, listed, strict=True))}
    by_root: list[dict[str, Labels]] = [{} for _ in folders]
    for (root, name), labels in read_labels(
        table, "--labels", images, notes, partial(read_in_folder, table.parent)
    ).items():
        by_root[root][name] = labels
    without = [name for names, of in zip(used, by_root, strict=True) for name in names if not of.get(name)]
    if without:
        count = sum(map(len, used))
        notes.append(f"{len(without):,} of {count:,} images have no label in {table} (such as {without[0]})")
    return [map(of.get, names, repeat({})) for names, of in zip(used, by_root, strict=True)]
