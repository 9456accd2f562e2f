"""Judges an Apply together with others in a row, and with the samplers behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from .graph import Graph, Link, Node, Value
from .models import Models
from .protections import Protection
from .settings import constant

# Their rows are the positive prompt (0) and the negative one (1); other guiders number theirs otherwise.
PLAIN_GUIDERS = {"KSampler", "KSamplerAdvanced", "SamplerCustom", "CFGGuider", "BasicGuider"}


def doubts(chain: Sequence[Protection], digests: Sequence[str], full: bool) -> Iterator[str]:
    """Doubts about Applies in a row, without the inert ones: together they may undo or overdo the turns of one of them.

    One Apply limits copies of a concept together. In a row ComfyUI stops where both pass half a turn.
    """
    parts = [part for each in chain for part in each.parts if part.strength > 0]
    for part in parts:
        if digests and part.sha256 not in digests:
            yield (
                f"concept {part.name!r} is not pinned to one of the required files, and may undo their turn: "
                "pin it, and require its sha256 too"
            )
    if full or len(chain) > 1:
        known_by = Counter(key for part in parts for key in {part.name, part.file and part.file.sha256, part.sha256})
        yield from (
            f"concept {key!r} acts twice, and turns twice as far"
            for key, count in known_by.items()
            if key and count > 1
        )
    if len(chain) > 1:
        yield from _undone(chain, full)


def _undone(chain: Sequence[Protection], full: bool) -> Iterator[str]:
    """Applies that may act or not, and concepts that no longer turn, or not in all of their heads, in a row."""
    for each in chain:
        if not each.acts:
            yield f"SafeRoPE Apply {each.node} may act or not, and may turn back what another one turns"
    does = [each.does for each in chain if each.does]
    for part in (part for each in chain for part in each.parts if part.counts and part.file):
        some, heads = part.file.turned(does)
        if some < (heads if full else 1):
            yield f"concept {part.name!r} turns in {some} of its {heads} heads together with the others"


def unpinned(chain: Sequence[Protection]) -> Iterator[str]:
    """Concepts of Applies in a row that are not pinned to one file by a sha256."""
    for part in (part for each in chain for part in each.parts if part.sha256 is None):
        yield f"concept {part.name!r} of node {part.node} is not pinned by a sha256: pin it in Load Concept"


def stops_by_samplers(found: Protection, models: Models) -> Iterator[str]:
    """Reasons why an acting Apply does not act under a sampler behind it, by settings that depend on that sampler."""
    end, rows = found.settings["end_percent"], found.settings["conditionings"]
    behind = models.reached(found.node, models.after)
    for node in (models.graph.nodes[key] for key in models.order if key in behind):
        if rows != "all" and node.guides and node.kind not in PLAIN_GUIDERS:
            yield f"positive only under {node.kind} {node.id}, which numbers its prompts otherwise"
        if end < 1 and node.draws and not _from_the_start(models.graph, node):
            yield (
                f"it ends at {end:g} of the steps, and {node.kind} {node.id} may begin after that: only a denoise of "
                "1, as a constant, is sure to begin before"
            )


def _from_the_start(graph: Graph, node: Node) -> bool:
    """Whether a sampler's first step is surely that of the whole schedule."""
    sigmas = node.inputs.get("sigmas")
    if node.kind in ("SamplerCustom", "SamplerCustomAdvanced") and isinstance(sigmas, Link):
        node = graph.nodes[sigmas.source]
    if node.kind not in ("KSampler", "BasicScheduler") or node.bypassed or "denoise" not in node.inputs:
        return False
    denoise = constant(graph, node.inputs["denoise"])
    return isinstance(denoise, Value) and type(denoise.value) in (int, float) and denoise.value == 1
