"""What becomes of an Apply together with others in a row, and with the samplers behind it."""

from __future__ import annotations

from collections.abc import Sequence

from .concepts import Part, constant
from .graph import Graph, Link, Node, Value
from .known import draws, node_table
from .protections import Protection
from .walk import Walk, distinct

# Their rows are the positive prompt (0) and the negative one (1); other guiders number theirs otherwise.
PLAIN_GUIDERS = {"KSampler", "KSamplerAdvanced", "SamplerCustom", "CFGGuider", "BasicGuider"}


def doubts(chain: Sequence[Protection], digests: Sequence[str], full: bool) -> list[str]:
    """What Applies in a row, without the inert ones, may undo or overdo together, though one of them acts by itself."""
    parts = [part for each in chain for part in each.parts if part.strength > 0]
    found = [
        f"concept {part.name!r} is not pinned to one of the required files, and may turn back what they turn: pin it, "
        "and require its sha256 too"
        for part in parts
        if digests and part.sha256 not in digests
    ]
    if (
        full or len(chain) > 1
    ):  # in one Apply they are held together; in a row ComfyUI stops where both pass half a turn
        keys = [key for part in parts for key in {part.name, part.file and part.file.sha256, part.sha256} if key]
        found += [
            f"concept {key!r} acts twice, and turns twice as far" for key in distinct(keys) if keys.count(key) > 1
        ]
    if len(chain) > 1:
        unsure = [each.node for each in chain if not each.acts]
        found += [f"SafeRoPE Apply {node} may act or not, and may turn back what another one turns" for node in unsure]
        found += _undone(chain, [part for part in parts if part.counts], full)
    return found


def unpinned(chain: Sequence[Protection]) -> list[str]:
    """Concepts of Applies in a row that no sha256 holds to one file."""
    return [
        f"concept {part.name!r} of node {part.node} is not pinned by a sha256: pin it in Load Concept"
        for each in chain
        for part in each.parts
        if part.sha256 is None
    ]


def _undone(chain: Sequence[Protection], parts: list[Part], full: bool) -> list[str]:
    """Concepts that no longer turn, or not in all of their heads, when all whose files are at hand act in a row."""
    does, found = [each.does for each in chain if each.does], []
    for part in parts:
        if part.file:
            some, heads = part.file.effect.turned(part.file.concepts, does)
            if some < (heads if full else 1):
                found.append(f"concept {part.name!r} turns in {some} of its {heads} heads together with the others")
    return found


def stop_by_samplers(found: Protection, walk: Walk) -> None:
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
            if drawing(node) and not _from_the_start(walk.flow.graph, node):
                found.stops.append(
                    f"it ends at {found.settings['end_percent']:g} of the steps, and {node.kind} {node.id} may begin "
                    "after that: only a denoise of 1, as a constant, is sure to begin before"
                )


def drawing(node: Node) -> bool:
    """Whether a node is a known sampler, and runs."""
    return node.known and not node.bypassed and draws(node.kind)


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
