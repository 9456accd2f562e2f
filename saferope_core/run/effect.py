"""The effect of concepts on a model: how many heads turn, and how far.

A well-formed concept may do nothing (gates of 1, generators near zero, strength 0) or be undone by another one (the
inverse turn in the same heads). To find both, directions of each head are sent through the protections.

Axes: N safety-critical heads, D head dimension, R subspace rank, S reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from ..concept.concept import Concept
from ..concept.geometry import BLOCK_TYPES
from ..concept.stream import STREAMS
from ..concept.strength import opposed
from ..maths.rotation import planes
from .protection import Protection

# A token that is nearly all unsafe: a gate above it lets everything through. The tiny world's gates reach 0.953.
PROBE_RISK = 0.99
# How far a vector of length 1 must move: as far as a turn by 1 radian at the smallest step of a strength, 0.05.
LEAST_TURN = 0.05


@dataclass(frozen=True)
class Effect:
    """The effect of one concept alone. `turning` of its `heads` heads move a direction by LEAST_TURN or more."""

    heads: int
    turning: int
    angle: float  # radians: the widest turn of any plane, at risk 1 and this strength
    gates: tuple[float, float]  # the lowest and the highest of the gates that are asked

    def __str__(self) -> str:
        low, high = self.gates
        turns = f"turns in {self.turning} of {self.heads} heads, by {self.angle:.2f} rad at most"
        return f"{turns}, gates {low:.3f} to {high:.3f}"


def effect_of(concept: Concept, strength: float = 1.0, threshold: float | None = None) -> Effect:
    """The effect of one concept at `strength` times its own; threshold: one gate for all heads, or None for its own."""
    alone = Protection([concept], concept.geometry, [strength], [threshold])
    turning = int((moved(concept, [alone]) >= LEAST_TURN).sum())
    full = max(planes(concept.generator(stream))[0].max().item() for stream in STREAMS)
    gates = [concept.gate(role, stream) for stream in STREAMS for role in concept.acts(stream)]
    low, high = min(gate.min().item() for gate in gates), max(gate.max().item() for gate in gates)
    angle = full * min(1.0, abs(alone.effective[0]))
    return Effect(len(concept.heads), turning, angle, (low, high) if threshold is None else (threshold, threshold))


def require_effect(concept: Concept, threshold: float | None = None) -> None:
    """Raise ValueError where the concept turns nothing at strength 1 in any block: such a concept is empty.

    threshold: a fixed gate, which takes the place of the concept's own, or None. A concept of strength 0 passes: with
    it the user asks for no protection.
    """
    if concept.strength == 0:
        return
    effect = effect_of(concept, 1 / concept.strength, None if threshold is None else 0.0)
    if not effect.turning:
        raise ValueError(
            f"Concept {concept.slug!r} has no effect: it {effect}, at strength 1. Expected a head that turns. "
            "Its gates let no token turn, or its angles are near 0. Train or calibrate it anew, take another file, or "
            "set strength to 0 to draw without protection."
        )


def undone(chain: Sequence[Protection]) -> list[str]:
    """A sentence for every concept of the protections in a row that the others turn back, in any of its heads."""
    concepts = [concept for protection in chain for concept in protection.concepts]
    if len(concepts) < 2:
        return []
    probed = [_probed(each) for each in concepts]
    own = [_far(way, _part(chain, [each])) >= LEAST_TURN for way, each in zip(probed, concepts, strict=True)]
    whole = [_far(way, chain) < LEAST_TURN for way in probed]
    found: list[str] = []
    by_others = _by_others(chain, concepts, probed, whole)
    for each, alone, still, others in zip(concepts, own, whole, by_others, strict=True):
        who = [(other, alone & heads) for other, heads in others if (alone & heads).any()]
        lost = alone & still
        for _, heads in who:
            lost |= heads
        if lost.any():
            by = f" by {', '.join(repr(other.slug) for other, _ in who[:4])}" if who else ""
            found.append(f"concept {each.slug!r} is turned back{by} in {int(lost.sum())} of its {len(lost)} heads")
    return found


def _by_others(
    chain: Sequence[Protection], concepts: list[Concept], probed: list[Probed], whole: list[Tensor]
) -> list[list[tuple[Concept, Tensor]]]:
    """For each concept, each opposed concept and bool [N]: the heads in which little moves under these two alone."""
    found: list[list[tuple[Concept, Tensor]]] = [[] for _ in concepts]
    for one, other in combinations(range(len(concepts)), 2):
        if concepts[one] is concepts[other] or not opposed(concepts[one], concepts[other]):
            continue
        pair = _part(chain, [concepts[one], concepts[other]])
        all_there = all(each is protection for each, protection in zip(pair, chain, strict=True))
        for this, that in ((one, other), (other, one)):
            still = whole[this] if all_there else _far(probed[this], pair) < LEAST_TURN
            found[this].append((concepts[that], still))
    return found


def moved(concept: Concept, chain: Sequence[Protection]) -> Tensor:
    """The farthest that the chain moves a direction that the concept turns, in each of its heads: [N] in [0, 2]."""
    return _far(_probed(concept), chain)


class Probed(NamedTuple):
    """A concept and its probes [N, P, D] by stream and role, made once for all chains they are sent through."""

    concept: Concept
    probes: dict[tuple[str, str], Tensor]


def _probed(concept: Concept) -> Probed:
    probes = {}
    for stream in STREAMS:
        for role in concept.acts(stream):
            basis = concept.basis(role, stream)
            both = [_probes(basis, concept.reach), _leaning(basis, concept, role, stream)]
            probes[stream, role] = torch.cat(both, dim=1)
    return Probed(concept, probes)


def _far(probed: Probed, chain: Sequence[Protection]) -> Tensor:
    """`moved`, of probes at hand."""
    concept = probed.concept
    far = torch.zeros(len(concept.heads))
    blocks = [
        (kind, index, _in_block(concept, kind, index)) for kind, index in concept.heads[:, :2].unique(dim=0).tolist()
    ]
    for (stream, role), probes in probed.probes.items():
        owners, group = concept.owners(role), concept.geometry.group if role == "k" else 1
        for kind, index, here in blocks:
            heads = concept.heads[here, 2].long() // group
            x = torch.zeros(1, concept.geometry.heads_of(role), *probes.shape[1:])
            x[0, heads[owners[here]]] = probes[here & owners]
            spans = {"text": (0, 0), "image": (0, 0), stream: (0, x.shape[2])}
            y = x
            for each in chain:
                y = each.rotate(y, role, BLOCK_TYPES[kind], index, spans["text"], spans["image"])
            lengths = torch.linalg.vector_norm(y - x, dim=-1).amax(-1)[0, heads]
            far[here] = torch.maximum(far[here], lengths)
    return far


def _in_block(concept: Concept, kind: int, index: int) -> Tensor:
    return (concept.heads[:, :2] == torch.tensor([kind, index])).all(1)


def _probes(bases: Tensor, reach: int) -> Tensor:
    """Vectors [N, R, D] of length 1 and risk PROBE_RISK, one along each unsafe direction of bases [N, D, R + S]."""
    unsafe = bases[..., : bases.shape[-1] - reach].mT
    if bases.shape[-1] == bases.shape[-2]:
        return unsafe  # nothing lies outside
    row = bases.square().sum(-1).argmin(-1)  # the axis that lies furthest outside
    axis = torch.nn.functional.one_hot(row, bases.shape[-2]).to(bases)
    rest = axis - (bases @ bases[torch.arange(len(bases)), row][..., None])[..., 0]
    outside = torch.nn.functional.normalize(rest, dim=-1)
    return PROBE_RISK**0.5 * unsafe + (1 - PROBE_RISK) ** 0.5 * outside[:, None]


def _leaning(bases: Tensor, concept: Concept, role: str, stream: str) -> Tensor:
    """Vectors [N, S, D] of length 1 along the reach, with the risk at which they turn fully. Where risk is relative to
    harmless vectors, an unsafe vector lies nearly all in the reach. Empty for a concept that turns fully at risk 1.
    """
    if (concept.full(role, stream) == 1).all():
        return bases.new_zeros(len(bases), 0, bases.shape[1])
    risk = concept.full(role, stream).clamp(max=PROBE_RISK)[:, None, None]
    unsafe, reach = bases.mT.split([bases.shape[-1] - concept.reach, concept.reach], dim=1)
    return risk.sqrt() * unsafe[:, :1] + (1 - risk).sqrt() * reach


def _part(chain: Sequence[Protection], concepts: Sequence[Concept]) -> list[Protection]:
    """The chain with some of its concepts alone."""
    return [_only(protection, concepts) for protection in chain]


def _only(protection: Protection, concepts: Sequence[Concept]) -> Protection:
    """The protection with these concepts alone, as far as it has them, each at its strength there.

    Where these are all its concepts it is the same object: its folded planes take the most time to make, and serve
    again.
    """
    rows = zip(protection.concepts, protection.effective, protection.thresholds, strict=True)
    kept = [row for row in rows if any(row[0] is each for each in concepts)]
    factors = [effective / concept.strength if concept.strength else 0.0 for concept, effective, _ in kept]
    made = Protection([row[0] for row in kept], protection.geometry, factors, [row[2] for row in kept])
    same = len(kept) == len(protection.concepts) and made.effective == protection.effective
    return protection if same else made
