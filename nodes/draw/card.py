"""One dark card for artists. It shows a headline, the risk, the picture, and the prompt's words as chips.

It is drawn twice as wide as ComfyUI shows it in a usual node, so that its text can be read there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw
from torch import Tensor

from .charts import (
    GRID,
    INK,
    MARGIN,
    PAPER,
    WIDTH,
    colour,
    fitted,
    font_of,
    image_of,
    ink_on,
    label_of,
    pillow,
    wrapped,
)
from .risk_pictures import LEAST_TOP, coloured

HEADLINE, LINE, CHIP, SMALL = 46, 28, 28, 24  # font sizes in pixels; ComfyUI shows them at half the size
DIM = (168, 170, 180)
SIGNALS = {"high": (253, 190, 60), "low": (110, 200, 170), "unknown": (168, 170, 180)}
ROOM = WIDTH - 2 * MARGIN
BAR, PAD, GAP = 18, 16, 10  # pixels: the scale's height, the room in a chip, the room between two
MOST_CHIPS, MOST_LINES = 24, 4  # the riskiest words, in the prompt's order; lines below the headline
MAP = 200  # pixels: the heat map's side beside a picture


class Card(NamedTuple):
    """The content of a card. `signal` is high, low or unknown. `risk` and `mark` lie in [0, 1]."""

    headline: str
    signal: str
    lines: Sequence[str]
    risk: float | None
    mark: float  # a risk above it is flagged
    words: Sequence[tuple[str, float]] = ()  # in the prompt's order, with their risks
    picture: Tensor | None = None  # [h, w, 3] in [0, 1]
    heat: Tensor | None = None  # [rows, columns]: risk of the picture's places


class Chip(NamedTuple):
    """A word's place on the card and its colour."""

    text: str
    box: tuple[int, int, int, int]
    fill: tuple[int, int, int]


def draw_card(card: Card) -> Tensor:
    """IMAGE [1, h, WIDTH, 3]. Its height h depends on its content."""
    sheet = Image.new("RGB", (WIDTH, 3 * WIDTH), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((0, 0, 10, sheet.height), fill=SIGNALS[card.signal])
    text, size = fitted(label_of(card.headline), HEADLINE, ROOM)
    pen.text((MARGIN, 24), text, INK, font_of(size), stroke_width=1)
    y = 24 + HEADLINE + 16
    for line in [part for told in card.lines for part in wrapped(told, LINE, ROOM)][:MOST_LINES]:
        pen.text((MARGIN, y), line, DIM, font_of(LINE))
        y += LINE + 8
    y = _scale(pen, card, y + 14) if card.risk is not None or card.words else y
    y = _pictures(sheet, pen, card, y + 16)
    if card.words:
        chips, y = chips_of(card.words, y + 50)
        pen.text((MARGIN, chips[0].box[1] - 40), "Your prompt, word by word", DIM, font_of(SMALL))
        for chip in chips:
            pen.rounded_rectangle(chip.box, 12, fill=chip.fill, outline=GRID)
            pen.text((chip.box[0] + PAD, chip.box[1] + 6), chip.text, ink_on(chip.fill), font_of(CHIP))
        if left := len(card.words) - len(chips):
            pen.text((MARGIN, y + 6), f"and {left} calmer words", DIM, font_of(SMALL))
            y += SMALL + 14
    return image_of(sheet.crop((0, 0, WIDTH, y + MARGIN - GAP)))


def _scale(pen: ImageDraw.ImageDraw, card: Card, y: int) -> int:
    """Draws the colours from 0 to 1, the card's risk on them, and the mark. Returns the y below them."""
    for x in range(ROOM):
        pen.line((MARGIN + x, y, MARGIN + x, y + BAR), fill=colour(x / (ROOM - 1)))
    pen.rectangle((MARGIN, y, MARGIN + ROOM - 1, y + BAR), outline=GRID)
    if card.risk is not None:
        at = MARGIN + min(max(card.risk, 0.0), 1.0) * (ROOM - 1)
        pen.rounded_rectangle((at - 5, y - 8, at + 5, y + BAR + 8), 4, fill=INK, outline=PAPER, width=2)
    mark = MARGIN + card.mark * (ROOM - 1)
    pen.line((mark, y, mark, y + BAR + 8), fill=INK, width=3)
    below, font = y + BAR + 14, font_of(SMALL)
    pen.text((MARGIN, below), "calm 0", DIM, font)
    pen.text((MARGIN + ROOM, below), "1 risky", DIM, font, anchor="ra")
    middle = min(max(mark, MARGIN + 200), MARGIN + ROOM - 210)  # between both ends
    pen.text((middle, below), f"flagged above {card.mark:g}", DIM, font, anchor="ma")
    return below + SMALL + 10


def _pictures(sheet: Image.Image, pen: ImageDraw.ImageDraw, card: Card, y: int) -> int:
    """Draws the picture and, at its right, the map of its places. One may be missing. Returns the y below them."""
    highest = 0.0 if card.heat is None else float(card.heat.max())
    heat = None if card.heat is None else coloured(card.heat / max(LEAST_TOP, highest))
    if card.picture is None and heat is None:
        return y - 16
    width = ROOM if heat is None else ROOM - MAP - 24
    x = MARGIN
    if card.picture is not None:
        shown = _within(pillow(card.picture), width, Image.Resampling.LANCZOS)
        sheet.paste(shown, (x, y))
        x, bottom = x + shown.width + 24, y + shown.height
    else:
        bottom = y
    if heat is not None:
        small = _within(heat, MAP, Image.Resampling.NEAREST)
        sheet.paste(small, (x, y))
        pen.rectangle((x, y, x + small.width - 1, y + small.height - 1), outline=GRID)
        said = f"Risky places. The brightest: {highest:.2f}"
        beside = card.picture is None
        left, top = (x + small.width + 24, y) if beside else (x, y + small.height + 8)
        lines = wrapped(said, SMALL, WIDTH - MARGIN - left)
        for number, line in enumerate(lines):
            pen.text((left, top + number * (SMALL + 6)), line, DIM, font_of(SMALL))
        bottom = max(bottom, y + small.height, top + len(lines) * (SMALL + 6))
    return bottom + 10


def _within(picture: Image.Image, side: int, how: Image.Resampling) -> Image.Image:
    """The picture as large as it fits into a square, enlarged where it is smaller."""
    scale = side / max(picture.size)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), how)


def chips_of(words: Sequence[tuple[str, float]], top: int) -> tuple[list[Chip], int]:
    """Chips of the riskiest words, MOST_CHIPS at most, in lines and in the prompt's order, and the y below them."""
    kept = sorted(sorted(range(len(words)), key=lambda place: -words[place][1])[:MOST_CHIPS])
    chips: list[Chip] = []
    x, y, high = MARGIN, top, CHIP + 20
    for word, risk in (words[place] for place in kept):
        text, _ = fitted(label_of(word), CHIP, ROOM - 2 * PAD, CHIP)
        wide = round(font_of(CHIP).getlength(text)) + 2 * PAD
        if x > MARGIN and x + wide > MARGIN + ROOM:
            x, y = MARGIN, y + high + GAP
        chips.append(Chip(text, (x, y, x + wide, y + high), colour(risk)))
        x += wide + GAP
    return chips, y + high + GAP
