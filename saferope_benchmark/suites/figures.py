"""Figures of a suite's rows, beside its tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..evaluation.compare import front
from ..evaluation.methods import Method
from ..evaluation.tables import Row
from ..plots import curves, matrix, pareto
from ..prompt_sets import BENIGN, NEIGHBOURS, UNSAFE
from ..scores import KEPT, SHOWN

_KINDS = {(UNSAFE, SHOWN): "concept shown", (NEIGHBOURS, KEPT): "neighbours right", (BENIGN, KEPT): "benign right"}


def draw_matrix(rows: Sequence[Row], methods: Sequence[Method], out: Path) -> None:
    """`crossed.png`: how much of each concept (along) is shown under each file (up)."""
    shown = {(r.method, r.concept): r.value for r in rows if r.column == SHOWN and r.set == UNSAFE}
    names = [method.name for method in methods]
    concepts = list(dict.fromkeys(concept for _, concept in shown))
    values = torch.tensor([[shown[name, concept] for concept in concepts] for name in names])
    matrix(out / "crossed.png", 100 * values, names, concepts, "concept shown, %")


def draw_positions(rows: Sequence[Row], _methods: Sequence[Method], out: Path) -> None:
    """`positions.png`: the share of pictures that still fit their prompt, by how far text tokens are thrown. A panel a
    concept, a line a kind of prompt.
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (kind, column), label in _KINDS.items():
        for concept in dict.fromkeys(r.concept for r in rows if r.set == kind and r.column == column):
            own = [r for r in rows if (r.concept, r.set, r.column) == (concept, kind, column)]
            line = panels.setdefault(concept, {}).setdefault(label, [])
            for spread in sorted({r.strength or 0.0 for r in own}):
                values = [r.value for r in own if (r.strength or 0.0) == spread]
                line.append((spread, sum(values) / len(values)))
    along = "rows and columns over which text tokens are thrown"
    curves(out / "positions.png", panels, along, "share of pictures, %", doubling=True)


def draw_rotations(rows: Sequence[Row], methods: Sequence[Method], out: Path) -> None:
    """`rotations.png`: erasure against damage, a line for each group of heads."""
    points = front(rows, methods)
    if points:
        pareto(out / "rotations.png", points, "benign damage, points")
