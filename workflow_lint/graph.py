"""One small graph for both forms of a ComfyUI workflow, and where models may flow in it.

An input holds a Link to another node's output, a Value, or is Unknown with the reason; an input that nothing is linked
to is missing. The API form becomes a graph here, the editor's form in `editor`.

Types come from the table of known classes alone: what a file says of a slot's type, its author may have made up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .file import Unreadable
from .known import ANY, EVERYWHERE, MODELS, OTHER, OUTSIDE, node_table

MAX_NODES = 20_000  # of a workflow with its subgraphs unfolded


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
    """Something that comes from where it cannot be followed to. `link`: it may be a link, and so bring a model."""

    reason: str
    link: bool = True


Input = Link | Value | Unknown


@dataclass
class Node:
    """A node that runs, or a bypassed one, which stays as something that passes on what it is given."""

    id: str
    kind: str
    inputs: dict[str, Input] = field(default_factory=dict)
    bypassed: bool = False

    @property
    def known(self) -> bool:
        return self.kind in node_table()


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
        if not isinstance(kind, str) or kind == OUTSIDE or not isinstance(inputs, dict):
            raise Unreadable(f'has an entry {key!r:.60} that is no node, expected {{"class_type": ..., "inputs": ...}}')
        if EVERYWHERE.fullmatch(kind):
            inputs = {}  # what it sends on is linked plainly in this form
        graph.add(Node(key, kind, {name: _api_input(value, prompt) for name, value in inputs.items()}))
    return graph


def _api_input(value: Any, prompt: dict) -> Input:
    """ComfyUI follows more than plain links (["1", false], ["1", -3], {"__value__": ["1", 0]}); its editor writes no
    others.
    """
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int:
        if value[1] >= 0:
            return (
                Link(*value) if value[0] in prompt else Unknown(f"a link from node {value[0]:.60}, which is not there")
            )
    if isinstance(value, dict) and "__value__" in value:
        return Unknown("a value in a wrapper (__value__), which may be a link")
    return Unknown("a list that is no plain link") if isinstance(value, list) else Value(value)


class Flow:
    """Where models may flow in a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.table = graph, node_table()
        self.consumers: dict[str, list[tuple[Node, str, Link]]] = {key: [] for key in graph.nodes}
        for node in graph.nodes.values():
            for name, value in node.inputs.items():
                if isinstance(value, Link):
                    self.consumers[value.source].append((node, name, value))
        self.holders = self._holders()

    def taken(self, node: Node, name: str) -> str:
        """The type that an input takes. A dotted name is one of a growing row of inputs."""
        if not node.known:
            return ANY
        slots = self.table[node.kind][0]
        return slots.get(name, slots.get(name.split(".")[0], OTHER))

    def given(self, link: Link) -> str:
        """The type that a link brings; ANY where its source does not tell."""
        node = self.graph.nodes[link.source]
        types = self.table[node.kind][1] if node.known else []
        return types[link.slot] if link.slot < len(types) else ANY

    def _holders(self) -> set[str]:
        """Nodes whose outputs of no type may be a model: not known, outside of a blueprint, or fed by one of these."""
        nodes = self.graph.nodes.values()
        found = {node.id for node in nodes if (not node.known and not node.bypassed) or node.kind == OUTSIDE}
        todo = list(self.graph.nodes)
        while todo:
            for node, name, link in self.consumers[todo.pop()]:
                model = self.given(link) in MODELS or (self.given(link) == ANY and link.source in found)
                if model and self.taken(node, name) == ANY and node.id not in found:
                    found.add(node.id)
                    todo.append(node.id)
        return found

    def carries(self, node: Node, name: str, link: Link) -> bool:
        """Whether a link may carry a model to this input."""
        taken, given = self.taken(node, name), self.given(link)
        return taken in MODELS | {ANY} and (given in MODELS or (given == ANY and link.source in self.holders))

    def models(self, node: Node) -> list[tuple[str, Link | Unknown]]:
        """The inputs of a node that a model may come in by; Unknown where what comes in there is not surely one."""
        found: list[tuple[str, Link | Unknown]] = []
        for name, value in node.inputs.items():
            taken = self.taken(node, name)
            if isinstance(value, Link) and self.carries(node, name, value):
                found.append((name, value))
            elif taken in MODELS and not isinstance(value, Unknown):
                found.append((name, Unknown("what is no model")))
            elif taken in MODELS or (taken == ANY and isinstance(value, Unknown) and value.link):
                found.append((name, value))
        return found
