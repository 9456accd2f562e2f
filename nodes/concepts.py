"""Concept files: where ComfyUI looks for them, and the node that reads one."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..saferope_core import Concept, load_concepts, sha256

FOLDER = "saferope"  # models/saferope, output/saferope and `saferope:` in extra_model_paths.yaml
EXTENSIONS = {".safetensors"}  # never a pickle; an empty set would list every file
BUNDLED = Path(__file__).resolve().parent.parent / "tinyworld" / "concepts"

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


def describe(concepts: list[Concept], digest: str) -> str:
    """What a concept file does, for people: plain text, a few lines for each concept, then the file's sha256."""
    return "\n".join([*map(_describe, concepts), f"sha256 {digest}"])


def _describe(concept: Concept) -> str:
    return (
        f"{concept.name}: {concept.description}\n"
        f"{len(concept.heads)} safety-critical heads, rank {concept.rank}, acts on {concept.acts_on}, "
        f"{concept.mode} generator, strength {concept.strength:g}\n"
        f"for {concept.geometry.describe()}"
    )


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
                )
            ],
            outputs=[
                ConceptType.Output("concept", tooltip="The concepts of the file."),
                io.String.Output("description", tooltip="What the file suppresses, its model and its sha256."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, concept: str) -> str:
        """The content decides: a file replaced under its old name is read again."""
        return sha256(find(concept))

    @classmethod
    def execute(cls, concept: str) -> io.NodeOutput:
        path = find(concept)
        concepts = load_concepts(path)
        return io.NodeOutput(concepts, describe(concepts, sha256(path)))
