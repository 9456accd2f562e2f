"""The exact arithmetic of a plan: risk of every vector, and the rotation by it.

Axes: B batch, H heads of the plan, L tokens, D head dimension, R subspace rank, S reach.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..maths.risk import gated, risk_of, saturated
from ..maths.rotation import exact, turn
from .plan import Part, Plan


def scales_of(vectors: Tensor, plan: Plan) -> tuple[list[Tensor], Tensor]:
    """s [B, H, L] (see `saturated`) of vectors [B, H, L, D] for every part; their coordinates for the first part."""
    with exact(vectors):
        coordinates = [torch.einsum("bhld,hdr->bhlr", vectors, part.directions.to(vectors)) for part in plan.parts]
        pairs = zip(coordinates, plan.parts, strict=True)
        scales = [
            saturated(gated(_risk(each, vectors, part), part.gate), part.strength.to(each)[:, None])
            for each, part in pairs
        ]
        return scales, coordinates[0]


def turned(vectors: Tensor, parts: Sequence[Part], scales: Sequence[Tensor], coordinates: Tensor) -> Tensor:
    """Vectors [B, H, L, D] turned by one part after the other; `coordinates` are theirs for the first part."""
    known: Tensor | None = coordinates
    for part, scale in zip(parts, scales, strict=True):
        vectors = turn(vectors, part.directions, part.theta, scale, known)
        known = None  # the next concept meets vectors that have moved
    return vectors


def _risk(coordinates: Tensor, vectors: Tensor, part: Part) -> Tensor:
    """LRS [B, H, L] from the coordinates [B, H, L, R + S] in the part's directions."""
    if part.unsafe is not None:
        coordinates = torch.einsum("bhlp,hpr->bhlr", coordinates, part.unsafe.to(coordinates))
    return risk_of(coordinates, vectors)
