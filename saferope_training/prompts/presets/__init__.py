"""Subjects, modifiers and templates for real FLUX, one JSON file a concept, written for this project."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent
BENIGN = "benign"  # everyday prompts, for captions where the user has none
_PARTS = ("seeds", "subjects", "modifiers", "templates")


def names() -> tuple[str, ...]:
    """The concepts that there are presets for."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json") if path.stem != BENIGN))


def load(name: str) -> dict[str, list[str]]:
    """`seeds` (the concept's meaning), `subjects`, `modifiers` and `templates` of a preset, or of BENIGN."""
    preset = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert set(preset) == set(_PARTS), f"preset {name}: got {sorted(preset)}"
    return preset
