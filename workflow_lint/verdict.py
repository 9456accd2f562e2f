"""Does, by a workflow, every path from a model to a sampler pass a SafeRoPE Apply that acts? A graph in, a verdict out.

Models are followed forward from where they are loaded, through all that passes them on, up to an Apply that holds what
is required; whatever is reached is exposed. Whatever is not surely understood counts as not protected: a node on the
way that is not known, anything but a plain link where a model belongs, a setting whose effect depends on what is not in
the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .editor import from_editor
from .effect import Files
from .file import Documents, Unreadable
from .graph import Flow, Graph, from_api
from .known import advice
from .protections import Protection, protections
from .together import doubts, drawing, stop_by_samplers, unpinned
from .walk import MOST_STEPS, Walk, distinct

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
    """What every path must pass: an Apply that acts; `full`: over all of it; one pinned to each of `digests`.

    every_pinned: and no concept on the way that is not pinned to some file.
    """

    digests: tuple[str, ...] = ()
    full: bool = False
    every_pinned: bool = False

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
    words = "asks for protection" if shown.protected else "does not ask for protection"
    return [
        f"DISAGREEMENT: the editor's workflow in the same file {words}, or asks differently; what ran (prompt) counts"
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
        stop_by_samplers(protection, walk)
    samplers = [Sampler(node.id, node.kind) for node in graph.nodes.values() if drawing(node)]
    for what, holds in required.tests():
        parents = walk.exposed({key for key, protection in found.items() if holds(protection)})
        for sampler in samplers:
            if sampler.node in parents:
                sampler.failures.append((f"a path without {what}", walk.path(sampler.node, parents)))
    anything, doubted = walk.exposed(set()), _doubted(walk, found, required)
    for sampler in samplers:
        _finish(sampler, walk, doubted, sampler.node in anything)
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


def _doubted(walk: Walk, found: dict[str, Protection], required: Required) -> dict[str, list[str]]:
    """For each Apply, what is to be said against it together with those in front of it."""
    told = {}
    for key in found:
        chain = [found[each] for each in walk.upstream(key)[::-1] if each in found and not found[each].inert]
        told[key] = doubts(chain, required.digests, required.full) + unpinned(chain) * required.every_pinned
    return told


def _finish(sampler: Sampler, walk: Walk, doubted: dict[str, list[str]], reached: bool) -> None:
    """What else keeps a sampler from being protected: circles, missing models, strange nodes, concepts that undo
    others.
    """
    reasons = []
    if sampler.node in walk.circular:
        reasons.append("models that run in a circle")
    elif not reached:
        reasons.append("no model reaches it")
    upstream = walk.upstream(sampler.node)
    nodes = [walk.flow.graph.nodes[key] for key in upstream]
    for node in nodes:
        if node.id in walk.broken:
            reasons.append(f"{node.kind} {node.id} takes a model over {walk.broken[node.id]}")
        if not node.known and not node.bypassed:
            sampler.unknown.append(node.id)
            reasons.append(f"its model comes by {node.kind} {node.id}, which is not known; {advice(node.kind)}")
    sampler.protections = [key for key in upstream if key in doubted]
    reasons += [reason for key in sampler.protections for reason in doubted[key]]
    if walk.left <= 0:
        reasons.append("too many ways lead to it to look at all of them")
    sampler.failures += [(reason, []) for reason in distinct(reasons)]


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
    kinds = distinct(node.kind for node in nodes if not flow.models(node))
    if not kinds:
        return []
    return [
        f"not known, and not seen to take a model; if one loads and draws by itself, nobody sees it: {', '.join(kinds)}"
    ]
