"""Several concepts as one, and how much they overlap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..saferope_core import MAX_CONCEPTS, STREAMS, Concept, Protection, overlap, strength_notes, undone
from .draw.charts import heat_map
from .inputs import ConceptType

MOST = 32  # inputs
NUMBERED = 20  # concepts up to which the map's cells have room for their values


class CombineConcepts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeRoPE_CombineConcepts",
            display_name="SafeRoPE Combine Concepts",
            category="SafeRoPE",
            description="Joins several concepts into one input for SafeRoPE Apply, and shows how much they overlap. "
            "The strength of each is the strength of its SafeRoPE Load Concept.",
            search_aliases=["merge concepts", "several concepts", "saferope"],
            inputs=[
                io.Autogrow.Input(
                    "concepts",
                    template=io.Autogrow.TemplatePrefix(
                        ConceptType.Input("concept"), prefix="concept", min=1, max=MOST
                    ),
                    tooltip=f"1 to {MOST} inputs, applied in this order, with {MAX_CONCEPTS} concepts at most.",
                ),
            ],
            outputs=[
                ConceptType.Output("concept", tooltip="All of them, for SafeRoPE Apply."),
                io.String.Output("report", tooltip="How much each pair overlaps, for text and for image tokens."),
                io.Image.Output(
                    "overlap", tooltip="A map of the larger overlap: 0 nothing in common, 1 one inside the other."
                ),
            ],
        )

    @classmethod
    def execute(cls, concepts: dict[str, Any]) -> io.NodeOutput:
        found = [concept for name in concepts for concept in concepts[name]]
        if not 1 <= len(found) <= MAX_CONCEPTS:
            raise ValueError(
                f"These inputs hold {len(found)} concepts, expected 1 to {MAX_CONCEPTS}, as many as a concept file may "
                "hold. Take inputs away."
            )
        found, tell = distinct(found), _teller(len(found))
        values = overlaps(found, tell)
        names = [concept.name for concept in found]
        numbers = len(names) <= NUMBERED
        picture = heat_map(values.amax(0), names, names, "Overlap of concepts", "overlap", numbers=numbers)
        return io.NodeOutput(found, report(found, values), picture)


def _teller(count: int) -> Callable[[], None]:
    """A function to call for each pair. It shows progress, and raises ComfyUI's exception where it is told to stop."""
    bar = comfy.utils.ProgressBar(count * (count - 1) // 2)

    def tell() -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)

    return tell


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


def overlaps(concepts: list[Concept], tell: Callable[[], None] = lambda: None) -> Tensor:
    """Mean overlap [2, n, n] in [0, 1] of text and of image tokens, 1 on the diagonal; `tell` is called for every pair.

    Raises ValueError where geometries differ.
    """
    values = torch.eye(len(concepts)).repeat(len(STREAMS), 1, 1)
    for first, second in combinations(range(len(concepts)), 2):
        tell()
        found = overlap(concepts[first], concepts[second])
        values[:, first, second] = values[:, second, first] = torch.tensor([found.of(stream) for stream in STREAMS])
    return values


def report(concepts: list[Concept], values: Tensor) -> str:
    """A line for each concept, each pair, and each strength that does not act as it is; values [2, n, n]:
    `overlaps`."""
    lines = [f"{concept.name}: {len(concept.heads)} heads, strength {concept.strength:g}" for concept in concepts]
    for first, second in combinations(range(len(concepts)), 2):
        most, (text, image) = values[:, first, second].amax(), values[:, first, second]
        share = f"{most:.3f} (text {text:.3f}, image {image:.3f}; 0 none, 1 all)"
        lines.append(f"{concepts[first].name} / {concepts[second].name}: overlap {share}")
    lines += strength_notes(concepts, [concept.strength for concept in concepts])
    lines += undone([Protection(concepts, concepts[0].geometry)])
    return "\n".join(lines)
