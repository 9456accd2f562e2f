"""The links of a graph that may carry a model, and the nodes that models pass from loaders to samplers.

Types come from the table of known classes alone: the author of a file may have made up the types in it.
"""

from __future__ import annotations

from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from itertools import islice
from typing import Any

from .graph import Graph, Input, Link, Node, Unknown
from .known import ANY, MODELS, OTHER, OUTSIDE, node_table

Way = tuple[str, Any]  # a node, and the way before it; None where a model begins


class Models:
    """The ways of models through a graph.

    - `order`: all nodes, each after the nodes that it takes from. Nodes that run in a circle are told as opaque.
    - `before`, `after`: the nodes that a model comes from, and goes to.
    - `broken`: nodes that surely get no model where one belongs, with the reason.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.order = self._sorted()
        self.before: dict[str, dict[str, None]] = {key: {} for key in self.order}
        self.after: dict[str, dict[str, None]] = {key: {} for key in self.order}
        self.broken: dict[str, str] = {}
        self._holders = {key for key, node in graph.nodes.items() if node.strange or node.kind == OUTSIDE}
        for key in self.order:
            for name, value in graph.nodes[key].inputs.items():
                self._look_at(graph.nodes[key], name, value)

    def _sorted(self) -> list[str]:
        nodes = self.graph.nodes
        sources = {
            key: [value.source for value in node.inputs.values() if isinstance(value, Link)]
            for key, node in nodes.items()
        }
        try:
            return list(TopologicalSorter(sources).static_order())
        except CycleError as error:
            self.graph.opaque.append((error.args[1][0], "takes from itself, by nodes that run in a circle"))
            return list(nodes)

    def _look_at(self, node: Node, name: str, value: Input) -> None:
        """Notes an input that takes a model, or surely none where one belongs."""
        taken = self._taken(node, name)
        if isinstance(value, Link) and taken in MODELS | {ANY} and self._carries(value):
            self.before[node.id][value.source] = self.after[value.source][node.id] = None
            if taken == ANY:
                self._holders.add(node.id)
        elif isinstance(value, Unknown) and (taken in MODELS or (taken == ANY and value.link)):
            self.broken[node.id] = value.reason
        elif taken in MODELS:
            self.broken[node.id] = "something that is no model"

    def _taken(self, node: Node, name: str) -> str:
        """The type that an input takes. A dotted name is one of a growing row of inputs."""
        if not node.known:
            return ANY
        slots = node_table()[node.kind][0]
        return slots.get(name, slots.get(name.split(".")[0], OTHER))

    def _carries(self, link: Link) -> bool:
        """Whether a link may bring a model: by its type, or of no type, from a node that may hold one."""
        types = node_table().get(self.graph.nodes[link.source].kind, [{}, []])[1]
        given = types[link.slot] if link.slot < len(types) else ANY
        return given in MODELS or (given == ANY and link.source in self._holders)

    def takes(self, key: str) -> bool:
        """Whether a node takes a model, or an input that may be one."""
        return bool(self.before[key]) or key in self.broken

    def ways(self, holding: Collection[str] = (), most: int = 1) -> dict[str, list[Way]]:
        """For each node, up to `most` ways on which a model reaches it around all nodes in `holding`."""
        found: dict[str, list[Way]] = {}
        for key in self.order:
            if key in holding:
                continue
            longer = ((key, way) for source in self.before[key] for way in found.get(source, ()))
            begins = not self.before[key] or key in self.broken
            found[key] = list(islice(longer, most)) or [(key, None)] * begins
        return found

    def reached(self, key: str, links: dict[str, dict[str, None]]) -> set[str]:
        """The node, and all nodes that models pass before it or after it."""
        seen, todo = {key}, [key]
        while todo:
            new = [each for each in links[todo.pop()] if each not in seen]
            seen.update(new)
            todo += new
        return seen


def path(way: Way | None) -> list[str]:
    """The nodes of a way, from where the model comes."""
    found = []
    while way:
        key, way = way
        found.append(key)
    return found[::-1]
