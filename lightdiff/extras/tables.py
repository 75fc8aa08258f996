"""Tables for any terminal: no number in them, and no flag, is cut."""

from rich.cells import cell_len
from rich.console import Group
from rich.table import Table

from lightdiff.runtime.progress import SafeConsole

FOLDED = 32  # characters of a table's widest column, such as a path, that are left on each line


def print_table(console: SafeConsole, table: Table, *more: str) -> None:
    """Print a table below its title, and `more`; on a terminal too narrow for whole words of it, as lines of text."""
    rows = list(zip(*(map(str, column.cells) for column in table.columns), strict=True))
    headings = [str(column.header) for column in table.columns]
    parts, table.title = [console.render_str(str(table.title))] if table.title else [], None
    unlimited = console.options.update(max_width=sum(cell_len(cell) + 9 for row in [headings, *rows] for cell in row))
    width = console.measure(table, options=unlimited).maximum
    lengths = [max(map(cell_len, column)) for column in zip(headings, *rows, strict=True)]
    longest = max(lengths, default=0)
    if console.is_terminal and console.width < width - longest + min(longest, FOLDED):
        pairs = [pair for row in rows for pair in zip(headings, row, strict=True) if pair[1]]
        shown = pairs if table.show_header else rows
        console.print(Group(*parts, *(console.render_str(": ".join(cells)) for cells in shown)), *more, soft_wrap=False)
        return
    for column, length in zip(table.columns, lengths, strict=True):
        column.no_wrap, column.overflow = length < longest, "fold"
    table.width = min(width, console.width) if console.is_terminal else width
    console.print(Group(*parts, table), *more, soft_wrap=not console.is_terminal)
