"""What comes into an Apply: the values of its settings, and the concepts with what may be read of their files.

Values count from widgets, and from primitive nodes with a constant. Whatever is not surely understood is told as a
reason why the Apply does not act.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

from .editor import PRIMITIVES
from .effect import File, Files
from .graph import Graph, Link, Node, Unknown, Value
from .known import CALIBRATE, COMBINE, LOAD, OUTSIDE

STRENGTH_MAX = 2.0  # of the nodes
LEAST_STRENGTH = 0.05  # the nodes' smallest step: less rounds away
MOST_CONCEPTS, DEEPEST, MOST_LINKS = 64, 16, 500  # of one Apply: concepts, Combine nodes in a row, links followed
MOST_COMBINED = 32  # inputs of a Combine node
UNSEEN = "is in its file, which is not at hand (--concepts FOLDER)"
SHA256 = re.compile(r"[0-9a-f]{64}")


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
    concepts: tuple[Any, ...] = field(default=(), repr=False, compare=False)  # of the file, times its Load's strength

    @property
    def counts(self) -> bool:
        return self.strength >= LEAST_STRENGTH and (self.turns is None or self.turns[0] > 0)


class Reader:
    """Values of one node; what cannot be read is told in `stops` and comes as None, or as the default for choices."""

    def __init__(self, graph: Graph, node: Node, stops: list[str]) -> None:
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


class Concepts:
    """Follows concepts from an Apply to where they are made."""

    def __init__(self, graph: Graph, files: Files | None) -> None:
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
        if node and node.kind == OUTSIDE:
            return [Part(node.id, f"from outside, by input {value.slot + 1} of the blueprint", 1.0)]
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
        """All concepts of a Combine, in their order. 0.1.0 could take them apart, and then hardly protected."""
        names = [name for name in node.inputs if name != "orthogonalise"]
        if names != [f"concepts.concept{i}" for i in range(min(len(names), MOST_COMBINED))]:
            stops.append(f"Combine {node.id} has inputs in a row that ComfyUI does not make: they cannot be verified")
            return []
        parts = [part for name in names for part in self._at(node.inputs[name], stops, depth + 1)]
        apart = Reader(self.graph, node, stops).value("orthogonalise", False)
        if apart is False or len(parts) < 2 or stops:
            return parts
        stops.append(f"Combine {node.id} takes concepts apart (orthogonalise): what is left of each {UNSEEN}")
        return []

    def _loaded(self, node: Node, stops: list[str]) -> list[Part]:
        told: list[str] = []
        read = Reader(self.graph, node, told)
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
        return [
            replace(
                part,
                strength=strength * furthest,
                file=file,
                concepts=tuple(file.effect.scaled(file.concepts, strength)),
            )
        ]
