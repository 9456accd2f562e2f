"""The values of widgets in the editor's form, for the nodes whose values count."""

from __future__ import annotations

from .graph import Input, Unknown, Value
from .known import APPLY, COMBINE, LOAD
from .scope import Scope, part

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


def widgets(scope: Scope, node: dict) -> dict[str, Input]:
    """The values of a node's widgets by name."""
    kind, values = node["type"], node.get("widgets_values")
    if kind in PRIMITIVES:
        return {"value": _shown(scope, node, "value", primitive(node))}
    names = WIDGETS.get(kind, ())
    if isinstance(values, list) and len(values) > len(names):
        return dict.fromkeys(names, Unknown("another version's widgets, whose order is not known", link=False))
    if isinstance(values, list):
        values = dict(zip(names, values, strict=False))
    held = values if isinstance(values, dict) else {}
    return {name: _shown(scope, node, name, Value(held[name])) for name in names if name in held}


def primitive(node: dict) -> Value | Unknown:
    """The value of a primitive node, unless it changes by itself from run to run."""
    values = node.get("widgets_values")
    if not isinstance(values, list) or not values:
        return Unknown("a primitive node without a value", link=False)
    if values[1:2] not in ([], ["fixed"]):
        return Unknown("a primitive node whose value changes after each run", link=False)
    return Value(values[0])


def _shown(scope: Scope, node: dict, name: str, value: Value | Unknown) -> Value | Unknown:
    """A widget's value. Inside of subgraphs every instance that shows the widget must hold the same one.

    Which of them runs depends on the version of the editor.
    """
    while isinstance(value, Value) and scope.host is not None and scope.parent is not None:
        shown = _shown_as(scope, scope.host, node, name)
        if shown is None:
            break
        held = part(scope.host, "widgets_values", list)
        if len(held) > 1 or any(type(each) is not type(value.value) or each != value.value for each in held):
            return Unknown("a widget that the subgraph's instance shows and may have changed", link=False)
        node, scope, name = scope.host, scope.parent, shown
    return value


def _shown_as(scope: Scope, host: dict, node: dict, name: str) -> str | None:
    """The name under which an instance shows a widget, by a link or a list of its own; None: it does not."""
    entries = scope.sheet.entries
    for index, slot in enumerate(node["inputs"]):
        end = scope.into(node, index)
        if slot.get("name") == name and isinstance(end, tuple) and end[0] == scope.entry:
            return str(entries[end[1]].get("name")) if end[1] < len(entries) else name
    return name if (str(node["id"]), name) in host["shown"] else None
