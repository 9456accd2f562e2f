"""How far a strength may turn. A plane that has turned by a whole turn is where it was: half a turn changes most.

Axes: N safety-critical heads, R + S width of a basis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .concept import Concept
from .rotation import planes

HALF_TURN = math.pi  # radians
AS_MADE = 1.0  # the strength that a concept's generators were made for
_TURNED = ("heads", "generator_text", "generator_image", "basis_q", "basis_k", "basis_image_q", "basis_image_k")
_ROLES = ("acts_on", "acts_on_image")


def held_strengths(concepts: Sequence[Concept], strengths: Sequence[float]) -> tuple[float, ...]:
    """The strengths, factors on the concepts' angles, held where more of them would turn past half a turn.

    A concept is held where its widest angle, over heads, planes and streams, is half a turn at LRS 1; but never below
    AS_MADE: one that was made with wider angles works as it was made. The angles of copies of one concept add up, so
    copies are held together, each in proportion. Strengths that are not held come back as they are.
    """
    held = list(strengths)
    for copies in _copies(concepts):
        total = sum(strengths[number] for number in copies)
        allowed = _held(concepts[copies[0]], total)
        if allowed != total:
            for number in copies:
                held[number] = strengths[number] / total * allowed
    return tuple(held)


def strength_notes(concepts: Sequence[Concept], strengths: Sequence[float]) -> list[str]:
    """A sentence for people about every concept that `held_strengths` holds back."""
    return [
        f"concept {concept.slug!r}: strength {asked:g} acts as {used:.3g}. More, of it and its copies together, would turn past "
        "half a turn, back to the unprotected model."
        for concept, asked, used in zip(concepts, strengths, held_strengths(concepts, strengths), strict=True)
        if asked != used
    ]


def _held(concept: Concept, strength: float) -> float:
    if abs(strength) <= AS_MADE:
        return strength
    widest = max(planes(each)[0].max().item() for each in (concept.generator_text, concept.generator_image))
    allowed = max(AS_MADE, HALF_TURN / widest) if widest > 0 else math.inf
    return math.copysign(min(allowed, abs(strength)), strength)


def _copies(concepts: Sequence[Concept]) -> list[list[int]]:
    """The concepts' numbers, those together that turn the same planes alike, whatever they are called."""
    groups: list[list[int]] = []
    for number, concept in enumerate(concepts):
        group = next((each for each in groups if _alike(concepts[each[0]], concept)), None)
        if group is None:
            groups.append([number])
        else:
            group.append(number)
    return groups


def _alike(one: Concept, other: Concept) -> bool:
    if any(getattr(one, name) != getattr(other, name) for name in _ROLES):
        return False
    pairs = ((getattr(one, name), getattr(other, name)) for name in _TURNED)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
