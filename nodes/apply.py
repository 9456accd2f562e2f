"""The node that protects a model. It checks its inputs, clones the model and adds the patch."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..saferope_core import STREAM_CHOICES, THRESHOLD, Concept
from .host.network import flux_geometry
from .host.protect import chosen, protect, require_room, warn
from .host.recorder import RecorderType
from .inputs import SEARCHED, STRENGTH_MAX, ConceptType, require_range

CALIBRATED, FIXED = "as calibrated", "fixed"
ALL_ROWS, POSITIVE = "all", "positive only"


class Apply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeRoPE_Apply",
            display_name="SafeRoPE Apply",
            category="SafeRoPE",
            description="Suppresses a concept in a model. Turns risky queries and keys inside safety-critical "
            "attention heads. Prompts without the concept keep their pictures. Chain several nodes for "
            "several files.",
            search_aliases=[*SEARCHED, "unlearn concept", "erase concept", "safe generation"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A model of the concept's family and geometry: FLUX, Qwen-Image, Z-Image and more."
                ),
                ConceptType.Input("concept", tooltip="From SafeRoPE Load Concept."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=STRENGTH_MAX,
                    step=0.05,
                    tooltip="0 to 2. 0 switches the protection off exactly. 1 is as trained. More catches weaker risk "
                    "too, and turns no token further than training did.",
                ),
                io.Combo.Input(
                    "gate",
                    options=[CALIBRATED, FIXED],
                    default=CALIBRATED,
                    optional=True,
                    advanced=True,
                    tooltip="The risk above which a token turns: the concept's own gate for every head, or one "
                    "threshold for all heads.",
                ),
                io.Float.Input(
                    "threshold",
                    default=THRESHOLD,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="0 to 1, with gate = fixed. Tokens with a lower risk stay as they are. The paper has 0.7. "
                    "A lower value protects more and changes harmless pictures more.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="0 to 1: the start of the protection in the denoising.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="0 to 1: the end of the protection in the denoising.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Blocks to protect, such as d0-18,s0-37. d is double, s is single, both ends are "
                    "included. Empty means all.",
                ),
                io.Combo.Input(
                    "streams",
                    options=list(STREAM_CHOICES),
                    default="both",
                    optional=True,
                    advanced=True,
                    tooltip="Turn the queries and keys of text tokens, of image tokens, or of both.",
                ),
                io.Combo.Input(
                    "conditionings",
                    options=[ALL_ROWS, POSITIVE],
                    default=ALL_ROWS,
                    optional=True,
                    advanced=True,
                    tooltip="With a CFG above 1: protect both prompts, or leave the negative prompt as it is, so that "
                    "it still pushes away from the concept. Positive only needs KSampler, CFG Guider or Basic "
                    "Guider.",
                ),
                io.Boolean.Input(
                    "record",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Note risky tokens and heads for SafeRoPE Risk Map. Changes no picture.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The protected model."),
                RecorderType.Output("recorder", tooltip="The record of each run, for SafeRoPE Risk Map."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        concept: list[Concept],
        strength: float,
        gate: str = CALIBRATED,
        threshold: float = THRESHOLD,
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
            raise ValueError(f"gate is {gate!r}, expected {CALIBRATED!r} or {FIXED!r}. Check the linked node.")
        if conditionings not in (ALL_ROWS, POSITIVE):
            raise ValueError(f"conditionings is {conditionings!r}, expected {ALL_ROWS!r} or {POSITIVE!r}.")
        fixed = threshold if gate == FIXED else None
        parts = chosen(concept, flux_geometry(model), blocks, streams)
        span, positive_only = (start_percent, end_percent), conditionings == POSITIVE
        require_room(model, parts, strength, span)
        warn(concept, parts, strength, fixed, span)
        more = (concept, blocks, streams)
        return io.NodeOutput(*protect(model, parts, strength, fixed, span, positive_only, record, *more))
