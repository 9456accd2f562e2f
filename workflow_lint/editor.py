"""The graph of a workflow as ComfyUI's editor saves it: one plane of nodes, with subgraphs unfolded into it.

Reroutes, muted nodes and the borders of subgraphs become wires, which pass on their input. Muted and bypassed nodes
count as when the editor queues. A muted node (mode 2) gives nothing, nor does any node in it. A bypassed node (mode 4)
passes on its input of the type asked for. Here it passes on all inputs of that type, where the editor chooses one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .file import Unreadable
from .graph import MAX_NODES, Graph, Input, Link, Node, Unknown, Value
from .known import APPLY, OUTSIDE
from .scope import BYPASSED, MUTED, End, Scope, Sheet, objects, part
from .widgets import WIDGETS, primitive, widgets

MAX_NESTING = 32  # of subgraphs
MAX_LINKS = 100_000  # links and inputs with all subgraphs unfolded
MAX_HOPS = 200  # wires between two nodes
ASIDE = {"Note", "MarkdownNote"}
BLUEPRINT = (
    "this is a blueprint: its inputs count as connected, to a model without protection and to unknown "
    "concepts; audit the workflow that uses it"
)
GROUP = ("workflow>", "workflow/")  # how the type of a group node begins
GROUP_NODE = "a group node, which is not looked into; convert it to a subgraph"
NO_DEFINITION = "a subgraph whose definition is not in the file"


def from_editor(workflow: Any) -> Graph:
    """The graph of the editor's form. Raises Unreadable where it is not one."""
    if not isinstance(workflow, dict) or not workflow.get("nodes"):
        raise Unreadable("has no nodes, expected what ComfyUI's editor saves")
    return _Plane(workflow).flat()


def _definitions(workflow: dict) -> dict[str, Sheet]:
    """Subgraphs by id, nested ones too."""
    found: dict[str, Sheet] = {}
    todo = [workflow]
    while todo:
        for each in objects(part(todo.pop(), "definitions", dict), "subgraphs"):
            if not isinstance(each.get("id"), str) or each["id"] in found:
                raise Unreadable("has a subgraph without an id of its own")
            found[each["id"]] = Sheet(each)
            todo.append(each)
    return found


class _Plane:
    """`placed`: the nodes that run or are bypassed, each with its scope. `wires`: by place, a function from the number
    of an output to its source.
    """

    def __init__(self, workflow: dict) -> None:
        self.definitions, self.graph = _definitions(workflow), Graph()
        self.placed: dict[str, tuple[Scope, dict]] = {}
        self.wires: dict[str, Callable[[int], End | Input | None]] = {}
        self.nodes = self.links = 0
        root = Sheet(workflow)
        alone = list(root.nodes.values()) if len(root.nodes) == 1 and not root.links else []
        self.blueprint = next((node for node in alone if node["type"] in self.definitions), None)
        self._unfold(Scope(root))

    def _unfold(self, scope: Scope) -> None:
        self.nodes += len(scope.sheet.nodes)
        self.links += scope.sheet.size
        if self.nodes > MAX_NODES or self.links > MAX_LINKS:
            limits = f"{MAX_NODES} nodes or {MAX_LINKS} links and inputs"
            raise Unreadable(f"has more than {limits} with its subgraphs unfolded")
        for key, node in scope.sheet.nodes.items():
            self._place(scope, scope.prefix + key, node)

    def _place(self, scope: Scope, place: str, node: dict) -> None:
        """Puts a node into the plane, or a wire in its place."""
        kind, runs = node["type"], node["mode"] != BYPASSED
        if node["mode"] == MUTED:
            self.wires[place] = lambda _: Unknown("a muted node", link=False)
            if kind == APPLY:
                self.graph.notes.append(f"SafeRoPE Apply {place} is muted: it gives nothing")
        elif kind in ASIDE:
            self.wires[place] = lambda _: None
        elif runs and kind == "Reroute":
            self.wires[place] = lambda _: scope.into(node, 0)
        elif runs and kind == "PrimitiveNode":
            self.wires[place] = lambda _: primitive(node)
        elif runs and kind in self.definitions:
            self._instance(scope, place, node)
        else:
            self.placed[place] = (scope, node)
            if runs and kind.startswith(GROUP):
                self.graph.opaque.append((place, GROUP_NODE))
            elif runs and [len(each) for each in kind.split("-")] == [8, 4, 4, 4, 12]:
                self.graph.opaque.append((place, NO_DEFINITION))

    def _instance(self, scope: Scope, place: str, node: dict) -> None:
        """Unfolds a subgraph, with wires at its borders. The inputs of a blueprint count as connected."""
        if place.count(":") >= MAX_NESTING:
            raise Unreadable(f"has subgraphs nested more than {MAX_NESTING} deep, or one inside itself")
        inner = Scope(self.definitions[node["type"]], f"{place}:", scope, node)
        entries = inner.sheet.entries
        places: dict[str, list[int]] = {}
        for index, slot in enumerate(node["inputs"]):
            places.setdefault(str(slot.get("name")), []).append(index)

        def enter(number: int) -> End | Input | None:
            name = str(entries[number].get("name")) if number < len(entries) else ""
            found = places.get(name, [])
            if len(found) != 1:
                return (
                    Unknown(f"an input {name!r:.40} of a subgraph that is there {len(found)} times") if found else None
                )
            index = found[0]
            if node is self.blueprint and "widget" not in node["inputs"][index]:
                return Link(place, index)
            return scope.into(node, index)

        self.wires[inner.entry], self.wires[place] = enter, inner.out_of
        if node is self.blueprint:
            self.graph.nodes[place] = Node(place, OUTSIDE)
            self.graph.notes.append(BLUEPRINT)
        self._unfold(inner)

    def _follow(self, end: End | Input | None) -> Input | None:
        """The input at the end of wires. None: nothing is linked there."""
        for _ in range(MAX_HOPS):
            if not isinstance(end, tuple):
                return end
            place, slot = end
            if place in self.placed:
                return Link(place, slot)
            if place not in self.wires:
                return Unknown(f"a link from node {place:.60}, which is not there")
            end = self.wires[place](slot)
        return Unknown(f"links that run in a circle, or through more than {MAX_HOPS} reroutes")

    def flat(self) -> Graph:
        for place, (scope, node) in self.placed.items():
            made = Node(place, node["type"], widgets(scope, node), node["mode"] == BYPASSED)
            held = dict(made.inputs)
            names: set[str] = set()
            for index, slot in enumerate(node["inputs"]):
                name = slot["name"] if isinstance(slot.get("name"), str) else f"input {index}"
                found = self._follow(scope.into(node, index))
                if name in names:
                    found = Unknown(f"two inputs of the name {name!r:.60}")
                elif isinstance(found, Value) and made.kind in WIDGETS and found != held.get(name):
                    found = Unknown("a primitive node that holds another value than the widget itself", link=False)
                if found is not None:
                    made.inputs[name] = found
                names.add(name)
            self.graph.nodes[place] = made
        return self.graph
