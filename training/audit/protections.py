"""What the SafeRoPE nodes of a workflow do: whether each Apply acts, on which concepts, how far, and what weakens it.

An Apply counts as acting only where everything that decides it can be read: values from widgets, and from primitive nodes
with a constant. What would make ComfyUI stop (a value out of range, a pin that no file can have) does not count either.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .editor import PRIMITIVES
from .graph import APPLY, CALIBRATE, COMBINE, LOAD, Flow, Graph, Link, Node, Unknown, Value

STRENGTH_MAX = 2.0  # of the nodes
CALIBRATED, FIXED = "as calibrated", "fixed"
PAPER_THRESHOLD = 0.7  # a higher fixed gate lets through what the paper's own would not
MOST_CONCEPTS, DEEPEST, MOST_LINKS = 64, 16, 500  # of one Apply: concepts, Combine nodes in a row, links followed
SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCKS = re.compile(r"\s*[ds][0-9]{1,4}(-[0-9]{1,4})?\s*(,\s*[ds][0-9]{1,4}(-[0-9]{1,4})?\s*)*", re.IGNORECASE)

Digest = Callable[[str], str | None]  # sha256 of a concept file by the name in a workflow, None where there is none


@dataclass(frozen=True)
class Part:
    """A concept that an Apply turns; strength: of its own node times that of Apply."""

    node: str
    name: str
    strength: float
    sha256: str | None = None  # what it is pinned to
    made_of_prompts: bool = False


@dataclass
class Protection:
    """One Apply. `stops`: why it does not act; `weak`: what makes it less than whole."""

    node: str
    settings: dict[str, Any] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    weak: list[str] = field(default_factory=list)

    @property
    def acts(self) -> bool:
        return not self.stops

    def full(self) -> bool:
        return self.acts and not self.weak

    def pinned_to(self, digest: str) -> bool:
        return self.acts and any(part.sha256 == digest and part.strength > 0 for part in self.parts)


def protections(flow: Flow, digest: Digest | None = None) -> dict[str, Protection]:
    """Every Apply that is neither muted nor bypassed, by the id of its node."""
    reader = _Concepts(flow.graph, digest)
    nodes = [node for node in flow.graph.nodes.values() if node.kind == APPLY and not node.bypassed]
    return {node.id: _protection(flow, node, reader) for node in nodes}


def _protection(flow: Flow, node: Node, reader: _Concepts) -> Protection:
    found = Protection(node.id)
    read = _Reader(flow.graph, node, found.stops)
    if not flow.models(node):
        found.stops.append("no model is connected")
    strength = read.number("strength", None, 0.0, STRENGTH_MAX)
    gate = read.choice("gate", CALIBRATED, (CALIBRATED, FIXED))
    threshold = read.number("threshold", PAPER_THRESHOLD, 0.0, 1.0)
    start, end = read.number("start_percent", 0.0, 0.0, 1.0), read.number("end_percent", 1.0, 0.0, 1.0)
    blocks = read.text("blocks", "")
    streams = read.choice("streams", "both", ("both", "text", "image"))
    rows = read.choice("conditionings", "all", ("all", "positive only"))
    found.settings = {
        "strength": strength, "gate": gate, "threshold": threshold if gate == FIXED else None, "start_percent": start,
        "end_percent": end, "blocks": blocks, "streams": streams, "conditionings": rows,
    }  # fmt: skip
    found.parts = [
        Part(p.node, p.name, p.strength * (strength or 0.0), p.sha256, p.made_of_prompts)
        for p in reader.parts(node, "concept", found)
    ]
    if not found.stops:  # else the numbers are not all there
        _judge(found, strength, gate, threshold, start, end, blocks)
    return found


def _judge(found: Protection, strength, gate, threshold, start, end, blocks) -> None:
    """What stops or weakens a protection whose settings can all be read."""
    if strength == 0:
        found.stops.append("strength is 0")
    elif not any(part.strength > 0 for part in found.parts):
        found.stops.append("every concept's strength is 0")
    if start >= end:
        found.stops.append(f"its range of steps is empty ({start:g} to {end:g})")
    if gate == FIXED and threshold >= 1:
        found.stops.append("its gate is fixed at 1, which no risk is above")
    if blocks.strip() and not _BLOCKS.fullmatch(blocks):
        found.stops.append(f"blocks are {blocks!r:.60}, which cannot be read")
    settings = found.settings
    weak = [f"concept {p.name!r} has strength {p.strength:g}, less than 1" for p in found.parts if p.strength < 1]
    if (start, end) != (0, 1):
        weak.append(f"only a part of the steps, {start:g} to {end:g}")
    if gate == FIXED and threshold > PAPER_THRESHOLD:
        weak.append(f"a fixed gate of {threshold:g}, above the paper's {PAPER_THRESHOLD:g}")
    if blocks.strip():
        weak.append(f"only the blocks {blocks.strip()!r:.60}; whether the concept has heads there is in its file")
    if settings["streams"] != "both":
        weak.append(f"only the {settings['streams']} stream; whether the concept turns it is in its file")
    if settings["conditionings"] != "all":
        weak.append("only the positive conditioning")
    found.weak[:0] = weak


class _Reader:
    """Values of one node; what cannot be read is told in `stops` and comes as None, or as the default for choices."""

    def __init__(self, graph: Graph, node: Node, stops: list[str]):
        self.graph, self.node, self.stops = graph, node, stops

    def value(self, name: str, default: Any) -> Any:
        found = self.node.inputs.get(name)
        if isinstance(found, Link):
            found = constant(self.graph, found)
        if isinstance(found, Unknown):
            self.stops.append(f"{name} comes from {found.reason}: it cannot be verified")
            return None
        if found is None and default is None:
            self.stops.append(f"{name} is not set")
        return default if found is None else found.value

    def number(self, name: str, default: float | None, low: float, high: float) -> float | None:
        told, value = len(self.stops), self.value(name, default)
        if type(value) in (int, float) and low <= value <= high and math.isfinite(value):
            return float(value)
        if len(self.stops) == told:
            self.stops.append(f"{name} is {_short(value)}, expected a number from {low:g} to {high:g}")
        return None

    def choice(self, name: str, default: str, options: tuple[str, ...]) -> str:
        told, value = len(self.stops), self.value(name, default)
        if isinstance(value, str) and value in options:
            return value
        if len(self.stops) == told:
            self.stops.append(f"{name} is {_short(value)}, expected {' or '.join(options)}")
        return default

    def text(self, name: str, default: str | None) -> str:
        told, value = len(self.stops), self.value(name, default)
        if isinstance(value, str):
            return value
        if len(self.stops) == told:
            self.stops.append(f"{name} is {_short(value)}, expected a text")
        return ""


def _short(value: Any) -> str:
    return (
        f"{value!r:.40}" if isinstance(value, (str, int, float, bool)) or value is None else f"a {type(value).__name__}"
    )


def constant(graph: Graph, link: Link) -> Value | Unknown:
    """What a link brings where its source is a primitive node with a value of its own."""
    node = graph.nodes[link.source]
    if (
        node.kind in PRIMITIVES
        and not node.bypassed
        and isinstance(found := node.inputs.get("value"), (Value, Unknown))
    ):
        return found
    return Unknown(f"node {node.id} ({node.kind})")


class _Concepts:
    """Follows concepts from an Apply to where they are made."""

    def __init__(self, graph: Graph, digest: Digest | None):
        self.graph, self.digest, self.left = graph, digest, 0

    def parts(self, node: Node, name: str, found: Protection) -> list[Part]:
        """The concepts that come in; why there are none goes to `stops`, why some do not count to `weak`."""
        doubts: list[str] = []
        self.left = MOST_LINKS
        parts = self._at(node.inputs.get(name), doubts, 0)
        if len(parts) > MOST_CONCEPTS or self.left <= 0:
            parts, doubts = [], [f"more than {MOST_CONCEPTS} concepts are connected"]
        if not parts:
            found.stops += doubts or ["no concept is connected"]
        found.weak += doubts
        return parts

    def _at(self, value: Any, doubts: list[str], depth: int) -> list[Part]:
        self.left -= 1
        if value is None or self.left <= 0:
            return []
        node = self.graph.nodes[value.source] if isinstance(value, Link) else None
        if (
            node is None
            or node.bypassed
            or node.kind not in (LOAD, COMBINE, CALIBRATE)
            or value.slot != 0
            or depth > DEEPEST
        ):
            what = f"node {node.id} ({node.kind})" if node else getattr(value, "reason", "something that is no node")
            doubts.append(f"a concept comes from {what}: it cannot be verified")
            return []
        if node.kind == COMBINE:
            return self._combined(node, doubts, depth)
        if node.kind == CALIBRATE:
            return [Part(node.id, f"made of prompts by node {node.id}", 1.0, made_of_prompts=True)]
        return self._loaded(node, doubts)

    def _combined(self, node: Node, doubts: list[str], depth: int) -> list[Part]:
        """All concepts of a Combine. Taken apart, what two share is turned only as far as the weaker: that counts for all."""
        told, parts, stops = len(doubts), [], []
        for name, value in node.inputs.items():
            if name.startswith("concepts") and len(parts) <= MOST_CONCEPTS:
                parts += self._at(value, doubts, depth + 1)
        apart = _Reader(self.graph, node, stops).value("orthogonalise", False)
        if parts and (stops or apart is not False):
            least = 0.0 if len(doubts) > told else min(part.strength for part in parts)
            parts = [Part(p.node, p.name, least, p.sha256, p.made_of_prompts) for p in parts]
        return parts

    def _loaded(self, node: Node, doubts: list[str]) -> list[Part]:
        stops: list[str] = []
        read = _Reader(self.graph, node, stops)
        name, strength = read.text("concept", None), read.number("strength", 1.0, 0.0, STRENGTH_MAX)
        pin = read.text("sha256", "").strip().lower()
        if pin and not SHA256.fullmatch(pin):
            stops.append(f"its sha256 is {pin!r:.40}, which no file has")
        if not stops and self.digest:
            stops += _unlike(self.digest(name), pin)
        if stops:
            doubts.append(f"concept {name!r:.60} of node {node.id}: {'; '.join(stops)}")
            return []
        return [Part(node.id, name, strength, pin or None)]


def _unlike(digest: str | None, pin: str) -> list[str]:
    if digest is None:
        return ["there is no file of this name in the folder of concepts"]
    return [f"is pinned to {pin}, but the file there has {digest}"] if pin and pin != digest else []
