"""What is in these folders? Counts, sizes, formats, labels, duplicates, unreadable files: before any training."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import median

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightdiff.data.files import FOLDER, ImageFile, Layout, Source, layout, scan, source_of
from lightdiff.data.images import BadImage, colour, opened, to_rgb

RESOLUTIONS = (32, 64, 128, 256, 512, 1024)


class FolderReport(BaseModel):
    """One --data folder."""

    folder: str
    layout: Layout
    images: int
    train: int
    val: int


class Spread(BaseModel):
    """Smallest, middle and largest of some lengths in pixels."""

    min: int
    median: float
    max: int


class Sizes(BaseModel):
    """How large the readable images are, upright."""

    width: Spread
    height: Spread
    shorter_side: Spread
    smaller_than: dict[int, int]  # resolution: images whose shorter side would be enlarged


class Duplicates(BaseModel):
    """Files with the same bytes."""

    images: int  # that could go without losing a picture
    leaks: int  # groups with files in both train and val
    groups: list[list[str]]


class BadFile(BaseModel):
    """A file that cannot be read, and why."""

    name: str
    reason: str


class Report(BaseModel):
    """Everything found. Lists are complete; `max_shown` is how much of each is printed."""

    folders: list[FolderReport]
    images: int
    train: int
    val: int
    formats: dict[str, int]
    modes: dict[str, int]
    sizes: Sizes | None
    labels: dict[str, dict[str, int]]
    unlabelled: int
    duplicates: Duplicates
    bad: list[BadFile]
    max_shown: int


@dataclass(frozen=True, slots=True)
class _Look:
    """What opening one file tells: a digest if its bytes can be had, a reason if its pixels cannot."""

    digest: str = ""
    format: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    reason: str = ""


def inspect(
    folders: list[Path], val_share: float, max_shown: int = 10, progress: Callable[[int, int], None] | None = None
) -> Report:
    """A report on all images below the folders, each of which is decoded in full, as training would.

    Args:
        folders: As given with --data.
        val_share: Share held out for validation.
        max_shown: Files of a kind, or values of a label, that `print_report` shows.
        progress: Called with the images done and all images.
    """
    files = scan(folders, val_share)
    names = [_printable(os.path.join(folders[file.root], file.path)) for file in files]
    sources = [(folder, source_of(folder)) for folder in folders]
    looks: list[_Look] = []
    with ThreadPool(os.cpu_count()) as pool:
        for look in pool.imap(_look, ((file.path, *sources[file.root]) for file in files), chunksize=16):
            looks.append(look)
            if progress:
                progress(len(looks), len(files))
    readable = [look for look in looks if not look.reason]
    splits = Counter(file.split for file in files)
    return Report(
        folders=[_folder_report(folders, root, files) for root in range(len(folders))],
        images=len(files),
        train=splits["train"],
        val=splits["val"],
        formats=_counts(look.format for look in readable),
        modes=_counts(look.mode for look in readable),
        sizes=_sizes([look.size for look in readable]) if readable else None,
        labels=_label_counts(files),
        unlabelled=sum(not file.labels for file in files),
        duplicates=_duplicates(files, names, looks),
        bad=[BadFile(name=n, reason=look.reason) for n, look in zip(names, looks, strict=True) if look.reason],
        max_shown=max_shown,
    )


def _look(image: tuple[str, Path, Source]) -> _Look:
    name, folder, source = image
    digest = ""
    try:
        with opened(name, folder, source) as found:
            data = (folder / name).read_bytes() if source is FOLDER else found.tobytes()
            digest = hashlib.sha256(data).hexdigest()
            kind, mode = found.format or "", found.mode
            return _Look(digest, kind, mode, to_rgb(found, colour("white")).size)
    except BadImage as error:
        return _Look(digest, reason=str(error))


def _folder_report(folders: list[Path], root: int, files: list[ImageFile]) -> FolderReport:
    own = [file for file in files if file.root == root]
    splits = Counter(file.split for file in own)
    return FolderReport(
        folder=_printable(str(folders[root])),
        layout=layout(folders[root], [file.path for file in own]),
        images=len(own),
        train=splits["train"],
        val=splits["val"],
    )


def _sizes(sizes: list[tuple[int, int]]) -> Sizes:
    shorter = [min(size) for size in sizes]
    return Sizes(
        width=_spread([width for width, _ in sizes]),
        height=_spread([height for _, height in sizes]),
        shorter_side=_spread(shorter),
        smaller_than={resolution: sum(side < resolution for side in shorter) for resolution in RESOLUTIONS},
    )


def _spread(lengths: list[int]) -> Spread:
    return Spread(min=min(lengths), median=median(lengths), max=max(lengths))


def _duplicates(files: list[ImageFile], names: list[str], looks: list[_Look]) -> Duplicates:
    same: dict[str, list[int]] = defaultdict(list)
    for index, look in enumerate(looks):
        if look.digest:
            same[look.digest].append(index)
    groups = [group for group in same.values() if len(group) > 1]
    return Duplicates(
        images=sum(len(group) - 1 for group in groups),
        leaks=sum(len({files[index].split for index in group}) > 1 for group in groups),
        groups=[[names[index] for index in group] for group in groups],
    )


def _label_counts(files: list[ImageFile]) -> dict[str, dict[str, int]]:
    values: dict[str, list[str]] = defaultdict(list)
    for file in files:
        for name, value in file.labels.items():
            values[_printable(name)].append(_printable(value))
    return {name: _counts(values[name]) for name in sorted(values)}


def _counts(values: Iterable[str]) -> dict[str, int]:
    """Each value with its count, the most frequent first."""
    return dict(sorted(Counter(values).items(), key=lambda pair: (-pair[1], pair[0])))


def _printable(name: str) -> str:
    """The name in valid Unicode: file names may hold bytes that no terminal and no JSON takes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


# --- on screen ----------------------------------------------------------------------------------------------------


def print_report(report: Report, console: Console) -> None:
    """Print tables: folders, formats and sizes, labels; then duplicates and unreadable files by name."""
    tables = [_folder_table(report), _counts_table("Format", report.formats), _counts_table("Mode", report.modes)]
    if report.sizes:
        tables += [_size_table(report.sizes), _smaller_table(report.sizes, report.images - len(report.bad))]
    tables += [_counts_table(name.capitalize(), counts, report.max_shown) for name, counts in report.labels.items()]
    for table in tables:
        console.print(table, "")
    if report.labels and report.unlabelled:
        console.print(f"Images without a label: {report.unlabelled:,}")
    _print_duplicates(report, console)
    _print_bad(report, console)


def _folder_table(report: Report) -> Table:
    table = _table("Folder", "Layout", "Images", "Train", "Val")
    for folder in report.folders:
        table.add_row(escape(folder.folder), folder.layout, *_numbers(folder.images, folder.train, folder.val))
    if len(report.folders) > 1:
        table.add_row("all", "", *_numbers(report.images, report.train, report.val), style="bold")
    return table


def _counts_table(title: str, counts: Mapping[str, int], max_shown: int = 100) -> Table:
    table = _table(title, "Images", "Share")
    total = sum(counts.values())
    for value, count in list(counts.items())[:max_shown]:
        table.add_row(escape(value), f"{count:,}", f"{count / total:.1%}")
    if len(counts) > max_shown:
        rest = sum(list(counts.values())[max_shown:])
        table.add_row(f"{len(counts) - max_shown} others", f"{rest:,}", f"{rest / total:.1%}", style="dim")
    return table


def _size_table(sizes: Sizes) -> Table:
    table = _table("Pixels", "Smallest", "Median", "Largest")
    for name in ("width", "height", "shorter_side"):
        spread: Spread = getattr(sizes, name)
        table.add_row(name.replace("_", " "), f"{spread.min:,}", f"{spread.median:,g}", f"{spread.max:,}")
    return table


def _smaller_table(sizes: Sizes, readable: int) -> Table:
    table = _table("Resolution", "Images it enlarges", "Share")
    for resolution, count in sizes.smaller_than.items():
        table.add_row(str(resolution), f"{count:,}", f"{count / readable:.1%}")
    return table


def _print_duplicates(report: Report, console: Console) -> None:
    found, shown = report.duplicates, report.max_shown
    if not found.groups:
        console.print("Duplicates by content: none")
        return
    console.print(f"Duplicates by content: {found.images:,} of {report.images:,} (groups: {len(found.groups):,})")
    if found.leaks:
        console.print(f"  [yellow]in both train and val: {found.leaks:,} groups; validation sees training images[/]")
    for group in found.groups[:shown]:
        more = f" and {len(group) - 3} more" if len(group) > 3 else ""
        console.print("  " + escape(" = ".join(group[:3])) + more, soft_wrap=True)
    _print_rest(len(found.groups) - shown, console)


def _print_bad(report: Report, console: Console) -> None:
    if not report.bad:
        console.print("Unreadable files: none")
        return
    share = len(report.bad) / report.images
    console.print(f"[red]Unreadable files: {len(report.bad):,} of {report.images:,} ({share:.2%})[/]")
    for file in report.bad[: report.max_shown]:
        console.print(f"  {escape(file.name)}: {escape(file.reason)}", soft_wrap=True)
    _print_rest(len(report.bad) - report.max_shown, console)


def _print_rest(count: int, console: Console) -> None:
    if count > 0:
        console.print(f"  and {count:,} more", style="dim")


def _table(first: str, *columns: str) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column(escape(first), overflow="fold")
    for column in columns:
        table.add_column(column, justify="left" if column == "Layout" else "right")
    return table


def _numbers(*counts: int) -> list[str]:
    return [f"{count:,}" for count in counts]
