"""Pictures as PNG files, with the texts that they carry; and side by side, with words at the edges."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ziplora_lib.errors import BadInput

_MARGIN = 8
# for how many pixels of a picture the labels have their own size; larger pictures get larger ones
_LEGIBLE = 256


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file, with the texts in its `info`."""
    texts = PngInfo()
    for name, text in picture.info.items():
        if isinstance(name, str) and isinstance(text, str):
            texts.add_text(name, text.encode("utf-8", "replace").decode())  # a file name can have broken characters
    data = io.BytesIO()
    picture.save(data, "PNG", pnginfo=texts)
    return data.getvalue()


def png_texts(path: Path) -> dict[str, str]:
    """The texts of a PNG file; its pixels are not looked at. Raises BadInput for a file that is none."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return {name: text for name, text in picture.info.items() if isinstance(text, str)}
    except Exception as error:  # Pillow raises a dozen kinds, for what is broken and for what is made to do harm
        raise BadInput(
            f"is not a readable PNG picture ({str(error)[:200] or type(error).__name__})",
            file=path.name,
            remedy="Take the picture as ZipLoRA wrote it, or the merged LoRA itself",
        ) from error


def strip(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str] = ()
) -> Image.Image:
    """A sheet: rows of pictures of one size, each row's label at its left, each column's above it."""
    width, height = rows[0][0].size
    scale = max(1, height // _LEGIBLE)
    beside, above = ([_written(text, scale) for text in labels] for labels in (row_labels, column_labels))
    left = max([0, *(label.width for label in beside)])
    left = left + 2 * _MARGIN if left else 0
    top = 24 * scale if any(column_labels) else 0
    columns = max(map(len, rows))
    across = max([width, *(label.width + _MARGIN for label in above)]) + 2
    sheet = Image.new("RGB", (left + columns * across, top + len(rows) * (height + 2)), "white")
    for c, label in enumerate(above):
        sheet.paste(label, (left + c * across + _MARGIN, 6 * scale))
    for r, (pictures, label) in enumerate(zip(rows, beside)):
        y = top + r * (height + 2)
        sheet.paste(label, (_MARGIN, y + (height - label.height) // 2))
        for c, picture in enumerate(pictures):
            sheet.paste(picture, (left + c * across, y))
    return sheet


def _written(text: str, scale: int) -> Image.Image:
    """A label. The font that every Pillow has is of one size, and in older ones knows Western letters only."""
    if not text:
        return Image.new("L", (0, 0))
    font = ImageFont.load_default()
    text = text.encode("latin-1", "replace").decode("latin-1")
    _, _, width, height = (math.ceil(edge) for edge in font.getbbox(text))
    label = Image.new("L", (width, height), "white")
    ImageDraw.Draw(label).text((0, 0), text, fill="black", font=font)
    return label.resize((width * scale, height * scale), Image.Resampling.BICUBIC)
