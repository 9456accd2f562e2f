"""Several concepts at once: how much they overlap.

Two rotations commute where the spaces they turn in are orthogonal. Elsewhere their order matters. Text and image tokens
are different vectors, and a concept may turn each kind in spaces of its own. So overlap is measured for every stream
and role by itself, in the heads where both concepts turn such vectors. A concept without bases for image tokens turns
them in its text bases. A generator or a strength of 0 turns nothing.

Axes: N heads of a concept, n heads that both turn, D head dimension, R + S width of a basis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .concept import Concept
from .stream import ROLES, STREAMS


@dataclass(frozen=True)
class Overlap:
    """The overlap of two concepts.

    `shared[stream, role]` [n] has, for each head in which both turn such vectors, the mean squared cosine of the
    principal angles between the two spaces, in [0, 1]: 0 orthogonal, 1 the narrower inside the wider. A stream and role
    that only one of them turns is left out. `heads` int32 [n, 3] are the heads that both turn in any stream and role.
    """

    first: str
    second: str
    heads: Tensor
    shared: dict[tuple[str, str], Tensor]

    def of(self, stream: str) -> float:
        """The mean over heads and roles of one stream, "text" or "image"; 0 unless both turn it."""
        values = [value for (own, _), value in self.shared.items() if own == stream]
        return torch.cat(values).mean().item() if values else 0.0

    @property
    def most(self) -> float:
        """The larger of the two streams' means, see `of`."""
        return max(self.of(stream) for stream in STREAMS)


def overlap(first: Concept, second: Concept) -> Overlap:
    """Principal angles between two concepts of one geometry. Raises ValueError where their geometries differ."""
    first.geometry.require(second.geometry, f"concept {second.slug!r}")
    shared, rows = {}, []
    for stream in STREAMS:
        for role in ROLES:
            here, there = _common(first, second, stream, role)
            if len(here):
                bases = first.basis(role, stream)[here], second.basis(role, stream)[there]
                shared[stream, role] = _mean_squared_cosine(*bases)
                rows.append(here)
    heads = first.heads[torch.cat(rows).unique()] if rows else first.heads[:0]
    return Overlap(first.slug, second.slug, heads, shared)


def _mean_squared_cosine(a: Tensor, b: Tensor) -> Tensor:
    """[N] from bases [N, D, *]."""
    return torch.linalg.matrix_norm(a.mT @ b).square() / min(a.shape[-1], b.shape[-1])


def _common(first: Concept, second: Concept, stream: str, role: str) -> tuple[Tensor, Tensor]:
    """Rows, in each concept, of the heads in which both turn the vectors of this stream and role."""
    here, there = _turned(first, stream, role), _turned(second, stream, role)
    group = first.geometry.group if role == "k" else 1
    places, others = first.places[here] // group, second.places[there] // group
    both = torch.isin(places, others)
    return here[both], there[torch.searchsorted(others, places[both])]


def _turned(concept: Concept, stream: str, role: str) -> Tensor:
    """Rows of the heads in which a concept turns the vectors of this stream and role."""
    if not concept.strength or role not in concept.acts(stream):
        return torch.zeros(0, dtype=torch.long)
    return (concept.moving(stream) & concept.owners(role)).nonzero()[:, 0]
