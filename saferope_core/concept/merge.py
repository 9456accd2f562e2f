"""Several concepts at once: how much they overlap, and how to make a later one leave an earlier one alone.

Two rotations commute where the spaces they turn in are orthogonal; elsewhere the order in which they are applied
matters. Text and image tokens are different vectors, and a concept may turn each kind in spaces of its own: whatever is
said or done here is so for every stream and role by itself, in the heads where both concepts turn such vectors. A
concept without bases for image tokens turns them in its text bases; a generator or a strength of 0 turns nothing.

Axes: N heads of a concept, n heads that both turn, D head dimension, R + S width of a basis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..maths.subspace import orthonormal
from .concept import Concept
from .stream import ROLES, STREAMS, Roles

LEAST_LEFT = 0.1  # singular value: of a direction of which less than this is left, nothing should be made up


@dataclass(frozen=True)
class Overlap:
    """What two concepts share.

    `shared[stream, role]` [n] has, for each head in which both turn such vectors, the mean squared cosine of the
    principal angles between the two spaces, in [0, 1]: 0 orthogonal, 1 the narrower inside the wider. Streams and roles
    that not both turn are left out. `heads` int32 [n, 3] are the heads that both turn in any of them.
    """

    first: str
    second: str
    heads: Tensor
    shared: dict[tuple[str, str], Tensor]

    def of(self, stream: str) -> float:
        """The mean over heads and roles of one stream, "text" or "image"; 0 where not both turn it."""
        values = [value for (own, _), value in self.shared.items() if own == stream]
        return torch.cat(values).mean().item() if values else 0.0

    @property
    def most(self) -> float:
        """That of the stream in which they share more."""
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


def orthogonalised(later: Concept, *earlier: Concept) -> Concept:
    """`later` without the directions that its spaces share with the spaces of `earlier`, so that it commutes with each.

    For every stream and role, in heads where both turn such vectors, each basis B becomes the nearest orthonormal one
    to (I − E Eᵀ) B, E being all earlier ones' bases side by side; these have to be orthogonal to each other. Generators
    and gates stay. It then protects a little less from the shared part, which the earlier concept still covers. A
    `later` that turns image tokens in its text bases gets bases of their own for them, with the same gates, if the two
    now differ. Raises ValueError where geometries differ, and where a direction of `later` lies almost wholly in the
    others' spaces.
    """
    for each in earlier:
        later.geometry.require(each.geometry, f"concept {each.slug!r}")
    free = {stream: Roles(*(_freed(later, earlier, stream, role) for role in ROLES)) for stream in STREAMS}
    text, image, turns = replace(later.text, basis=free["text"]), later.image, later.moving("image")
    if image is not None and image.basis is not None:
        image = replace(image, basis=free["image"])
    elif image is not None and not all(
        torch.equal(free["image"][role][turns], free["text"][role][turns]) for role in later.acts("image")
    ):
        image = replace(image, basis=free["image"], gate=later.text.gate, full=later.text.full)
    return replace(later, text=text, image=image, source="")


def taken_apart(concepts: Sequence[Concept], tell: Callable[[], None] = lambda: None) -> list[Concept]:
    """Each without the directions that it shares with the concepts before it: `orthogonalised`. `tell` is called for
    every one.
    """
    result: list[Concept] = []
    for concept in concepts:
        tell()
        result.append(orthogonalised(concept, *result))
    return result


def _freed(later: Concept, earlier: Sequence[Concept], stream: str, role: str) -> Tensor:
    """The basis [N, D, R + S] of `later` for a stream and role, free of the spaces that earlier ones turn there."""
    basis, others, slugs = later.basis(role, stream), [], []
    for each in earlier:
        here, there = _common(later, each, stream, role)
        if len(here):
            others.append((here, each.basis(role, stream)[there]))
            slugs.append(each.slug)
    if not others:
        return basis
    touched = torch.cat([here for here, _ in others]).unique()
    left = _projected(basis.double(), others)
    gram = left[touched].mT @ left[touched]
    values, vectors = torch.linalg.eigh(gram)
    if values.min() < LEAST_LEFT**2:
        raise ValueError(
            f"concept {later.slug!r}: a direction of it lies almost wholly in the space of "
            f"{', '.join(map(repr, slugs[:4]))} for {stream} tokens, expected at least {LEAST_LEFT:g} of each outside "
            "it; merge without orthogonalising, or make one concept of them"
        )
    # the polar factor by its Gram matrix: no value of it is small, and an SVD takes fifty times as long
    left[touched] = left[touched] @ (vectors * values.rsqrt()[:, None]) @ vectors.mT
    # it stays in the span of `left`, but for rounding
    left = _projected(left, others)
    return basis.index_copy(0, touched, orthonormal(left[touched]).to(basis.dtype))


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
