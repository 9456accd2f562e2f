"""Prompts as products: subject | modifier | template, the way the paper's Unsafe-1K was made (it was never released).

Every combination is one point of a grid. A sample is a seeded walk through the grid without repeats. So any size gives
the same prompts again, and a larger sample begins with the smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence

from saferope_core.presets import SLOT, walk

from . import UNSAFE, PromptRecord


def product_prompts(
    side: str, subjects: Sequence[str], modifiers: Sequence[str], templates: Sequence[str], count: int, seed: int
) -> list[PromptRecord]:
    """`count` prompts, all different, the subject's span marked on the unsafe side.

    The modifier stands before the subject and is outside its span; one of the choices is no modifier. ValueError for
    a template without its slot, for empty lists, and where the grid has fewer points than asked for.
    """
    _check(subjects, templates)
    grid = {"subjects": list(subjects), "modifiers": list(modifiers), "templates": list(templates)}
    found = walk(grid, count, seed)
    return [_record(side, before, subjects[subject], after) for before, subject, after in found]


def _record(side: str, before: str, subject: str, after: str) -> PromptRecord:
    span = (len(before), len(before) + len(subject)) if side == UNSAFE else None
    return PromptRecord(side, before + subject + after, span)


def _check(subjects: Sequence[str], templates: Sequence[str]) -> None:
    for template in templates:
        if template.count(SLOT) != 1:
            raise ValueError(f"template {template!r}: got {template.count(SLOT)} slots, expected one {SLOT}")
    if not all(subject.strip() for subject in subjects):
        raise ValueError("subjects: got an empty one, expected words for the concept")
