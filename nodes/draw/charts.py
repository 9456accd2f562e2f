"""Pictures that nodes show: labelled maps, drawn with Pillow, which ComfyUI brings. Pure functions of tensors and
text."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...saferope_core.concept.untrusted import printable

INK, PAPER, GRID = (30, 32, 38), (250, 250, 250), (222, 222, 226)
# cividis, at nine places: made for eyes with and without colour blindness (Nuñez et al. 2018)
CIVIDIS = (
    (0, 34, 78),
    (28, 54, 107),
    (62, 74, 108),
    (92, 93, 110),
    (123, 121, 119),
    (154, 143, 117),
    (188, 168, 106),
    (222, 194, 87),
    (253, 231, 55),
)
TEXT, TITLE = 15, 20  # font sizes in pixels
LONGEST_LABEL, LONGEST_TITLE = 40, 100  # characters: a name from a file must not decide how large a picture is
TALLEST = 2304  # pixels of a heat map's cells: 24 heads, each as high as a cell may be
MOST_BARS = 64


def heat_map(
    values: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    unit: str,
    framed: Tensor | None = None,
    numbers: bool = False,
    width: int = 1024,
) -> Tensor:
    """Values [rows, columns] in [0, 1] (others are clamped) as a labelled map with a colour bar; IMAGE [1, h, w, 3].

    NaN, a value that is not known, is a light grey cell without a number. `framed` bool [rows, columns] marks cells;
    `numbers` writes the values into them. `unit` names the colour bar. Texts are plain letters: the font has no Greek
    and no exponents. Long ones are cut.
    """
    title, unit = title_of(title), label_of(unit)
    rows, columns = [label_of(row) for row in rows], [label_of(column) for column in columns]
    font, left = font_of(TEXT), 24 + max(width_of(row, TEXT) for row in rows)
    cell = max(12, min(96, (width - left - 120) // len(columns), TALLEST // len(rows)))
    top, bottom = 64, 56
    size = (max(left + cell * len(columns) + 130, width_of(title, TITLE) + 48), top + cell * len(rows) + bottom)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((24, 20), title, INK, font_of(TITLE))
    for r, row in enumerate(rows):
        if cell >= TEXT or r % 2 == 0:
            pen.text((left - 10, top + (r + 0.5) * cell), row, INK, font, anchor="rm")
        for c in range(len(columns)):
            value = float(values[r, c])
            box = (left + c * cell, top + r * cell, left + (c + 1) * cell - 2, top + (r + 1) * cell - 2)
            pen.rectangle(box, fill=GRID if isnan(value) else colour(value))
            if framed is not None and framed[r, c]:
                pen.rectangle(box, outline=(214, 39, 40), width=2 if cell < 40 else 4)
            if numbers and not isnan(value):
                ink = PAPER if value < 0.55 else INK
                pen.text((box[0] + cell / 2, box[1] + cell / 2), f"{value:.2f}", ink, font, anchor="mm")
    every = max(1, -(-max(width_of(column, TEXT) + 8 for column in columns) // cell))
    for c in range(0, len(columns), every):
        pen.text((left + (c + 0.5) * cell, top + cell * len(rows) + 8), columns[c], INK, font, anchor="ma")
    colour_bar(pen, left + cell * len(columns) + 26, top, max(60, cell * len(rows) - 2), unit)
    return image_of(sheet)


def bars(values: Sequence[float], labels: Sequence[str], title: str, unit: str, width: int = 1024) -> Tensor:
    """Values in [0, 1] as labelled horizontal bars, MOST_BARS at most; IMAGE [1, h, w, 3]. Long texts are cut."""
    if len(values) > MOST_BARS:
        unit = f"{unit}; {len(values) - MOST_BARS} more are not shown"
        values, labels = values[:MOST_BARS], labels[:MOST_BARS]
    title, unit, labels = title_of(title), title_of(unit), [label_of(label) for label in labels]
    left, height, top = 36 + max(width_of(label, TEXT) for label in labels), 28, 64
    sheet = Image.new("RGB", (width, top + height * len(values) + 44), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((24, 20), title, INK, font_of(TITLE))
    room = width - left - 90
    for number, (value, label) in enumerate(zip(values, labels, strict=True)):
        y = top + number * height
        pen.text((left - 10, y + height / 2 - 2), label, INK, font_of(TEXT), anchor="rm")
        pen.rectangle((left, y + 2, left + room, y + height - 6), fill=GRID)
        if value > 0:
            pen.rectangle((left, y + 2, left + max(1, room * min(value, 1.0)), y + height - 6), fill=colour(value))
        pen.text((left + room + 12, y + height / 2 - 2), f"{value:.2f}", INK, font_of(TEXT), anchor="lm")
    pen.text((left, top + height * len(values) + 10), unit, INK, font_of(TEXT))
    return image_of(sheet)


def title_of(text: str) -> str:
    """`text` as a picture's title: printable, one line, not too long."""
    return printable(text, LONGEST_TITLE)


def label_of(text: str) -> str:
    """`text` as a label in a picture: printable, one line, not too long."""
    return printable(text, LONGEST_LABEL)


def colour(value: float) -> tuple[int, int, int]:
    """Cividis at a value in [0, 1]; others are clamped."""
    place = min(max(value, 0.0), 1.0) * (len(CIVIDIS) - 1)
    low = min(int(place), len(CIVIDIS) - 2)
    share = place - low
    pairs = zip(CIVIDIS[low], CIVIDIS[low + 1], strict=True)
    red, green, blue = (round((1 - share) * a + share * b) for a, b in pairs)
    return red, green, blue


def image_of(sheet: Image.Image) -> Tensor:
    """ComfyUI's IMAGE of a picture: [1, h, w, 3] float32 in [0, 1]."""
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    return pixels.view(1, sheet.height, sheet.width, 3).float() / 255


def batched(pictures: list[Tensor]) -> Tensor:
    """One batch of pictures of different sizes: white is added right and below."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    batch = torch.ones(len(pictures), height, width, 3)
    for place, picture in zip(batch, pictures, strict=True):
        place[: picture.shape[1], : picture.shape[2]] = picture[0]
    return batch


def colour_bar(pen: ImageDraw.ImageDraw, left: int, top: int, height: int, unit: str, highest: float = 1.0) -> None:
    """Cividis from 0 below to `highest` above, with numbers and what they are."""
    for y in range(height):
        pen.line((left, top + y, left + 16, top + y), fill=colour(1 - y / (height - 1)))
    for value in (0.0, 0.5, 1.0):
        label = f"{value * highest:.2f}".rstrip("0").removesuffix(".") or "0"
        pen.text((left + 24, top + (1 - value) * (height - 1)), label, INK, font_of(TEXT), anchor="lm")
    pen.text((left - 4, top + height + 10), unit, INK, font_of(TEXT))


def font_of(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font, which needs no file."""
    return ImageFont.load_default(size)


def width_of(text: str, size: int) -> int:
    """Of a line of text, in pixels."""
    return round(font_of(size).getlength(text))
