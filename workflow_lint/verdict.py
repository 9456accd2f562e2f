"""Does, by a workflow, every path from a model to a sampler pass a SafeRoPE Apply that acts? A graph in, a verdict out.

Models are followed from where they are loaded, through all that passes them on, up to an Apply that holds what is
required; whatever is reached is exposed. Whatever is not surely understood counts as not protected: a node on the way
that is not known, anything but a plain link where a model belongs, a setting whose effect depends on what is not in
the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .editor import from_editor
from .effect import Files
from .file import Documents, Unreadable
from .graph import Graph, from_api
from .known import APPLY, advice
from .models import Models, path
from .protections import Protection, protections
from .together import doubts, stops_by_samplers, unpinned

ACTING = "an Apply that acts"
MOST_PATHS = 4  # shown of a sampler
MOST_LOOKED_AT = 200  # samplers and Applies; each is looked at together with those before and behind it


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
    """What is to be said of one graph."""

    graph: Graph
    samplers: list[Sampler]
    protections: dict[str, Protection]
    form: str = ""

    @property
    def protected(self) -> bool:
        """Every sampler, at least one, and nothing out of sight."""
        return bool(self.samplers) and all(each.protected for each in self.samplers) and not self.graph.opaque

    @property
    def opaque(self) -> list[tuple[str, str]]:
        return self.graph.opaque

    @property
    def notes(self) -> list[str]:
        return self.graph.notes

    @property
    def idle(self) -> set[str]:
        """Applies on no path to a sampler."""
        return set(self.protections).difference(*(sampler.protections for sampler in self.samplers))


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
    if sum(node.draws or node.kind == APPLY for node in graph.nodes.values()) > MOST_LOOKED_AT:
        raise Unreadable(f"has more than {MOST_LOOKED_AT} samplers and Applies, too many to look at")
    models = Models(graph)
    found = protections(models, files)
    for each in found.values():
        if each.acts:
            each.stops += stops_by_samplers(each, models)
    verdict = Verdict(graph, [Sampler(node.id, node.kind) for node in graph.nodes.values() if node.draws], found)
    for what, holds in required.tests():
        ways = models.ways({key for key, each in found.items() if holds(each)})
        for sampler in verdict.samplers:
            sampler.failures += [(f"a path without {what}", path(way)) for way in ways[sampler.node]]
    doubted = {key: _doubted(models, found, key, required) for key in found}
    ways = models.ways(most=MOST_PATHS + 1)
    for sampler in verdict.samplers:
        sampler.paths = [path(way) for way in ways[sampler.node][:MOST_PATHS]]
        sampler.more_paths = len(ways[sampler.node]) > MOST_PATHS
        _finish(sampler, models, doubted)
    _tell_of_strangers(models)
    if any(each.acts and not all(part.file for part in each.parts) for each in found.values()):
        graph.notes.append(
            "what the concepts turn was not looked at, only what the workflow asks for (--concepts FOLDER)"
        )
    return verdict


def _doubted(models: Models, found: dict[str, Protection], key: str, required: Required) -> list[str]:
    """What is to be said against an Apply together with those in front of it."""
    before = models.reached(key, models.before)
    chain = [each for key, each in found.items() if key in before and not each.inert]
    told = list(doubts(chain, required.digests, required.full))
    return [*told, *unpinned(chain)] if required.every_pinned else told


def _finish(sampler: Sampler, models: Models, doubted: dict[str, list[str]]) -> None:
    """What else keeps a sampler from being protected: broken links, strange nodes, concepts that undo others."""
    before = models.reached(sampler.node, models.before)
    on_the_way = [models.graph.nodes[key] for key in models.order if key in before]
    broken = [node for node in on_the_way if node.id in models.broken]
    strange = [node for node in on_the_way if node.strange]
    sampler.unknown = [node.id for node in strange]
    sampler.protections = [key for key in doubted if key in before]
    reasons = [
        *(f"{node.kind} {node.id} takes a model over {models.broken[node.id]}" for node in broken),
        *(f"its model comes by {node}, which is not known; {advice(node.kind)}" for node in strange),
        *(reason for key in sampler.protections for reason in doubted[key]),
    ]
    sampler.failures += [(reason, []) for reason in dict.fromkeys(reasons)]


def _tell_of_strangers(models: Models) -> None:
    """Nodes that are not known: each that takes what may be a model may be a sampler; a note of the others."""
    strange = [node for node in models.graph.nodes.values() if node.strange]
    for node in strange:
        if models.takes(node.id):
            reason = f"is not known, takes what may be a model, and may draw with it; {advice(node.kind)}"
            models.graph.opaque.append((node.id, reason))
    if others := dict.fromkeys(node.kind for node in strange if not models.takes(node.id)):
        unseen = "not known, and not seen to take a model; if one loads and draws by itself, nobody sees it"
        models.graph.notes.append(f"{unseen}: {', '.join(others)}")
