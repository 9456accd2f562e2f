"""Plans: from concepts to the tensors that a block's queries and keys need.

Axes: H heads of a plan, D head dimension, R subspace rank, S reach, P = (R + S) // 2 planes, N safety-critical heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..concept.concept import Concept
from ..concept.geometry import Geometry
from ..concept.stream import STREAMS
from ..maths.rotation import fold


class Part(NamedTuple):
    """The turn of one concept in the heads of a plan. A head without a turn has directions, θ and gate 0, so LRS 0."""

    directions: Tensor  # [H, D, R + S], from `fold`
    theta: Tensor  # [H, P]
    strength: (
        Tensor  # [H], factor on the risk, see `saturated`: the concept's strength by the LRS at which it turns fully
    )
    gate: Tensor  # [H]
    unsafe: Tensor | None  # [H, R + S, R], directionsᵀ U: the unsafe subspace seen from the directions; None if S = 0
    own: Tensor  # int64 [n]: the heads of the plan whose gates a token can pass
    concept: int  # its number


class Plan(NamedTuple):
    """The turns of one block, role and stream: the heads that any concept turns, and the concepts in order."""

    heads: Tensor  # int64 [H]
    parts: list[Part]
    directions: Tensor  # [H, D, sum of R + S]: the directions of all parts, side by side


class Active(NamedTuple):
    """A concept in use."""

    number: int
    concept: Concept
    strength: float  # factor on its risk
    threshold: float | None  # one gate for all heads, or None for the gates of the concept


Key = tuple[int, str, str]  # row of the block in the head map, role, stream
Plans = dict[Key, Plan]


def plans_of(active: Sequence[Active], geometry: Geometry) -> Plans:
    """The plan, on the CPU, of every block, role and stream in which a concept turns a head."""
    # not inference tensors, even if first asked for in inference mode: gradients may pass through them later
    with torch.inference_mode(False), torch.no_grad():
        found: dict[Key, list[tuple[Tensor, Part]]] = defaultdict(list)
        for each in active:
            for stream in STREAMS:
                for row, role, heads, part in _parts_of(each, stream):
                    found[row, role, stream].append((heads, part))
        return {key: _merged(parts, geometry) for key, parts in found.items()}


def moved(plan: Plan, device: torch.device) -> Plan:
    """The plan on a device."""
    return Plan(*tree_map_only(Tensor, lambda tensor: tensor.to(device), plan))


def moving_rows(concept: Concept) -> set[int]:
    """The rows, in the head map, of all blocks in which the concept turns a head."""
    moving = concept.moving("text") | concept.moving("image")
    return set(_rows(concept)[moving].tolist())


def _rows(concept: Concept) -> Tensor:
    """Row in the head map of every head's block, [N]."""
    return concept.heads[:, 0] * concept.geometry.double_blocks + concept.heads[:, 1]


def _parts_of(active: Active, stream: str) -> Iterator[tuple[int, str, Tensor, Part]]:
    """(row, role, heads, part) of every block of one concept, without the heads whose generator is zero."""
    number, concept, strength, threshold = active
    moving = concept.moving(stream)
    if not moving.any():
        return
    roles = concept.acts(stream)
    bases = [concept.basis(role, stream)[moving] for role in roles]
    theta, *folded = fold(concept.generator(stream)[moving], *bases)
    for role, basis, directions in zip(roles, bases, folded, strict=True):
        owners = concept.owners(role)[moving]
        # heads are sorted, so the heads of a block lie together
        rows, counts = (each.tolist() for each in _rows(concept)[moving][owners].unique_consecutive(return_counts=True))
        heads = concept.heads[moving, 2].long() // (concept.geometry.group if role == "k" else 1)
        unsafe = (directions.mT.double() @ basis[..., : basis.shape[-1] - concept.reach].double()).float()
        gate, factor = concept.gate(role, stream)[moving], strength / concept.full(role, stream)[moving]
        gate = gate if threshold is None else torch.full_like(gate, threshold)
        fields = (heads, directions, theta, factor, gate, unsafe)
        for row, own, d, t, f, g, u in zip(rows, *(each[owners].split(counts) for each in fields), strict=True):
            yield row, role, own, Part(d, t, f, g, u if concept.reach else None, _open(g), number)


def _merged(parts: Sequence[tuple[Tensor, Part]], geometry: Geometry) -> Plan:
    """One plan over the union of the heads of several concepts."""
    heads = torch.cat([heads for heads, _ in parts]).unique() if len(parts) > 1 else parts[0][0]
    placed = [_placed(part, own, heads, geometry.heads) if len(parts) > 1 else part for own, part in parts]
    directions = torch.cat([part.directions for part in placed], dim=-1) if len(parts) > 1 else placed[0].directions
    return Plan(heads, placed, directions)


def _placed(part: Part, own: Tensor, heads: Tensor, count: int) -> Part:
    """`part`, made for the heads `own`, for the heads of a plan: 0 in heads that it does not turn."""

    def full(values: Tensor) -> Tensor:
        return values.new_zeros(count, *values.shape[1:]).index_copy(0, own, values)[heads]

    return part._replace(
        directions=full(part.directions),
        theta=full(part.theta),
        strength=full(part.strength),
        gate=full(part.gate),
        unsafe=None if part.unsafe is None else full(part.unsafe),
        own=torch.isin(heads, own[part.own]).nonzero()[:, 0],
    )


def _open(gate: Tensor) -> Tensor:
    """Indices of the gates that a token can pass. No LRS is above 1, so a gate of 1 is never asked or told of."""
    return gate.lt(1).nonzero()[:, 0]
