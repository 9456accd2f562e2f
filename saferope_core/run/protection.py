"""The one object that both hosts ask, block by block: q or k and the token spans in, the rotated vectors out.

The way of a query: `Protection.rotate` finds the plan of its block, role and stream (`plan`), and the form for its
device (`forms`) computes the risk of the plan's heads and turns them.

Axes: B batch, H heads, L tokens, D head dimension.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..concept.concept import Concept
from ..concept.geometry import Geometry
from ..concept.stream import STREAMS
from ..concept.strength import held_strengths
from .forms import PACKED, Form, Seen, Told, form_of, turn_exact, turn_packed
from .packed import Packed, packed
from .plan import Active, Key, Plans, moved, moving_rows, plans_of
from .stored import Stored, on_device, stored

T = TypeVar("T")
APPLE = "mps"  # whose complex powers were not measured


class Protection:
    """Rotates a model's queries and keys away from concepts, one after the other. Safe to share between threads.

    strengths: one factor per concept, multiplied with the concept's own; 0 switches it off (default 1 each). The
    product is a factor on the risk, s = min(1, strength * gated LRS) (see `saturated`). `effective` are the factors in
    use: the products, held where copies would turn further than half a turn (see `held_strengths`).
    thresholds: per concept one gate in [0, 1] for all its heads, or None for the concept's gates (default None each).
    Raises ValueError where a concept was made for another geometry, and for lists or numbers that do not fit. It also
    does so where a head already turns fully at a threshold: such a gate would protect from little.
    """

    def __init__(
        self,
        concepts: Sequence[Concept],
        geometry: Geometry,
        strengths: Sequence[float] | None = None,
        thresholds: Sequence[float | None] | None = None,
    ) -> None:
        self.concepts = tuple(concepts)
        self.geometry = geometry
        for concept in self.concepts:
            geometry.require(concept.geometry, f"concept {concept.slug!r}")
        self.strengths = _per_concept("strengths", strengths, 1.0, self.concepts, _finite, "a finite number")
        self.thresholds = _per_concept("thresholds", thresholds, None, self.concepts, _share, "0 to 1, or None")
        pairs = zip(self.concepts, self.strengths, strict=True)
        self.effective = held_strengths(self.concepts, [concept.strength * factor for concept, factor in pairs])
        for each in self._active():
            _require_reached(each)
        self._covered = set().union(*(moving_rows(each.concept) for each in self._active()))
        self._folded: Plans | None = None  # on the CPU; kept, since to fold takes seconds
        self._stored: dict[tuple[str, torch.dtype], Stored] = {}  # by the kind of device, on the CPU as well
        self._prepared: dict[tuple[torch.device, torch.dtype | None], Plans | dict[Key, Packed]] = {}
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

        H is `geometry.heads_of(role)`, role 'q' or 'k'. text and image are half-open, disjoint token spans
        (start, stop), empty where there is none.
        Tokens turn by the generator of their stream, and every concept takes its LRS from the unrotated vector.
        Float32 inside (float64 for float64), x's dtype out; on a GPU directions have x's dtype too. x is not written
        to, and is returned as the same object where there is nothing to do. With `own`, the caller alone holds x: the
        turned vectors are written into it, which saves a copy, half of all the work on a CPU. Heads that are not
        safety-critical, tokens outside the spans and tokens not above the gate come back bit for bit (see `turn_plain`
        for −0.0). `seen`, if given, receives the tokens above the gates. Raises ValueError where gradients are kept for
        an `own` x.
        """
        if own and x.requires_grad:
            raise ValueError("x is to be written to, but gradients are kept for it: call without own")
        row = self.geometry.row(block_type, block_index)
        if row not in self._covered:
            return x
        form, result = form_of(x), x
        plans = self._plans_for(form, x)
        for stream, span in zip(STREAMS, (text, image), strict=True):
            plan = plans.get((row, role, stream))
            if plan is not None and span[0] < span[1]:
                assert 0 <= span[0] and span[1] <= x.shape[2], f"{stream} span {span} in {x.shape[2]} tokens"
                told = None if seen is None else Told(seen, row, stream, self.geometry.heads // x.shape[1])
                if isinstance(plan, Packed):
                    result = turn_packed(form, x, result, plan, span, told, own)
                else:
                    result = turn_exact(form, x, result, plan, span, told, own)
        return result

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Makes the tensors that `rotate` needs for such vectors without gradients, so that no step waits for them."""
        like = torch.empty(1, 1, 1, 1, device=device, dtype=dtype)
        self._plans_for(form_of(like), like)

    def clear(self) -> None:
        """Drop the tensors prepared per device; the next `prepare` or `rotate` copies them there again."""
        with self._lock:
            self._prepared = {}

    def _active(self) -> list[Active]:
        """The concepts that turn anything."""
        settings = zip(self.concepts, self.effective, self.thresholds, strict=True)
        return [Active(number, *each) for number, each in enumerate(settings) if each[1] != 0]

    def _plans_for(self, form: Form, x: Tensor) -> Plans | dict[Key, Packed]:
        key = (x.device, x.dtype if form in PACKED else None)
        plans = self._prepared.get(key)
        if plans is None:
            with self._lock:
                plans = self._prepared.get(key)
                if plans is None:
                    plans = self._prepared[key] = self._prepare(*key)
        return plans

    def _prepare(self, device: torch.device, dtype: torch.dtype | None) -> Plans | dict[Key, Packed]:
        if self._folded is None:
            self._folded = plans_of(self._active(), self.geometry)
        if dtype is not None:
            kind = device.type, dtype
            if kind not in self._stored:
                self._stored[kind] = stored(self._packed(*kind))
            return on_device(self._stored[kind], device)
        return {key: moved(plan, device) for key, plan in self._folded.items()}

    def _packed(self, kind: str, dtype: torch.dtype) -> dict[Key, Packed]:
        """On the CPU, for a kind of device."""
        assert self._folded is not None
        heads, cpu, powers = self.geometry.heads_of, torch.device("cpu"), kind != APPLE
        return {key: packed(plan, heads(key[1]), dtype, cpu, powers) for key, plan in self._folded.items()}


def _require_reached(active: Active) -> None:
    concept, threshold = active.concept, active.threshold
    if threshold is not None and concept.least_full <= threshold < 1:
        raise ValueError(
            f"thresholds: got {threshold:g} for concept {concept.slug!r}, expected less than {concept.least_full:.3g}: "
            "its heads measure risk relative to harmless tokens, and one turns fully from there on; take the concept's "
            "own gates"
        )


def _per_concept(
    what: str,
    values: Sequence[T] | None,
    default: T,
    concepts: Sequence[Concept],
    fits: Callable[[T], bool],
    expected: str,
) -> tuple[T, ...]:
    found = (default,) * len(concepts) if values is None else tuple(values)
    if len(found) != len(concepts):
        raise ValueError(f"{what}: got {len(found)}, expected one for each of the {len(concepts)} concepts")
    for value, concept in zip(found, concepts, strict=True):
        if not fits(value):
            raise ValueError(f"{what}: got {value!r} for concept {concept.slug!r}, expected {expected}")
    return found


def _finite(value: float) -> bool:
    return value is not None and math.isfinite(value)


def _share(value: float | None) -> bool:
    return value is None or 0 <= value <= 1
