"""Several concepts at once: how much they overlap, and how to make a later one leave an earlier one alone.

Two rotations commute where the spaces they turn in are orthogonal; elsewhere the order in which they are applied matters.

Axes: N heads that both concepts turn, D head dimension, R + S width of a basis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def orthogonalised(later: Concept, *earlier: Concept) -> Concept:
    """`later` with what its spaces share with those of `earlier` taken out of them, so that it commutes with each.

    In heads that both turn, each basis B becomes the nearest orthonormal one to (I − E Eᵀ) B, E being all earlier ones'
    bases side by side; these have to be orthogonal to each other. Generators and gates stay. It then protects a little
    less from what the concepts share, which earlier ones still do.
    Raises ValueError where geometries differ, and where a direction of `later` lies almost wholly in the others' spaces.
    """
    common = []
    for each in earlier:
        later.geometry.require(each.geometry, f"concept {each.slug!r}")
        common.append((each, *_common(later, each)))
    changed = {}
    for name in ("basis_q", "basis_k", "basis_image_q", "basis_image_k"):
        basis = getattr(later, name)
        if basis is not None and common:
            stream, role = ("image", name[-1]) if "image" in name else ("text", name[-1])
            others = [(here, each.basis(role, stream)[there]) for each, here, there in common]
            touched = torch.cat([here for here, _ in others]).unique()
            free = _free_of(basis, touched, others, later.slug, [each.slug for each in earlier])
            changed[name] = basis.index_copy(0, touched, free[touched].to(basis.dtype))
    return replace(later, **changed)


def taken_apart(concepts: Sequence[Concept], tell: Callable[[], None] = lambda: None) -> list[Concept]:
    """Each without what it shares with those before it: `orthogonalised`. `tell` is called for every one."""
    result: list[Concept] = []
    for concept in concepts:
        tell()
        result.append(orthogonalised(concept, *result))
    return result


def _free_of(
    basis: Tensor, touched: Tensor, others: list[tuple[Tensor, Tensor]], slug: str, other_slugs: list[str]
) -> Tensor:
    """The nearest orthonormal basis to (I − E Eᵀ) B in the rows `touched`; basis [N, D, *], float64."""
    left = _projected(basis.double(), others)
    gram = left[touched].mT @ left[touched]
    values, vectors = torch.linalg.eigh(gram)
    if len(touched) and values.min() < LEAST_LEFT**2:
        raise ValueError(
            f"concept {slug!r}: a direction of it lies almost wholly in the space of {', '.join(map(repr, other_slugs[:4]))}, "
            f"expected at least {LEAST_LEFT:g} of each outside it; merge without orthogonalising, or make one concept of them"
        )
    # the polar factor by its Gram matrix: no value of it is small, and an SVD takes fifty times as long
    left[touched] = left[touched] @ (vectors * values.rsqrt()[:, None]) @ vectors.mT
    # it stays in the span of `left`, but for rounding
    left = _projected(left, others)
    left[touched] = orthonormal(left[touched])
    return left


def _projected(basis: Tensor, others: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(I − E Eᵀ) B, one of the others after the other; each is rows of the basis and E [rows, D, *] there."""
    result = basis.clone()
    for here, other in others:
        wide = other.double()
        result[here] -= wide @ (wide.mT @ result[here])
    return result


def _mean_squared_cosine(a: Tensor, b: Tensor) -> Tensor:
    """[N] from bases [N, D, *]."""
    return torch.linalg.matrix_norm(a.mT @ b).square() / min(a.shape[-1], b.shape[-1])


def _common(first: Concept, second: Concept) -> tuple[Tensor, Tensor]:
    """Rows of the heads that both concepts have."""
    here, there = _places(first), _places(second)
    rows = torch.isin(here, there).nonzero()[:, 0]
    return rows, torch.searchsorted(there, here[rows])


def _places(concept: Concept) -> Tensor:
    """A number for every head [N], ascending as the heads are."""
    block_type, block, head = concept.heads.long().unbind(1)
    geometry = concept.geometry
    return (block_type * geometry.double_blocks + block) * geometry.heads + head
