"""The node that protects a model: checks what it was given, clones the model, adds the patch."""

from __future__ import annotations

from typing import Any

from comfy.ldm.flux.model import Flux
from comfy_api.latest import io

from ..saferope_core import Concept, Geometry, Protection
from .concepts import STRENGTH_MAX, ConceptType
from .patch import AttentionPatch, patched

CALIBRATED, FIXED = "as calibrated", "fixed"
PAPER_THRESHOLD = 0.7  # the paper's gate, the same for every head


def flux_geometry(model: Any) -> Geometry:
    """Blocks and heads of a ModelPatcher's FLUX. Raises ValueError for every other architecture.

    Other families call an attention patch of the same name with other vectors (Cosmos, Wan), so likeness will not do.
    """
    network = model.get_model_object("diffusion_model")
    network = getattr(network, "_orig_mod", network)  # torch.compile's wrapper
    if not isinstance(network, Flux):
        raise ValueError(
            f"SafeRoPE got a {type(network).__name__} model. Expected FLUX, as ComfyUI's own loaders load it "
            "(safetensors or GGUF). Connect a FLUX model, and load it without Nunchaku."
        )
    params = network.params
    family = "flux2" if params.global_modulation else "flux"
    return Geometry(
        params.depth, params.depth_single_blocks, params.num_heads, params.hidden_size // params.num_heads, family
    )


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high. ComfyUI checks widgets, but not values that come over a link."""
    if not low <= value <= high:  # false for NaN too
        raise ValueError(f"{name} is {value}, expected a number from {low:g} to {high:g}. Check what is linked to it.")


def protect(
    model: Any, concepts: list[Concept], strength: float, threshold: float | None, start: float, end: float
) -> Any:
    """A protected clone of `model`. Strength 0 and an empty range of steps give a clone without a patch."""
    count = len(concepts)
    protection = Protection(
        concepts, flux_geometry(model), strengths=[strength] * count, thresholds=[threshold] * count
    )
    if strength == 0 or start == end:
        return model.clone()
    return patched(model, AttentionPatch(protection, start, end))


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
                    "for, more turns further.",
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
            ],
            outputs=[io.Model.Output("model", tooltip="The protected model.")],
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
    ) -> io.NodeOutput:
        require_range("strength", strength, 0.0, STRENGTH_MAX)
        require_range("threshold", threshold, 0.0, 1.0)
        require_range("start_percent", start_percent, 0.0, 1.0)
        require_range("end_percent", end_percent, start_percent, 1.0)
        if gate not in (CALIBRATED, FIXED):
            raise ValueError(f"gate is {gate!r}, expected {CALIBRATED!r} or {FIXED!r}. Check what is linked to it.")
        fixed = threshold if gate == FIXED else None
        return io.NodeOutput(protect(model, concept, strength, fixed, start_percent, end_percent))
