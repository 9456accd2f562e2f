"""Subjects, modifiers and templates for real FLUX, one JSON file a concept, written for this project."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent
BENIGN = "benign"  # everyday prompts, for captions where the user has none
_PARTS = {"seeds", "subjects", "modifiers", "templates"}
_INSTEAD = "instead"


def names() -> tuple[str, ...]:
    """The concepts that there are presets for."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json") if path.stem != BENIGN))


def load(name: str) -> dict[str, list[str]]:
    """`seeds` (the concept's meaning), `subjects`, `modifiers` and `templates` of a preset, or of BENIGN.

    Those of a concept also have `instead`: for each of the subjects, in their order, the words that stand in for it.
    """
    preset = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert set(preset) == _PARTS | ({_INSTEAD} if name != BENIGN else set()), f"preset {name}: got {sorted(preset)}"
    assert name == BENIGN or len(preset[_INSTEAD]) == len(preset["subjects"]), f"preset {name}: {_INSTEAD}"
    return preset
