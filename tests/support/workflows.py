"""Small workflows by hand, in API form, and the same in the editor's forms: links as lists, as objects, inside a
subgraph.
"""

from __future__ import annotations

import copy
from typing import Any

STAR = "star.safetensors"
PIN, OTHER_PIN = "ab" * 32, "cd" * 32
OUTPUTS = {
    "UNETLoader": ["MODEL"],
    "UnetLoaderGGUF": ["MODEL"],
    "CheckpointLoaderSimple": ["MODEL", "CLIP", "VAE"],
    "PixArtCheckpointLoader": ["MODEL"],
    "StrangeLoader": ["MODEL"],
    "LoraLoader": ["MODEL", "CLIP"],
    "StrangeLora": ["MODEL", "CLIP"],
    "ModelMergeSimple": ["MODEL"],
    "ComfySwitchNode": ["*"],
    "SafeRoPE_LoadConcept": ["SAFEROPE_CONCEPT", "STRING"],
    "SafeRoPE_CombineConcepts": ["SAFEROPE_CONCEPT", "STRING", "IMAGE"],
    "SafeRoPE_CalibrateConcept": ["SAFEROPE_CONCEPT", "STRING"],
    "StrangeConcept": ["SAFEROPE_CONCEPT"],
    "SafeRoPE_Apply": ["MODEL", "SAFEROPE_RECORDER"],
    "KSampler": ["LATENT"],
    "KSamplerAdvanced": ["LATENT"],
    "SamplerCustom": ["LATENT", "LATENT"],
    "SamplerCustomAdvanced": ["LATENT", "LATENT"],
    "StrangeSampler": ["LATENT"],
    "StrangeSamplerThatPassesOn": ["MODEL", "LATENT"],
    "BasicGuider": ["GUIDER"],
    "CFGGuider": ["GUIDER"],
    "DualCFGGuider": ["GUIDER"],
    "PerpNegGuider": ["GUIDER"],
    "DualModelGuider": ["GUIDER"],
    "BasicScheduler": ["SIGMAS"],
    "ModelSave": [],
    "PrimitiveFloat": ["FLOAT"],
    "PrimitiveString": ["STRING"],
    "StrangeFloat": ["FLOAT"],
    "EmptySD3LatentImage": ["LATENT"],
    "VAEDecode": ["IMAGE"],
    "SaveImage": [],
}
TAKEN = {
    "guider": "GUIDER",
    "concept": "SAFEROPE_CONCEPT",
    "samples": "LATENT",
    "images": "IMAGE",
    "on_true": "*",
    "on_false": "*",
}
WIDGETS = {
    "SafeRoPE_LoadConcept": {"concept": STAR, "strength": 1.0, "sha256": ""},
    "SafeRoPE_CombineConcepts": {"orthogonalise": False},  # of 0.1.0
    "SafeRoPE_Apply": {
        "strength": 1.0,
        "gate": "as calibrated",
        "threshold": 0.7,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "blocks": "",
        "streams": "both",
        "conditionings": "all",
    },
    "KSampler": {
        "seed": 1,
        "control_after_generate": "fixed",
        "steps": 20,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
    },
    "BasicScheduler": {"scheduler": "simple", "steps": 20, "denoise": 1.0},
    "PrimitiveFloat": {"value": 0.0},
    "PrimitiveString": {"value": ""},
}


def node(kind: str, **inputs: Any) -> dict:
    """A node in API form; an input ("3", 0) is a link, `__` in a name a dot."""
    values = {
        key.replace("__", "."): list(value) if isinstance(value, tuple) else value for key, value in inputs.items()
    }
    return {"class_type": kind, "inputs": values}


def protected(**apply: Any) -> dict:
    """Loader 1, concept 2, Apply 3, KSampler 4 and what saves its picture. `apply`: other inputs of Apply; None:
    without.
    """
    inputs = {"model": ("1", 0), "concept": ("2", 0), "strength": 1.0} | apply
    return {
        "1": node("UNETLoader", unet_name="flux1-dev.safetensors"),
        "2": node("SafeRoPE_LoadConcept", concept=STAR),
        "3": node("SafeRoPE_Apply", **{key: value for key, value in inputs.items() if value is not None}),
        "4": node("KSampler", model=("3", 0), seed=1, denoise=1.0),
        "5": node("VAEDecode", samples=("4", 0)),
        "6": node("SaveImage", images=("5", 0)),
    }


def editor(prompt: dict, modes: dict | None = None, objects: bool = False) -> dict:
    """The editor's form of an API form; `modes`: 2 muted, 4 bypassed, by node; `objects`: links as objects."""
    links, nodes = [], []
    for key, entry in prompt.items():
        kind, slots = entry["class_type"], []
        widgets = copy.deepcopy(WIDGETS.get(kind, {}))
        for name, value in entry["inputs"].items():
            if name in widgets:
                widgets[name] = None if isinstance(value, list) else value
            if isinstance(value, list):
                taken = TAKEN.get(name.split(".")[-1].rstrip("0123456789"), "MODEL" if "model" in name else "*")
                links.append([len(links) + 1, int(value[0]), value[1], int(key), len(slots), taken])
                slots.append({"name": name, "type": taken, "link": len(links)})
        outputs = [{"name": each, "type": each, "links": []} for each in OUTPUTS[kind]]
        made = {"id": int(key), "type": kind, "mode": (modes or {}).get(key, 0), "inputs": slots, "outputs": outputs}
        nodes.append(made | {"widgets_values": list(widgets.values())})
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    return {
        "nodes": nodes,
        "links": [dict(zip(names, link, strict=True)) for link in links] if objects else links,
        "version": 0.4,
    }


def inside(workflow: dict, mode: int = 0, name: str = "5b7a1d52-0000-4000-8000-000000000001") -> dict:
    """A workflow that holds another as a subgraph."""
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [link if isinstance(link, dict) else dict(zip(names, link, strict=True)) for link in workflow["links"]]
    others = workflow.get("definitions", {}).get("subgraphs", [])
    definition = {"id": name, "inputs": [], "outputs": [], "inputNode": {"id": -10}, "outputNode": {"id": -20}}
    definition |= {"nodes": workflow["nodes"], "links": links}
    instance = {"id": 70, "type": name, "mode": mode, "inputs": [], "outputs": []}
    return {"nodes": [instance], "links": [], "definitions": {"subgraphs": [definition, *others]}}


def forms(prompt: dict) -> dict[str, dict]:
    """The same workflow in every form."""
    listed = editor(prompt)
    return {
        "api": prompt,
        "lists": listed,
        "objects": editor(prompt, objects=True),
        "subgraph": inside(listed),
        "nested": inside(inside(listed), name="5b7a1d52-0000-4000-8000-000000000002"),
    }
