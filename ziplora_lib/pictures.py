"""Pictures side by side, with words at the edges."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 8


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def strip(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str] = ()
) -> Image.Image:
    """A sheet: rows of pictures of one size, each row's label at its left, each column's above it."""
    width, height = rows[0][0].size
    font = ImageFont.load_default()
    left = max([0, *(int(font.getlength(label)) for label in row_labels)])
    left = left + 2 * _MARGIN if left else 0
    top = 24 if any(column_labels) else 0
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (left + columns * (width + 2), top + len(rows) * (height + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for c, label in enumerate(column_labels):
        draw.text((left + c * (width + 2) + _MARGIN, 6), label, fill="black", font=font)
    for r, (pictures, label) in enumerate(zip(rows, row_labels)):
        y = top + r * (height + 2)
        draw.text((_MARGIN, y + height // 2 - 6), label, fill="black", font=font)
        for c, picture in enumerate(pictures):
            sheet.paste(picture, (left + c * (width + 2), y))
    return sheet
