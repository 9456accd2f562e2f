"""Settings of nodes: the value that runs, from a widget or a primitive node with a constant, and the rule it must keep.

A setting that is not surely understood is told as a reason why the Apply does not act.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .graph import Graph, Input, Link, Node, Unknown, Value
from .widgets import PRIMITIVES

STRENGTH_MAX = 2.0  # of the nodes
CALIBRATED, FIXED = "as calibrated", "fixed"
PAPER_THRESHOLD = 0.7  # a higher fixed gate lets tokens through that the paper's gate turns
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Rule:
    """The default of a setting (None: it must be set), and the values that ComfyUI takes."""

    default: Any
    fits: Callable[[Any], bool]
    expected: str


def _number(default: float | None, most: float) -> Rule:
    return Rule(
        default, lambda value: type(value) in (int, float) and 0 <= value <= most, f"a number from 0 to {most:g}"
    )


def _choice(*options: str) -> Rule:
    return Rule(options[0], lambda value: isinstance(value, str) and value in options, " or ".join(options))


def _text(default: str | None) -> Rule:
    return Rule(default, lambda value: isinstance(value, str), "a text")


OF_APPLY = {
    "strength": _number(None, STRENGTH_MAX),
    "gate": _choice(CALIBRATED, FIXED),
    "threshold": _number(PAPER_THRESHOLD, 1.0),
    "start_percent": _number(0.0, 1.0),
    "end_percent": _number(1.0, 1.0),
    "blocks": _text(""),
    "streams": _choice("both", "text", "image"),
    "conditionings": _choice("all", "positive only"),
}
OF_LOAD = {"concept": _text(None), "strength": _number(1.0, STRENGTH_MAX), "sha256": _text("")}
OF_COMBINE = {"orthogonalise": Rule(False, lambda value: isinstance(value, bool), "true or false")}


def settings(graph: Graph, node: Node, rules: dict[str, Rule], stops: list[str]) -> dict[str, Any]:
    """The settings of a node by name; None, and a reason in `stops`, for each that cannot be read."""
    return {name: _setting(graph, node, name, rule, stops) for name, rule in rules.items()}


def _setting(graph: Graph, node: Node, name: str, rule: Rule, stops: list[str]) -> Any:
    found = constant(graph, node.inputs.get(name, Value(rule.default)))
    if isinstance(found, Value) and rule.fits(found.value):
        return found.value
    if isinstance(found, Unknown):
        stops.append(f"{name} comes from {found.reason}: it cannot be verified")
    else:
        stops.append(f"{name} is {_short(found.value)}, expected {rule.expected}")
    return None


def constant(graph: Graph, value: Input) -> Value | Unknown:
    """The constant of an input; over a link, where its source is a primitive node with a value of its own."""
    if not isinstance(value, Link):
        return value
    node = graph.nodes[value.source]
    if node.kind in PRIMITIVES and value.slot == 0 and not node.bypassed:
        found = node.inputs.get("value")
        if isinstance(found, Unknown) or (isinstance(found, Value) and type(found.value) in PRIMITIVES[node.kind]):
            return found
    return Unknown(f"node {node.id} ({node.kind})", link=False)


def _short(value: Any) -> str:
    plain = isinstance(value, (str, int, float)) or value is None
    return f"{value!r:.40}" if plain else f"a {type(value).__name__}"
