"""The bundled workflow, from the form in which ComfyUI's editor saves it to the form in which its HTTP API takes it.

graph = api_prompt(json.loads(BUNDLED.read_text()), server.object_info())
server.run(fill(graph, text="a red star ...", seed=7, concept="star.safetensors", strength=1.0))
"""

from __future__ import annotations

import copy

from .comfyui import ROOT

BUNDLED = ROOT / "example_workflows" / "SafeRoPE tiny world.json"
MUTED, BYPASSED = 2, 4  # node modes of the editor
ASIDE = {"Note", "MarkdownNote"}  # live in the editor only
WIDGETS = {
    "INT",
    "FLOAT",
    "STRING",
    "BOOLEAN",
    "COMBO",
}  # input types with a widget, which the editor saves by position


def api_prompt(workflow: dict, object_info: dict) -> dict:
    """{node id: {"class_type", "inputs"}} of a saved workflow without subgraphs.

    `object_info` is the server's: it tells in which order a node's widgets were saved. Raises ValueError where the saved
    values do not fit the node, as after a change of its inputs.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    nodes = [n for n in workflow["nodes"] if n["type"] not in ASIDE and n.get("mode", 0) not in (MUTED, BYPASSED)]
    return {
        str(node["id"]): {
            "class_type": node["type"],
            "inputs": _values(node, object_info[node["type"]])
            | {i["name"]: sources[i["link"]] for i in node.get("inputs", []) if i.get("link") is not None},
            "_meta": {"title": node.get("title", node["type"])},
        }
        for node in nodes
    }


def _values(node: dict, info: dict) -> dict:
    """The widgets' values by name."""
    names = []
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            if isinstance(kind, list) or kind in WIDGETS:
                names += [name] + [None] * bool(options.get("control_after_generate"))  # a widget beside the seed's
    saved = node.get("widgets_values", [])
    if len(saved) != len(names):
        raise ValueError(
            f"{node['type']}: the workflow holds {len(saved)} widget values, the node has {len(names)} ({names}). "
            "Save the workflow again from the editor."
        )
    return {name: value for name, value in zip(names, saved, strict=True) if name}


def fill(graph: dict, text: str, seed: int, concept: str, strength: float) -> dict:
    """A copy of the API form with another prompt, seed, concept file and strength."""
    filled = copy.deepcopy(graph)
    _set(filled, "CLIPTextEncode", text=text, titled="Prompt")
    _set(filled, "KSampler", seed=seed)
    _set(filled, "SafeRoPE_LoadConcept", concept=concept)
    _set(filled, "SafeRoPE_Apply", strength=strength)
    return filled


def _set(graph: dict, class_type: str, titled: str | None = None, **values) -> None:
    nodes = [n for n in graph.values() if n["class_type"] == class_type and titled in (None, n["_meta"]["title"])]
    if not nodes:
        raise ValueError(f"the workflow has no {class_type} node" + (f" titled {titled!r}" if titled else ""))
    for node in nodes:
        node["inputs"] |= values
