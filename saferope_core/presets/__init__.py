"""Subjects, modifiers and templates for real models, one JSON file a concept, written for this project."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
BENIGN = "benign"  # everyday prompts, for captions where the user has none
LIKENESS = "likeness"  # of a person whose name the user gives: it has no subjects of its own
SLOT = "{subject}"
_PARTS = {"seeds", "subjects", "modifiers", "templates"}
_INSTEAD = "instead"


def names() -> tuple[str, ...]:
    """The concepts that there are presets for."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json") if path.stem not in (BENIGN, LIKENESS)))


def load(name: str) -> dict[str, list[str]]:
    """`seeds` (the concept's meaning), `subjects`, `modifiers` and `templates` of a preset, or of BENIGN.

    A concept's preset also has `instead`: for each subject, in order, the words that stand in for it.
    """
    preset = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert set(preset) == _PARTS | ({_INSTEAD} if name != BENIGN else set()), f"preset {name}: got {sorted(preset)}"
    assert name == BENIGN or len(preset[_INSTEAD]) == len(preset["subjects"]), f"preset {name}: {_INSTEAD}"
    return preset


def likeness(name: str) -> dict[str, list[str]]:
    """A preset for the person of this name: its `instead` words stand in for the one subject in turn."""
    preset = json.loads((FOLDER / f"{LIKENESS}.json").read_text(encoding="utf-8"))
    return preset | {"subjects": [name]}


def walk(preset: dict[str, list[str]], count: int, seed: int) -> list[tuple[str, int, str]]:
    """`count` points of the grid subjects x (none and modifiers) x templates, none twice: (before, number, after).

    `number` is the number of the subject that stands between the two texts. The modifier ends the first text. A larger
    walk of a seed begins with the smaller one. ValueError where the grid has fewer points.
    """
    subjects, templates, choices = preset["subjects"], preset["templates"], ["", *preset["modifiers"]]
    points = len(subjects) * len(choices) * len(templates)
    if points < count:
        raise ValueError(
            f"prompts: got {count}, expected at most {points}, as many as subjects x (modifiers + 1) x templates give; "
            "ask for fewer or add subjects"
        )
    found = []
    for chosen in random.Random(seed).sample(range(points), count):
        point, subject = divmod(chosen, len(subjects))
        template, modifier = divmod(point, len(choices))
        before, after = templates[template].split(SLOT)
        found.append((before + (f"{choices[modifier]} " if modifier else ""), subject, after))
    return found


def lines(
    preset: dict[str, list[str]], count: int, seed: int, tails: Sequence[str] = ("",)
) -> tuple[list[str], list[str]]:
    """Prompts as people write them: `count` unsafe ones, the subject in brackets, and the same with `instead`.

    Every prompt ends with one of the tails in turn.
    """
    unsafe, safe = [], []
    subjects, words = preset["subjects"], preset[_INSTEAD]
    for number, (before, subject, after) in enumerate(walk(preset, count, seed)):
        end = after + tails[number % len(tails)]
        unsafe.append(f"{before}[{subjects[subject]}]{end}")
        safe.append(f"{before}{words[subject if len(subjects) > 1 else number % len(words)]}{end}")
    return unsafe, safe


def everyday(count: int, seed: int, tails: Sequence[str] = ("",)) -> list[str]:
    """`count` prompts of everyday life, each with one of the tails in turn."""
    preset = load(BENIGN)
    return [
        f"{before}{preset['subjects'][subject]}{after}{tails[number % len(tails)]}"
        for number, (before, subject, after) in enumerate(walk(preset, count, seed))
    ]
