"""Builds a workflow as ComfyUI's editor saves it: nodes by what they are called, links by names, places by groups.

    graph = Graph(object_info, "My workflow")
    world = graph.add("SafeRoPE_TinyWorld")
    prompt = graph.add("CLIPTextEncode", "Prompt", clip=world["clip"], text="a red star")
    graph.arrange([[group("1 Model", BLUE, [world])], [group("2 Prompt", YELLOW, [prompt])]])
    graph.workflow()

Inputs, widgets, outputs and their order are those of a running server's /object_info, so that nothing here can go stale.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..workflow import INLET, OUTLET, UPLOAD, Input, inputs_of

NAMESPACE = uuid.UUID("5afe0000-7099-4d1e-8001-7175a0be0000")  # ids from titles: the same at every build
AUTOGROW, MATCHING = (
    "COMFY_AUTOGROW_V3",
    "COMFY_MATCHTYPE_V3",
)  # inputs that grow; that all have the type of what is linked
OPTIONAL = 7  # the shape of an optional input's slot: a hollow circle
CORE, PACK = "comfy-core", "saferope"

# Sizes in canvas units, enough for both of the editor's ways to draw nodes; "Nodes 2.0" needs more than the older one, and
# puts the pack's name below a node that is not ComfyUI's own.
SLOT, WIDGET, STRING, BADGE, TITLE, PADDING = 20, 28, 44, 24, 30, 16
WIDTH, TEXT_HEIGHT, LINKED_TEXT_HEIGHT = 300, 110, 68
GAP, GROUP_PADDING, GROUP_TITLE, LEFT, TOP = 30, 20, 44, 40, 60

BLUE, PURPLE, YELLOW, GREEN, GREY = "#3f789e", "#7d5ba6", "#a8843a", "#4c8a5c", "#6b7280"
PALETTE = {"pack": ("#323", "#535"), "prompt": ("#232", "#353"), "note": ("#432", "#653")}  # title, body


class Out(NamedTuple):
    """An output of a node, to be given to another's input. `value` is what a widget holds while it is linked to this."""

    node: int
    slot: int
    type: str
    value: Any = None


@dataclass
class Node:
    """One node; `node["clip"]` is an output by name or number."""

    id: int
    kind: str
    data: dict[str, Any]
    outputs: list[Out] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def __getitem__(self, key: str | int) -> Out:
        return self.outputs[key if isinstance(key, int) else self.names.index(key)]

    @property
    def size(self) -> list[int]:
        return self.data["size"]


class Group(NamedTuple):
    title: str
    color: str
    columns: list[list[Node]]


def group(title: str, color: str, *columns: list[Node]) -> Group:
    """Nodes under one heading, in columns."""
    return Group(title, color, list(columns))


class Graph:
    def __init__(self, object_info: dict, title: str):
        self.info, self.title = object_info, title
        self.nodes: list[Node] = []
        self.links: list[list] = []
        self.groups: list[dict] = []
        self.inlets: list[dict] = []
        self.outlets: list[dict] = []

    def add(
        self, kind: str, title: str | None = None, size: tuple[int, int] = (0, 0), paint: str = "", **given: Any
    ) -> Node:
        """A node. Every input is an Out (a link), a list of Outs (an input that grows), or a widget's value.

        size: at least this wide and high; paint: a key of PALETTE. Raises ValueError for inputs that the node lacks and
        where a required one is missing.
        """
        info, number = self.info[kind], len(self.nodes) + 1
        pairs = [(each, given.pop(each.name, None)) for each in inputs_of(info)]
        if given:
            raise ValueError(f"{kind} has no input {', '.join(given)}. It has {[each.name for each, _ in pairs]}.")
        slots = [slot for each, value in pairs if not each.has_widget for slot in self._sockets(number, each, value)]
        slots += [slot for each, value in pairs if each.has_widget for slot in self._widget_slots(each, value)]
        links = [slot.pop("source") for slot in slots]
        for place, (slot, source) in enumerate(zip(slots, links, strict=True)):
            slot["link"] = None if source is None else self._link(source, number, place, slot)
        data = {"id": number, "type": kind, "pos": [0, 0], "size": [0, 0], "flags": {}, "order": 0, "mode": 0}
        data |= {"inputs": slots, "outputs": []} | ({"title": title} if title else {})
        data["properties"] = {"Node name for S&R": kind, "cnr_id": PACK if is_ours(kind) else CORE}
        data["widgets_values"] = [value for each, given in pairs if each.has_widget for value in _saved(each, given)]
        node = Node(number, kind, data, *_outputs(number, info, links))
        data["outputs"] = [
            {"name": n, "type": o.type, "links": []} for n, o in zip(node.names, node.outputs, strict=True)
        ]
        data["size"] = [max(size[0], WIDTH), max(size[1], _height(slots, node, pairs))]
        self._paint(data, paint or ("pack" if is_ours(kind) else ""))
        self.nodes.append(node)
        return node

    def note(self, text: str, size: tuple[int, int], title: str = "Read me") -> Node:
        """A text in Markdown beside the nodes."""
        number = len(self.nodes) + 1
        data = {"id": number, "type": "MarkdownNote", "pos": [0, 0], "size": list(size), "flags": {}, "order": 0}
        data |= {"mode": 0, "inputs": [], "outputs": [], "title": title, "properties": {}, "widgets_values": [text]}
        self._paint(data, "note")
        self.nodes.append(Node(number, "MarkdownNote", data))
        return self.nodes[-1]

    def inlet(self, name: str, value: Any = None) -> Out:
        """An input of the subgraph that this graph becomes; its type is that of the first input it is given to."""
        self.inlets.append({"id": self.id_of(f"in {name}"), "name": name, "type": "", "linkIds": []})
        return Out(INLET, len(self.inlets) - 1, "", value)

    def outlet(self, name: str, source: Out) -> None:
        """An output of the subgraph that this graph becomes."""
        slot = {"name": name, "type": source.type}
        link = self._link(source, OUTLET, len(self.outlets), slot)
        self.outlets.append({"id": self.id_of(f"out {name}"), **slot, "linkIds": [link]})

    def arrange(self, columns: list[list[Group]], note: Node | None = None) -> None:
        """Places groups in columns from left to right and the note below the first ones, and draws the groups' frames."""
        left = LEFT
        for column in columns:
            top, right = TOP, left
            for each in column:
                width, height = self._place(each, left, top)
                top, right = top + height + GAP, max(right, left + width)
            left = right + GAP
        if note:
            first, last = LEFT, LEFT + note.size[0]
            above = [
                x["bounding"]
                for x in self.groups
                if x["bounding"][0] < last and x["bounding"][0] + x["bounding"][2] > first
            ]
            note.data["pos"] = [first, max(box[1] + box[3] for box in above) + GAP + TITLE]

    def _place(self, group: Group, left: int, top: int) -> tuple[int, int]:
        """Puts a group's nodes down and returns its width and height."""
        x, lowest = left + GROUP_PADDING, 0
        for column in group.columns:
            y, width = top + GROUP_TITLE + TITLE, max(node.size[0] for node in column)
            for node in column:
                node.data["pos"], node.data["size"][0] = [x, y], width
                y += node.size[1] + TITLE + GAP
            x, lowest = x + width + GAP, max(lowest, y - TITLE - GAP)
        bounding = [left, top, x - GAP + GROUP_PADDING - left, lowest + GROUP_PADDING - top]
        self.groups.append({"id": len(self.groups) + 1, "title": group.title, "bounding": bounding})
        self.groups[-1] |= {"color": group.color, "font_size": 24, "flags": {}}
        return bounding[2], bounding[3]

    def workflow(self) -> dict:
        """The saved form."""
        whole = {"id": self.id_of("workflow"), "revision": 0, "last_node_id": len(self.nodes)}
        whole |= {"last_link_id": len(self.links), "nodes": self._ordered(), "links": self.links}
        return whole | {"groups": self.groups, "config": {}, "extra": {}, "version": 0.4}

    def _ordered(self) -> list[dict]:
        """The nodes' data with each one's place in the order of execution: that in which they were added."""
        for order, node in enumerate(self.nodes):
            node.data["order"] = order
        return [node.data for node in self.nodes]

    def _sockets(self, number: int, each: Input, value: Any) -> list[dict]:
        """The slots of an input without a widget: one, or one for every member of an input that grows and a free one."""
        if each.kind == AUTOGROW:
            template = each.options["template"]
            (spec,) = template["input"]["required"].values()
            sources = [*value, *([None] if len(value) < template["max"] else [])]
            members = [f"{template['prefix']}{i}" for i in range(len(sources))]
            slot = {"type": spec[0]}
            named = [{"label": member, "name": f"{each.name}.{member}"} for member in members]
            return [name | slot | {"source": source} for name, source in zip(named, sources, strict=True)]
        if value is None and each.required:
            raise ValueError(f"node {number} of {self.title!r} lacks {each.name}")
        kind = value.type if each.kind == MATCHING else each.kind
        return [{"name": each.name, "type": kind, "source": value} | ({} if each.required else {"shape": OPTIONAL})]

    def _widget_slots(self, each: Input, value: Any) -> list[dict]:
        """The slot of a widget, into which something may be plugged, and that of an upload button beside it."""
        source = value if isinstance(value, Out) else None
        slot = {"name": each.name, "type": each.kind, "widget": {"name": each.name}, "source": source}
        button = {"name": UPLOAD, "type": "IMAGEUPLOAD", "widget": {"name": UPLOAD}, "source": None}
        return [slot | ({} if each.required else {"shape": OPTIONAL})] + [button] * (each.companion == UPLOAD)

    def _link(self, source: Out, target: int, place: int, slot: dict) -> int:
        number = len(self.links) + 1
        if source.node == INLET:
            inlet = self.inlets[source.slot]
            inlet["type"] = inlet["type"] or slot["type"]
            inlet["linkIds"].append(number)
        else:
            self.nodes[source.node - 1].data["outputs"][source.slot]["links"].append(number)
        self.links.append([number, source.node, source.slot, target, place, source.type or slot["type"]])
        return number

    def _paint(self, data: dict, color: str) -> None:
        if color:
            data["color"], data["bgcolor"] = PALETTE[color]

    def id_of(self, part: str) -> str:
        return str(uuid.uuid5(NAMESPACE, f"{self.title}: {part}"))


def is_ours(kind: str) -> bool:
    return kind.startswith("SafeRoPE")


def _saved(each: Input, value: Any) -> list:
    """What is saved for a widget: its value, its default where it is linked or not given, and its companion's."""
    if isinstance(value, Out):
        value = value.value
    if value is None:
        value = each.options.get("default", _first(each))
    return [value, *{"control_after_generate": ["fixed"], UPLOAD: ["image"]}.get(each.companion, [])]


def _first(each: Input) -> Any:
    blank = {"STRING": "", "INT": each.options.get("min", 0), "FLOAT": each.options.get("min", 0.0), "BOOLEAN": False}
    if each.kind == "COMBO":
        return next(iter(each.options.get("options", [])), "")
    return blank[each.kind]


def _outputs(number: int, info: dict, sources: list[Out | None]) -> tuple[list[Out], list[str]]:
    """The outputs and their names; an output that takes its input's type has that of the first linked input."""
    linked = next((source.type for source in sources if source is not None), "*")
    kinds = [linked if kind == MATCHING else kind for kind in info["output"]]
    return [Out(number, place, kind) for place, kind in enumerate(kinds)], list(info["output_name"])


def _height(slots: list[dict], node: Node, pairs: list[tuple[Input, Any]]) -> int:
    """The least height that the editor would give the node."""
    widgets = [each for each, _ in pairs if each.has_widget]
    rows = max(sum("widget" not in slot for slot in slots), len(node.outputs))
    linked = {slot["name"] for slot in slots if slot["link"] is not None}
    texts = [each.name in linked for each in widgets if each.options.get("multiline")]
    strings = sum(each.kind == "STRING" for each in widgets) - len(texts)
    lines = len(widgets) - len(texts) - strings + sum(each.companion is not None for each in widgets)
    text = sum(LINKED_TEXT_HEIGHT if plugged else TEXT_HEIGHT for plugged in texts)
    badge = BADGE if is_ours(node.kind) else 0
    return rows * SLOT + lines * WIDGET + strings * STRING + text + badge + PADDING
