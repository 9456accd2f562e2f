"""Workflows from the form in which ComfyUI's editor saves them to the form in which its HTTP API takes them.

graph = api_prompt(json.loads(BUNDLED.read_text()), server.object_info())
server.run(fill(graph, text="a red star ...", seed=7, concept="star.safetensors", strength=1.0))
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from .comfyui import ROOT

EXAMPLES = ROOT / "example_workflows"
BLUEPRINTS = ROOT / "subgraphs"
BUNDLED = EXAMPLES / "SafeRoPE tiny world.json"
MUTED, BYPASSED = 2, 4  # node modes of the editor
ASIDE = {"Note", "MarkdownNote"}  # live in the editor only
INLET, OUTLET = -10, -20  # the editor's ids for the inputs and the outputs of a subgraph, as nodes inside of it
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR"}  # input types that the editor gives a widget
UPLOAD = "upload"  # the button of an input for pictures
LOADERS = ["UNETLoader", "DualCLIPLoader", "VAELoader"]  # in the order of the tiny world's outputs
TINY = {  # by node and place: the tiny world's values in the place of FLUX's
    ("EmptySD3LatentImage", 0): 96,
    ("EmptySD3LatentImage", 1): 96,
    ("PrimitiveStringMultiline", 0): "a red star in the center on a pink background",
    ("SafeRoPE_LoadConcept", 0): "star.safetensors",
    ("SafeRoPE_CalibrateConcept", 13): "tiny world: star",
}
SEEDS = {"seed", "noise_seed"}  # INTs of these names get a widget beside them, whether the node asks for it or not


class Link(NamedTuple):
    """From an output to an input, both by position."""

    origin: int
    origin_slot: int
    target: int
    target_slot: int
    type: str


class Input(NamedTuple):
    """One input of a node as /object_info tells it. `options` holds the choices of a COMBO as "options"."""

    name: str
    kind: str
    options: dict
    required: bool

    @property
    def has_widget(self) -> bool:
        return self.kind in WIDGETS and not self.options.get("forceInput")

    @property
    def companion(self) -> str | None:
        """The widget that the editor puts beside this one and saves after it; the API does not know it."""
        asked = self.options.get("control_after_generate")
        if self.kind == "INT" and (asked or (asked is None and self.name in SEEDS)):
            return "control_after_generate"
        return UPLOAD if self.options.get("image_upload") else None


def inputs_of(info: dict) -> list[Input]:
    """All inputs of a node in the editor's order; `info` is its entry in /object_info."""
    found = []
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            kind, options = spec[0], dict(spec[1]) if len(spec) > 1 else {}
            if isinstance(kind, list):
                kind, options = "COMBO", options | {"options": kind}
            found.append(Input(name, kind, options, group == "required"))
    return found


def widget_names(info: dict) -> list[str]:
    """The names of the values that the editor saves for a node, by position, companions included."""
    pairs = ((each.name, each.companion) for each in inputs_of(info) if each.has_widget)
    return [name for pair in pairs for name in pair if name]


def links_of(graph: dict) -> dict[int, Link]:
    """The links of a workflow, which are lists, or of a subgraph's definition, which are objects, by their ids."""
    fields = ("origin_id", "origin_slot", "target_id", "target_slot", "type")
    rows = ([link["id"], *(link[f] for f in fields)] if isinstance(link, dict) else link for link in graph["links"])
    return {row[0]: Link(*row[1:6]) for row in rows}


def definitions(workflow: dict) -> dict[str, dict]:
    """The subgraphs that a workflow brings along, by their ids, which are the types of the nodes that
    stand for them."""
    return {each["id"]: each for each in workflow.get("definitions", {}).get("subgraphs", [])}


def api_prompt(workflow: dict, object_info: dict) -> dict:
    """{node id: {"class_type", "inputs"}} of a saved workflow; nodes in subgraphs get ids such as "5:3".

    `object_info` is the server's: it tells in which order a node's widgets were saved. Raises ValueError where the
    saved values do not fit the node, as after a change of its inputs.
    """
    scope = _Scope(workflow, definitions(workflow))
    return {
        place: {
            "class_type": node["type"],
            "inputs": _values(node, object_info[node["type"]]) | linked,
            "_meta": {"title": node.get("title", node["type"])},
        }
        for place, node, linked in scope.nodes()
    }


class _Scope:
    """A workflow or the inside of a subgraph, with the scope and the node that it stands in."""

    def __init__(self, graph: dict, subgraphs: dict[str, dict], prefix: str = "", outer: tuple | None = None) -> None:
        self.graph, self.subgraphs, self.prefix, self.outer = graph, subgraphs, prefix, outer
        self.links = links_of(graph)
        self.by_id = {node["id"]: node for node in graph["nodes"]}

    def inside(self, node: dict) -> _Scope:
        return _Scope(self.subgraphs[node["type"]], self.subgraphs, f"{self.prefix}{node['id']}:", (self, node))

    def nodes(self) -> Iterator[tuple[str, dict, dict]]:
        """(id, node, {input: source of its link}) of every node that runs."""
        for node in self.graph["nodes"]:
            if node["type"] in ASIDE or node.get("mode", 0) in (MUTED, BYPASSED):
                continue
            if node["type"] in self.subgraphs:
                yield from self.inside(node).nodes()
                continue
            sources = {i["name"]: self.source(i["link"]) for i in node.get("inputs", []) if i.get("link") is not None}
            yield f"{self.prefix}{node['id']}", node, {name: at for name, at in sources.items() if at is not None}

    def source(self, link: int) -> Any:
        """A link's source: [node id, output's index], a widget's value of a subgraph's node, or None for neither."""
        origin, slot = self.links[link].origin, self.links[link].origin_slot
        if origin == INLET:
            scope, node = self.outer
            inputs = {each["name"]: each for each in node.get("inputs", [])}
            name = self.graph["inputs"][slot]["name"]
            outside = inputs.get(name, {}).get("link")
            shown = (each for each in inputs if "widget" in inputs[each])
            values = dict(zip(shown, node.get("widgets_values") or [], strict=False))  # none: the values inside hold
            return values.get(name) if outside is None else scope.source(outside)
        if self.by_id[origin]["type"] in self.subgraphs:
            inner = self.inside(self.by_id[origin])
            return inner.source(inner.graph["outputs"][slot]["linkIds"][0])
        return [f"{self.prefix}{origin}", slot]


def _values(node: dict, info: dict) -> dict:
    """The widgets' values by name."""
    names, saved = widget_names(info), node.get("widgets_values", [])
    if len(saved) != len(names):
        raise ValueError(
            f"{node['type']}: the workflow holds {len(saved)} widget values, the node has {len(names)} ({names}). "
            "Open the workflow in ComfyUI, set the new inputs, and save it again."
        )
    asked = {each.name for each in inputs_of(info)}
    return {name: value for name, value in zip(names, saved, strict=True) if name in asked}


def fill(graph: dict, text: str, seed: int, concept: str, strength: float) -> dict:
    """A copy of the API form with another prompt, seed, concept file and strength."""
    filled = copy.deepcopy(graph)
    change(filled, "CLIPTextEncode", text=text, titled="Prompt")
    change(filled, "KSampler", seed=seed)
    change(filled, "SafeRoPE_LoadConcept", concept=concept)
    change(filled, "SafeRoPE_Apply", strength=strength)
    return filled


def change(graph: dict, class_type: str, titled: str | None = None, **values) -> None:
    """Sets inputs of all nodes of a class, or only where the title is `titled`. ValueError where there is none."""
    nodes = [n for n in graph.values() if n["class_type"] == class_type and titled in (None, n["_meta"]["title"])]
    if not nodes:
        raise ValueError(f"the workflow has no {class_type} node" + (f" titled {titled!r}" if titled else ""))
    for node in nodes:
        node["inputs"] |= values


def in_tiny_world(workflow: dict) -> dict:
    """A copy of a FLUX workflow, in the form of the editor, with the embedded model in the place of its three loaders,
    the tiny world's size, preset and star.

    So a workflow can be tried without FLUX's files. Nodes keep their ids.
    """
    made = copy.deepcopy(workflow)
    loaders = {node["id"]: LOADERS.index(node["type"]) for node in made["nodes"] if node["type"] in LOADERS}
    home = next(number for number, slot in loaders.items() if slot == 0)
    example = json.loads(BUNDLED.read_text(encoding="utf-8"))["nodes"]
    world = copy.deepcopy(next(node for node in example if node["type"] == "SafeRoPE_TinyWorld"))
    moved = [link for link in made["links"] if link[1] in loaders]
    for link in moved:
        link[1:3] = [home, loaders[link[1]]]
    for slot, output in enumerate(world["outputs"]):
        output["links"] = [link[0] for link in moved if link[2] == slot]
    first = next(node for node in made["nodes"] if node["id"] == home)
    first |= {key: world[key] for key in ("type", "inputs", "outputs", "properties", "widgets_values", "title")}
    made["nodes"] = [node for node in made["nodes"] if node["id"] == home or node["id"] not in loaders]
    for node in made["nodes"]:
        values = node.get("widgets_values", [])
        node["widgets_values"] = [TINY.get((node["type"], place), value) for place, value in enumerate(values)]
    return made
