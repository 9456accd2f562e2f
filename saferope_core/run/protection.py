"""The one object both hosts ask, block by block: q or k and the token spans in, the rotated vectors out.

Axes: B batch, H heads, L tokens, D head dimension, R subspace rank, S reach (see `concept`), P = (R + S) // 2 planes,
N safety-critical heads.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..concept.concept import Concept
from ..concept.geometry import Geometry
from ..concept.stream import STREAMS
from ..concept.strength import held_strengths
from ..maths.risk import gated, risk_of
from ..maths.rotation import exact, fold, turn, wide
from .few import few_candidates

# What is told, for every concept that has gates below 1 there: its number, the block's row, the stream, its heads [n] and which
# tokens pass their gates, bool [B, n, L]. `recorder.Forward.saw` is one.
Seen = Callable[[int, int, str, Tensor, Tensor], None]


class _Part(NamedTuple):
    """What one concept does to the heads of one plan. A head it leaves alone has directions, θ and gate 0: LRS 0."""

    directions: Tensor  # [H, D, R + S], from fold
    theta: Tensor  # [H, P], strength included
    gate: Tensor  # [H]
    unsafe: Tensor | None  # [H, R + S, R], directionsᵀ U: the unsafe subspace seen from the directions; None if S = 0
    own: Tensor | None = None  # int64 [n]: the plan's heads whose gates this concept asks; set when plans are merged
    concept: int = 0  # its number


class _Plan(NamedTuple):
    """All rotations of one block, role and stream: the heads that any concept turns, and the concepts in order."""

    heads: Tensor  # int64 [H]
    parts: list[_Part]
    directions: Tensor  # [H, D, sum of R + S]: those of all parts, side by side


class _Active(NamedTuple):
    """A concept in use."""

    number: int
    concept: Concept
    strength: float  # factor on its angles
    threshold: float | None  # one gate for all heads, or the concept's own


class Protection:
    """Rotates a model's queries and keys away from concepts, one after the other. Safe to share between threads.

    strengths: one factor per concept, multiplied with the concept's own; 0 switches it off (default 1 each). What turns
    is `effective`: the product, held where it would turn further than half a turn (see `held_strengths`).
    thresholds: per concept one gate in [0, 1] for all its heads, or None for the concept's gates (default None each).
    Raises ValueError where a concept was made for another geometry, and for lists or numbers that do not fit.
    """

    def __init__(
        self,
        concepts: Sequence[Concept],
        geometry: Geometry,
        strengths: Sequence[float] | None = None,
        thresholds: Sequence[float | None] | None = None,
    ):
        self.concepts = tuple(concepts)
        self.geometry = geometry
        for concept in self.concepts:
            geometry.require(concept.geometry, f"concept {concept.slug!r}")
        self.strengths = _per_concept("strengths", strengths, 1.0, self.concepts, _finite, "a finite number")
        self.thresholds = _per_concept("thresholds", thresholds, None, self.concepts, _share, "0 to 1, or None")
        pairs = zip(self.concepts, self.strengths, strict=True)
        self.effective = held_strengths(self.concepts, [concept.strength * factor for concept, factor in pairs])
        self._covered = {row for each in self._active() for row in _moving_rows(each.concept)}
        self._plans: dict[torch.device, dict[tuple[int, str, str], _Plan]] = {}
        self._lock = threading.Lock()

    def covers(self, block_type: str, block_index: int) -> bool:
        """Whether any vector of this block can turn. Raises ValueError for a block the geometry does not have."""
        return self.geometry.row(block_type, block_index) in self._covered

    def rotate(
        self,
        x: Tensor,
        role: str,
        block_type: str,
        block_index: int,
        text: tuple[int, int],
        image: tuple[int, int],
        seen: Seen | None = None,
        own: bool = False,
    ) -> Tensor:
        """R(x) x for the queries or keys x [B, H, L, D] of one block, taken after QK-norm and before RoPE.

        role 'q' or 'k'; text and image are half-open, disjoint token spans (start, stop), empty where there is none.
        Text tokens turn by generator_text, image tokens by generator_image, and every concept takes its LRS from the
        unrotated vector. Float32 inside (float64 for float64), x's dtype out. x is not written to, and is returned as
        the same object where there is nothing to do; unless it is the caller's `own`, which nobody else holds: then
        the turned vectors are written into it, which saves a copy, half of all the work on a CPU. Heads that are not
        safety-critical, tokens outside the spans and tokens not above the gate come back bit for bit. `seen`, if given,
        is told who was above. Raises ValueError for an `own` x that gradients are kept for.
        """
        if own and x.requires_grad:
            raise ValueError("x is to be written to, but gradients are kept for it: call without own")
        row = self.geometry.row(block_type, block_index)
        if row not in self._covered:
            return x
        plans, result = self._plans_on(x.device), x
        for stream, span in zip(STREAMS, (text, image), strict=True):
            plan = plans.get((row, role, stream))
            if plan is not None and span[0] < span[1]:
                assert 0 <= span[0] and span[1] <= x.shape[2], f"{stream} span {span} in {x.shape[2]} tokens"
                tell = None if seen is None else partial(seen, row=row, stream=stream)
                result = _rotate_span(x, result, plan, *span, tell, own)
        return result

    def clear(self) -> None:
        """Drop the tensors prepared per device; the next `rotate` makes them anew."""
        with self._lock:
            self._plans = {}

    def _active(self) -> list[_Active]:
        """The concepts that turn anything."""
        settings = zip(self.concepts, self.effective, self.thresholds, strict=True)
        return [_Active(number, *each) for number, each in enumerate(settings) if each[1] != 0]

    def _plans_on(self, device: torch.device) -> dict[tuple[int, str, str], _Plan]:
        plans = self._plans.get(device)
        if plans is None:
            with self._lock:
                plans = self._plans.get(device)
                if plans is None:
                    plans = self._plans[device] = _all_plans(self._active(), self.geometry, device)
        return plans


def _rotate_span(
    x: Tensor, result: Tensor, plan: _Plan, start: int, stop: int, tell: Callable[..., None] | None, own: bool
) -> Tensor:
    """`result` (x, or a copy of it) with tokens start to stop of the plan's heads turned; a copy, unless x is `own`."""
    span = x[:, :, start:stop]
    few = few_candidates(span, plan.heads, plan.directions, plan.parts) if _gathers(x.device) else None
    vectors = wide(span.index_select(1, plan.heads)) if few is None else few.gather(span, plan.heads)
    scales, coordinates = _scales(vectors, plan)
    if tell is not None:
        for part, scale in zip(plan.parts, scales, strict=True):
            if not len(part.own):
                continue
            passed = scale.ne(0) if few is None else few.spread(scale.ne(0), stop - start)
            tell(part.concept, heads=plan.heads[part.own], passed=passed.index_select(1, part.own))
    if few is not None and not any(bool(scale.any()) for scale in scales):
        return result
    turned = _turned(vectors, plan.parts, scales, coordinates).to(x.dtype)
    result = x.clone() if result is x and not own else result
    if few is None:
        result[:, :, start:stop].index_copy_(1, plan.heads, turned)
    else:
        few.put(turned, result[:, :, start:stop], plan.heads)
    return result


def _scales(vectors: Tensor, plan: _Plan) -> tuple[list[Tensor], Tensor]:
    """Every part's gated LRS [B, H, L] of vectors [B, H, L, D], and their coordinates in the first part's directions."""
    with exact(vectors):
        coordinates = [torch.einsum("bhld,hdr->bhlr", vectors, p.directions.to(vectors)) for p in plan.parts]
        found = zip(coordinates, plan.parts, strict=True)
        return [gated(_risk(c, vectors, part), part.gate) for c, part in found], coordinates[0]


def _risk(coordinates: Tensor, vectors: Tensor, part: _Part) -> Tensor:
    """LRS [B, H, L] from the coordinates [B, H, L, R + S] in the part's directions."""
    if part.unsafe is not None:
        coordinates = torch.einsum("bhlp,hpr->bhlr", coordinates, part.unsafe.to(coordinates))
    return risk_of(coordinates, vectors)


def _turned(vectors: Tensor, parts: list[_Part], scales: list[Tensor], known: Tensor | None) -> Tensor:
    """vectors [B, H, L, D] turned by one concept after the other; `known` are their coordinates for the first."""
    for part, scale in zip(parts, scales, strict=True):
        vectors = turn(vectors, part.directions, part.theta, scale, known)
        known = None  # the next concept meets vectors that have moved
    return vectors


def _gathers(device: torch.device) -> bool:
    """Whether to turn only the tokens above a gate. They are few, so this saves nearly all the work; but to find
    them on a GPU would cost a synchronisation per block and shapes that depend on the data."""
    return device.type == "cpu"


def _all_plans(active: list[_Active], geometry: Geometry, device: torch.device) -> dict[tuple[int, str, str], _Plan]:
    """Plans by (row, role, stream), for those that turn something."""
    # not inference tensors, even if first asked for in inference mode: gradients may pass through them later
    with torch.inference_mode(False), torch.no_grad():
        found = defaultdict(list)
        for each in active:
            for stream in STREAMS:
                for row, role, heads, part in _parts_of(each, stream):
                    found[row, role, stream].append((heads, part))
        return {key: _merged(parts, geometry, device) for key, parts in found.items()}


def _parts_of(active: _Active, stream: str) -> Iterator[tuple[int, str, Tensor, _Part]]:
    """(row, role, heads, part) of every block of one concept, without the heads whose generator is zero."""
    number, concept, strength, threshold = active
    moving = concept.moving(stream)
    if not moving.any():
        return
    roles = concept.acts(stream)
    bases = [concept.basis(role, stream)[moving] for role in roles]
    theta, *folded = fold(concept.generator(stream)[moving], *bases)
    # heads are sorted, so those of a block lie together
    rows, counts = (each.tolist() for each in _rows(concept)[moving].unique_consecutive(return_counts=True))
    heads = concept.heads[moving, 2].long().split(counts)
    for role, basis, directions in zip(roles, bases, folded, strict=True):
        unsafe = (directions.mT.double() @ basis[..., : basis.shape[-1] - concept.reach].double()).float()
        gate = concept.gate(role, stream)[moving]
        fields = (directions, strength * theta, gate if threshold is None else torch.full_like(gate, threshold), unsafe)
        for row, own, *tensors in zip(rows, heads, *(each.split(counts) for each in fields), strict=True):
            yield row, role, own, _Part(*tensors[:3], tensors[3] if concept.reach else None, concept=number)


def _merged(parts: list[tuple[Tensor, _Part]], geometry: Geometry, device: torch.device) -> _Plan:
    """One plan over the union of the heads of several concepts."""
    if len(parts) == 1:
        heads, part = parts[0]
        tensors = [None if each is None else each.to(device) for each in part[:4]]
        part = _Part(*tensors, _open(part).nonzero()[:, 0].to(device), part.concept)
        return _Plan(heads.to(device), [part], part.directions)
    heads = torch.cat([heads for heads, _ in parts]).unique()

    def placed(values: Tensor | None, own: Tensor) -> Tensor | None:
        """`values` of a concept's own heads in the rows of all the plan's heads, 0 elsewhere."""
        if values is None:
            return None
        full = values.new_zeros(geometry.heads, *values.shape[1:])
        full[own] = values
        return full[heads].to(device)

    def merged(own: Tensor, part: _Part) -> _Part:
        tensors = {name: placed(getattr(part, name), own) for name in ("directions", "theta", "gate", "unsafe")}
        return part._replace(**tensors, own=torch.isin(heads, own[_open(part)]).nonzero()[:, 0].to(device))

    placed_parts = [merged(own, part) for own, part in parts]
    return _Plan(heads.to(device), placed_parts, torch.cat([part.directions for part in placed_parts], dim=-1))


def _open(part: _Part) -> Tensor:
    """bool [H]: gates that a token can pass. No LRS is above 1, so a gate of 1 is not asked, and nothing is told of it."""
    return part.gate < 1


def _rows(concept: Concept) -> Tensor:
    """Row in the head map of every head's block, [N]."""
    return concept.heads[:, 0] * concept.geometry.double_blocks + concept.heads[:, 1]


def _moving_rows(concept: Concept) -> list[int]:
    return _rows(concept)[concept.moving("text") | concept.moving("image")].tolist()


def _per_concept(what: str, values, default, concepts: tuple[Concept, ...], fits, expected: str) -> tuple:
    values = (default,) * len(concepts) if values is None else tuple(values)
    if len(values) != len(concepts):
        raise ValueError(f"{what}: got {len(values)}, expected one for each of the {len(concepts)} concepts")
    for value, concept in zip(values, concepts, strict=True):
        if not fits(value):
            raise ValueError(f"{what}: got {value!r} for concept {concept.slug!r}, expected {expected}")
    return values


def _finite(value) -> bool:
    return value is not None and math.isfinite(value)


def _share(value) -> bool:
    return value is None or 0 <= value <= 1
