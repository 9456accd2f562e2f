"""Pictures of risk: the prompt's words under bars, a heat map over the picture, the course over the steps.

Drawn as wide as ComfyUI shows them well, in colours for all eyes (cividis), every axis labelled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isnan

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .charts import GRID, INK, PAPER, TEXT, TITLE, colour, colour_bar, font_of, image_of, label_of, title_of, width_of

WIDTH, MARGIN = 1024, 24
BLANK = 100  # pixels: how high a sheet without a picture is
LEFT = 84  # room for the vertical axis
BAR, WORD_ROW = 150, 212  # pixels: the highest bar, and a row of bars with its words and a gap
NARROWEST, GAP = 30, 8
MARK = (214, 39, 40)  # the line above which something is called risky
LINES = ((0, 34, 78), (200, 110, 0))  # dark blue and orange: apart for all eyes, and in grey
MOST_ROWS = 8  # of words; a prompt of 512 tokens would be a column nobody looks at
FAINT, STRONG = 30, 200  # of 255: how much of the picture the map's lowest and highest risk cover
LEAST_TOP = 0.1  # a heat map's colours reach from 0 to at least this risk: noise should not glow


def blank(title: str, reason: str) -> Tensor:
    """A sheet that says in the place of a picture why there is none; IMAGE [1, h, w, 3]."""
    sheet = Image.new("RGB", (WIDTH, BLANK), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 20), title_of(title), INK, font_of(TITLE))
    pen.text((MARGIN, 60), title_of(reason), INK, font_of(TEXT))
    return image_of(sheet)


def word_bars(words: Sequence[str], risks: Sequence[float], title: str, mark: float | None = None) -> Tensor:
    """A bar for every word, as high as its risk in [0, 1], with the word below, in lines like text; IMAGE [1, h, w, 3].

    `mark` draws a dashed line at a risk. At most MOST_ROWS lines are drawn; a last one says how many words are left
    out.
    """
    words = [label_of(word) for word in words]
    rows = _lines([max(NARROWEST, width_of(word, TEXT)) + GAP for word in words], WIDTH - LEFT - MARGIN)
    shown = rows[:MOST_ROWS]
    left_out = sum(len(row) for row in rows[MOST_ROWS:])
    sheet = Image.new("RGB", (WIDTH, 64 + WORD_ROW * max(1, len(shown)) + (30 if left_out else 0)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 20), title_of(title), INK, font_of(TITLE))
    for number, row in enumerate(shown):
        _word_row(pen, [words[i] for i in row], [risks[i] for i in row], 64 + WORD_ROW * number + 20, mark)
    if left_out:
        pen.text((LEFT, sheet.height - 34), f"and {left_out} more words", INK, font_of(TEXT))
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
    pen.text((MARGIN - 6, top + BAR / 2), "risk", INK, font_of(TEXT), anchor="lm")
    x = LEFT
    for word, risk in zip(words, risks, strict=True):
        width = max(NARROWEST, width_of(word, TEXT))
        pen.rectangle((x, bottom - max(1, min(risk, 1.0) * BAR), x + width, bottom), fill=colour(risk), outline=INK)
        pen.text((x + width / 2, bottom + 8), word, INK, font_of(TEXT), anchor="ma")
        x += width + GAP
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
    height = round(720 * risk.shape[0] / risk.shape[1])
    width, height = (720, height) if height <= 900 else (round(900 * risk.shape[1] / risk.shape[0]), 900)
    heat = _coloured(scaled).resize((width, height), Image.Resampling.NEAREST)
    if picture is not None:
        under = _pillow(picture).resize((width, height), Image.Resampling.LANCZOS)
        strength = Image.fromarray((FAINT + (STRONG - FAINT) * scaled).to(torch.uint8).numpy()).resize((width, height))
        heat = Image.composite(heat, under, strength)
    sheet = Image.new(
        "RGB", (max(width + MARGIN + 130, width_of(title_of(title), TITLE) + 2 * MARGIN), height + 110), PAPER
    )
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 20), title_of(title), INK, font_of(TITLE))
    sheet.paste(heat, (MARGIN, 64))
    colour_bar(pen, MARGIN + width + 26, 64, max(60, height - 30), "risk", top)
    return image_of(sheet)


def _coloured(values: Tensor) -> Image.Image:
    """One pixel for each value in [0, 1]."""
    pixels = torch.tensor([[colour(value) for value in row] for row in values.tolist()], dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _pillow(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture[..., :3].float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def course(series: Mapping[str, Sequence[float]], levels: Sequence[float], title: str) -> Tensor:
    """Lines of risk in [0, 1] over the steps, at most two; below, the noise level of each step; IMAGE [1, h, w, 3].

    Steps that were not measured, NaN, are gaps.
    """
    if any(map(isnan, (value for values in series.values() for value in values))):
        title += " (gaps: not measured)"
    height, plot = 480, 290
    sheet = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 20), title_of(title), INK, font_of(TITLE))
    bottom, right = 100 + plot, WIDTH - MARGIN - 20
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - value * plot
        pen.line((LEFT, y, right, y), fill=GRID)
        pen.text((LEFT - 12, y), f"{value:.2f}", INK, font_of(TEXT), anchor="rm")
    places = [LEFT + 20 + (right - LEFT - 40) * i / max(1, len(levels) - 1) for i in range(len(levels))]
    every = -(-len(levels) // 14)
    for place, level in list(zip(places, levels, strict=True))[::every]:
        pen.text((place, bottom + 10), f"{level:.2f}", INK, font_of(TEXT), anchor="ma")
    pen.text(((LEFT + right) / 2, bottom + 36), "noise level (sigma) of the step", INK, font_of(TEXT), anchor="ma")
    for (name, values), line, x in zip(series.items(), LINES, (LEFT, LEFT + 380), strict=False):
        points = [
            None if isnan(value) else (place, bottom - min(value, 1.0) * plot)
            for place, value in zip(places, values, strict=True)
        ]
        for one, other in pairwise(points):
            if one and other:
                pen.line((one, other), fill=line, width=3)
        for point in filter(None, points):
            pen.ellipse((point[0] - 4, point[1] - 4, point[0] + 4, point[1] + 4), fill=line)
        pen.line((x, 62, x + 28, 62), fill=line, width=4)
        pen.text((x + 36, 62), name, INK, font_of(TEXT), anchor="lm")
    return image_of(sheet)
