"""From concepts and settings to a protected clone of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...saferope_core import (
    Asked,
    Concept,
    Geometry,
    Protection,
    held_strengths,
    parse_blocks,
    require_effect,
    restricted,
    strength_notes,
)
from .network import flux_geometry
from .notices import notice, start_notices
from .patch import AttentionPatch, patched
from .receipts import asked as asked_of
from .recorder import Recorder

NOT_RECORDED = "record is off in SafeRoPE Apply"


def protect(
    model: Any,
    concepts: list[Concept],
    strength: float,
    threshold: float | None,
    span: tuple[float, float] = (0.0, 1.0),
    positive_only: bool = False,
    record: bool = True,
    whole: Sequence[Concept] = (),
    blocks: str = "",
    streams: str = "both",
) -> tuple[Any, Recorder]:
    """A protected clone of `model` and its recorder. Where nothing can turn, the clone has no patch.

    `concepts` are the parts of the `whole` ones in `blocks` and `streams`. Recorder and receipt name all of them.
    """
    count, kept = len(concepts), {concept.slug for concept in concepts}
    geometry = flux_geometry(model)
    protection = Protection(concepts, geometry, strengths=[strength] * count, thresholds=[threshold] * count)
    idle = _why_idle(concepts, strength, span)
    names = [concept.name for concept in (*concepts, *(each for each in whole if each.slug not in kept))]
    recorder = Recorder(names, geometry, off=idle or (None if record else NOT_RECORDED))
    if idle:
        return model.clone(), recorder
    before = [patch.protection for patch in _patches(model, span)]
    told = asked_of(whole or concepts, protection, span, blocks, streams, positive_only, before)
    _tell(told, whole or concepts, threshold)
    patch = AttentionPatch(protection, *span, positive_only=positive_only, recorder=recorder, asked=told)
    return patched(model, patch), recorder


def _tell(told: Asked, concepts: Sequence[Concept], threshold: float | None) -> None:
    """Shows notices of concepts that turn nothing by these settings, and of concepts that others turn back. Raises
    ValueError for a concept that turns nothing by any settings.
    """
    whole = {concept.slug: concept for concept in concepts}
    for each in told.concepts:
        if each.effective and not each.turning and threshold != 1:  # `warn` has told of that
            require_effect(whole[each.slug], threshold)
            notice(
                f"concept {each.slug!r} turns nothing: the chosen gate, blocks, streams or strength leave no effect."
            )
    for sentence in told.undone:
        notice(f"{sentence}.")


def _why_idle(concepts: list[Concept], strength: float, span: tuple[float, float]) -> str | None:
    """The reason why the model stays as it is, bit for bit; None where it gets protected."""
    if not concepts:
        return "no concept has anything to turn in the chosen blocks and streams"
    if strength == 0 or all(concept.strength == 0 for concept in concepts):
        return "the strength is 0"
    return f"start_percent and end_percent are both {span[0]:g}" if span[0] == span[1] else None


def chosen(concepts: list[Concept], geometry: Geometry, blocks: str, streams: str) -> list[Concept]:
    """The parts of the concepts in some blocks and streams. Raises ValueError for a selection that
    cannot be read."""
    for concept in concepts:
        geometry.require(concept.geometry, f"concept {concept.slug!r}")
    places = parse_blocks(blocks, geometry)
    parts = (restricted(concept, places, streams) for concept in concepts)
    return [part for part in parts if part is not None]


def require_room(model: Any, parts: list[Concept], strength: float, span: tuple[float, float]) -> None:
    """Raise ValueError where SafeRoPE Apply nodes before this one turn the same concept, and both would pass half a
    turn.
    """
    here = held_strengths(parts, [part.strength * strength for part in parts])
    protections = [patch.protection for patch in _patches(model, span)]
    concepts = [concept for each in protections for concept in each.concepts] + parts
    strengths = [strength for each in protections for strength in each.effective] + list(here)
    for concept, asked, held in zip(concepts, strengths, held_strengths(concepts, strengths), strict=True):
        if not math.isclose(asked, held):
            raise ValueError(
                f"Concept {concept.slug!r} is turned by another SafeRoPE Apply before this one in the same steps, and "
                "both together would turn it past half a turn, back to the unprotected model. Remove one of them, or "
                "lower their strengths."
            )


def _patches(model: Any, span: tuple[float, float]) -> list[AttentionPatch]:
    """Patches of the SafeRoPE Apply nodes before this one that act in the same steps."""
    patches = model.model_options.get("transformer_options", {}).get("patches", {}).get("attn1_patch", [])
    return [
        patch
        for patch in patches
        if isinstance(patch, AttentionPatch) and max(patch.start, span[0]) < min(patch.end, span[1])
    ]


def warn(
    concepts: list[Concept], parts: list[Concept], strength: float, threshold: float | None, span: tuple[float, float]
) -> None:
    """Shows a notice for each setting that leaves concepts without their effect. `parts`: their chosen parts.

    Raises ValueError for a concept that has nothing to turn anywhere.
    """
    start_notices()
    if strength == 0:  # the user asks for no protection
        return
    left = {part.slug for part in parts}
    for concept in concepts:
        if concept.slug not in left and concept.strength != 0:
            require_effect(concept, threshold)
            notice(
                f"concept {concept.slug!r} has nothing to turn in the chosen blocks and streams: it is not suppressed."
            )
    if parts and span[0] == span[1]:
        notice(f"start_percent and end_percent are both {span[0]:g}: nothing is suppressed in any step.")
    if parts and threshold == 1:
        notice("the gate is fixed at 1, which no token passes: nothing is suppressed.")
    for note in strength_notes(parts, [part.strength * strength for part in parts]):
        notice(note)
