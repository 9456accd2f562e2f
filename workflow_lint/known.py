"""The classes of nodes that an audit knows, the types that they take and give, and advice about other classes.

A class that is not here is not understood. Its effect on a model is not known, and its outputs may hold one.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

MODELS = {"MODEL", "GUIDER"}  # a guider is a model with its conditionings
DRAWN = {"LATENT", "IMAGE"}
ANY, OTHER = "*", ""
APPLY, LOAD, COMBINE, CALIBRATE, PROBE = (
    f"SafeRoPE_{name}" for name in ("Apply", "LoadConcept", "CombineConcepts", "CalibrateConcept", "RiskProbe")
)
# Stands for all nodes that a blueprint gets connected to. Readers refuse a file with a node of this class.
OUTSIDE = "outside of the blueprint, node"
# Classes of other packs. Their helper models caption, cut out, estimate depth or fill in: they are of types of their
# own, so that ComfyUI lets no diffusion model in or out there.
_HELPERS = (
    *("DownloadAndLoadFlorence2Model", "DownloadAndLoadFlorence2Lora", "Florence2ModelLoader", "Florence2Run"),
    *("DownloadAndLoadDepthAnythingV2Model", "DepthAnything_V2"),  # kijai/ComfyUI-DepthAnythingV2; above -Florence2
    *("INPAINT_LoadInpaintModel", "INPAINT_InpaintWithModel"),  # Acly/comfyui-inpaint-nodes: LaMa, MAT
)
_LOADERS = ("UnetLoaderGGUF", "UnetLoaderGGUFAdvanced")  # city96/ComfyUI-GGUF: ComfyUI's own model, in other weights
ASKS_ONLY = {"AddNoise", CALIBRATE, PROBE}  # take a model and may give a latent or picture, but draw nothing
EVERYWHERE = re.compile(r"(Anything|Prompts|Seed) Everywhere.*")  # cg-use-everywhere: draw nothing themselves
_VIRTUAL = re.compile(r"(easy )?[sg]etNode|" + EVERYWHERE.pattern, re.IGNORECASE)  # KJNodes, Easy-Use
_CONTEXT = re.compile(r"Context.*\(rgthree\)")


@cache
def node_table() -> dict[str, list]:
    """{node: [{input: type}, [types of outputs]]} of ComfyUI's own nodes, ours and some of other packs.

    A type is one of MODELS and DRAWN, ANY where a slot may take or give one of them, else OTHER.
    """
    text = (Path(__file__).parent / "comfyui_nodes.json").read_text(encoding="utf-8")
    others = {kind: [{}, []] for kind in (*_HELPERS, OUTSIDE)} | {kind: [{}, ["MODEL"]] for kind in _LOADERS}
    return json.loads(text) | others


def advice(kind: str) -> str:
    """The remedy for a node that is not known."""
    if _VIRTUAL.fullmatch(kind):
        return (
            "its links are not in the editor's file: audit the picture, or export the workflow in API form, with them"
        )
    if _CONTEXT.fullmatch(kind):
        return "put plain links in its place: its values have no names in the file"
    return "put a node of ComfyUI's own and plain links in its place, or mute it: its effect on a model is not known"
