"""Does, by a workflow, every path from a model to a sampler pass a SafeRoPE Apply that acts? A graph in, a verdict out.

Models are followed from their loaders, through all nodes that pass them on, up to an Apply that meets the requirements.
A sampler that a model reaches on such a way is exposed. All that is not surely understood counts as not protected:

- an unknown node on the way,
- anything but a plain link where a model belongs,
- a setting whose effect depends on facts outside of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .concepts import Files
from .editor import from_editor
from .file import Documents, Unreadable
from .graph import Graph, from_api
from .known import APPLY, advice
from .models import Models, path
from .protections import Protection, protections
from .together import doubts, stops_by_samplers, unpinned

ACTING = "an Apply that acts"
MOST_PATHS = 4  # shown of a sampler
MOST_LOOKED_AT, MOST_STEPS = 200, 1_000_000  # samplers and Applies; their number, times all nodes


@dataclass
class Sampler:
    """A node that draws. `failures`: requirements that are missing, each with a path without it."""

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
    """The verdict on one graph. `form`: the form of the file."""

    graph: Graph
    samplers: list[Sampler]
    protections: dict[str, Protection]
    form: str = ""

    def __post_init__(self) -> None:
        self.opaque, self.notes = self.graph.opaque, self.graph.notes

    @property
    def protected(self) -> bool:
        """Every sampler is protected, there is at least one, and none may be out of sight."""
        return bool(self.samplers) and all(each.protected for each in self.samplers) and not self.opaque

    @property
    def idle(self) -> set[str]:
        """Applies on no path to a sampler."""
        return set(self.protections).difference(*(sampler.protections for sampler in self.samplers))


@dataclass(frozen=True)
class Required:
    """The requirements of every path: an Apply that acts, in full with `full`, and one pinned to each of `digests`.

    every_pinned: every concept on the way must be pinned to some file, too.
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
    """The verdict on a file. Where it holds the workflow that ran and the editor's, the workflow that ran counts.

    Raises Unreadable where the workflow that counts cannot be read.
    """
    if documents.prompt is None:
        verdict = audit(from_editor(documents.workflow), required, files)
        verdict.form = "editor's form"
        if documents.picture:
            verdict.notes.append("the file holds only the editor's workflow, not what ran")
        return verdict
    verdict = audit(from_api(documents.prompt), required, files)
    verdict.form = "API form"
    if documents.picture and documents.workflow is not None:
        verdict.notes.extend(_disagreement(verdict, documents.workflow, required, files))
    return verdict


def _disagreement(verdict: Verdict, workflow: Any, required: Required, files: Files | None) -> Iterator[str]:
    try:
        shown = audit(from_editor(workflow), required, files)
    except Unreadable as error:
        yield f"DISAGREEMENT: the editor's workflow in the same file {error}; what ran (prompt) counts"
        return
    if _gist(shown) != _gist(verdict):
        words = "asks for protection" if shown.protected else "does not ask for protection"
        beside = f"the editor's workflow in the same file {words}, or asks differently"
        yield f"DISAGREEMENT: {beside}; what ran (prompt) counts"


def _gist(verdict: Verdict) -> tuple:
    found, idle = verdict.protections, verdict.idle
    acting = {key: (each.settings, each.parts) for key, each in found.items() if each.acts and key not in idle}
    return verdict.protected, {sampler.node: sampler.protected for sampler in verdict.samplers}, acting


def audit(graph: Graph, required: Required, files: Files | None = None) -> Verdict:
    """The verdict on a graph. Raises Unreadable where it has too much to look at."""
    samplers = [Sampler(node.id, node.kind) for node in graph.nodes.values() if node.draws]
    looked_at = len(samplers) + sum(node.kind == APPLY for node in graph.nodes.values())
    if looked_at > MOST_LOOKED_AT or looked_at * len(graph.nodes) > MOST_STEPS:
        raise Unreadable(f"has {looked_at} samplers and Applies among {len(graph.nodes)} nodes, too many to look at")
    models = Models(graph)
    found = protections(models, files)
    for each in found.values():
        if each.acts:
            each.stops += stops_by_samplers(each, models)
    _look(samplers, models, found, required)
    for node in graph.nodes.values():
        if node.strange and models.takes(node.id):
            reason = f"is not known, takes what may be a model, and may draw with it; {advice(node.kind)}"
            graph.opaque.append((node.id, reason))
    graph.notes += _notes(models, found)
    return Verdict(graph, samplers, found)


def _look(samplers: list[Sampler], models: Models, applies: dict[str, Protection], required: Required) -> None:
    """Follows the ways of models to each sampler, and tells the requirements that are missing on them."""
    bare = {
        f"a path without {what}": models.ways({key for key, each in applies.items() if holds(each)})
        for what, holds in required.tests()
    }
    ways, against = models.ways(most=MOST_PATHS + 1), _against(models, applies, required)
    for sampler in samplers:
        before = models.reached(sampler.node, models.before)
        sampler.paths = [path(way) for way in ways[sampler.node][:MOST_PATHS]]
        sampler.more_paths = len(ways[sampler.node]) > MOST_PATHS
        sampler.protections = [key for key in applies if key in before]
        sampler.unknown = [key for key in against if key in before and models.graph.nodes[key].strange]
        sampler.failures = [(reason, path(way)) for reason, found in bare.items() for way in found[sampler.node]]
        reasons = dict.fromkeys(reason for key, told in against.items() if key in before for reason in told)
        sampler.failures += [(reason, []) for reason in reasons]


def _against(models: Models, found: dict[str, Protection], required: Required) -> dict[str, list[str]]:
    """Objections to each node on the way of a model. Applies are judged together with the Applies before them."""
    told: dict[str, list[str]] = {key: [] for key in models.order}
    for node in (models.graph.nodes[key] for key in models.order):
        if node.id in models.broken:
            told[node.id].append(f"{node} takes a model over {models.broken[node.id]}")
        elif node.bypassed and not models.takes(node.id):
            told[node.id].append(f"no model comes out of {node}")
        if node.strange:
            told[node.id].append(f"its model comes by {node}, which is not known; {advice(node.kind)}")
    for key in found:
        before = models.reached(key, models.before)
        chain = [each for key, each in found.items() if key in before and not each.inert]
        told[key] += doubts(chain, required.digests, required.full)
        if required.every_pinned:
            told[key] += unpinned(chain)
    return told


def _notes(models: Models, found: dict[str, Protection]) -> Iterator[str]:
    """Notes for a reader who sees the verdict alone."""
    strange = dict.fromkeys(
        node.kind for key, node in models.graph.nodes.items() if node.strange and not models.takes(key)
    )
    if strange:
        unseen = "not known, and not seen to take a model; if one loads and draws by itself, the audit cannot see it"
        yield f"{unseen}: {', '.join(strange)}"
    if any(each.acts and not all(part.file for part in each.parts) for each in found.values()):
        yield "the effect of the concepts was not looked at, only the settings of the workflow (--concepts FOLDER)"
