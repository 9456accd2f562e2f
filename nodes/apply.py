"""The node that protects a model: checks what it was given, clones the model, adds the patch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..saferope_core import (
    STREAM_CHOICES,
    Concept,
    Geometry,
    Protection,
    held_strengths,
    parse_blocks,
    restricted,
    strength_notes,
)
from .host.network import geometry_of
from .host.notices import notice, start_notices
from .host.patch import AttentionPatch, patched
from .host.recorder import Recorder, RecorderType
from .load import STRENGTH_MAX, ConceptType, require_range

CALIBRATED, FIXED = "as calibrated", "fixed"
ALL_ROWS, POSITIVE = "all", "positive only"
PAPER_THRESHOLD = 0.7  # the paper's gate, the same for every head
NOT_RECORDED = "record is off in SafeRoPE Apply"


def flux_geometry(model: Any) -> Geometry:
    """Blocks and heads of a ModelPatcher's FLUX. Raises ValueError for every other architecture."""
    return geometry_of(model.get_model_object("diffusion_model"))


def protect(
    model: Any,
    concepts: list[Concept],
    strength: float,
    threshold: float | None,
    span: tuple[float, float] = (0.0, 1.0),
    positive_only: bool = False,
    record: bool = True,
    left_out: Sequence[str] = (),
) -> tuple[Any, Recorder]:
    """A protected clone of `model` and its recorder. Where nothing can turn, the clone has no patch.

    `left_out`: names of concepts that were asked for and have nothing to turn; the recorder tells of them too.
    """
    count = len(concepts)
    geometry = flux_geometry(model)
    protection = Protection(concepts, geometry, strengths=[strength] * count, thresholds=[threshold] * count)
    idle = _why_idle(concepts, strength, span)
    names = [*(concept.name for concept in concepts), *left_out]
    recorder = Recorder(names, geometry, off=idle or (None if record else NOT_RECORDED))
    if idle:
        return model.clone(), recorder
    patch = AttentionPatch(protection, *span, positive_only=positive_only, recorder=recorder if record else None)
    return patched(model, patch), recorder


def warn(
    concepts: list[Concept], parts: list[Concept], strength: float, threshold: float | None, span: tuple[float, float]
) -> None:
    """Notices about all that was asked of the concepts and will not be; `parts` are what is left of them to turn."""
    start_notices()
    if strength == 0:  # how one asks for no protection
        return
    left = {part.slug for part in parts}
    for concept in concepts:
        if concept.slug not in left and concept.strength != 0:
            notice(
                f"concept {concept.slug!r} has nothing to turn in the chosen blocks and streams: it is not suppressed."
            )
    if parts and span[0] == span[1]:
        notice(f"start_percent and end_percent are both {span[0]:g}: nothing is suppressed in any step.")
    if parts and threshold == 1:
        notice("the gate is fixed at 1, which no token passes: nothing is suppressed.")
    for note in strength_notes(parts, [part.strength * strength for part in parts]):
        notice(note)


def require_room(model: Any, parts: list[Concept], strength: float, span: tuple[float, float]) -> None:
    """Raise ValueError where SafeRoPE Apply nodes before this one turn the same concept, and both would pass half a turn."""
    here = held_strengths(parts, [part.strength * strength for part in parts])
    patches = model.model_options.get("transformer_options", {}).get("patches", {}).get("attn1_patch", [])
    protections = [
        patch.protection
        for patch in patches
        if isinstance(patch, AttentionPatch) and max(patch.start, span[0]) < min(patch.end, span[1])
    ]
    concepts = [concept for each in protections for concept in each.concepts] + parts
    strengths = [strength for each in protections for strength in each.effective] + list(here)
    for concept, asked, held in zip(concepts, strengths, held_strengths(concepts, strengths), strict=True):
        if not math.isclose(asked, held):
            raise ValueError(
                f"Concept {concept.slug!r} is turned by another SafeRoPE Apply before this one in the same steps, and both "
                "together would turn it past half a turn, back to the unprotected model. Remove one of them, or lower their "
                "strengths."
            )


def _why_idle(concepts: list[Concept], strength: float, span: tuple[float, float]) -> str | None:
    """Why this is the unprotected model, bit for bit; None where it is protected."""
    if not concepts:
        return "no concept has anything to turn in the chosen blocks and streams"
    if strength == 0 or all(concept.strength == 0 for concept in concepts):
        return "the strength is 0"
    return f"start_percent and end_percent are both {span[0]:g}" if span[0] == span[1] else None


def chosen(concepts: list[Concept], geometry: Geometry, blocks: str, streams: str) -> list[Concept]:
    """What is left of the concepts in some blocks and streams. Raises ValueError for a selection that cannot be read."""
    for concept in concepts:
        geometry.require(concept.geometry, f"concept {concept.slug!r}")
    places = parse_blocks(blocks, geometry)
    parts = (restricted(concept, places, streams) for concept in concepts)
    return [part for part in parts if part is not None]


class Apply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeRoPE_Apply",
            display_name="SafeRoPE Apply",
            category="SafeRoPE",
            description="Suppresses a concept in a FLUX model by turning risky queries and keys inside a few attention "
            "heads. Prompts without the concept keep their pictures. Chain several nodes for several files.",
            search_aliases=["safety", "unlearn concept", "erase concept", "safe generation", "nsfw", "saferope"],
            inputs=[
                io.Model.Input("model", tooltip="A FLUX model of the geometry the concept was made for."),
                ConceptType.Input("concept", tooltip="From SafeRoPE Load Concept."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=STRENGTH_MAX,
                    step=0.05,
                    tooltip="0 to 2. 0 switches the protection off exactly, 1 turns as far as the concept was trained "
                    "for, more turns further, to half a turn at most.",
                ),
                io.Combo.Input(
                    "gate",
                    options=[CALIBRATED, FIXED],
                    default=CALIBRATED,
                    optional=True,
                    tooltip="From which risk on a token is turned: the concept's own value for every head, or one "
                    "threshold for all of them.",
                ),
                io.Float.Input(
                    "threshold",
                    default=PAPER_THRESHOLD,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="0 to 1, read with gate = fixed: tokens with a lower risk stay as they are. 0.7 in the "
                    "paper; lower protects more and changes harmless pictures more.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="0 to 1: where in the denoising the protection starts.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="0 to 1: where in the denoising the protection ends.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    optional=True,
                    tooltip="Which blocks to protect, such as d0-18,s0-37: d double, s single, both ends included. Empty: all.",
                ),
                io.Combo.Input(
                    "streams",
                    options=list(STREAM_CHOICES),
                    default="both",
                    optional=True,
                    tooltip="Whose queries and keys are turned: those of text tokens, of image tokens, or both.",
                ),
                io.Combo.Input(
                    "conditionings",
                    options=[ALL_ROWS, POSITIVE],
                    default=ALL_ROWS,
                    optional=True,
                    tooltip="With a CFG above 1: protect positive and negative prompt, or leave the negative one as it is, so "
                    "that it can still push away from the concept. Positive only needs KSampler, CFG Guider or Basic Guider.",
                ),
                io.Boolean.Input(
                    "record",
                    default=True,
                    optional=True,
                    tooltip="Note which tokens and heads were found risky, for SafeRoPE Risk Map. Changes no picture.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The protected model."),
                RecorderType.Output("recorder", tooltip="What the protection saw in each run, for SafeRoPE Risk Map."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        concept: list[Concept],
        strength: float,
        gate: str = CALIBRATED,
        threshold: float = PAPER_THRESHOLD,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        blocks: str = "",
        streams: str = "both",
        conditionings: str = ALL_ROWS,
        record: bool = True,
    ) -> io.NodeOutput:
        require_range("strength", strength, 0.0, STRENGTH_MAX)
        require_range("threshold", threshold, 0.0, 1.0)
        require_range("start_percent", start_percent, 0.0, 1.0)
        require_range("end_percent", end_percent, start_percent, 1.0)
        if gate not in (CALIBRATED, FIXED):
            raise ValueError(f"gate is {gate!r}, expected {CALIBRATED!r} or {FIXED!r}. Check what is linked to it.")
        if conditionings not in (ALL_ROWS, POSITIVE):
            raise ValueError(f"conditionings is {conditionings!r}, expected {ALL_ROWS!r} or {POSITIVE!r}.")
        fixed = threshold if gate == FIXED else None
        parts = chosen(concept, flux_geometry(model), blocks, streams)
        span, positive_only = (start_percent, end_percent), conditionings == POSITIVE
        require_room(model, parts, strength, span)
        warn(concept, parts, strength, fixed, span)
        left = {part.slug for part in parts}
        left_out = [each.name for each in concept if each.slug not in left]
        return io.NodeOutput(*protect(model, parts, strength, fixed, span, positive_only, record, left_out))
