"""Scopes of the editor's form, a workflow and each instance of a subgraph, and the links in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .file import Unreadable
from .graph import MAX_NODES, Unknown
from .known import OUTSIDE

MUTED, BYPASSED = 2, 4
MODES = (0, 1, MUTED, 3, BYPASSED)
MAX_SLOTS = 2_000  # inputs or outputs of one node
INPUT_NODE, OUTPUT_NODE = -10, -20  # where a subgraph does not name its own

End = tuple[str, int]  # an output: the place of its node in the whole workflow, and its number


class Sheet:
    """A workflow, or the definition of a subgraph, with its nodes and links checked.

    `links`: by number, the source and the target of each. `leaving`: by output of the subgraph, the links to it.
    """

    def __init__(self, holder: dict) -> None:
        self.entries, self.exits = slots(holder, "inputs"), slots(holder, "outputs")
        self.entry, leaving = (
            str(part(holder, name, dict).get("id", default))
            for name, default in (("inputNode", INPUT_NODE), ("outputNode", OUTPUT_NODE))
        )
        nodes = [_node(node) for node in objects(holder, "nodes")]
        self.nodes = {str(node["id"]): node for node in nodes}
        if len(self.nodes) < len(nodes) or self.entry in self.nodes:
            raise Unreadable("has two nodes of one id")
        self.links = dict(_link(link) for link in part(holder, "links", list) if link is not None)
        self.size = len(self.links) + sum(len(node["inputs"]) for node in nodes)
        self.leaving: dict[int, list[Any]] = {}
        for number, (_, target, slot) in self.links.items():
            if target == leaving:
                self.leaving.setdefault(slot, []).append(number)


@dataclass(frozen=True)
class Scope:
    """A workflow, or an instance of a subgraph: node `host` of `parent`. `prefix`: of the places of its nodes."""

    sheet: Sheet
    prefix: str = ""
    parent: Scope | None = None
    host: dict | None = None

    @property
    def entry(self) -> str:
        """The place of the node that stands for the inputs of the subgraph."""
        return self.prefix + self.sheet.entry

    def origin(self, number: Any) -> End:
        """The output that a link comes from."""
        source, slot = self.sheet.links[number][0]
        return self.prefix + source, slot

    def into(self, node: dict, index: int) -> End | Unknown | None:
        """The output that is linked to an input of one of the nodes; None without a link."""
        number = node["inputs"][index].get("link") if index < len(node["inputs"]) else None
        if number is None:
            return None
        link = self.sheet.links.get(number) if type(number) in (int, str) else None
        if link is None or link[1] != str(node["id"]):
            return Unknown(f"the link {number!r:.40}, which is not there or leads elsewhere")
        return self.origin(number)

    def out_of(self, slot: int) -> End | Unknown | None:
        """The inner output that is linked to an output of the subgraph. The editor goes by the list of the output."""
        found, listed = self.sheet.leaving.get(slot, []), []
        if slot < len(self.sheet.exits):
            listed = self.sheet.exits[slot].get("linkIds")
        if len(found) == 1 and listed == found:
            return self.origin(found[0])
        return Unknown("a subgraph's output that lists other links than lead to it") if found or listed else None


def part(holder: Any, name: str, kind: type) -> Any:
    """A part of an object, empty where it is missing. Raises Unreadable where it is something else."""
    found = holder.get(name) if isinstance(holder, dict) else None
    if found is not None and not isinstance(found, kind):
        raise Unreadable(f"has {name!r} as a {type(found).__name__}, expected a {kind.__name__}")
    return kind() if found is None else found


def objects(holder: Any, name: str) -> list[dict]:
    """A list of objects. Raises Unreadable where it is something else."""
    found = part(holder, name, list)
    if not all(isinstance(each, dict) for each in found):
        raise Unreadable(f"has something in {name!r} that is no object")
    return found


def slots(holder: dict, name: str) -> list[dict]:
    """The inputs or outputs of a node or subgraph."""
    found = objects(holder, name)
    if len(found) > MAX_SLOTS:
        raise Unreadable(f"has a node or subgraph of more than {MAX_SLOTS} {name}")
    return found


def _node(node: dict) -> dict:
    """A node with mode, inputs and outputs in any case, and the widgets of inner nodes that it shows as its own.

    Its id holds no colon: colons part the ids in subgraphs.
    """
    key, kind, mode = node.get("id"), node.get("type"), node.get("mode", 0)
    named = type(key) in (int, str) and ":" not in str(key) and isinstance(kind, str) and kind != OUTSIDE
    if not named or type(mode) is not int or mode not in MODES:
        raise Unreadable("has a node without id, type or mode, expected what ComfyUI's editor saves")
    listed = part(part(node, "properties", dict), "proxyWidgets", list)
    shown = {(str(each[0]), str(each[1])) for each in listed if isinstance(each, list) and len(each) >= 2}
    return node | {"mode": mode, "inputs": slots(node, "inputs"), "outputs": slots(node, "outputs"), "shown": shown}


def _link(link: Any) -> tuple[Any, tuple[tuple[str, int], str, int]]:
    """Number, source, target and its slot. Links are lists in a workflow, objects in subgraphs and in newer files."""
    if isinstance(link, dict):
        link = [link.get(name) for name in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
    if isinstance(link, list) and len(link) >= 5 and type(link[0]) in (int, str):
        number, source, slot, target, target_slot = link[:5]
        if _is_slot(slot) and _is_slot(target_slot):
            return number, ((str(source), int(slot)), str(target), int(target_slot))
    raise Unreadable("has a link that is none, expected [id, source, slot, target, slot, type]")


def _is_slot(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < MAX_NODES and value == int(value)
