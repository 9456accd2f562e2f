"""Pictures that nodes show: labelled maps, drawn with Pillow, which ComfyUI brings. Pure functions of tensors and
text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from math import isnan

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...saferope_core.concept.untrusted import printable

SHOWN_AT = 350  # pixels: the width of a node in which type must be read
WIDTH = 2 * SHOWN_AT
INK, PAPER, GRID = (240, 240, 244), (24, 25, 29), (62, 64, 72)  # dark, as ComfyUI is
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
TEXT, TITLE = 24, 30  # font sizes in pixels: 12 and 15 where they are shown
LONGEST_LABEL, LONGEST_TITLE = 40, 100  # characters: a name from a file must not decide how large a picture is
TALLEST = 1728  # pixels of a heat map's cells
LEAST_CELL, MOST_CELL = 8, 240
MOST_BARS = 64
MARGIN = 24
MARK = (255, 110, 100)  # the frame of a cell, the line above which a risk is flagged


def heat_map(
    values: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    unit: str,
    framed: Tensor | None = None,
    numbers: bool = False,
) -> Tensor:
    """Values [rows, columns] in [0, 1] (others are clamped) as a labelled map with a colour bar; IMAGE [1, h, w, 3].

    NaN, a value that is not known, is a light grey cell without a number. `framed` bool [rows, columns] marks cells;
    `numbers` writes the values into them. `unit` names the colour bar. Texts are plain letters: the font has no Greek
    and no exponents. Long ones are cut.
    """
    rows, columns = [label_of(row) for row in rows], [label_of(column) for column in columns]
    left, right = 24 + max(width_of(row, TEXT) for row in rows), 40 + width_of("0.00", TEXT)
    cell = max(LEAST_CELL, min(MOST_CELL, (WIDTH - left - right) // len(columns), TALLEST // len(rows)))
    size = max(WIDTH, left + cell * len(columns) + right)
    left += (size - left - cell * len(columns) - right) // 2  # a small map stands in the middle, its bar beside it
    lines = [*wrapped(title_of(title), TITLE, size - 2 * MARGIN), ""]
    top, high = MARGIN + (TITLE + 8) * (len(lines) - 1) + TEXT + 24, max(120, cell * len(rows))
    sheet = Image.new("RGB", (size, top + high + 2 * TEXT + 8), PAPER)
    pen = ImageDraw.Draw(sheet)
    heading(pen, lines)
    pen.text((size - MARGIN, top - TEXT - 14), label_of(unit), INK, font_of(TEXT), anchor="ra")
    for r, row in enumerate(rows):
        if r % -(-(TEXT + 2) // cell) == 0:
            pen.text((left - 10, top + (r + 0.5) * cell), row, INK, font_of(TEXT), anchor="rm")
        for c in range(len(columns)):
            _cell(pen, float(values[r, c]), (left + c * cell, top + r * cell), cell, numbers)
            if framed is not None and framed[r, c]:
                box = (left + c * cell, top + r * cell, left + (c + 1) * cell - 2, top + (r + 1) * cell - 2)
                pen.rectangle(box, outline=MARK, width=2 if cell < 40 else 4)
    every = max(1, -(-max(width_of(column, TEXT) + 10 for column in columns) // cell))
    for c in range(0, len(columns), every):
        pen.text((left + (c + 0.5) * cell, top + cell * len(rows) + 8), columns[c], INK, font_of(TEXT), anchor="ma")
    colour_bar(pen, left + cell * len(columns) + 8, top, high)
    return image_of(sheet)


def _cell(pen: ImageDraw.ImageDraw, value: float, corner: tuple[int, int], side: int, number: bool) -> None:
    fill = GRID if isnan(value) else colour(value)
    pen.rectangle((*corner, corner[0] + side - 2, corner[1] + side - 2), fill=fill)
    if number and not isnan(value):
        middle = (corner[0] + side / 2, corner[1] + side / 2)
        pen.text(middle, f"{value:.2f}", ink_on(fill), font_of(TEXT), anchor="mm")


def bars(values: Sequence[float], labels: Sequence[str], title: str, unit: str) -> Tensor:
    """Values in [0, 1] as labelled horizontal bars, MOST_BARS at most; IMAGE [1, h, WIDTH, 3]. Long texts are cut."""
    if len(values) > MOST_BARS:
        unit = f"{unit}; {len(values) - MOST_BARS} more are not shown"
        values, labels = values[:MOST_BARS], labels[:MOST_BARS]
    labels, lines = [label_of(label) for label in labels], wrapped(title_of(title), TITLE, WIDTH - 2 * MARGIN)
    below = wrapped(title_of(unit), TEXT, WIDTH - 2 * MARGIN)
    left, high = MARGIN + 12 + max(width_of(label, TEXT) for label in labels), TEXT + 12
    top = MARGIN + (TITLE + 8) * len(lines) + 12
    sheet = Image.new("RGB", (WIDTH, top + high * len(values) + (TEXT + 8) * len(below) + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    heading(pen, lines)
    room = WIDTH - left - MARGIN - 12 - width_of("0.00", TEXT)
    for number, (value, label) in enumerate(zip(values, labels, strict=True)):
        y = top + number * high
        pen.text((left - 12, y + high / 2 - 2), label, INK, font_of(TEXT), anchor="rm")
        pen.rectangle((left, y + 4, left + room, y + high - 8), fill=GRID)
        if value > 0:
            pen.rectangle((left, y + 4, left + max(1, room * min(value, 1.0)), y + high - 8), fill=colour(value))
        pen.text((left + room + 12, y + high / 2 - 2), f"{value:.2f}", INK, font_of(TEXT), anchor="lm")
    for number, line in enumerate(below):
        pen.text((MARGIN, top + high * len(values) + 8 + number * (TEXT + 8)), line, INK, font_of(TEXT))
    return image_of(sheet)


def heading(pen: ImageDraw.ImageDraw, lines: Sequence[str]) -> None:
    """A picture's title, line by line."""
    for number, line in enumerate(lines):
        pen.text((MARGIN, MARGIN - 4 + number * (TITLE + 8)), line, INK, font_of(TITLE))


def title_of(text: str) -> str:
    """`text` as a picture's title: printable, one line, not too long."""
    return _plain(text, LONGEST_TITLE)


def label_of(text: str) -> str:
    """`text` as a label in a picture: printable, one line, not too long."""
    return _plain(text, LONGEST_LABEL)


def _plain(text: str, longest: int) -> str:
    """`text` printable and without accents: the font has letters and no marks on them."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return printable(bare, longest)


def fitted(text: str, size: int, room: int, least: int = TEXT) -> tuple[str, int]:
    """A line and a font size, from `size` down to `least`, in which it fits; cut where it fits in none."""
    while size > least and width_of(text, size) > room:
        size -= 2
    if width_of(text, size) > room:
        while width_of(f"{text} ...", size) > room:
            text = text[:-1]
        text = f"{text.rstrip()} ..."
    return text, size


def wrapped(text: str, size: int, room: int) -> list[str]:
    """Lines of whole words that fit; a word without room is cut."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and width_of(longer, size) <= room:
            lines[-1] = longer
        else:
            lines.append(fitted(word, size, room, size)[0])
    return lines


def ink_on(fill: tuple[int, int, int]) -> tuple[int, int, int]:
    """The lighter or the darker ink, by the luminance of the colour under it (ITU-R BT.601)."""
    red, green, blue = fill
    return PAPER if 0.299 * red + 0.587 * green + 0.114 * blue > 127 else INK


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
    """One batch of pictures of different sizes: paper is added right and below."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    batch = (torch.tensor(PAPER) / 255).expand(len(pictures), height, width, 3).clone()
    for place, picture in zip(batch, pictures, strict=True):
        place[: picture.shape[1], : picture.shape[2]] = picture[0]
    return batch


def colour_bar(pen: ImageDraw.ImageDraw, left: int, top: int, height: int, highest: float = 1.0) -> None:
    """Cividis from 0 below to `highest` above, with numbers, the lowest within its height."""
    for y in range(height):
        pen.line((left, top + y, left + 16, top + y), fill=colour(1 - y / (height - 1)))
    for value, anchor in ((0.0, "ls"), (0.5, "lm"), (1.0, "lt")):
        label = f"{value * highest:.2f}".rstrip("0").removesuffix(".") or "0"
        pen.text((left + 24, top + (1 - value) * (height - 1)), label, INK, font_of(TEXT), anchor=anchor)


def pillow(picture: Tensor) -> Image.Image:
    """A picture [h, w, 3] in [0, 1]; others are clamped."""
    return Image.fromarray((picture[..., :3].float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def font_of(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font, which needs no file."""
    return ImageFont.load_default(size)


def width_of(text: str, size: int) -> int:
    """The width of a line of text, in pixels."""
    return round(font_of(size).getlength(text))
