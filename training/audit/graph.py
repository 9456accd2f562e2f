"""One small graph for both forms of a ComfyUI workflow, and where models flow in it.

An input holds a Link to another node's output, a Value, or is Unknown with the reason; an input that nothing is linked to is
missing. The API form becomes a graph here, the editor's form in `editor`.

Types of slots come from ComfyUI's own nodes (comfyui_nodes.json, written by dev/node_table.py), else from what the editor
saved beside a slot, else from what is at the other end. Where nothing tells, a link that may carry a model counts as one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .file import Unreadable

MAX_NODES = 20_000  # of a workflow with its subgraphs unfolded
MODELS = {"MODEL", "GUIDER"}  # a guider is a model with its conditionings
DRAWN = {"LATENT", "IMAGE"}
ANY, OTHER = "*", ""
APPLY, LOAD, COMBINE, CALIBRATE, PROBE = (
    f"SafeRoPE_{name}" for name in ("Apply", "LoadConcept", "CombineConcepts", "CalibrateConcept", "RiskProbe")
)
_OURS = {
    APPLY: [{"model": "MODEL"}, ["MODEL", OTHER]],
    LOAD: [{}, [OTHER, OTHER]],
    COMBINE: [{"concepts": ANY}, [OTHER, OTHER, "IMAGE"]],
    CALIBRATE: [{"model": "MODEL", "latent": "LATENT"}, [OTHER, OTHER, "IMAGE"]],
    PROBE: [{"model": "MODEL", "latent": "LATENT"}, [OTHER, OTHER, OTHER, "IMAGE", "IMAGE"]],
    "SafeRoPE_RiskMap": [{"latent": "LATENT", "image": "IMAGE"}, [OTHER, OTHER, "IMAGE", "IMAGE", "IMAGE", "IMAGE"]],
    "SafeRoPE_SaveConcept": [{}, [OTHER]],
    "SafeRoPE_InspectConcept": [{}, ["IMAGE", "IMAGE", OTHER]],
    "SafeRoPE_TinyWorld": [{}, ["MODEL", OTHER, OTHER]],
}
_ASKS_ONLY = {"AddNoise", CALIBRATE, PROBE}  # take a model and may give a latent or picture, but draw nothing
# what unknown nodes call a model, in the API form, which has no types
_MODEL_NAME = re.compile(r"(\w*_)?(model|unet|guider|pipe|basic_pipe)_?\d*", re.IGNORECASE)
_DRAWN_NAME = re.compile(r"samples|latents?|latent_image|images?|pixels", re.IGNORECASE)


@dataclass(frozen=True)
class Link:
    """The output of another node."""

    source: str
    slot: int


@dataclass(frozen=True)
class Value:
    """A constant: a widget's value, or one that a primitive node brings."""

    value: Any


@dataclass(frozen=True)
class Unknown:
    """Something that comes from where it cannot be followed to."""

    reason: str


Input = Link | Value | Unknown


@dataclass
class Node:
    """A node that runs, or a bypassed one, which stays as something that passes on what has its type."""

    id: str
    kind: str
    inputs: dict[str, Input] = field(default_factory=dict)
    input_types: dict[str, str] = field(default_factory=dict)
    output_types: list[str] = field(default_factory=list)
    bypassed: bool = False


@dataclass
class Graph:
    """Nodes by id; `opaque`: what may sample out of sight (id and reason); `notes`: what else is worth telling."""

    nodes: dict[str, Node] = field(default_factory=dict)
    opaque: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, node: Node) -> None:
        if node.id in self.nodes:
            raise Unreadable(f"has two nodes of the id {node.id!r:.60}")
        if len(self.nodes) >= MAX_NODES:
            raise Unreadable(f"has more than {MAX_NODES} nodes with its subgraphs unfolded")
        self.nodes[node.id] = node


def from_api(prompt: Any) -> Graph:
    """The graph of an API form, {node id: {"class_type", "inputs"}}. Raises Unreadable for anything else."""
    if not isinstance(prompt, dict) or not prompt:
        raise Unreadable('has no nodes, expected {node id: {"class_type": ..., "inputs": ...}}')
    graph = Graph()
    for key, entry in prompt.items():
        kind, inputs = (entry.get("class_type"), entry.get("inputs", {})) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(inputs, dict):
            raise Unreadable(f'has an entry {key!r:.60} that is no node, expected {{"class_type": ..., "inputs": ...}}')
        graph.add(Node(key, kind, {name: _api_input(value, prompt) for name, value in inputs.items()}))
    return graph


def _api_input(value: Any, prompt: dict) -> Input:
    if isinstance(value, list) and len(value) == 2 and is_slot(value[1]) and type(value[0]) in (str, int):
        source = str(value[0])
        if source in prompt:
            return Link(source, int(value[1]))
        return Unknown(f"a link from node {source:.60}, which is not there")
    if isinstance(value, dict) and "__value__" in value:  # how a list is told from a link
        return Value(value["__value__"])
    return Value(value)


def is_slot(value: Any) -> bool:
    """Whether it is a number of an output: a whole one, not negative; ComfyUI takes 0.0 for 0."""
    return type(value) in (int, float) and 0 <= value < MAX_NODES and value == int(value)


@cache
def node_table() -> dict[str, list]:
    """{node: [{input: type}, [types of outputs]]} of ComfyUI's own nodes and ours. No state: the file's content."""
    text = (Path(__file__).parent / "comfyui_nodes.json").read_text(encoding="utf-8")
    return json.loads(text) | _OURS


def declared(kind: Any) -> str:
    """The type that the editor saved, as the table has it: one of four, ANY where it may be one, else OTHER."""
    if not isinstance(kind, str) or kind in ("", "*") or kind.startswith("COMFY_"):
        return ANY
    parts = {part.strip().upper() for part in kind.split(",")}
    return kind.upper() if kind.upper() in MODELS | DRAWN else ANY if parts & (MODELS | DRAWN | {ANY}) else OTHER


class Flow:
    """Where models flow in a graph."""

    def __init__(self, graph: Graph):
        self.graph, self.table = graph, node_table()
        self.consumers: dict[str, list[tuple[Node, str, Link]]] = {key: [] for key in graph.nodes}
        for node in graph.nodes.values():
            for name, value in node.inputs.items():
                if isinstance(value, Link):
                    self.consumers[value.source].append((node, name, value))
        self.touched = self._touched()

    def known(self, node: Node) -> bool:
        return node.kind in self.table and not node.bypassed

    def taken(self, node: Node, name: str) -> str:
        """The type that an input takes."""
        if self.known(node):
            slots = self.table[node.kind][0]
            return slots.get(name, ANY if "." in name else OTHER)  # dotted: one of a growing row of inputs
        return node.input_types.get(name, ANY)

    def given(self, node: Node, slot: int) -> str:
        """The type that an output has by itself, ANY where it does not tell."""
        types = self.table[node.kind][1] if self.known(node) else node.output_types
        return types[slot] if slot < len(types) else ANY

    def _plainly(self, node: Node, name: str, link: Link) -> bool | None:
        """Whether a link carries a model by its ends; None where neither end tells."""
        taken, given = self.taken(node, name), self.given(self.graph.nodes[link.source], link.slot)
        if self.known(node) and taken != ANY:
            return taken in MODELS
        if {taken, given} & MODELS:
            return True
        if taken == given == ANY:
            return True if _MODEL_NAME.fullmatch(name) else None
        return False

    def _touched(self) -> set[str]:
        """Nodes of unknown types that a model goes into: what comes out of them, to others of the kind, may be one."""
        found = {
            node.id
            for links in self.consumers.values()
            for node, name, link in links
            if self._plainly(node, name, link)
        }
        todo = list(found)
        while todo:
            for node, name, link in self.consumers[todo.pop()]:
                if self._plainly(node, name, link) is None and node.id not in found:
                    found.add(node.id)
                    todo.append(node.id)
        return found

    def carries(self, node: Node, name: str, link: Link) -> bool:
        """Whether a link may carry a model to this input."""
        plainly = self._plainly(node, name, link)
        return link.source in self.touched if plainly is None else plainly

    def models(self, node: Node) -> list[tuple[str, Link | Unknown]]:
        """The inputs of a node that a model may come in by."""
        found: list[tuple[str, Link | Unknown]] = []
        for name, value in node.inputs.items():
            if isinstance(value, Link) and self.carries(node, name, value):
                found.append((name, value))
            elif isinstance(value, Unknown) and (self.taken(node, name) in MODELS or self._may_be(node, name)):
                found.append((name, value))
        return found

    def _may_be(self, node: Node, name: str) -> bool:
        return self.taken(node, name) == ANY and bool(_MODEL_NAME.fullmatch(name))

    def results(self, node: Node) -> set[str]:
        """Types of what a node gives: its own word, and for the slots it is silent on what the takers expect."""
        types = self.table[node.kind][1] if self.known(node) else node.output_types
        found = set(types) - {ANY}
        for taker, name, link in self.consumers[node.id]:
            if self.given(node, link.slot) != ANY:
                continue
            taken = self.taken(taker, name)
            if taken == ANY:
                taken = "MODEL" if _MODEL_NAME.fullmatch(name) else "LATENT" if _DRAWN_NAME.fullmatch(name) else OTHER
            found.add(taken)
        return found

    def samples(self, node: Node) -> bool:
        """Whether a node draws with a model: it takes one, and gives none on, or gives a latent or picture beside it.

        ComfyUI's own nodes are known: those that give neither (schedulers, savers) draw nothing, and those that give a
        latent beside a model prepare both.
        """
        if node.bypassed:
            return False
        results = self.results(node)
        if self.known(node):
            takes = bool(set(self.table[node.kind][0].values()) & MODELS)
            return takes and bool(results & DRAWN) and not results & MODELS and node.kind not in _ASKS_ONLY
        return bool(self.models(node)) and (not results & MODELS or bool(results & DRAWN))
