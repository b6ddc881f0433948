"""A contact sheet: pictures of any size as the cells of a table, with words where there is none."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ziplora_lib.pictures import strip

# sides in pixels: of the whole sheet, of its smallest cell, of a row's label
WHOLE, SMALLEST, LABEL = 8192, 32, 200
_MARGIN = 8


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | str]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image | None:
    """Each cell a picture, or a text that stands for one. None where there is no picture at all."""
    sides = [max(cell.size) for row in rows for cell in row if isinstance(cell, Image.Image)]
    if not sides:
        return None
    side = max(SMALLEST, min(max(sides), WHOLE // max(len(rows), len(column_labels))))
    cells = [[_notice(cell, side) if isinstance(cell, str) else _fitted(cell, side) for cell in row] for row in rows]
    return strip(
        cells, [_clipped(label, LABEL) for label in row_labels], [_clipped(label, side) for label in column_labels]
    )


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture in a white square, made smaller where it has to be."""
    square, small = Image.new("RGB", (side, side), "white"), picture.convert("RGB")
    small.thumbnail((side, side))
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return square


def _notice(text: str, side: int) -> Image.Image:
    """A grey square with the text."""
    square, font = Image.new("RGB", (side, side), "#eeeeee"), ImageFont.load_default()
    inside = side - 2 * _MARGIN
    lines = textwrap.wrap(_drawable(text), max(4, int(inside / font.getlength("n"))))[: max(1, inside // 14)]
    for i, line in enumerate(lines):
        ImageDraw.Draw(square).text((_MARGIN, _MARGIN + 14 * i), line, fill="#555555", font=font)
    return square


def _clipped(text: str, width: int) -> str:
    """The text, cut to this many pixels."""
    text, font = _drawable(text), ImageFont.load_default()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _drawable(text: str) -> str:
    """With question marks for what Pillow's own font does not have, at which older ones of it fail."""
    return text.encode("latin-1", "replace").decode("latin-1")
