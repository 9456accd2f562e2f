"""Does, by a workflow, every path from a model to a sampler pass a SafeRoPE Apply that acts? A graph in, a verdict out.

Models are followed forward from where they are loaded, through all that passes them on, up to an Apply that holds what is
required; whatever is reached is exposed. Whatever is not surely understood counts as not protected: a node on the way that
is not known, anything but a plain link where a model belongs, a setting whose effect depends on what is not in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .editor import from_editor
from .effect import Files, turned
from .file import Documents, Unreadable
from .graph import Flow, Graph, Link, Node, Unknown, Value, from_api
from .known import advice, draws, node_table
from .protections import Protection, constant, protections

# Their rows are the positive prompt (0) and the negative one (1); other guiders number theirs otherwise.
PLAIN_GUIDERS = {"KSampler", "KSamplerAdvanced", "SamplerCustom", "CFGGuider", "BasicGuider"}
MOST_PATHS = 4  # shown of a sampler
MOST_STEPS = 1_000_000  # for what depends on the way to a sampler, and again for the paths that are shown
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
    unknown: list[str] = field(default_factory=list)  # nodes on its paths that are not known

    @property
    def protected(self) -> bool:
        return not self.failures


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
        """Every sampler, at least one, and nothing out of sight."""
        return bool(self.samplers) and all(sampler.protected for sampler in self.samplers) and not self.opaque


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


def audit_file(documents: Documents, required: Required, files: Files | None = None) -> Verdict:
    """The verdict on a file. Where it holds what ran and what the editor showed, the former counts.

    Raises Unreadable where what counts cannot be read.
    """
    if documents.prompt is None:
        verdict = audit(from_editor(documents.workflow), required, files)
        verdict.form = "editor's form"
        if documents.picture:
            verdict.notes.append("the file holds only the editor's workflow, not what ran")
        return verdict
    verdict = audit(from_api(documents.prompt), required, files)
    verdict.form = "API form"
    if documents.picture:
        verdict.notes += _disagreement(verdict, documents.workflow, required, files)
    return verdict


def _disagreement(verdict: Verdict, workflow: Any, required: Required, files: Files | None) -> list[str]:
    if workflow is None:
        return []
    try:
        shown = audit(from_editor(workflow), required, files)
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


def audit(graph: Graph, required: Required, files: Files | None = None) -> Verdict:
    """The verdict on a graph."""
    flow = Flow(graph)
    found = protections(flow, files)
    names = {node.id: f"{node.kind} {node.id}{' (bypassed)' * node.bypassed}" for node in graph.nodes.values()}
    walk = Walk(flow)
    for protection in found.values():
        _stop_by_samplers(protection, walk)
    drawing = [node for node in graph.nodes.values() if node.known and not node.bypassed and draws(node.kind)]
    samplers = [Sampler(node.id, node.kind) for node in drawing]
    for what, holds in required.tests():
        parents = walk.exposed({key for key, protection in found.items() if holds(protection)})
        for sampler in samplers:
            if sampler.node in parents:
                sampler.failures.append((f"a path without {what}", walk.path(sampler.node, parents)))
    anything = walk.exposed(set())
    for sampler in samplers:
        _finish(sampler, walk, found, required, sampler.node in anything)
    walk.left = MOST_STEPS
    for sampler in samplers:
        sampler.paths, sampler.more_paths = walk.some_paths(graph.nodes[sampler.node])
    opaque, notes = graph.opaque + _takers(flow), graph.notes + _others(flow)
    names |= {key: f"node {key}" for key, _ in opaque if key not in names}
    idle = set(found) - {key for sampler in samplers for key in sampler.protections}
    if any(each.acts and not all(part.file for part in each.parts) for each in found.values()):
        notes = [
            *notes,
            "what the concepts turn was not looked at, only what the workflow asks for (--concepts FOLDER)",
        ]
    return Verdict(samplers, found, opaque, notes, names, idle)


def _finish(sampler: Sampler, walk: Walk, found: dict[str, Protection], required: Required, reached: bool) -> None:
    """What else keeps a sampler from being protected: circles, missing models, strange nodes, concepts that undo others."""
    if sampler.node in walk.circular:
        sampler.failures.append(("models that run in a circle", []))
    elif not reached:
        sampler.failures.append(("no model reaches it", []))
    upstream = walk.upstream(sampler.node)
    sampler.protections = [key for key in upstream if key in found]
    nodes = [walk.flow.graph.nodes[key] for key in upstream]
    sampler.unknown = [node.id for node in nodes if not node.known and not node.bypassed]
    sampler.failures += [
        (f"{node.kind} {node.id} takes a model over {walk.broken[node.id]}", [])
        for node in nodes
        if node.id in walk.broken
    ]
    sampler.failures += [
        (f"its model comes by {node.kind} {node.id}, which is not known; {advice(node.kind)}", [])
        for node in nodes
        if node.id in sampler.unknown
    ]
    for key in sampler.protections:
        chain = [found[each] for each in walk.upstream(key)[::-1] if each in found and found[each].acts]
        sampler.failures += [(doubt, []) for doubt in _doubts(chain, required) if (doubt, []) not in sampler.failures]
    if walk.left <= 0:
        sampler.failures.append(("too many ways lead to it to look at all of them", []))


def _doubts(chain: list[Protection], required: Required) -> list[str]:
    """What Applies in a row may undo or overdo together, though each of them acts."""
    parts = [part for each in chain for part in each.parts if part.counts]
    doubts = [
        f"concept {part.name!r} is not among the required ones, and may turn back what they turn: require its sha256 too, or "
        "give --concepts FOLDER"
        for part in parts
        if required.digests and part.sha256 not in required.digests and part.file is None
    ]
    if required.full:
        keys = [key for part in parts for key in {part.name, part.file and part.file.sha256, part.sha256} if key]
        doubts += [
            f"concept {key!r} acts twice, and turns twice as far" for key in _distinct(keys) if keys.count(key) > 1
        ]
    if len(chain) > 1 and all(part.file for part in parts):
        does = [each.does for each in chain]
        doubts += [
            f"concept {part.name!r} turns nothing together with the others, by their files"
            for part in parts
            if turned(part.file.concepts, does)[0] == 0
        ]
    return doubts


def _stop_by_samplers(found: Protection, walk: Walk) -> None:
    """Settings whose effect depends on the samplers behind."""
    if not found.acts:
        return
    nodes = [walk.flow.graph.nodes[key] for key in walk.behind(found.node)]
    if found.settings["conditionings"] != "all":
        for node in nodes:
            if _guides(node) and node.kind not in PLAIN_GUIDERS:
                found.stops.append(f"positive only under {node.kind} {node.id}, which numbers its prompts otherwise")
    if found.settings["end_percent"] < 1:
        for node in nodes:
            if node.known and draws(node.kind) and not _from_the_start(walk.flow.graph, node):
                found.stops.append(
                    f"it ends at {found.settings['end_percent']:g} of the steps, and {node.kind} {node.id} may begin after "
                    "that: only a denoise of 1, as a constant, is sure to begin before"
                )


def _guides(node: Node) -> bool:
    """Whether a node decides which prompts the model is asked with: samplers that take one, and guiders."""
    if not node.known or node.bypassed:
        return False
    inputs, outputs = node_table()[node.kind]
    return "MODEL" in inputs.values() and ("GUIDER" in outputs or draws(node.kind))


def _from_the_start(graph: Graph, node: Node) -> bool:
    """Whether a sampler's first step is surely that of the whole schedule."""
    sigmas = node.inputs.get("sigmas")
    if node.kind in ("SamplerCustom", "SamplerCustomAdvanced") and isinstance(sigmas, Link):
        node = graph.nodes[sigmas.source]
    if node.kind not in ("KSampler", "BasicScheduler") or node.bypassed:
        return False
    denoise = node.inputs.get("denoise")
    denoise = constant(graph, denoise) if isinstance(denoise, Link) else denoise
    return isinstance(denoise, Value) and type(denoise.value) in (int, float) and denoise.value == 1


def _takers(flow: Flow) -> list[tuple[str, str]]:
    """Nodes that are not known and take what may be a model: each may be a sampler."""
    nodes = [node for node in flow.graph.nodes.values() if not node.known and not node.bypassed]
    return [
        (node.id, f"is not known, takes what may be a model, and may draw with it; {advice(node.kind)}")
        for node in nodes
        if flow.models(node)
    ]


def _others(flow: Flow) -> list[str]:
    """A note of the nodes that are not known and take nothing that may be a model."""
    nodes = [node for node in flow.graph.nodes.values() if not node.known and not node.bypassed]
    kinds = _distinct(node.kind for node in nodes if not flow.models(node))
    if not kinds:
        return []
    return [
        f"not known, and not seen to take a model; if one loads and draws by itself, nobody sees it: {', '.join(kinds)}"
    ]


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
        self.broken = {
            key: value.reason for key, found in entries.items() for _, value in found if isinstance(value, Unknown)
        }
        self.roots = [key for key in nodes if not entries[key] and self.after[key] and not nodes[key].bypassed]
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

    def behind(self, key: str) -> list[str]:
        """The nodes that a node's model reaches, and itself."""
        return list(self._spread([key], set()))

    def exposed(self, stops: set[str]) -> dict[str, str | None]:
        """What a model, or an input that cannot be followed, reaches past all stops."""
        return self._spread([*self.roots, *self.broken], stops)

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


def _distinct(keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(keys))
