"""Several concepts as one, and how much they overlap."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..saferope_core import Concept, orthogonalised, overlap
from .concepts import ConceptType
from .pictures import heat_map

MOST = 32


class CombineConcepts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeRoPE_CombineConcepts",
            display_name="SafeRoPE Combine Concepts",
            category="SafeRoPE",
            description="Makes one input for SafeRoPE Apply of any number of concepts, and shows how much they overlap. The "
            "strength of each is that of its SafeRoPE Load Concept.",
            search_aliases=["merge concepts", "several concepts", "saferope"],
            inputs=[
                io.Autogrow.Input(
                    "concepts",
                    template=io.Autogrow.TemplatePrefix(
                        ConceptType.Input("concept"), prefix="concept", min=1, max=MOST
                    ),
                    tooltip=f"1 to {MOST} concepts, applied in this order.",
                ),
                io.Boolean.Input(
                    "orthogonalise",
                    default=False,
                    tooltip="Take out of each concept what earlier ones share with it, so that their order does not matter. "
                    "A shared part is then left to the earlier one.",
                ),
            ],
            outputs=[
                ConceptType.Output("concept", tooltip="All of them, for SafeRoPE Apply."),
                io.String.Output("report", tooltip="How much each pair overlaps, head by head on average."),
                io.Image.Output("overlap", tooltip="The same as a map: 0 nothing in common, 1 one inside the other."),
            ],
        )

    @classmethod
    def execute(cls, concepts: dict[str, Any], orthogonalise: bool = False) -> io.NodeOutput:
        found = distinct([concept for name in concepts for concept in concepts[name]])
        values = overlaps(found)
        if orthogonalise:
            for later in range(1, len(found)):
                for earlier in range(later):
                    found[later] = orthogonalised(found[later], found[earlier])
        names = [concept.name for concept in found]
        picture = heat_map(values, names, names, "Overlap of concepts", "overlap", numbers=True)
        return io.NodeOutput(found, report(found, values, orthogonalise), picture)


def distinct(concepts: list[Concept]) -> list[Concept]:
    """The concepts, with numbers added to slugs that come more than once, so that all can be told apart and saved."""
    result, seen = [], set()
    for concept in concepts:
        slug, number = concept.slug, 2
        while slug in seen:
            slug, number = f"{concept.slug}-{number}", number + 1
        seen.add(slug)
        result.append(concept if slug == concept.slug else replace(concept, slug=slug))
    return result


def overlaps(concepts: list[Concept]) -> Tensor:
    """Mean overlap [n, n] in [0, 1], 1 on the diagonal. Raises ValueError where geometries differ."""
    values = torch.eye(len(concepts))
    for first, second in combinations(range(len(concepts)), 2):
        values[first, second] = values[second, first] = overlap(concepts[first], concepts[second]).mean
    return values


def report(concepts: list[Concept], values: Tensor, orthogonalise: bool) -> str:
    """A line for each concept and each pair."""
    lines = [f"{concept.name}: {len(concept.heads)} heads, strength {concept.strength:g}" for concept in concepts]
    for first, second in combinations(range(len(concepts)), 2):
        share = f"{values[first, second]:.3f}"
        lines.append(f"{concepts[first].name} / {concepts[second].name}: overlap {share} (0 none, 1 all)")
    if orthogonalise and len(concepts) > 1:
        lines.append("taken apart: what a pair shared is left to the earlier one")
    return "\n".join(lines)
