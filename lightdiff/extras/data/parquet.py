"""Parquet files as a source of images: a column of structs with their bytes, as Hugging Face's data sets have it.

Rows are read a row group at a time, and few groups are kept: in order that is fast, at random each image costs its
group. `encode` and `pack` read in order; pack first what is to be trained on. Needs the extra `parquet`.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lightdiff.data.files import Source, read_in_folder
from lightdiff.data.formats import BadImage, open_stream
from lightdiff.data.layouts import Labels, Names
from lightdiff.data.table import NO_FILE, Fingerprint, content_hash
from lightdiff.errors import UserError
from lightdiff.extras.data.archives import files_at
from lightdiff.extras.data.splits import ROLES

GROUPS = 4  # row groups that are kept in memory
LARGEST = 1 << 30  # bytes of the images of one, unpacked
FEW = 10  # rows, of which any number of values makes a label


class Rows(NamedTuple):
    """The images of one file: the column of their bytes, and where each row group begins."""

    path: str
    changed: int  # time of change
    column: str
    starts: tuple[int, ...]  # of each row group, and the number of rows


def opened(path: str) -> Any:
    """A Parquet file.

    Raises:
        UserError: If it cannot be read, or pyarrow is missing.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("--data: Parquet needs pyarrow: python -m pip install 'lightdiff[parquet]'") from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"--data: {path} is damaged, or no Parquet file: {error}") from None


def rows_of(place: Path) -> dict[str, Rows]:
    """The files that a path or a pattern names, by the beginning of their images' names.

    Raises:
        UserError: If there is none, or one has no images.
    """
    paths = files_at(place)
    if not paths:
        raise UserError(f"--data: {place} does not exist")
    found = dict[str, Rows]()
    for path in paths:
        role = path.stem.partition("-")[0]  # train-00000-of-00002
        name = f"{role}/{path.stem}" if role in ROLES and len(paths) > 1 else path.stem
        if name in found:
            raise UserError(f"--data: {path} and {found[name].path} are named alike: name the folder of one of them")
        found[name] = _rows(str(path), path.stat().st_mtime_ns)
    return found


@cache
def _rows(path: str, changed: int) -> Rows:
    file = opened(path)
    structs = [f.name for f in file.schema_arrow if getattr(f.type, "num_fields", 0) and _has_bytes(f.type)]
    if not structs:
        columns = ", ".join(file.schema_arrow.names)
        raise UserError(f"--data: {path} has no column of images, structs with 'bytes', but {columns}")
    starts = [0]
    for group in range(file.num_row_groups):
        starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
    return Rows(path, changed, "image" if "image" in structs else structs[0], tuple(starts))


def _has_bytes(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def names(place: Path, passed_over: Counter[str]) -> Iterator[str]:
    """FILE:ROW of each image, in a folder train, validation or test where several files say so."""
    _found.cache_clear()
    return (f"{stem}:{row:08d}" for stem, rows in rows_of(place).items() for row in range(rows.starts[-1]))


def read(place: Path, name: str) -> bytes:
    """The bytes of an image.

    Raises:
        BadImage: If there are none.
    """
    stem, _, row = name.rpartition(":")
    rows = _found(place)[stem]
    group = next(g for g, end in enumerate(rows.starts[1:]) if int(row) < end)
    data = _group(rows, group)[int(row) - rows.starts[group]]
    if not data:
        raise BadImage("the row has no bytes, only a path")
    return bytes(data)


@cache
def _found(place: Path) -> dict[str, Rows]:
    return rows_of(place)


@lru_cache(maxsize=GROUPS)
def _group(rows: Rows, group: int) -> list[bytes | None]:
    """The bytes of all images of a row group."""
    if os.stat(rows.path).st_mtime_ns != rows.changed:
        raise BadImage("its file has been changed since its list was made")
    file = opened(rows.path)
    columns = file.metadata.row_group(group)
    size = sum(columns.column(i).total_uncompressed_size for i in range(columns.num_columns))
    if size > LARGEST:
        raise BadImage(f"its row group has {size:,} bytes, more than {LARGEST:,}: write it anew in smaller ones")
    structs = file.read_row_group(group, [f"{rows.column}.bytes"]).column(0).combine_chunks()
    found: list[bytes | None] = structs.field("bytes").to_pylist()
    return found


def open_image(place: Path, name: str) -> Image.Image:
    """An image, open but not yet decoded."""
    return open_stream(BytesIO(read(place, name)))


def fingerprint(place: Path, name: str, contents: bool = False) -> Fingerprint:
    """The time of change of an image's file, and its hash; its size is not known without reading it."""
    try:
        changed = _found(place)[name.rpartition(":")[0]].changed
        return 0, changed, content_hash(read(place, name) if contents else None)
    except (OSError, BadImage, UserError, LookupError, StopIteration):
        return NO_FILE


def labels(place: Path, names: Names) -> Iterable[Labels] | None:
    """Columns of whole numbers and texts, by the names of Hugging Face's classes; none that differ in most rows."""
    import pyarrow.types as kinds

    found: dict[str, Labels] = {}
    for stem, rows in rows_of(place).items():
        file = opened(rows.path)
        features = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        features = features.get("info", {}).get("features", {})
        for field in file.schema_arrow:
            if not (kinds.is_integer(field.type) or kinds.is_string(field.type) or kinds.is_large_string(field.type)):
                continue
            values = file.read([field.name]).column(0).to_pylist()
            if len(values) >= FEW and len(set(values)) > len(values) / 2:
                continue
            words = features.get(field.name, {}).get("names")
            for row, value in enumerate(values):
                if value is not None and value != "":
                    text = words[value] if words and isinstance(value, int) and 0 <= value < len(words) else str(value)
                    found.setdefault(f"{stem}:{row:08d}", {})[field.name] = text
    return (found.get(name, {}) for name in names) if found else None


SOURCE = Source(names, open_image, fingerprint, read_in_folder, labels)
