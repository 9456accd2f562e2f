"""The concepts that come into an Apply, with facts from their files. A caller hands the files in as `Files`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .graph import Graph, Input, Link, Node
from .known import CALIBRATE, COMBINE, LOAD, OUTSIDE
from .settings import OF_COMBINE, OF_LOAD, SHA256, settings

LEAST_STRENGTH = 0.05  # the nodes' smallest step: a lower strength rounds to 0
MOST_CONCEPTS, MOST_LINKS = 64, 500  # of one Apply: concepts, links followed
MOST_COMBINED = 32  # inputs of a Combine node
UNSEEN = "is in its file, which is not at hand (--concepts FOLDER)"
Concept, Rotations = Any, Any  # opaque; a concept has a `strength`


class File(Protocol):
    """A concept file that was read whole, and the effect of its concepts in Load and Apply nodes."""

    @property
    def sha256(self) -> str: ...

    def scaled(self, strength: float) -> list[Concept]:
        """The concepts with the strength of a Load node."""

    def rotations(
        self, concepts: Sequence[Concept], strength: float, threshold: float | None, blocks: str, streams: str
    ) -> Rotations | None:
        """Rotations of an Apply with concepts of any files; None: it turns nothing. ValueError where it would stop."""

    def turned(self, chain: Sequence[Rotations]) -> tuple[int, int]:
        """(heads in which the chain moves any unsafe direction of the file's concepts, all heads of these)."""


Files = Callable[[str], File | str]  # the file of a name in a workflow, or the reason why there is none


@dataclass
class Part:
    """The concepts that one node gives an Apply.

    - `strength`: that of its file, where at hand, times its own, times Apply's.
    - `turns`: by its file, (heads in which it moves its own unsafe directions, all its heads). None: not known.
    """

    node: str
    name: str
    strength: float = 1.0
    sha256: str | None = None  # the file that it is pinned to
    made_of_prompts: bool = False
    turns: tuple[int, int] | None = None
    file: File | None = field(default=None, repr=False, compare=False)
    concepts: list[Any] = field(default_factory=list, repr=False, compare=False)  # of the file, with Load's strength

    @property
    def counts(self) -> bool:
        return self.strength >= LEAST_STRENGTH and (self.turns is None or self.turns[0] > 0)


def parts(graph: Graph, apply: Node, files: Files | None, stops: list[str]) -> list[Part]:
    """The concepts of an Apply in their order. Each doubt about one of them goes to `stops`."""
    found: list[Part] = []
    todo = [value for value in (apply.inputs.get("concept"),) if value is not None]
    for _ in range(MOST_LINKS):
        if not todo or len(found) > MOST_CONCEPTS:
            break
        node = _source(graph, todo.pop(), stops)
        if node and node.kind == COMBINE:
            todo += _combined(graph, node, stops)[::-1]
        elif node:
            found += _made(graph, node, files, stops)
    if todo or len(found) > MOST_CONCEPTS:
        stops.append(f"more than {MOST_CONCEPTS} concepts are connected")
    elif not found and not stops:
        stops.append("no concept is connected")
    return found


def _source(graph: Graph, value: Input, stops: list[str]) -> Node | None:
    """The node that gives a concept."""
    node = graph.nodes[value.source] if isinstance(value, Link) else None
    if node and not node.bypassed:
        if node.kind == OUTSIDE or (node.kind in (LOAD, COMBINE, CALIBRATE) and value == Link(node.id, 0)):
            return node
    what = f"node {node.id} ({node.kind})" if node else getattr(value, "reason", "something that is no node")
    stops.append(f"a concept comes from {what}: it cannot be verified")
    return None


def _combined(graph: Graph, node: Node, stops: list[str]) -> list[Input]:
    """The inputs of a Combine in their order. The one of 0.1.0 could take concepts apart, and then hardly protected."""
    names = [name for name in node.inputs if name not in OF_COMBINE]
    if names != [f"concepts.concept{i}" for i in range(min(len(names), MOST_COMBINED))]:
        stops.append(f"Combine {node.id} has inputs in a row that ComfyUI does not make: they cannot be verified")
        return []
    if settings(graph, node, OF_COMBINE, stops)["orthogonalise"] is not False:
        stops.append(f"Combine {node.id} takes concepts apart (orthogonalise): the rest of each {UNSEEN}")
    return [node.inputs[name] for name in names]


def _made(graph: Graph, node: Node, files: Files | None, stops: list[str]) -> list[Part]:
    if node.kind == OUTSIDE:
        return [Part(node.id, "from outside, by an input of the blueprint")]
    if node.kind == CALIBRATE:
        return [Part(node.id, f"made of prompts by node {node.id}", made_of_prompts=True)]
    told: list[str] = []
    found = settings(graph, node, OF_LOAD, told)
    pin = (found["sha256"] or "").strip().lower()
    if pin and not SHA256.fullmatch(pin):
        told.append(f"its sha256 is {pin!r:.40}, which no file has")
    file = files(found["concept"]) if files and not told else None
    if isinstance(file, str):
        told.append(file)
    elif file and pin not in ("", file.sha256):
        told.append(f"is pinned to {pin}, but the file there has {file.sha256}")
    if told:
        stops.append(f"concept {found['concept']!r:.60} of node {node.id}: {'; '.join(told)}")
        return []
    return [_with_file(Part(node.id, found["concept"], found["strength"], pin or None), file)]


def _with_file(part: Part, file: File | None) -> Part:
    """The part with its file. Its strength is then that of the concept in the file which is furthest from 1."""
    if file:
        part.file, part.concepts = file, file.scaled(part.strength)
        part.strength = max((each.strength for each in part.concepts), key=lambda strength: abs(strength - 1))
    return part
