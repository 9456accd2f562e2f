"""One small graph for both forms of a ComfyUI workflow.

An input holds a Link to another node's output, a Value, or an Unknown with the reason. An input that nothing is linked
to is missing. The API form becomes a graph here, the editor's form in `editor`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .file import Unreadable
from .known import ASKS_ONLY, DRAWN, EVERYWHERE, MODELS, OUTSIDE, node_table

MAX_NODES = 20_000  # of a workflow with its subgraphs unfolded


@dataclass(frozen=True)
class Link:
    """The output of another node."""

    source: str
    slot: int


@dataclass(frozen=True)
class Value:
    """A constant: a widget's value, or one that a primitive node brings."""

    value: Any


@dataclass(frozen=True)
class Unknown:
    """An input whose source cannot be followed. `link`: it may be a link, and so bring a model."""

    reason: str
    link: bool = True


Input = Link | Value | Unknown


@dataclass
class Node:
    """A node that runs, or a bypassed one, which stays and passes on its inputs."""

    id: str
    kind: str
    inputs: dict[str, Input] = field(default_factory=dict)
    bypassed: bool = False

    @property
    def known(self) -> bool:
        return self.kind in node_table()

    @property
    def strange(self) -> bool:
        """Whether it runs and is of no known class."""
        return not self.bypassed and not self.known

    @property
    def draws(self) -> bool:
        """Whether it runs and is known to draw: takes a model, gives a latent or picture, and passes no model on.

        Nodes that give neither (schedulers, savers) draw nothing. Nodes that give a latent beside a model prepare both.
        """
        takes, gives = self._types()
        return bool(takes & MODELS and gives & DRAWN and not gives & MODELS) and self.kind not in ASKS_ONLY

    @property
    def guides(self) -> bool:
        """Whether it runs and chooses the prompts for a model: samplers that take one, and guiders."""
        takes, gives = self._types()
        return "MODEL" in takes and ("GUIDER" in gives or self.draws)

    def _types(self) -> tuple[set[str], set[str]]:
        """The types that it takes and gives where it runs, as far as known."""
        inputs, outputs = node_table()[self.kind] if self.known and not self.bypassed else ({}, [])
        return set(inputs.values()), set(outputs)

    def __str__(self) -> str:
        return f"{self.kind} {self.id}{' (bypassed)' * self.bypassed}"


@dataclass
class Graph:
    """Nodes by id. `opaque`: nodes that may sample out of sight (id and reason). `notes`: other facts for a reader."""

    nodes: dict[str, Node] = field(default_factory=dict)
    opaque: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def from_api(prompt: Any) -> Graph:
    """The graph of an API form, {node id: {"class_type", "inputs"}}. Raises Unreadable for anything else."""
    if not isinstance(prompt, dict) or not 0 < len(prompt) <= MAX_NODES:
        raise Unreadable(
            f'has no nodes or over {MAX_NODES}, expected {{node id: {{"class_type": ..., "inputs": ...}}}}'
        )
    graph = Graph()
    for key, entry in prompt.items():
        kind, inputs = (entry.get("class_type"), entry.get("inputs", {})) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or kind == OUTSIDE or not isinstance(inputs, dict):
            raise Unreadable(f'has an entry {key!r:.60} that is no node, expected {{"class_type": ..., "inputs": ...}}')
        if EVERYWHERE.fullmatch(kind):
            inputs = {}  # its links are plain ones in this form
        graph.nodes[key] = Node(key, kind, {name: _api_input(value, prompt) for name, value in inputs.items()})
    return graph


def _api_input(value: Any, prompt: dict) -> Input:
    """A plain link or a value. ComfyUI follows more (["1", false], ["1", -3], {"__value__": ["1", 0]}); its editor
    writes no others.
    """
    if isinstance(value, dict) and "__value__" in value:
        return Unknown("a value in a wrapper (__value__), which may be a link")
    if not isinstance(value, list):
        return Value(value)
    if len(value) != 2 or not isinstance(value[0], str) or type(value[1]) is not int or value[1] < 0:
        return Unknown("a list that is no plain link")
    return Link(*value) if value[0] in prompt else Unknown(f"a link from node {value[0]:.60}, which is not there")
