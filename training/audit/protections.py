"""What the SafeRoPE nodes of a workflow do: whether each Apply acts, on which concepts, how far, and what weakens it.

An Apply counts as acting only where everything that decides it can be read: values from widgets, and from primitive nodes
with a constant. What would make ComfyUI stop (a value out of range, a pin that no file can have) does not count either, nor
what is decided by a concept's file as long as that is not at hand. Where it is, what it turns counts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

from .editor import PRIMITIVES
from .effect import File, Files, rotations, scaled, taken_apart, turned
from .graph import Flow, Graph, Link, Node, Unknown, Value
from .known import APPLY, CALIBRATE, COMBINE, LOAD

STRENGTH_MAX = 2.0  # of the nodes
LEAST_STRENGTH = 0.05  # the nodes' smallest step: less rounds away
CALIBRATED, FIXED = "as calibrated", "fixed"
PAPER_THRESHOLD = 0.7  # a higher fixed gate lets through what the paper's own would not
MOST_CONCEPTS, DEEPEST, MOST_LINKS = 64, 16, 500  # of one Apply: concepts, Combine nodes in a row, links followed
MOST_COMBINED = 32  # inputs of a Combine node
UNSEEN = "is in its file, which is not at hand (--concepts FOLDER)"
SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCKS = re.compile(r"\s*[ds][0-9]{1,4}(-[0-9]{1,4})?\s*(,\s*[ds][0-9]{1,4}(-[0-9]{1,4})?\s*)*", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """What one node gives an Apply to turn; strength: of its file, where at hand, times its own times that of Apply.

    `turns`: in how many of its heads, by its file, it moves what it is about, and how many it has; None: not known.
    """

    node: str
    name: str
    strength: float
    sha256: str | None = None  # what it is pinned to
    made_of_prompts: bool = False
    turns: tuple[int, int] | None = None
    file: File | None = field(default=None, repr=False, compare=False)
    concepts: tuple[Any, ...] = field(
        default=(), repr=False, compare=False
    )  # of the file, with the strength of its Load node

    @property
    def counts(self) -> bool:
        return self.strength >= LEAST_STRENGTH and (self.turns is None or self.turns[0] > 0)


@dataclass
class Protection:
    """One Apply. `stops`: why it does not act; `weak`: what makes it less than whole; `does`: by its concepts' files."""

    node: str
    settings: dict[str, Any] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    weak: list[str] = field(default_factory=list)
    does: Any = field(default=None, repr=False)

    @property
    def acts(self) -> bool:
        return not self.stops

    def full(self) -> bool:
        return self.acts and not self.weak

    def pinned_to(self, digest: str) -> bool:
        return self.acts and any(part.sha256 == digest and part.counts for part in self.parts)


def protections(flow: Flow, files: Files | None = None) -> dict[str, Protection]:
    """Every Apply that is neither muted nor bypassed, by the id of its node."""
    reader = _Concepts(flow.graph, files)
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
    found.parts = [replace(p, strength=p.strength * (strength or 0.0)) for p in reader.parts(node, found.stops)]
    if not found.stops:  # else the numbers are not all there
        _stop(found, threshold)
    if not found.stops and any(part.file for part in found.parts):
        _try(found)
    if not found.stops:
        _weaken(found)
    return found


def _stop(found: Protection, threshold: float) -> None:
    """What stops a protection whose settings can all be read."""
    settings, blocks = found.settings, found.settings["blocks"]
    start, end = settings["start_percent"], settings["end_percent"]
    if settings["strength"] == 0:
        found.stops.append("strength is 0")
    elif not any(part.counts for part in found.parts):
        found.stops.append(f"no concept has a strength of {LEAST_STRENGTH:g} or more")
    if start >= end:
        found.stops.append(f"its range of steps is empty ({start:g} to {end:g})")
    elif start > 0:
        found.stops.append(
            f"it starts at {start:g} of the steps: whether one of them comes after that is not in the file"
        )
    if settings["gate"] == FIXED and threshold >= 1:
        found.stops.append("its gate is fixed at 1, which no risk is above")
    if blocks.strip() and not _BLOCKS.fullmatch(blocks):
        found.stops.append(f"blocks are {blocks!r:.60}, which cannot be read")
    if all(part.file for part in found.parts):
        return
    if blocks.strip():
        found.stops.append(f"only the blocks {blocks.strip()!r:.60}; whether a concept has heads there {UNSEEN}")
    if settings["streams"] == "image":
        found.stops.append(f"only the image stream; whether a concept turns it {UNSEEN}")


def _try(found: Protection) -> None:
    """Lets the concepts whose files are at hand turn their own unsafe directions."""
    settings = found.settings
    concepts = [concept for part in found.parts for concept in part.concepts]
    try:
        found.does = rotations(
            concepts, settings["strength"], settings["threshold"], settings["blocks"], settings["streams"]
        )
    except ValueError as error:
        found.stops.append(f"its concepts do not go together ({error})")
        return
    chain = [found.does] if found.does else []
    found.parts = [replace(p, turns=turned(p.file.concepts, chain)) if p.file else p for p in found.parts]
    if not any(part.counts for part in found.parts):
        found.stops.append("by their files, its concepts turn nothing")


def _weaken(found: Protection) -> None:
    """What makes a protection that acts less than whole. Rotations are periodic: more than 1 is not more than whole."""
    settings, weak = found.settings, found.weak
    for part in found.parts:
        if not math.isclose(part.strength, 1):
            weak.append(f"concept {part.name!r} has strength {part.strength:g}, expected 1")
        if part.turns and part.turns[0] < part.turns[1]:
            weak.append(f"concept {part.name!r} turns in {part.turns[0]} of its {part.turns[1]} heads")
    if settings["end_percent"] < 1:
        weak.append(f"only a part of the steps, 0 to {settings['end_percent']:g}")
    if settings["gate"] == FIXED and settings["threshold"] > PAPER_THRESHOLD:
        weak.append(f"a fixed gate of {settings['threshold']:g}, above the paper's {PAPER_THRESHOLD:g}")
    if settings["blocks"].strip():
        weak.append(f"only the blocks {settings['blocks'].strip()!r:.60}")
    if settings["streams"] != "both":
        weak.append(f"only the {settings['streams']} stream")
    if settings["conditionings"] != "all":
        weak.append("only the positive conditioning")


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
    if node.kind in PRIMITIVES and link.slot == 0 and not node.bypassed:
        found = node.inputs.get("value")
        if isinstance(found, Unknown) or (isinstance(found, Value) and type(found.value) in PRIMITIVES[node.kind]):
            return found
    return Unknown(f"node {node.id} ({node.kind})", link=False)


class _Concepts:
    """Follows concepts from an Apply to where they are made."""

    def __init__(self, graph: Graph, files: Files | None):
        self.graph, self.files, self.left = graph, files, 0

    def parts(self, node: Node, stops: list[str]) -> list[Part]:
        """The concepts that come in; whatever is not surely understood of any of them goes to `stops`."""
        self.left = MOST_LINKS
        parts = self._at(node.inputs.get("concept"), stops, 0)
        if len(parts) > MOST_CONCEPTS or self.left <= 0:
            parts = []
            stops[:] = [f"more than {MOST_CONCEPTS} concepts are connected"]
        if not parts and not stops:
            stops.append("no concept is connected")
        return parts

    def _at(self, value: Any, stops: list[str], depth: int) -> list[Part]:
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
            stops.append(f"a concept comes from {what}: it cannot be verified")
            return []
        if node.kind == COMBINE:
            return self._combined(node, stops, depth)
        if node.kind == CALIBRATE:
            return [Part(node.id, f"made of prompts by node {node.id}", 1.0, made_of_prompts=True)]
        return self._loaded(node, stops)

    def _combined(self, node: Node, stops: list[str], depth: int) -> list[Part]:
        """All concepts of a Combine, in their order. Taken apart, what is left of each is known by their files alone."""
        names = [name for name in node.inputs if name != "orthogonalise"]
        if names != [f"concepts.concept{i}" for i in range(min(len(names), MOST_COMBINED))]:
            stops.append(f"Combine {node.id} has inputs in a row that ComfyUI does not make: they cannot be verified")
            return []
        parts = [part for name in names for part in self._at(node.inputs[name], stops, depth + 1)]
        apart = _Reader(self.graph, node, stops).value("orthogonalise", False)
        if apart is False or len(parts) < 2 or stops:
            return parts
        if not all(part.file for part in parts):
            stops.append(f"Combine {node.id} takes concepts apart (orthogonalise): what is left of each {UNSEEN}")
            return []
        try:
            left = iter(taken_apart([concept for part in parts for concept in part.concepts]))
        except ValueError as error:
            stops.append(f"Combine {node.id} cannot take its concepts apart ({error})")
            return []
        return [replace(part, concepts=tuple(next(left) for _ in part.concepts)) for part in parts]

    def _loaded(self, node: Node, stops: list[str]) -> list[Part]:
        told: list[str] = []
        read = _Reader(self.graph, node, told)
        name, strength = read.text("concept", None), read.number("strength", 1.0, 0.0, STRENGTH_MAX)
        pin = read.text("sha256", "").strip().lower()
        if pin and not SHA256.fullmatch(pin):
            told.append(f"its sha256 is {pin!r:.40}, which no file has")
        file = self.files(name) if self.files and not told else None
        if isinstance(file, str):
            told.append(file)
        elif file and pin not in ("", file.sha256):
            told.append(f"is pinned to {pin}, but the file there has {file.sha256}")
        if told:
            stops.append(f"concept {name!r:.60} of node {node.id}: {'; '.join(told)}")
            return []
        part = Part(node.id, name, strength, pin or None)
        if file is None:
            return [part]
        furthest = max((each.strength for each in file.concepts), key=lambda own: abs(own * strength - 1))
        return [replace(part, strength=strength * furthest, file=file, concepts=tuple(scaled(file.concepts, strength)))]
