"""Pictures of risk: the prompt's words under bars, a heat map over the picture, the course over the steps.

They are as wide as ComfyUI shows them well. Colours are for all eyes (cividis), and every axis has a label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isnan

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .charts import (
    GRID,
    INK,
    MARGIN,
    MARK,
    PAPER,
    TEXT,
    TITLE,
    WIDTH,
    colour,
    colour_bar,
    font_of,
    heading,
    image_of,
    label_of,
    pillow,
    title_of,
    width_of,
    wrapped,
)

LEFT = 100  # room for the vertical axis
BAR, WORD_ROW = 150, 220  # pixels: the highest bar, and a row of bars with its words and a gap
NARROWEST, GAP = 48, 12
LINES = ((110, 190, 240), (240, 165, 60))  # light blue and orange: apart for all eyes, and in grey
MOST_ROWS = 8  # of words; with 512 tokens the column would be too long to read
FAINT, STRONG = 30, 200  # of 255: opacity of the map at its lowest and highest risk
LEAST_TOP = 0.1  # a heat map's colours reach from 0 to at least this risk: noise should not glow
MAP, PLOT = WIDTH - 2 * MARGIN - 100, 290  # pixels: the longer side of a heat map, the height of the courses


def _titled(title: str, below: int) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """A sheet with its title and `below` pixels under it, its pen, and the y where these pixels begin."""
    lines = wrapped(title_of(title), TITLE, WIDTH - 2 * MARGIN)
    top = MARGIN + (TITLE + 8) * len(lines) + 12
    sheet = Image.new("RGB", (WIDTH, top + below), PAPER)
    pen = ImageDraw.Draw(sheet)
    heading(pen, lines)
    return sheet, pen, top


def blank(title: str, reason: str) -> Tensor:
    """A sheet that says in the place of a picture why there is none; IMAGE [1, h, w, 3]."""
    lines = wrapped(title_of(reason), TEXT, WIDTH - 2 * MARGIN)
    sheet, pen, top = _titled(title, (TEXT + 8) * len(lines) + MARGIN)
    for number, line in enumerate(lines):
        pen.text((MARGIN, top + number * (TEXT + 8)), line, INK, font_of(TEXT))
    return image_of(sheet)


def word_bars(words: Sequence[str], risks: Sequence[float], title: str, mark: float | None = None) -> Tensor:
    """A bar for every word, as high as its risk in [0, 1], with the word below, in lines like text; IMAGE [1, h, w, 3].

    `mark` draws a dashed line at a risk. At most MOST_ROWS lines are drawn; a last one says how many words are left
    out. A line has the whole width, however short the prompt.
    """
    words = [label_of(word) for word in words]
    rows = _lines([max(NARROWEST, width_of(word, TEXT)) + GAP for word in words], WIDTH - LEFT - MARGIN)
    shown = rows[:MOST_ROWS]
    left_out = sum(len(row) for row in rows[MOST_ROWS:])
    sheet, pen, top = _titled(title, WORD_ROW * max(1, len(shown)) + (TEXT + MARGIN if left_out else 0))
    for number, row in enumerate(shown):
        _word_row(pen, [words[i] for i in row], [risks[i] for i in row], top + WORD_ROW * number + 20, mark)
    if left_out:
        pen.text((LEFT, sheet.height - TEXT - MARGIN), f"and {left_out} more words", INK, font_of(TEXT))
    return image_of(sheet)


def _lines(widths: Sequence[int], room: int) -> list[list[int]]:
    """Indices in lines that fit."""
    lines: list[list[int]] = [[]]
    used = 0
    for index, width in enumerate(widths):
        if used + width > room and lines[-1]:
            lines.append([])
            used = 0
        lines[-1].append(index)
        used += width
    return lines


def _word_row(
    pen: ImageDraw.ImageDraw, words: Sequence[str], risks: Sequence[float], top: int, mark: float | None
) -> None:
    bottom = top + BAR
    for value in (0.0, 0.5, 1.0):
        y = bottom - value * BAR
        pen.line((LEFT - 6, y, WIDTH - MARGIN, y), fill=GRID)
        pen.text((LEFT - 12, y), f"{value:.1f}", INK, font_of(TEXT), anchor="rm")
    pen.text((MARGIN, top + BAR / 4), "risk", INK, font_of(TEXT), anchor="lm")
    widths = [max(NARROWEST, width_of(word, TEXT)) for word in words]
    spare = max(0, WIDTH - LEFT - MARGIN - sum(widths) - GAP * len(words)) / max(1, len(words))
    x = LEFT + spare / 2
    for word, risk, width in zip(words, risks, widths, strict=True):
        pen.rectangle((x, bottom - max(1, min(risk, 1.0) * BAR), x + width, bottom), fill=colour(risk), outline=INK)
        pen.text((x + width / 2, bottom + 8), word, INK, font_of(TEXT), anchor="ma")
        x += width + GAP + spare
    if mark is not None:
        for start in range(LEFT, WIDTH - MARGIN, 12):
            pen.line((start, bottom - mark * BAR, start + 6, bottom - mark * BAR), fill=MARK, width=2)


def patch_map(risk: Tensor, title: str, picture: Tensor | None = None) -> Tensor:
    """Risk [rows, columns] of image tokens as a heat map, over `picture` [h, w, 3] where there is one; IMAGE [1, h, w,
    3].

    Colours go from 0 to the highest risk, LEAST_TOP at least; the bar beside it says which.
    """
    top = max(LEAST_TOP, risk.max().item())
    scaled = (risk / top).clamp(0, 1)
    width, height = (round(MAP * side / max(risk.shape)) for side in (risk.shape[1], risk.shape[0]))
    heat = coloured(scaled).resize((width, height), Image.Resampling.NEAREST)
    if picture is not None:
        under = pillow(picture).resize((width, height), Image.Resampling.LANCZOS)
        strength = Image.fromarray((FAINT + (STRONG - FAINT) * scaled).to(torch.uint8).numpy()).resize((width, height))
        heat = Image.composite(heat, under, strength)
    sheet, pen, y = _titled(title, max(120, height) + MARGIN)
    sheet.paste(heat, (MARGIN, y))
    colour_bar(pen, MARGIN + width + 20, y, max(120, height), top)
    return image_of(sheet)


def coloured(values: Tensor) -> Image.Image:
    """One pixel for each value in [0, 1]."""
    pixels = torch.tensor([[colour(value) for value in row] for row in values.tolist()], dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def course(series: Mapping[str, Sequence[float]], levels: Sequence[float], title: str) -> Tensor:
    """Lines of risk in [0, 1] over the steps, at most two, from noise at the left to the picture; IMAGE [1, h, w, 3].

    levels: the noise level of each step. Steps that were not measured, NaN, are gaps.
    """
    if any(map(isnan, (value for values in series.values() for value in values))):
        title += " (gaps: not measured)"
    sheet, pen, top = _titled(title, PLOT + (TEXT + 12) * (len(series) + 2) + MARGIN)
    bottom, right = top + (TEXT + 12) * len(series) + 12 + PLOT, WIDTH - MARGIN
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - value * PLOT
        pen.line((LEFT, y, right, y), fill=GRID)
        pen.text((LEFT - 12, y), f"{value:.2f}", INK, font_of(TEXT), anchor="rm")
    places = [LEFT + 20 + (right - LEFT - 40) * i / max(1, len(levels) - 1) for i in range(len(levels))]
    pen.text((LEFT, bottom + 12), "first step: noise", INK, font_of(TEXT))
    pen.text((right, bottom + 12), f"step {len(levels)}: the picture", INK, font_of(TEXT), anchor="ra")
    for number, ((name, values), line) in enumerate(zip(series.items(), LINES, strict=False)):
        heights = [None if isnan(value) else bottom - min(value, 1.0) * PLOT for value in values]
        points = [None if y is None else (x, y) for x, y in zip(places, heights, strict=True)]
        for one, other in pairwise(points):
            if one and other:
                pen.line((one, other), fill=line, width=4)
        for x, y in filter(None, points):
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=line)
        y = top + number * (TEXT + 12) + TEXT / 2
        pen.line((LEFT, y, LEFT + 28, y), fill=line, width=5)
        pen.text((LEFT + 40, y), label_of(name), INK, font_of(TEXT), anchor="lm")
    return image_of(sheet)
