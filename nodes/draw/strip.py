"""Pictures before and after, side by side: a column for every prompt."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from .charts import INK, MARGIN, PAPER, TEXT, WIDTH, fitted, font_of, image_of, pillow, title_of, wrapped

GAP = 14
LINES = 3  # of a prompt


def draw_strip(prompts: Sequence[str], before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Pictures [h, w, 3] of one size, and the prompts below; IMAGE [1, h, WIDTH, 3]."""
    side = (WIDTH - 2 * MARGIN - GAP * (len(prompts) - 1)) // len(prompts)
    high = max(1, round(side * before[0].shape[0] / before[0].shape[1]))
    row = TEXT + 8 + high + GAP
    below = MARGIN + 2 * row
    sheet = Image.new("RGB", (WIDTH, below + LINES * (TEXT + 6) + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (told, pictures) in enumerate((("before", before), ("after", after))):
        top = MARGIN + number * row
        pen.text((MARGIN, top), told, INK, font_of(TEXT))
        for column, picture in enumerate(pictures):
            sheet.paste(pillow(picture).resize((side, high)), (MARGIN + column * (side + GAP), top + TEXT + 8))
    for column, prompt in enumerate(prompts):
        for line, said in enumerate(_cut(wrapped(title_of(prompt.replace(" ,", ",")), TEXT, side), side)):
            pen.text((MARGIN + column * (side + GAP), below + line * (TEXT + 6)), said, INK, font_of(TEXT))
    return image_of(sheet)


def _cut(lines: list[str], room: int) -> list[str]:
    """LINES of them at most; the last one says that there is more."""
    if len(lines) <= LINES:
        return lines
    return [*lines[: LINES - 1], fitted(" ".join(lines[LINES - 1 :]), TEXT, room)[0]]
