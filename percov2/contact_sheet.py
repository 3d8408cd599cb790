"""One picture made of many, with a text under each: of the demo, and in TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP, _ABOVE_TEXT, _BELOW_TEXT = 12, 6, 14


def contact_sheet(
    rows: Sequence[Sequence[tuple[Image.Image, str]]], *, font_size: int = 18
) -> Image.Image:
    """Unscaled pictures in rows and aligned columns, a text of one or more lines under each.

    Args:
        rows: pictures with their texts, not all rows equally long; a column is as wide as its
            widest picture or text.
        font_size: of the texts, in pixels.
    """
    font = ImageFont.load_default(font_size)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def text_size(text: str) -> tuple[int, int]:
        box = measure.multiline_textbbox((0, 0), text, font=font)
        return int(box[2]) + 1, int(box[3]) + 1

    def cell_width(image: Image.Image, text: str) -> int:
        return max(image.width, text_size(text)[0]) + _GAP

    def cell_height(image: Image.Image, text: str) -> int:
        return image.height + _ABOVE_TEXT + text_size(text)[1] + _BELOW_TEXT + _GAP

    heights = [max(cell_height(*cell) for cell in row) for row in rows]
    widths = [0] * max(map(len, rows))
    for row in rows:
        for column, cell in enumerate(row):
            widths[column] = max(widths[column], cell_width(*cell))
    sheet = Image.new("RGB", (sum(widths) + _GAP, sum(heights) + _GAP), "white")
    draw, top = ImageDraw.Draw(sheet), _GAP
    for row, height in zip(rows, heights, strict=True):
        left = _GAP
        for (image, text), width in zip(row, widths, strict=False):
            sheet.paste(image, (left, top))
            below = (left, top + image.height + _ABOVE_TEXT)
            draw.multiline_text(below, text, fill="black", font=font)
            left += width
        top += height
    return sheet
