"""A contact sheet: rows and columns with labels, and pictures in each cell."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from lightdiff.pictures import CELL, GAP

MARGIN, SPACE = 16, 14  # around the sheet, and between its cells
TEXT, LINE = 16, 24  # font size, line height

Pictures = Sequence[Image.Image]


@dataclass(frozen=True)
class Heading:
    """Heading of the rows or the columns: a title, and a label for each."""

    title: str
    labels: Sequence[str]


def contact_sheet(
    caption: str,
    rows: Heading,
    columns: Heading,
    cells: Sequence[Sequence[Pictures]],
    across: int = 1,
    notes: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """The sheet, where `cells[row][column]` are the pictures of a cell, `across` of them side by side.

    Small pictures are enlarged by a whole number. `notes[row][column]` is a text below a cell.
    """
    sizes = [picture.size for line in cells for cell in line for picture in cell]
    wide, high = (max(lengths) for lengths in zip(*sizes, strict=True))
    times = -(-CELL // min(wide, high))
    box = wide * times, high * times
    count = max(len(cell) for line in cells for cell in line)
    width = min(across, count) * (box[0] + GAP) - GAP
    height = -(-count // across) * (box[1] + GAP) - GAP
    font = ImageFont.load_default(TEXT)

    def text_width(text: str) -> int:
        return int(font.getlength(text)) + 1

    left = MARGIN + max(map(text_width, (rows.title, *rows.labels))) + SPACE
    texts = [*columns.labels, *(note for line in notes for note in line)]
    pitch, line_height = max([width, *map(text_width, texts)]) + SPACE, height + LINE * bool(notes)
    lines = bool(caption) + bool(columns.title) + any((rows.title, *columns.labels))
    top = MARGIN + SPACE * bool(caption) + LINE * lines
    right = max(
        left + pitch * len(columns.labels) - SPACE, MARGIN + text_width(caption), left + text_width(columns.title)
    )
    sheet = Image.new("RGB", (right + MARGIN, top + len(cells) * (line_height + SPACE) - SPACE + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), caption, "black", font)
    draw.text((MARGIN, top - LINE), rows.title, "black", font)
    draw.text((left, top - 2 * LINE), columns.title, "black", font)
    for column, label in enumerate(columns.labels):
        draw.text((left + column * pitch, top - LINE), label, "black", font)
    for row, (label, line) in enumerate(zip(rows.labels, cells, strict=True)):
        y = top + row * (line_height + SPACE)
        draw.text((MARGIN, y + height // 2), label, "black", font, anchor="lm")
        for column, cell in enumerate(line):
            for i, picture in enumerate(cell):
                place = left + column * pitch + i % across * (box[0] + GAP), y + i // across * (box[1] + GAP)
                sheet.paste(upsample(picture, box), place)
        for column, note in enumerate(notes[row] if notes else ()):
            draw.text((left + column * pitch, y + height + GAP), note, "black", font)
    return sheet


def upsample(picture: Image.Image, box: tuple[int, int]) -> Image.Image:
    """A picture upsampled by the largest integer factor that fits this size, without smoothing."""
    times = min(box[0] // picture.width, box[1] // picture.height)
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
