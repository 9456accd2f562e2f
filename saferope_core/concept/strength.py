"""How far strengths may turn. A plane that has turned by a whole turn is where it was: half a turn changes most.

A strength is a factor on the risk, s = min(1, strength * gated LRS / full), so that no strength turns a vector by more
than the concept's full angle. More strength would still protect less in two cases: a concept whose full angle is above
half a turn, and copies of one concept, whose angles add up.

Axes: N safety-critical heads, R + S width of a basis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..maths.rotation import planes
from .concept import Concept
from .stream import ROLES, STREAMS

HALF_TURN = math.pi  # radians
AS_MADE = 1.0  # the strength that a concept's generators were made for
ROUNDING = 1.01  # factor: generators in float16 may exceed half a turn by that much
# Cosine between the turns of two concepts in a head. A copy in float16 has 0.99999, also with other angles. Unrelated
# concepts, whose planes are any of D = 128 dimensions, have about 0.
ALIKE = 0.9
OPPOSED = 0.3  # below minus this cosine two concepts may cancel: check them closely


def held_strengths(concepts: Sequence[Concept], strengths: Sequence[float]) -> tuple[float, ...]:
    """The strengths, factors on the concepts' risk, held where more of them would turn past half a turn.

    The full angle of a concept is its widest, over heads, planes and streams. A concept whose full angle is above half
    a turn is held at AS_MADE. Copies are concepts that turn alike in any head, also under other names or with heads
    left out. Copies turn one after the other, by the sum of their full angles times each one's largest s. They are held
    in proportion where that sum is above half a turn and above each copy's full angle. Other strengths come back as
    they are. Raises ValueError for such copies where one turns fully at a lower risk than 1: at no strength that
    protects would they stay within half a turn.
    """
    held = list(strengths)
    for copies in _copies(concepts):
        most = {number: min(AS_MADE, abs(strengths[number]) / concepts[number].least_full) for number in copies}
        if len(copies) == 1 and abs(strengths[copies[0]]) <= AS_MADE:
            continue
        full = {number: _widest(concepts[number]) for number in copies}
        turned, allowed = sum(most[number] * full[number] for number in copies), max(HALF_TURN, *full.values())
        wide = len(copies) == 1 and allowed > HALF_TURN * ROUNDING
        if turned > allowed * ROUNDING and any(concepts[number].least_full < 1 for number in copies):
            slugs = ", ".join(repr(concepts[number].slug) for number in copies)
            raise ValueError(
                f"concepts {slugs}: got copies that together turn past half a turn, back to the unprotected model, "
                "expected one of them; leave out the others"
            )
        if wide or turned > allowed * ROUNDING:
            for number in copies:
                held[number] = math.copysign(most[number] * min(1.0, allowed / turned), strengths[number])
    return tuple(held)


def strength_notes(concepts: Sequence[Concept], strengths: Sequence[float]) -> list[str]:
    """A sentence for people about every concept that `held_strengths` holds back."""
    return [
        f"concept {concept.slug!r}: strength {asked:g} acts as {used:.3g}. More, of it and its copies together, would "
        "turn past half a turn, back to the unprotected model."
        for concept, asked, used in zip(concepts, strengths, held_strengths(concepts, strengths), strict=True)
        if asked != used
    ]


def _widest(concept: Concept) -> float:
    """The widest angle of any plane at s = 1, in radians."""
    return max(planes(each)[0].max().item() for each in map(concept.generator, STREAMS))


def _copies(concepts: Sequence[Concept]) -> list[list[int]]:
    """The concepts' numbers, in groups that turn alike in some head."""
    groups: list[list[int]] = []
    for number, concept in enumerate(concepts):
        joined = [group for group in groups if any(_alike(concepts[other], concept) for other in group)]
        groups = [group for group in groups if group not in joined]
        groups.append([*(other for group in joined for other in group), number])
    return groups


def opposed(one: Concept, other: Concept) -> bool:
    """Whether one concept turns vectors back that the other turns, in some head, stream and role."""
    return any(bool((cosine < -OPPOSED).any()) for cosine in _cosines(one, other))


def _alike(one: Concept, other: Concept) -> bool:
    """Whether both turn the vectors of some stream and role in some head alike."""
    return any(bool((cosine > ALIKE).any()) for cosine in _cosines(one, other))


def _cosines(one: Concept, other: Concept) -> list[Tensor]:
    """`_cosine` for every stream and role that both turn; [] for concepts of two geometries."""
    if one.geometry != other.geometry:
        return []
    here = torch.isin(one.places, other.places).nonzero()[:, 0]
    there = torch.searchsorted(other.places, one.places[here])
    return [
        _cosine(one, other, here, there, stream, role)
        for stream in STREAMS
        for role in ROLES
        if role in one.acts(stream) and role in other.acts(stream)
    ]


def _cosine(one: Concept, other: Concept, here: Tensor, there: Tensor, stream: str, role: str) -> Tensor:
    """<X, Y> / (|X| |Y|) of X = U A Uᵀ and Y = V B Vᵀ in each common head [n]; NaN where one of them turns nothing.

    <X, Y> = <A, M B Mᵀ> with M = Uᵀ V, so nothing of size D x D is made.
    """
    a, b = one.generator(stream)[here], other.generator(stream)[there]
    between = one.basis(role, stream)[here].mT @ other.basis(role, stream)[there]
    lengths = torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(b)
    return (a * (between @ b @ between.mT)).sum((-2, -1)) / lengths
