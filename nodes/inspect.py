"""A concept in pictures: its heads, its spectrum, where it comes from."""

from __future__ import annotations

from comfy_api.latest import io

from ..saferope_core import Concept, effect_of
from ..saferope_core.concept.untrusted import printable
from .draw.charts import batched
from .draw.concept_pictures import head_map, introduced, spectrum
from .inputs import ConceptType

MOST_DRAWN = 16  # concepts: 64 of the largest geometry would take 2 GB of pictures


class InspectConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeRoPE_InspectConcept",
            display_name="SafeRoPE Inspect Concept",
            category="SafeRoPE",
            description="Shows the attention heads, the risk subspace and the origin of a concept.",
            search_aliases=["head map", "concept info", "provenance", "saferope"],
            inputs=[ConceptType.Input("concept", tooltip="From SafeRoPE Load Concept.")],
            outputs=[
                io.Image.Output("heads", tooltip="Δ of every head, a map for each concept. Framed heads turn."),
                io.Image.Output(
                    "spectrum", tooltip="The share of the concept's word in each direction of the subspace."
                ),
                io.String.Output("text", tooltip="Geometry, settings and origin."),
            ],
        )

    @classmethod
    def execute(cls, concept: list[Concept]) -> io.NodeOutput:
        drawn, left = concept[:MOST_DRAWN], len(concept) - MOST_DRAWN
        maps = batched([head_map(each) for each in drawn])
        spectra = batched([spectrum(each) for each in drawn])
        more = [f"Pictures show the first {MOST_DRAWN} concepts; {left} more are not drawn."] if left > 0 else []
        return io.NodeOutput(maps, spectra, "\n\n".join([*map(describe, concept), *more]))


def describe(concept: Concept) -> str:
    """The facts about a concept, in lines."""
    made, versions = concept.training.get("settings", {}), concept.training.get("versions", {})
    lines = [
        *introduced(concept),
        f"for {concept.geometry.title()}",
        f"risk in {concept.rank} of {concept.geometry.head_dim} dimensions, {concept.reach} more to turn into",
        f"turns {concept.acts('text')} of text and {concept.acts('image')} of image tokens, strength "
        f"{concept.strength:g}",
        f"generator: {concept.mode}",
        f"by itself it {effect_of(concept)}",
    ]
    if made:
        found = ", ".join(f"{key} {made[key]}" for key in ("model", "seed", "steps") if key in made)
        lines.append(printable(f"made with {found}"))
    if versions:
        lines.append(printable("by " + ", ".join(f"{key} {value}" for key, value in versions.items())))
    return "\n".join(lines)
