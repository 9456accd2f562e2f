"""Concept files: where ComfyUI looks for them, and the node that reads one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..saferope_core import Concept, load_concepts
from ..saferope_core import sha256 as file_sha256
from ..saferope_core.concept.untrusted import quoted

FOLDER = "saferope"  # models/saferope, output/saferope and `saferope:` in extra_model_paths.yaml
EXTENSIONS = {".safetensors"}  # never a pickle; an empty set would list every file
BUNDLED = Path(__file__).resolve().parent.parent / "tinyworld" / "concepts"

STRENGTH_MAX = 2.0

ConceptType = io.Custom("SAFEROPE_CONCEPT")  # list[Concept]


def register_folders() -> None:
    """Tell ComfyUI where concept files lie: the user's folders first, then those of the tiny world."""
    home = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.add_model_folder_path(FOLDER, home, is_default=True)
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.get_output_directory(), FOLDER))
    folder_paths.add_model_folder_path(FOLDER, str(BUNDLED))
    folder_paths.folder_names_and_paths[FOLDER][1].update(EXTENSIONS)


def find(name: str) -> str:
    """Path of a listed concept file. Raises FileNotFoundError for any other name: links can bring any text here."""
    listed = folder_paths.get_filename_list(FOLDER)
    path = folder_paths.get_full_path(FOLDER, name) if name in listed else None
    if path is None:
        raise FileNotFoundError(
            f"Concept file {name!r} was not found. Expected one of {listed}, the .safetensors files in "
            f"{folder_paths.get_folder_paths(FOLDER)}. Put the file into the first of these folders and press R."
        )
    return path


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high. ComfyUI checks widgets, but not values that come over a link."""
    if not low <= value <= high:  # false for NaN too
        raise ValueError(f"{name} is {value}, expected a number from {low:g} to {high:g}. Check what is linked to it.")


def require_pin(name: str, digest: str, pin: str) -> None:
    """Raises ValueError unless the pin is empty or the file's sha256, in any case and with spaces around it."""
    if pin.strip() and pin.strip().lower() != digest:
        raise ValueError(
            f"Concept file {name!r} has the sha256 {digest}, expected {pin.strip()[:80]!r}. It is another file than the one "
            "this workflow was made with: fetch that one, or clear the field if you trust this one."
        )


def describe(concepts: list[Concept], digest: str) -> str:
    """What a concept file does, for people: plain text, the file's sha256, then a few lines for each concept.

    The first line alone begins with `sha256`: the file's own words follow later, in a line that names the concept or
    behind a bar, so that they cannot pass for it.
    """
    return "\n".join([f"sha256 {digest}", *map(_describe, concepts)])


def introduced(concept: Concept) -> list[str]:
    """A concept's slug and name, and what its file says of it."""
    return [f"concept {concept.slug}: {concept.name}", *quoted(concept.description)]


def _describe(concept: Concept) -> str:
    lines = [
        *introduced(concept),
        f"{len(concept.heads)} safety-critical heads, rank {concept.rank}, acts on {concept.acts_on}, "
        f"{concept.mode} generator, strength {concept.strength:g}",
        f"for {concept.geometry.describe()}",
    ]
    return "\n".join(lines)


class LoadConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeRoPE_LoadConcept",
            display_name="SafeRoPE Load Concept",
            category="SafeRoPE",
            description="Reads a concept file: what SafeRoPE Apply is to suppress, and in which attention heads.",
            search_aliases=["safety", "unlearn concept", "erase concept", "remove nudity", "saferope"],
            inputs=[
                io.Combo.Input(
                    "concept",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A .safetensors file in models/saferope or output/saferope. It must have been made for the "
                    "model it is applied to. The tiny world's concepts are always there.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=STRENGTH_MAX,
                    step=0.05,
                    optional=True,
                    tooltip="0 to 2, for this file alone: a factor on what SafeRoPE Apply is set to. For several files at once.",
                ),
                io.String.Input(
                    "sha256",
                    default="",
                    optional=True,
                    tooltip="If given, the file must be this very one: the 64 digits that this node's description begins with. "
                    "Share a workflow with it, and nobody's other file of that name is used.",
                ),
            ],
            outputs=[
                ConceptType.Output("concept", tooltip="The concepts of the file."),
                io.String.Output("description", tooltip="The file's sha256, what it suppresses, and its model."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, concept: str, **_) -> str:
        """The content decides: a file replaced under its old name is read again."""
        return file_sha256(find(concept))

    @classmethod
    def execute(cls, concept: str, strength: float = 1.0, sha256: str = "") -> io.NodeOutput:
        require_range("strength", strength, 0.0, STRENGTH_MAX)
        path = find(concept)
        digest = file_sha256(path)
        require_pin(concept, digest, sha256)
        concepts = [replace(each, strength=each.strength * strength) for each in load_concepts(path)]
        if file_sha256(path) != digest:
            raise ValueError(f"Concept file {concept!r} changed while it was read. Queue again.")
        return io.NodeOutput(concepts, describe(concepts, digest))
