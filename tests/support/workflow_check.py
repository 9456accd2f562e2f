"""Faults of a saved workflow, as a running server sees them: node types, values of widgets, links, places.

problems(workflow, server.object_info(), {"vae_name": {"ae.safetensors"}}) -> [] where all is well
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from dev.workflow import ASIDE, INLET, OUTLET, Input, definitions, inputs_of, links_of, widget_names

AUTOGROW, MATCHING = "COMFY_AUTOGROW_V3", "COMFY_MATCHTYPE_V3"  # inputs that grow; inputs of one common type
TITLE = 30  # canvas units: the bar above a node
NUMBERS = {"INT": (int,), "FLOAT": (int, float)}
PLAIN = {"STRING": str, "BOOLEAN": bool}
COLOR = re.compile(r"#[0-9a-f]{6}")
AFTER = ("fixed", "increment", "decrement", "randomize")  # what may become of a seed after a run
Files = Mapping[str, Collection[str]]
WILD = ("*", MATCHING)


def problems(workflow: dict, object_info: dict, files: Files = MappingProxyType({})) -> list[str]:
    """Sentences, one for each thing that is wrong. `files`: by a COMBO's
    name, files that it may name though the server has none of them."""
    subgraphs = definitions(workflow)
    found = list(_graph(workflow, object_info, subgraphs, files))
    for inside in subgraphs.values():
        found += [f"in {inside['name']!r}: {each}" for each in _graph(inside, object_info, subgraphs, files)]
    return found


def _graph(graph: dict, object_info: dict, subgraphs: dict, files: Files) -> Iterator[str]:
    for node in graph["nodes"]:
        name = f"{node['type']} {node['id']}"
        if node["type"] in object_info:
            yield from (f"{name}: {each}" for each in _node(node, object_info[node["type"]], files))
        elif node["type"] not in ASIDE and node["type"] not in subgraphs:
            yield f"{name}: there is no such node"
    yield from _links(graph, object_info)
    yield from _places(graph)


def _node(node: dict, info: dict, files: Files) -> Iterator[str]:
    """Its widgets, its slots, and whether what it needs is connected."""
    names, saved = widget_names(info), node.get("widgets_values", [])
    if len(names) != len(saved):
        yield f"{len(saved)} widget values for {len(names)} widgets"
        return
    values, inputs = dict(zip(names, saved, strict=True)), inputs_of(info)
    for each in inputs:
        if each.has_widget and not _fits(each, values[each.name], files):
            yield f"{each.name} is {values[each.name]!r}, expected {_expected(each)}"
    if values.get("control_after_generate", "fixed") not in AFTER:
        yield f"control_after_generate is {values['control_after_generate']!r}"
    slots = {slot["name"]: slot for slot in node.get("inputs", [])}
    wanted = _slot_types(inputs, slots)
    for name, slot in slots.items():
        if not _joins(slot["type"], wanted.get(name)):
            yield f"input {name} of type {slot['type']}, expected {wanted.get(name, 'no such input')}"
    for each in inputs:
        first = f"{each.name}.{each.options['template']['prefix']}0" if each.kind == AUTOGROW else each.name
        if each.required and not each.has_widget and slots.get(first, {}).get("link") is None:
            yield f"{first} is not connected"
    outputs = [(slot["name"], slot["type"]) for slot in node.get("outputs", [])]
    expected = list(zip(info["output_name"], info["output"], strict=True))
    if [name for name, _ in outputs] != [name for name, _ in expected]:
        yield f"outputs {[name for name, _ in outputs]}, expected {[name for name, _ in expected]}"
    elif not all(_joins(kind, other) for (_, kind), (_, other) in zip(outputs, expected, strict=True)):
        yield f"outputs {outputs}, expected {expected}"


def _fits(each: Input, value: Any, files: Files) -> bool:
    if each.kind in NUMBERS:
        low, high = each.options.get("min", value), each.options.get("max", value)
        return isinstance(value, NUMBERS[each.kind]) and not isinstance(value, bool) and low <= value <= high
    if each.kind == "COMBO":
        return value in each.options["options"] or value in files.get(each.name, ())
    if each.kind == "COLOR":
        return isinstance(value, str) and bool(COLOR.fullmatch(value))
    return isinstance(value, PLAIN[each.kind])


def _expected(each: Input) -> str:
    if each.kind == "COMBO":
        return f"one of {each.options['options']}"
    return (
        f"{each.kind} from {each.options.get('min')} to {each.options.get('max')}"
        if each.kind in NUMBERS
        else each.kind
    )


def _slot_types(inputs: list[Input], slots: dict) -> dict[str, str]:
    """The type of every slot that the node may have, by its name."""
    types = {each.name: each.kind for each in inputs if each.kind != AUTOGROW}
    types |= {each.companion: "IMAGEUPLOAD" for each in inputs if each.companion == "upload"}
    for each in inputs:
        if each.kind == AUTOGROW:
            template = each.options["template"]
            ((member,),) = [[spec[0] for spec in template["input"]["required"].values()]]
            types |= {f"{each.name}.{template['prefix']}{number}": member for number in range(template["max"])}
    return types


def _joins(one: str, other: str | None) -> bool:
    return one == other or one in WILD or other in WILD


def _links(graph: dict, object_info: dict) -> Iterator[str]:
    """Every link from an output to an input that know of it, of one type; no slot that knows of a link there is none
    of.
    """
    links = links_of(graph)
    if len(links) != len(graph["links"]):
        yield "two links have the same id"
    outputs, inputs = {}, {}
    for node in graph["nodes"]:
        outputs |= {(node["id"], place): slot for place, slot in enumerate(node.get("outputs", []))}
        inputs |= {(node["id"], place): slot for place, slot in enumerate(node.get("inputs", []))}
    edges = {INLET: graph.get("inputs", []), OUTLET: graph.get("outputs", [])}
    outputs |= {(INLET, place): slot | {"links": slot["linkIds"]} for place, slot in enumerate(edges[INLET])}
    inputs |= {(OUTLET, place): slot | {"link": slot["linkIds"][0]} for place, slot in enumerate(edges[OUTLET])}
    for number, link in links.items():
        source, target = outputs.get((link.origin, link.origin_slot)), inputs.get((link.target, link.target_slot))
        if source is None or target is None:
            yield f"link {number} has no {'output' if source is None else 'input'} at its end: {link}"
        elif number not in (source.get("links") or []) or target.get("link") != number:
            yield f"link {number} is not known to both of its ends: {link}"
        elif not (_joins(source["type"], link.type) and _joins(link.type, target["type"])):
            yield f"link {number} joins {source['type']} and {target['type']} as {link.type}"
    known = {number for slot in outputs.values() for number in slot.get("links") or []}
    known |= {slot["link"] for slot in inputs.values() if slot.get("link") is not None}
    yield from (f"link {number} is known to a node, but there is none" for number in sorted(known - set(links)))


def _places(graph: dict) -> Iterator[str]:
    """Nothing lies on anything else; every node but notes lies in one group; groups lie apart."""
    nodes = {f"{n['type']} {n['id']}": _box(n) for n in graph["nodes"]}
    groups = {f"group {g['title']!r}": _span(*g["bounding"]) for g in graph.get("groups", [])}
    for boxes in (nodes, groups):
        names = list(boxes)
        for place, one in enumerate(names):
            yield from (f"{one} lies on {other}" for other in names[:place] if _meet(boxes[one], boxes[other]))
    for name, box in nodes.items():
        holders = [group for group, span in groups.items() if _meet(box, span)]
        whole = [group for group in holders if _within(box, groups[group])]
        if holders != whole or len(whole) > 1:
            yield f"{name} lies across the edge of {holders}"


def _box(node: dict) -> tuple[float, ...]:
    (x, y), (width, height) = node["pos"], node["size"]
    height = 0 if node.get("flags", {}).get("collapsed") else height
    return _span(x, y - TITLE, width, height + TITLE)


def _span(x: float, y: float, width: float, height: float) -> tuple[float, ...]:
    return x, y, x + width, y + height


def _meet(one: tuple, other: tuple) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _within(one: tuple, other: tuple) -> bool:
    return one[0] >= other[0] and one[1] >= other[1] and one[2] <= other[2] and one[3] <= other[3]
