"""inspect: counts, sizes, formats, labels, duplicates and unreadable files of image folders, before any training."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import median

from pydantic import BaseModel
from rich.markup import escape
from rich.table import Table

from lightdiff.data.files import ImageFile, Source, find_images, fingerprinters, source_of
from lightdiff.data.images import BadImage, opened, to_rgb
from lightdiff.data.layouts import Layout
from lightdiff.data.survey import with_whites
from lightdiff.extras.tables import print_table
from lightdiff.runtime.progress import SafeConsole
from lightdiff.settings import ImageSettings

RESOLUTIONS = (32, 64, 128, 256, 512, 1024)


class FolderReport(BaseModel):
    """One --data folder."""

    folder: str
    layout: Layout
    images: int
    train: int
    val: int


class Spread(BaseModel):
    """Minimum, median and maximum, in pixels."""

    min: int
    median: float
    max: int


class Sizes(BaseModel):
    """Sizes of the readable images, in upright orientation."""

    width: Spread
    height: Spread
    shorter_side: Spread
    smaller_than: dict[int, int]  # resolution: images that would be upsampled to it


class Duplicates(BaseModel):
    """Files with the same bytes."""

    images: int  # that can be removed without losing a picture
    leaks: int  # groups with files in both train and val
    groups: list[list[str]]


class BadFile(BaseModel):
    """A file that cannot be read, and why."""

    name: str
    reason: str


class Report(BaseModel):
    """Everything found. Lists are complete; at most `max_shown` entries of each are printed."""

    folders: list[FolderReport]
    passed_over: dict[str, int]  # what looks like a picture and is not read, folders not looked into
    notes: list[str]  # as training prints them
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
class _FileInfo:
    """What was read from one file: its format, mode and size, or the reason why it cannot be decoded."""

    format: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    reason: str = ""


def inspect(
    folders: list[Path],
    val_share: float,
    max_shown: int = 10,
    progress: Callable[[int, int], None] | None = None,
    labels: Path | None = None,
) -> Report:
    """Report on all images in the folders; each is decoded in full, as in training.

    Args:
        folders: As given with --data.
        val_share: Share held out for validation.
        max_shown: How many files of a kind, or values of a label, `print_report` prints.
        progress: Called with the number of images done and of all images.
        labels: A table of labels.
    """
    found = find_images(folders, val_share, table=labels)
    files = found.files
    paths = [os.path.join(folders[file.root], file.path) for file in files]
    sources = [(folder, source_of(folder)) for folder in folders]
    images = with_whites(ImageSettings(data=tuple(folders)), files, found.notes.append)
    infos: list[_FileInfo] = []
    with ThreadPool(os.cpu_count()) as pool:
        places = ((file.path, images, *sources[file.root]) for file in files)
        for info in pool.imap(_read_info, places, chunksize=16):
            infos.append(info)
            if progress:
                progress(len(infos), len(files))
    readable = [i for i, info in enumerate(infos) if not info.reason]
    groups = [[readable[i] for i in group] for group in duplicate_groups([files[i] for i in readable], folders)]
    splits = Counter(file.split for file in files)
    return Report(
        folders=[_folder_report(folders, root, files, found.layouts[root]) for root in range(len(folders))],
        passed_over=_counts(map(_printable, found.passed_over.elements())),
        notes=[_printable(note) for note in found.notes],
        images=len(files),
        train=splits["train"],
        val=splits["val"],
        formats=_counts(infos[i].format for i in readable),
        modes=_counts(infos[i].mode for i in readable),
        sizes=_sizes([infos[i].size for i in readable]) if readable else None,
        labels=_label_counts(files),
        unlabelled=sum(not file.labels for file in files),
        duplicates=Duplicates(
            images=sum(len(group) - 1 for group in groups),
            leaks=sum(len({files[i].split for i in group}) > 1 for group in groups),
            groups=[[_printable(paths[i]) for i in group] for group in groups],
        ),
        bad=[
            BadFile(name=_printable(path), reason=info.reason)
            for path, info in zip(paths, infos, strict=True)
            if info.reason
        ],
        max_shown=max_shown,
    )


def _read_info(where: tuple[str, ImageSettings, Path, Source]) -> _FileInfo:
    try:
        with opened(*where) as image:
            kind, mode = image.format or "", image.mode
            return _FileInfo(kind, mode, to_rgb(image, where[1]).size)
    except BadImage as error:
        return _FileInfo(reason=str(error))


def duplicate_groups(
    files: Sequence[ImageFile], folders: Sequence[Path], max_bytes: float = float("inf")
) -> list[list[int]]:
    """Groups of files with the same bytes, as indices into `files`; none if that took reading more than `max_bytes`.

    Only those that share their size with another are read.
    """
    by_size: dict[int, list[int]] = defaultdict(list)
    of_source = fingerprinters(folders)
    for i, file in enumerate(files):
        by_size[of_source[file.root](file.path, False)[0]].append(i)
    candidates = [(size, i) for size, group in by_size.items() if len(group) > 1 for i in group]
    if sum(size for size, _ in candidates) > max_bytes:
        return []
    by_digest: dict[bytes, list[int]] = defaultdict(list)
    with ThreadPool(os.cpu_count()) as pool:
        found = pool.imap(lambda pair: of_source[files[pair[1]].root](files[pair[1]].path, True), candidates, 16)
        for (_, i), (_, _, digest) in zip(candidates, found, strict=True):
            if any(digest):  # there is none of images that are no files
                by_digest[digest].append(i)
    return sorted(group for group in by_digest.values() if len(group) > 1)


def _folder_report(folders: list[Path], root: int, files: Sequence[ImageFile], layout: Layout) -> FolderReport:
    own = [file for file in files if file.root == root]
    splits = Counter(file.split for file in own)
    return FolderReport(
        folder=_printable(str(folders[root])),
        layout=layout,
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


def _label_counts(files: Sequence[ImageFile]) -> dict[str, dict[str, int]]:
    values: dict[str, list[str]] = defaultdict(list)
    for file in files:
        for name, value in file.labels.items():
            values[_printable(name)].append(_printable(value))
    return {name: _counts(values[name]) for name in sorted(values)}


def _counts(values: Iterable[str]) -> dict[str, int]:
    """Each value with its count, the most frequent first."""
    return dict(sorted(Counter(values).items(), key=lambda pair: (-pair[1], pair[0])))


def _printable(name: str) -> str:
    """The name in valid Unicode: file names may contain bytes that terminals and JSON reject."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


# --- printing -----------------------------------------------------------------------------------------------------


def print_report(report: Report, console: SafeConsole) -> None:
    """Print tables of folders, formats, sizes and labels, then duplicates and unreadable files by name."""
    tables = [_folder_table(report)]
    if report.passed_over:
        tables.append(_counts_table("Passed over", report.passed_over))
    tables += [_counts_table("Format", report.formats), _counts_table("Mode", report.modes)]
    if report.sizes:
        tables += [_size_table(report.sizes), _smaller_table(report.sizes, report.images - len(report.bad))]
    tables += [_counts_table(name.capitalize(), counts, report.max_shown) for name, counts in report.labels.items()]
    for table in tables:
        print_table(console, table, "")
    if report.labels and report.unlabelled:
        console.print(f"Images without a label: {report.unlabelled:,}")
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
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
    table = _table("Resolution", "Images upsampled", "Share")
    for resolution, count in sizes.smaller_than.items():
        table.add_row(str(resolution), f"{count:,}", f"{count / readable:.1%}")
    return table


def _print_duplicates(report: Report, console: SafeConsole) -> None:
    found, shown = report.duplicates, report.max_shown
    if not found.groups:
        console.print("Duplicates by content: none")
        return
    console.print(f"Duplicates by content: {found.images:,} of {report.images:,} (groups: {len(found.groups):,})")
    if found.leaks:
        console.print(
            f"  [yellow]in both train and val: {found.leaks:,} groups; validation includes training images[/]"
        )
    for group in found.groups[:shown]:
        more = f" and {len(group) - 3} more" if len(group) > 3 else ""
        console.print("  " + escape(" = ".join(group[:3])) + more, soft_wrap=True)
    _print_rest(len(found.groups) - shown, console)


def _print_bad(report: Report, console: SafeConsole) -> None:
    if not report.bad:
        console.print("Unreadable files: none")
        return
    share = len(report.bad) / report.images
    console.print(f"[red]Unreadable files: {len(report.bad):,} of {report.images:,} ({share:.2%})[/]")
    for file in report.bad[: report.max_shown]:
        console.print(f"  {escape(file.name)}: {escape(file.reason)}", soft_wrap=True)
    _print_rest(len(report.bad) - report.max_shown, console)


def _print_rest(count: int, console: SafeConsole) -> None:
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
