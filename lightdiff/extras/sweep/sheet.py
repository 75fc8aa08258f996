"""A contact sheet: rows and columns are values of settings, and each cell shows the same pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from lightdiff.pictures import GAP

MIN_SIDE = 48  # of a picture; smaller ones are upsampled by an integer factor
MARGIN, SPACE = 16, 14  # around the sheet, and between its cells
TEXT, LINE = 16, 24  # font size, line height

Pictures = Sequence[Image.Image]


@dataclass(frozen=True)
class Heading:
    """Heading of the rows or the columns: a title, and a label for each."""

    title: str
    labels: Sequence[str]


def contact_sheet(
    caption: str, rows: Heading, columns: Heading, cells: Sequence[Sequence[Pictures]], across: int
) -> Image.Image:
    """The sheet, where `cells[row][column]` are the pictures of a cell, `across` of them side by side."""
    sides = [picture.width for line in cells for cell in line for picture in cell]
    side = max(sides) * -(-MIN_SIDE // max(sides))
    count = max(len(cell) for line in cells for cell in line)
    width = min(across, count) * (side + GAP) - GAP
    height = -(-count // across) * (side + GAP) - GAP
    font = ImageFont.load_default(TEXT)

    def text_width(text: str) -> int:
        return int(font.getlength(text)) + 1

    left = MARGIN + max(map(text_width, (rows.title, *rows.labels))) + SPACE
    pitch = max([width, *map(text_width, columns.labels)]) + SPACE
    top = MARGIN + SPACE + LINE * (3 if columns.title else 2)
    right = max(
        left + pitch * len(columns.labels) - SPACE, MARGIN + text_width(caption), left + text_width(columns.title)
    )
    sheet = Image.new("RGB", (right + MARGIN, top + len(cells) * (height + SPACE) - SPACE + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), caption, "black", font)
    draw.text((MARGIN, top - LINE), rows.title, "black", font)
    draw.text((left, top - 2 * LINE), columns.title, "black", font)
    for column, label in enumerate(columns.labels):
        draw.text((left + column * pitch, top - LINE), label, "black", font)
    for row, (label, line) in enumerate(zip(rows.labels, cells, strict=True)):
        y = top + row * (height + SPACE)
        draw.text((MARGIN, y + height // 2), label, "black", font, anchor="lm")
        for column, cell in enumerate(line):
            for i, picture in enumerate(cell):
                place = left + column * pitch + i % across * (side + GAP), y + i // across * (side + GAP)
                sheet.paste(upsample(picture, side), place)
    return sheet


def upsample(picture: Image.Image, side: int) -> Image.Image:
    """A picture upsampled by the largest integer factor that fits this side, without smoothing."""
    return picture.resize((picture.width * (side // picture.width),) * 2, Image.Resampling.NEAREST)
