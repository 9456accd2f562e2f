"""The graph of a workflow as ComfyUI's editor saves it: subgraphs unfolded, reroutes and primitives followed.

As the editor does when it queues: a muted node (mode 2) gives nothing, with all that is in it; a bypassed one (mode 4)
passes on what has the type asked for. Here it passes on all inputs of that type, where the editor chooses one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .file import Unreadable
from .graph import MAX_NODES, Graph, Input, Link, Node, Unknown, Value
from .known import APPLY, COMBINE, LOAD, OUTSIDE

MUTED, BYPASSED = 2, 4
MODES = (0, 1, MUTED, 3, BYPASSED)
MAX_NESTING = 32  # of subgraphs
MAX_LINKS, MAX_SLOTS = 100_000, 2_000  # links and inputs with all subgraphs unfolded; inputs or outputs of one node
MAX_HOPS = 200  # reroutes and borders of subgraphs between two nodes
INPUT_NODE, OUTPUT_NODE = -10, -20  # where a subgraph does not name its own
ASIDE = {"Note", "MarkdownNote"}
BLUEPRINT = (
    "this is a blueprint: its inputs count as connected, to a model without protection and to concepts that nobody has "
    "looked at; audit the workflow that uses it"
)
GROUP = ("workflow>", "workflow/")  # how the type of a group node begins
# Widgets in the order in which they are saved, which is that of the node's schema.
WIDGETS = {
    LOAD: ("concept", "strength", "sha256"),
    COMBINE: ("orthogonalise",),
    APPLY: (
        "strength", "gate", "threshold", "start_percent", "end_percent", "blocks", "streams", "conditionings", "record",
    ),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "KSampler": ("seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
}  # fmt: skip
# Types of the values that they pass on as they are; ComfyUI would turn any other into one.
PRIMITIVES = {
    "PrimitiveInt": (int,),
    "PrimitiveFloat": (int, float),
    "PrimitiveString": (str,),
    "PrimitiveStringMultiline": (str,),
    "PrimitiveBoolean": (bool,),
}


@dataclass
class Scope:
    """The nodes and links of a workflow or of one instance of a subgraph, in which node `host` of `parent` stands for
    it.
    """

    nodes: dict[str, dict]
    links: dict[Any, tuple[str, int, str, int]]  # id: source, its slot, target, its slot
    prefix: str = ""
    parent: Scope | None = None
    host: dict | None = None
    definition: dict = field(default_factory=dict)
    ends: tuple[str, str] = (str(INPUT_NODE), str(OUTPUT_NODE))
    inner: dict[str, Scope] = field(default_factory=dict)
    blueprint: bool = False  # the file is one subgraph, connected to nothing: it runs only once it is put somewhere

    def __post_init__(self) -> None:
        self.size = len(self.links) + sum(len(_get(node, "inputs", list)) for node in self.nodes.values())
        self.outgoing: dict[int, list[Any]] = {}  # by output of the subgraph: the links that lead to it inside
        for key, (_, _, target, index) in self.links.items():
            if target == self.ends[1]:
                self.outgoing.setdefault(index, []).append(key)


def from_editor(workflow: Any) -> Graph:
    """The graph of the editor's form. Raises Unreadable where it is not one."""
    if not isinstance(workflow, dict) or not workflow.get("nodes"):
        raise Unreadable("has no nodes, expected what ComfyUI's editor saves")
    graph, definitions = Graph(), _definitions(workflow)
    scopes = [_scope(workflow)]
    nodes, links = len(scopes[0].nodes), scopes[0].size
    for scope in scopes:  # it grows: all scopes come first, since links lead from one to another
        for key, node in scope.nodes.items():
            if node["type"] not in definitions or node["mode"] in (MUTED, BYPASSED):
                continue
            inner = scope.inner[key] = _inside(scope, key, node, definitions[node["type"]])
            nodes, links = nodes + len(inner.nodes), links + inner.size
            if nodes > MAX_NODES or links > MAX_LINKS:
                raise Unreadable(
                    f"has more than {MAX_NODES} nodes or {MAX_LINKS} links and inputs with its subgraphs unfolded"
                )
            scopes.append(inner)
    scopes[0].blueprint = len(scopes[0].nodes) == len(scopes[0].inner) == 1 and not scopes[0].links
    for scope in scopes:
        for key, node in scope.nodes.items():
            _add(graph, scope, key, node, definitions)
    return graph


def _get(holder: dict, name: str, kind: type) -> Any:
    """A part of an object, empty where it is missing. Raises Unreadable where it is something else."""
    found = holder.get(name) if isinstance(holder, dict) else None
    if found is None:
        return kind()
    if not isinstance(found, kind):
        raise Unreadable(f"has {name!r} as a {type(found).__name__}, expected a {kind.__name__}")
    return found


def _objects(holder: dict, name: str) -> list[dict]:
    found = _get(holder, name, list)
    if not all(isinstance(each, dict) for each in found):
        raise Unreadable(f"has something in {name!r} that is no object")
    return found


def _definitions(workflow: dict) -> dict[str, dict]:
    """Subgraphs by id, those inside of others too."""
    found: dict[str, dict] = {}
    todo = [workflow]
    while todo:
        for each in _objects(_get(todo.pop(), "definitions", dict), "subgraphs"):
            if not isinstance(each.get("id"), str) or found.setdefault(each["id"], each) is not each:
                raise Unreadable("has a subgraph without an id of its own")
            todo.append(each)
    return found


def _scope(holder: dict, **place: Any) -> Scope:
    nodes: dict[str, dict] = {}
    for node in _objects(holder, "nodes"):
        key, mode = node.get("id"), node.get("mode", 0)
        if (
            type(key) not in (int, str)
            or not isinstance(node.get("type"), str)
            or node["type"] == OUTSIDE
            or type(mode) is not int
            or mode not in MODES
        ):
            raise Unreadable("has a node without id, type or mode, expected what ComfyUI's editor saves")
        nodes[str(key)] = node | {"mode": mode}
        if max(len(_objects(node, "inputs")), len(_objects(node, "outputs"))) > MAX_SLOTS:
            raise Unreadable(f"has a node of more than {MAX_SLOTS} inputs or outputs")
    if len(nodes) != len(_get(holder, "nodes", list)):
        raise Unreadable("has two nodes of one id")
    return Scope(nodes, dict(_links(holder)), **place)


def _links(holder: dict) -> Iterator[tuple[Any, tuple[str, int, str, int]]]:
    """Links are lists in a workflow, objects in its subgraphs and in newer files."""
    for link in _get(holder, "links", list):
        if isinstance(link, dict):
            link = [link.get(name) for name in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
        if (
            isinstance(link, list)
            and len(link) >= 5
            and type(link[0]) in (int, str)
            and _is_slot(link[2])
            and _is_slot(link[4])
        ):
            yield link[0], (str(link[1]), int(link[2]), str(link[3]), int(link[4]))
        elif link is not None:
            raise Unreadable("has a link that is none, expected [id, source, slot, target, slot, type]")


def _is_slot(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < MAX_NODES and value == int(value)


def _inside(scope: Scope, key: str, node: dict, definition: dict) -> Scope:
    prefix = f"{scope.prefix}{key}:"
    if prefix.count(":") > MAX_NESTING:
        raise Unreadable(f"has subgraphs nested more than {MAX_NESTING} deep, or one inside itself")
    ends = tuple(
        str(_get(definition, name, dict).get("id", default))
        for name, default in (("inputNode", INPUT_NODE), ("outputNode", OUTPUT_NODE))
    )
    if max(len(_objects(definition, "inputs")), len(_objects(definition, "outputs"))) > MAX_SLOTS:
        raise Unreadable(f"has a subgraph of more than {MAX_SLOTS} inputs or outputs")
    return _scope(definition, prefix=prefix, parent=scope, host=node, definition=definition, ends=ends)


def _add(graph: Graph, scope: Scope, key: str, node: dict, definitions: dict) -> None:
    """The node, unless it is muted or only the editor's own; a note of what a reader may miss."""
    kind, mode, place = node["type"], node["mode"], scope.prefix + key
    if mode == MUTED or kind in ASIDE or (kind in ("Reroute", "PrimitiveNode") and mode != BYPASSED):
        if mode == MUTED and kind == APPLY:
            graph.notes.append(f"SafeRoPE Apply {place} is muted: it gives nothing")
        return
    if kind in definitions and mode != BYPASSED:
        if scope.blueprint:
            graph.add(Node(place, OUTSIDE))
            graph.notes.append(BLUEPRINT)
        return
    if mode != BYPASSED and kind.startswith(GROUP):
        graph.opaque.append((place, "a group node, which is not looked into; convert it to a subgraph"))
    if mode != BYPASSED and _looks_like_an_id(kind):
        graph.opaque.append((place, "a subgraph whose definition is not in the file"))
    made = Node(place, kind, dict(_widgets(scope, node)), bypassed=mode == BYPASSED)
    names: set[str] = set()
    for index, slot in enumerate(_get(node, "inputs", list)):
        name = slot["name"] if isinstance(slot.get("name"), str) else f"input {index}"
        found = _origin(scope, node, index)
        if name in names:
            made.inputs[name] = Unknown(f"two inputs of the name {name!r:.60}")
        elif isinstance(found, Value) and found != made.inputs.get(name, None if kind in WIDGETS else found):
            made.inputs[name] = Unknown("a primitive node that holds another value than the widget itself", link=False)
        elif found is not None:
            made.inputs[name] = found
        names.add(name)
    graph.add(made)


def _looks_like_an_id(kind: str) -> bool:
    return len(kind) == 36 and [len(part) for part in kind.split("-")] == [8, 4, 4, 4, 12]


def _origin(scope: Scope, node: dict, index: int) -> Input | None:
    """What feeds an input: followed through reroutes and into and out of subgraphs. None: nothing does."""
    inward, seen = True, set()  # inward: at input `index` of the node; else at its output
    while True:
        if (step := (scope.prefix, str(node["id"]), inward, index)) in seen or len(seen) > MAX_HOPS:
            return Unknown(f"links that run in a circle, or through more than {MAX_HOPS} reroutes")
        seen.add(step)
        if inward:
            slots = _get(node, "inputs", list)
            number = slots[index].get("link") if index < len(slots) else None
            if number is None:
                open_end = scope.blueprint and index < len(slots) and "widget" not in slots[index]
                return Link(str(node["id"]), index) if open_end else None
            link = scope.links.get(number) if type(number) in (int, str) else None
            if link is None or link[2] != str(node["id"]):
                return Unknown(f"the link {number!r:.40}, which is not there or leads elsewhere")
            source, index = link[0], link[1]
        else:
            kind, mode, key = node["type"], node["mode"], str(node["id"])
            if mode == MUTED:
                return Unknown("a muted node", link=False)
            if mode == BYPASSED:
                return Link(scope.prefix + key, index)
            if kind == "Reroute":
                inward, index = True, 0
                continue
            if kind == "PrimitiveNode":
                return _primitive(node)
            if key not in scope.inner:
                return None if kind in ASIDE else Link(scope.prefix + key, index)
            scope = scope.inner[key]
            slots, inside = _get(scope.definition, "outputs", list), scope.outgoing.get(index, [])
            listed = slots[index].get("linkIds") if index < len(slots) else []
            if len(inside) != 1 or listed != inside:  # the editor goes by the list
                return (
                    Unknown("a subgraph's output that lists other links than lead to it") if inside or listed else None
                )
            source, index = scope.links[inside[0]][:2]
        while source == scope.ends[0] and scope.parent is not None:  # up and out of the subgraph, at the host's input
            slots = _get(scope.definition, "inputs", list)
            name = slots[index].get("name") if index < len(slots) else None
            at = [i for i, slot in enumerate(_get(scope.host, "inputs", list)) if slot.get("name") == name]
            if len(at) != 1:
                return Unknown(f"an input {name!r:.40} of a subgraph that is there {len(at)} times") if at else None
            node, scope, inward, index = scope.host, scope.parent, True, at[0]
            break
        else:
            if source not in scope.nodes:
                return Unknown(f"a link from node {source:.60}, which is not there")
            node, inward = scope.nodes[source], False


def _primitive(node: dict) -> Value | Unknown:
    """The value of the editor's primitive, unless it changes by itself from run to run."""
    values = node.get("widgets_values")
    if not isinstance(values, list) or not values:
        return Unknown("a primitive node without a value", link=False)
    if values[1:2] not in ([], ["fixed"]):
        return Unknown("a primitive node whose value changes after each run", link=False)
    return Value(values[0])


def _widgets(scope: Scope, node: dict) -> Iterator[tuple[str, Input]]:
    """The values of a node's widgets by name, for the nodes whose values count."""
    kind, values = node["type"], node.get("widgets_values")
    if kind in PRIMITIVES:
        yield "value", _shown(scope, node, "value", _primitive(node))
    names = WIDGETS.get(kind, ())
    if isinstance(values, list) and len(values) > len(names):
        reason = Unknown("another version's widgets, whose order is not known", link=False)
        yield from ((name, reason) for name in names)
        return
    if isinstance(values, list):
        values = dict(zip(names, values, strict=False))
    for name in names if isinstance(values, dict) else ():
        if name in values:
            yield name, _shown(scope, node, name, Value(values[name]))


def _shown(scope: Scope, node: dict, name: str, value: Value | Unknown) -> Value | Unknown:
    """A widget's value. Inside of subgraphs every instance that shows the widget must hold the same one.

    Which of them runs depends on the version of the editor.
    """
    while isinstance(value, Value) and scope.host is not None and scope.parent is not None:
        outer = _linked_outside(scope, node, name)
        if outer is None and not _promoted_by_name(scope.host, node, name):
            break
        held = _get(scope.host, "widgets_values", list)
        if len(held) > 1 or any(type(each) is not type(value.value) or each != value.value for each in held):
            return Unknown("a widget that the subgraph's instance shows and may have changed", link=False)
        node, scope, name = scope.host, scope.parent, outer or name
    return value


def _linked_outside(scope: Scope, node: dict, name: str) -> str | None:
    """The subgraph's own input that a widget is linked to, by name; None where there is none."""
    for slot in _get(node, "inputs", list):
        if slot.get("name") == name and type(slot.get("link")) in (int, str):
            source, index, *_ = scope.links.get(slot["link"], ("", 0))
            slots = _get(scope.definition, "inputs", list)
            if source == scope.ends[0] and index < len(slots):
                return str(slots[index].get("name"))
    return None


def _promoted_by_name(host: dict, node: dict, name: str) -> bool:
    shown = _get(_get(host, "properties", dict), "proxyWidgets", list)
    return any(
        isinstance(each, list) and len(each) >= 2 and str(each[0]) == str(node["id"]) and each[1] == name
        for each in shown
    )
