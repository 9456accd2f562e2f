"""Concept files: where ComfyUI looks for them, and the node that reads one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..saferope_core import Concept, effect_of, load_concepts
from ..saferope_core import sha256 as file_sha256
from .draw.concept_pictures import introduced
from .host.files import FOLDER, find, models, named, require_pin
from .host.notices import passing
from .inputs import SEARCHED, STRENGTH_MAX, ConceptType, require_range

NAMED, DIGITS = 3, 12  # concepts and digits of the sha256 in the line on the node


def describe(concepts: list[Concept], digest: str) -> str:
    """The description of a concept file: plain text, the file's sha256, then a few lines for each concept.

    Only the first line begins with `sha256`. The file's own words follow later, in a line that names the concept or
    behind a bar, so that they cannot imitate it.
    """
    return "\n".join([f"sha256 {digest}", *map(_describe, concepts)])


def _describe(concept: Concept) -> str:
    lines = [
        *introduced(concept),
        f"{len(concept.heads)} safety-critical heads, rank {concept.rank}, acts on {concept.text.acts_on}, "
        f"{concept.mode} generator, strength {concept.strength:g}",
        f"for {concept.geometry.title()}",
        f"by itself it {effect_of(concept)}",
    ]
    return "\n".join(lines)


def _in_short(concepts: list[Concept], digest: str) -> str:
    """A line on the node: the file's concepts, model and identity. Slugs alone, as the page takes the text for HTML."""
    more = f" and {len(concepts) - NAMED} more" if len(concepts) > NAMED else ""
    names = ", ".join(concept.slug for concept in concepts[:NAMED])
    return f"{names}{more}, for {concepts[0].geometry.title()}, sha256 {digest[:DIGITS]}"


class LoadConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeRoPE_LoadConcept",
            display_name="SafeRoPE Load Concept",
            category="SafeRoPE",
            description="Reads a concept file for SafeRoPE Apply.",
            search_aliases=[*SEARCHED, "unlearn concept", "erase concept", "remove nudity"],
            inputs=[
                io.Combo.Input(
                    "concept",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A .safetensors file in models/saferope or output/saferope. It must be made for the model "
                    "that you protect: the list says which. The concepts of the tiny world are always there.",
                    extra_dict={"made_for": models()},
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=STRENGTH_MAX,
                    step=0.05,
                    optional=True,
                    tooltip="0 to 2, for this file alone. It multiplies with the strength of SafeRoPE Apply. Use it "
                    "for several files at once.",
                ),
                io.String.Input(
                    "sha256",
                    default="",
                    optional=True,
                    tooltip="If given, the file must have this sha256: the 64 digits at the start of this node's "
                    "description, with or without `sha256:` before them. With it a shared workflow uses no "
                    "other file of this name.",
                ),
            ],
            outputs=[
                ConceptType.Output("concept", tooltip="The concepts of the file."),
                io.String.Output("description", tooltip="The file's sha256, its concepts and its model."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, concept: str, **_: Any) -> str:
        """The content decides: a file replaced under its old name is read again."""
        path = find(concept)
        with named(concept, path):
            return file_sha256(path)

    @classmethod
    def execute(cls, concept: str, strength: float = 1.0, sha256: str = "") -> io.NodeOutput:
        require_range("strength", strength, 0.0, STRENGTH_MAX)
        path = find(concept)
        with named(concept, path):
            digest = file_sha256(path)
            require_pin(concept, digest, sha256)
            concepts = [replace(each, strength=each.strength * strength) for each in load_concepts(path)]
            changed = file_sha256(path) != digest
        if changed:
            raise ValueError(f"Concept file {concept!r} changed while it was read. Queue again.")
        passing(_in_short(concepts, digest))
        return io.NodeOutput(concepts, describe(concepts, digest))
