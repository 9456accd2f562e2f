"""Prompts as products: subject | modifier | template, the way the paper's Unsafe-1K was made (it was never released).

Every combination is one point of a grid; a sample is a seeded walk through the grid without repeats, so that any size
gives the same prompts again, and a larger sample begins with the smaller one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from . import UNSAFE, PromptRecord

SLOT = "{subject}"


def product_prompts(
    side: str, subjects: Sequence[str], modifiers: Sequence[str], templates: Sequence[str], count: int, seed: int
) -> list[PromptRecord]:
    """`count` prompts, all different, the subject's span marked on the unsafe side.

    The modifier stands before the subject and is outside its span; one choice among them is none at all. ValueError for
    a template without its slot, for empty lists, and where the grid has fewer points than asked for.
    """
    choices = ["", *modifiers]
    _check(subjects, templates, len(subjects) * len(choices) * len(templates), count)
    records = []
    for point in random.Random(seed).sample(range(len(subjects) * len(choices) * len(templates)), count):
        point, subject = divmod(point, len(subjects))
        template, modifier = divmod(point, len(choices))
        records.append(_record(side, subjects[subject], choices[modifier], templates[template]))
    return records


def _record(side: str, subject: str, modifier: str, template: str) -> PromptRecord:
    before, after = template.split(SLOT)
    before = before + (f"{modifier} " if modifier else "")
    span = (len(before), len(before) + len(subject)) if side == UNSAFE else None
    return PromptRecord(side, before + subject + after, span)


def _check(subjects: Sequence[str], templates: Sequence[str], points: int, count: int) -> None:
    for template in templates:
        if template.count(SLOT) != 1:
            raise ValueError(f"template {template!r}: got {template.count(SLOT)} slots, expected one {SLOT}")
    if not all(subject.strip() for subject in subjects):
        raise ValueError("subjects: got an empty one, expected words for the concept")
    if points < count:
        raise ValueError(
            f"prompts: got {count}, expected at most {points}, as many as subjects x (modifiers + 1) x templates give; "
            "ask for fewer or add subjects"
        )
