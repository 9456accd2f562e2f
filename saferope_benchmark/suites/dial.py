"""Does the dial work? Concept files at strengths from 0 to 2, and files of other seeds beside the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from saferope_core.concept.files import write_text
from saferope_core.concept.untrusted import markdown as words
from saferope_training import processes
from saferope_training.flux.models import Model
from saferope_training.making.recipe import Recipe
from saferope_training.stages import Progress

from ..evaluation.methods import Method, concept_file
from ..evaluation.tables import Row, number
from ..plots import curves
from ..prompt_sets import HELD_OUT, UNSAFE
from ..scores import KEPT, REST, SHOWN, WHOLE
from .contenders import CALIBRATED, OURS, by_calibration, settings_for

STRENGTHS = tuple(step / 4 for step in range(1, 9))  # 0 is the unprotected model, bit for bit
SEEDS = (0, 1, 2)
_TOLD = (SHOWN, REST, WHOLE, KEPT, "mean difference")  # columns of dial.md
_LINES = {(OURS, UNSAFE): "trained", (OURS, HELD_OUT): "trained, held-out words"}
_LINES |= {(CALIBRATED, UNSAFE): "calibrated", (CALIBRATED, HELD_OUT): "calibrated, held-out words"}


def turned_up(model: Model, folder: Path, concepts: Sequence[str], progress: Progress) -> list[Method]:
    """Trained and calibrated files at all STRENGTHS; trained ones of other SEEDS at strength 1, "saferope, seed 1"."""
    found = []
    for slug in concepts:
        for seed in SEEDS:
            s = replace(settings_for(model, slug), seed=seed)
            place = folder / (slug if seed == 0 else f"{slug}.{seed}")
            path = Recipe(model, s, place, progress).train()
            if seed:
                found.append(concept_file(path, 1.0, f"{OURS}, seed {seed}", slug))
                continue
            quick = Recipe(model, by_calibration(s), place, progress).calibrate()
            for name, file in ((OURS, path), (CALIBRATED, quick)):
                found += [concept_file(file, strength, name, slug) for strength in STRENGTHS]
    return found


def draw_dial(rows: Sequence[Row], _methods: Sequence[Method], out: Path) -> None:
    """`dial.png`, the concept shown by strength, and `dial.md`, mean and range over the seeds at strength 1."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in (row for row in rows if row.column == SHOWN and (row.method, row.set) in _LINES):
        line = panels.setdefault(row.concept, {}).setdefault(_LINES[row.method, row.set], [])
        line.append((row.strength or 0.0, row.value))
        if (0.0, row.unprotected) not in line:
            line.append((0.0, row.unprotected))
    for lines in panels.values():
        for line in lines.values():
            line.sort()
    if processes.is_main():
        curves(out / "dial.png", panels, "strength", "pictures that show the concept, %")
        write_text(out / "dial.md", spread(rows))


def spread(rows: Sequence[Row]) -> str:
    """A table for each concept: every column's mean over the seeds at strength 1, and its least and largest value."""
    lines = []
    for concept in dict.fromkeys(row.concept for row in rows):
        lines += [
            f"## {words(concept)}",
            "",
            "| measure | unprotected | mean | least | largest |",
            "|---|---|---|---|---|",
        ]
        own = [row for row in rows if row.concept == concept and row.column in _TOLD and row.set]
        for column, asked in dict.fromkeys((row.column, row.set) for row in own):
            same = [row for row in own if (row.column, row.set) == (column, asked) and row.strength == 1]
            same = [row for row in same if row.method.startswith(OURS) and row.method != CALIBRATED]
            values = [row.value for row in same]
            shown = [same[0].unprotected, sum(values) / len(values), min(values), max(values)]
            cells = [number(value, None, same[0].unit) for value in shown]
            lines.append(f"| {words(f'{column}, {asked}')} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
