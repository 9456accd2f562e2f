"""Does every path from a model to a sampler pass a SafeRoPE Apply that acts? A graph in, a verdict out.

Models are followed forward from where they are loaded, through all that passes them on, up to an Apply that holds what is
required; whatever is reached is exposed. Every model counts as FLUX unless its loader can load nothing of the kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .editor import from_editor
from .file import Documents, Unreadable
from .graph import Flow, Graph, Node, Unknown, from_api
from .protections import Digest, Protection, protections

# loaders of single other architectures (the pack ComfyUI_ExtraModels); ComfyUI's own load whatever the file holds
OTHER_FAMILIES = {"PixArtCheckpointLoader", "SanaCheckpointLoader", "DitCheckpointLoader"}
MOST_PATHS = 4  # shown of a sampler
MOST_STEPS = 1_000_000  # for what is shown of all samplers; the verdict itself needs no such limit
ACTING = "an Apply that acts"


@dataclass
class Sampler:
    """A node that draws. `failures`: what is required and missing, with a path where it is missing."""

    node: str
    kind: str
    failures: list[tuple[str, list[str]]] = field(default_factory=list)
    paths: list[list[str]] = field(default_factory=list)
    more_paths: bool = False
    protections: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # nodes on its paths that are known by their links alone
    other_family: bool = False

    @property
    def protected(self) -> bool:
        return not self.failures and not self.other_family


@dataclass
class Verdict:
    """What is to be said of one graph. `names`: of nodes, by id."""

    samplers: list[Sampler]
    protections: dict[str, Protection]
    opaque: list[tuple[str, str]]
    notes: list[str]
    names: dict[str, str]
    idle: set[str]  # Applies on no path to a sampler
    form: str = ""

    @property
    def protected(self) -> bool:
        """Every sampler of a model that may be FLUX, at least one, and nothing out of sight."""
        judged = [sampler for sampler in self.samplers if not sampler.other_family]
        return bool(judged) and all(sampler.protected for sampler in judged) and not self.opaque


@dataclass(frozen=True)
class Required:
    """What every path must pass: an Apply that acts; `full`: over all of it; one pinned to each of `digests`."""

    digests: tuple[str, ...] = ()
    full: bool = False

    def tests(self) -> list[tuple[str, Callable[[Protection], bool]]]:
        holds = Protection.full if self.full else lambda each: each.acts
        what = f"{ACTING} in full" if self.full else ACTING
        pinned = [
            (f"{what}, pinned to {digest}", lambda each, digest=digest: holds(each) and each.pinned_to(digest))
            for digest in self.digests
        ]
        return [(what, holds), *pinned]


def audit_file(documents: Documents, required: Required, digest: Digest | None = None) -> Verdict:
    """The verdict on a file. Where it holds what ran and what the editor showed, the former counts.

    Raises Unreadable where what counts cannot be read.
    """
    if documents.prompt is None:
        verdict = audit(from_editor(documents.workflow), required, digest)
        verdict.form = "editor's form"
        if documents.picture:
            verdict.notes.append("the file holds only the editor's workflow, not what ran")
        return verdict
    verdict = audit(from_api(documents.prompt), required, digest)
    verdict.form = "API form"
    if documents.picture:
        verdict.notes += _disagreement(verdict, documents.workflow, required, digest)
    return verdict


def _disagreement(verdict: Verdict, workflow: Any, required: Required, digest: Digest | None) -> list[str]:
    if workflow is None:
        return []
    try:
        shown = audit(from_editor(workflow), required, digest)
    except Unreadable as error:
        return [f"DISAGREEMENT: the editor's workflow in the same file {error}; what ran (prompt) counts"]
    if _gist(shown) == _gist(verdict):
        return []
    words = "protected" if shown.protected else "not protected"
    return [
        f"DISAGREEMENT: by the editor's workflow in the same file it is {words}, or differently so; what ran (prompt) counts"
    ]


def _gist(verdict: Verdict) -> tuple:
    acting = {
        key: (p.settings, p.parts) for key, p in verdict.protections.items() if p.acts and key not in verdict.idle
    }
    return verdict.protected, {sampler.node: sampler.protected for sampler in verdict.samplers}, acting


def audit(graph: Graph, required: Required, digest: Digest | None = None) -> Verdict:
    """The verdict on a graph."""
    flow = Flow(graph)
    found = protections(flow, digest)
    names = {node.id: f"{node.kind} {node.id}{' (bypassed)' * node.bypassed}" for node in graph.nodes.values()}
    walk = Walk(flow)
    samplers = [Sampler(node.id, node.kind) for node in graph.nodes.values() if flow.samples(node)]
    for what, holds in required.tests():
        stops = {key for key, protection in found.items() if holds(protection)}
        parents = walk.exposed(stops)
        for sampler in samplers:
            if sampler.node in parents:
                sampler.failures.append((f"a path without {what}", walk.path(sampler.node, parents)))
    anything = walk.exposed(set())
    for sampler in samplers:
        _finish(sampler, walk, found, anything)
    names |= {key: f"node {key}" for key, _ in graph.opaque if key not in names}
    used = {key for sampler in samplers for key in sampler.protections}
    idle = set(found) - used if walk.left > 0 else set()
    return Verdict(samplers, found, graph.opaque, graph.notes, names, idle)


def _finish(sampler: Sampler, walk: Walk, found: dict[str, Protection], anything: dict[str, str | None]) -> None:
    """What else there is to say of a sampler: circles, missing models, its paths."""
    node = walk.flow.graph.nodes[sampler.node]
    if sampler.node in walk.circular:
        sampler.failures.append(("models that run in a circle", []))
    elif sampler.node not in anything:
        sampler.other_family = sampler.node in walk.foreign
        if not sampler.other_family:
            sampler.failures.append(("no model reaches it", []))
    sampler.paths, sampler.more_paths = walk.some_paths(node)
    upstream = walk.upstream(sampler.node)
    sampler.protections = [key for key in upstream if key in found]
    nodes = (walk.flow.graph.nodes[key] for key in upstream[1:])
    sampler.unknown = [each.id for each in nodes if not walk.flow.known(each) and not each.bypassed]


class Walk:
    """The links that models take, walked in both directions. Every walk visits a node once: circles end it."""

    def __init__(self, flow: Flow):
        self.flow, nodes = flow, flow.graph.nodes
        entries = {key: flow.models(node) for key, node in nodes.items()}
        self.before = {
            key: _distinct(value.source for _, value in found if not isinstance(value, Unknown))
            for key, found in entries.items()
        }
        self.after: dict[str, list[str]] = {key: [] for key in nodes}
        for key, sources in self.before.items():
            for source in sources:
                self.after[source].append(key)
        self.broken = [key for key, found in entries.items() if any(isinstance(value, Unknown) for _, value in found)]
        roots = [key for key in nodes if not entries[key] and self.after[key] and not nodes[key].bypassed]
        self.foreign_roots = [key for key in roots if nodes[key].kind in OTHER_FAMILIES]
        self.roots = [key for key in roots if nodes[key].kind not in OTHER_FAMILIES]
        self.foreign = set(self._spread(self.foreign_roots, set()))
        self.circular = self._circular()
        self.left = MOST_STEPS

    def _spread(self, roots: list[str], stops: set[str]) -> dict[str, str | None]:
        """What is reached from the roots without passing a stop: each node with the one it was reached from."""
        parents: dict[str, str | None] = {key: None for key in roots if key not in stops}
        todo = list(parents)
        while todo:
            key = todo.pop()
            for reached in self.after[key]:
                if reached not in parents and reached not in stops:
                    parents[reached] = key
                    todo.append(reached)
        return parents

    def exposed(self, stops: set[str]) -> dict[str, str | None]:
        """What a model of a family that may be FLUX, or an input that cannot be followed, reaches past all stops."""
        return self._spread(self.roots + self.broken, stops)

    def path(self, key: str, parents: dict[str, str | None]) -> list[str]:
        """From where the model comes to this node; empty when the steps are used up."""
        path, at = [], key
        while at is not None and self.left > 0:
            path.append(at)
            at = parents[at]
            self.left -= 1
        return path[::-1] if at is None else []

    def _circular(self) -> set[str]:
        """Nodes that lie on a circle of models or behind one: what is left when all others are taken away in order."""
        waiting = {key: len(sources) for key, sources in self.before.items()}
        todo = [key for key, count in waiting.items() if count == 0]
        while todo:
            for reached in self.after[todo.pop()]:
                waiting[reached] -= 1
                if waiting[reached] == 0:
                    todo.append(reached)
        return {key for key, count in waiting.items() if count}

    def upstream(self, key: str) -> list[str]:
        """The node and all that a model passes on the way to it; less when the steps are used up."""
        seen, todo = {key: None}, [key]
        while todo and self.left > 0:
            for source in self.before[todo.pop()]:
                self.left -= 1
                if source not in seen:
                    seen[source] = None
                    todo.append(source)
        return list(seen)

    def some_paths(self, node: Node) -> tuple[list[list[str]], bool]:
        """Up to MOST_PATHS paths from a loader to the node, and whether there are more."""
        found: list[list[str]] = []
        for path in self._paths(node.id):
            if len(found) == MOST_PATHS:
                return found, True
            found.append(path)
        return found, self.left <= 0

    def _paths(self, key: str) -> Iterator[list[str]]:
        """Depth first, backwards; stops for good when the steps for all samplers are used up."""
        path, branches = {key: None}, [iter(self.before[key])]
        while branches:
            self.left -= 1
            if self.left <= 0:
                return
            source = next(branches[-1], None)
            if source is None:
                path.popitem()
                branches.pop()
            elif source not in path:
                path[source] = None
                branches.append(iter(self.before[source]))
                if not self.before[source]:
                    self.left -= len(path)
                    yield list(path)[::-1]


def _distinct(keys: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(keys))
