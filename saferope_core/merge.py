"""Several concepts at once: how much they overlap, and how to make a later one leave an earlier one alone.

Two rotations commute where the spaces they turn in are orthogonal; elsewhere the order in which they are applied matters.

Axes: N heads that both concepts turn, D head dimension, R + S width of a basis.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .concept import Concept
from .subspace import orthonormal

ROLES = ("q", "k")
LEAST_LEFT = 0.1  # singular value: of a direction of which less than this is left, nothing should be made up


@dataclass(frozen=True)
class Overlap:
    """What two concepts share.

    `heads` int32 [N, 3] are the heads that both turn. `shared` has, per role and for each of them, the mean squared cosine
    of the principal angles between the two text spaces, in [0, 1]: 0 orthogonal, 1 the narrower inside the wider.
    """

    first: str
    second: str
    heads: Tensor
    shared: dict[str, Tensor]

    @property
    def mean(self) -> float:
        """Over heads and the roles that both act on; 0 where no head is shared."""
        values = torch.cat(list(self.shared.values())) if self.shared else torch.empty(0)
        return values.mean().item() if len(values) else 0.0


def overlap(first: Concept, second: Concept) -> Overlap:
    """Principal angles between two concepts of one geometry. Raises ValueError where their geometries differ."""
    first.geometry.require(second.geometry, f"concept {second.slug!r}")
    here, there = _common(first, second)
    shared = {
        role: _mean_squared_cosine(first.basis(role)[here], second.basis(role)[there])
        for role in ROLES
        if role in first.acts_on and role in second.acts_on
    }
    return Overlap(first.slug, second.slug, first.heads[here], shared)


def orthogonalised(later: Concept, earlier: Concept) -> Concept:
    """`later` with what its spaces share with `earlier`'s taken out of them, so that the two commute.

    In heads that both turn, each basis B becomes the nearest orthonormal one to (I − E Eᵀ) B, E being earlier's; generators
    and gates stay. It then protects a little less from what both concepts are about, which earlier still does.
    Raises ValueError where geometries differ, and where a direction of `later` lies almost wholly in `earlier`'s space.
    """
    later.geometry.require(earlier.geometry, f"concept {earlier.slug!r}")
    here, there = _common(later, earlier)
    changed = {}
    for name in ("basis_q", "basis_k", "basis_image_q", "basis_image_k"):
        basis = getattr(later, name)
        if basis is None:
            continue
        stream, role = ("image", name[-1]) if "image" in name else ("text", name[-1])
        changed[name] = basis.clone()
        changed[name][here] = _without(basis[here], earlier.basis(role, stream)[there], later.slug, earlier.slug)
    return replace(later, **changed)


def _without(basis: Tensor, other: Tensor, slug: str, other_slug: str) -> Tensor:
    """The nearest orthonormal basis to (I − E Eᵀ) B; both [N, D, *]."""
    left = basis.double() - other.double() @ (other.double().mT @ basis.double())
    if len(left) and torch.linalg.svdvals(left).min() < LEAST_LEFT:
        raise ValueError(
            f"concept {slug!r}: a direction of it lies almost wholly in the space of {other_slug!r}, expected at least "
            f"{LEAST_LEFT:g} of each outside it; merge without orthogonalising, or make one concept of both"
        )
    result = orthonormal(left)
    # the polar factor stays in the span of `left`, but for rounding
    result = orthonormal(result - other.double() @ (other.double().mT @ result))
    return result.to(basis.dtype)


def _mean_squared_cosine(a: Tensor, b: Tensor) -> Tensor:
    """[N] from bases [N, D, *]."""
    cosines = torch.linalg.matrix_norm(a.double().mT @ b.double()).square()
    return (cosines / min(a.shape[-1], b.shape[-1])).float()


def _common(first: Concept, second: Concept) -> tuple[Tensor, Tensor]:
    """Rows of the heads that both concepts have."""
    places = {tuple(place): row for row, place in enumerate(second.heads.tolist())}
    rows = [(row, places[tuple(place)]) for row, place in enumerate(first.heads.tolist()) if tuple(place) in places]
    here, there = zip(*rows, strict=True) if rows else ((), ())
    return torch.tensor(here, dtype=torch.long), torch.tensor(there, dtype=torch.long)
