"""Writes workflow_lint/comfyui_nodes.json: inputs and outputs of ComfyUI's own nodes and SafeRoPE's, for the audit of
workflows.

    python -m dev.node_table

The file names every node of the ComfyUI that is found; of inputs and outputs it keeps models, guiders, latents and
images.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from .comfyui import ROOT, ComfyUI

TABLE = ROOT / "workflow_lint" / "comfyui_nodes.json"
KEPT = {"MODEL", "GUIDER", "LATENT", "IMAGE"}
ANY = "*"  # a wildcard, or a node whose slots take the type of their link


def kind(spec: object) -> str:
    """The type of a slot: one of KEPT, ANY where it may be one of them, "" for all that is neither."""
    if not isinstance(spec, str):
        return ""  # a list of choices
    wild = spec == ANY or spec.startswith(("COMFY_MATCHTYPE", "COMFY_AUTOGROW", "COMFY_DYNAMIC"))
    parts = set(spec.split(","))
    return spec if spec in KEPT else ANY if wild or parts & KEPT else ""


def row(info: dict) -> list:
    """[{input: type}, [type of each output]] of a node, inputs without a type left out."""
    slots = {
        name: kind(spec[0]) for group in ("required", "optional") for name, spec in info["input"].get(group, {}).items()
    }
    return [{name: found for name, found in slots.items() if found}, [kind(spec) for spec in info["output"]]]


def main() -> None:
    with tempfile.TemporaryDirectory() as base, ComfyUI(Path(base)) as server:
        found = server.object_info()
    lines = [f"{json.dumps(name)}: {json.dumps(row(info))}" for name, info in sorted(found.items())]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{TABLE.name}: {len(lines)} nodes")


if __name__ == "__main__":
    main()
