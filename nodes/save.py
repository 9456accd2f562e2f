"""Writes concepts to ComfyUI's output folder, and nowhere else."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..saferope_core import Concept, save_concepts, sha256
from .host.files import FOLDER
from .inputs import ConceptType

# No separator, no dot, no drive: the name cannot leave the folder.
NAME = re.compile(r"[A-Za-z0-9_-]{1,80}")
LICENCES = re.compile(r"[A-Za-z0-9.+-]{1,60}")


class SaveConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeRoPE_SaveConcept",
            display_name="SafeRoPE Save Concept",
            category="SafeRoPE",
            description="Writes concepts to output/saferope as one file, where SafeRoPE Load Concept finds it. Never "
            "overwrites.",
            search_aliases=["export concept", "saferope"],
            inputs=[
                ConceptType.Input("concept", tooltip="The concepts to write."),
                io.String.Input("name", default="concept", tooltip="Letters, digits, - and _. The node adds a number."),
                io.Boolean.Input("half", default=True, tooltip="Half precision: half the size, and the same pictures."),
                io.String.Input("license", default="NOASSERTION", tooltip="SPDX name of the licence that you give it."),
            ],
            outputs=[io.String.Output("sha256", tooltip="The file's identity, for the pin of SafeRoPE Load Concept.")],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, concept: list[Concept], name: str, half: bool = True, license: str = "NOASSERTION"
    ) -> io.NodeOutput:
        if not NAME.fullmatch(name):
            raise ValueError(f"name is {name!r:.100}, expected 1 to 80 letters, digits, - and _: no folder, no ending.")
        if not LICENCES.fullmatch(license):
            raise ValueError(f"license is {license!r:.100}, expected an SPDX name such as apache-2.0 or cc0-1.0.")
        path = free_path(Path(folder_paths.get_output_directory()) / FOLDER, name)
        save_concepts(path, concept, torch.float16 if half else torch.float32, license)
        digest = sha256(path)
        return io.NodeOutput(digest, ui={"text": [f"{FOLDER}/{path.name}", f"sha256 {digest}"]})


def free_path(folder: Path, name: str) -> Path:
    """The first of `<name>_00001.safetensors`, `_00002`, ... that is not there yet."""
    os.makedirs(folder, exist_ok=True)
    number = 1
    while (folder / f"{name}_{number:05d}.safetensors").exists():
        number += 1
    return folder / f"{name}_{number:05d}.safetensors"
