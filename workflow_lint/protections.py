"""What the SafeRoPE nodes of a workflow do: whether each Apply acts, on which concepts, how far, and what weakens it.

An Apply counts as acting only where everything that decides it can be read. What would make ComfyUI stop (a value out
of range, a pin that no file can have) does not count either, nor what is decided by a concept's file as long as that is
not at hand. Where it is, what it turns counts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

from .concepts import LEAST_STRENGTH, MOST_CONCEPTS, STRENGTH_MAX, UNSEEN, Concepts, Part, Reader
from .effect import Files
from .graph import Flow, Node
from .known import APPLY

MOST_APPLIES = 200  # of a workflow; each is looked at together with those before and behind it
CALIBRATED, FIXED = "as calibrated", "fixed"
PAPER_THRESHOLD = 0.7  # a higher fixed gate lets through what the paper's own would not
_BLOCKS = re.compile(r"\s*[ds][0-9]{1,4}(-[0-9]{1,4})?\s*(,\s*[ds][0-9]{1,4}(-[0-9]{1,4})?\s*)*", re.IGNORECASE)


@dataclass
class Protection:
    """One Apply. `stops`: why it does not act, or not surely; `weak`: what makes it less than whole.

    `inert`: it surely changes nothing; `does`: what it does by its concepts' files.
    """

    node: str
    settings: dict[str, Any] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    weak: list[str] = field(default_factory=list)
    inert: bool = False
    does: Any = field(default=None, repr=False)

    @property
    def acts(self) -> bool:
        return not self.stops

    def full(self) -> bool:
        return self.acts and not self.weak

    def pinned_to(self, digest: str) -> bool:
        return self.acts and any(part.sha256 == digest and part.counts for part in self.parts)


def protections(flow: Flow, files: Files | None = None) -> dict[str, Protection]:
    """Every Apply that is neither muted nor bypassed, by the id of its node."""
    reader = Concepts(flow.graph, files)
    nodes = [node for node in flow.graph.nodes.values() if node.kind == APPLY and not node.bypassed]
    if len(nodes) > MOST_APPLIES:
        return {
            node.id: Protection(node.id, stops=[f"more than {MOST_APPLIES} Applies, too many to look at"])
            for node in nodes
        }
    return {node.id: _protection(flow, node, reader) for node in nodes}


def _protection(flow: Flow, node: Node, reader: Concepts) -> Protection:
    found = Protection(node.id)
    read = Reader(flow.graph, node, found.stops)
    if not flow.models(node):
        found.stops.append("no model is connected")
    strength = read.number("strength", None, 0.0, STRENGTH_MAX)
    gate = read.choice("gate", CALIBRATED, (CALIBRATED, FIXED))
    threshold = read.number("threshold", PAPER_THRESHOLD, 0.0, 1.0)
    start, end = read.number("start_percent", 0.0, 0.0, 1.0), read.number("end_percent", 1.0, 0.0, 1.0)
    blocks = read.text("blocks", "")
    streams = read.choice("streams", "both", ("both", "text", "image"))
    rows = read.choice("conditionings", "all", ("all", "positive only"))
    found.settings = {
        "strength": strength, "gate": gate, "threshold": threshold if gate == FIXED else None, "start_percent": start,
        "end_percent": end, "blocks": blocks, "streams": streams, "conditionings": rows,
    }  # fmt: skip
    found.parts = [replace(p, strength=p.strength * (strength or 0.0)) for p in reader.parts(node, found.stops)]
    off = bool(found.parts) and not found.stops and all(part.strength == 0 for part in found.parts)
    found.inert = (
        off or strength == 0 or (gate == FIXED and threshold == 1) or (None not in (start, end) and start == end)
    )
    if not found.stops:  # else the numbers are not all there
        _stop(found, threshold)
    if not found.stops and any(part.file for part in found.parts):
        _try(found)
    if not found.stops:
        _weaken(found)
    return found


def _stop(found: Protection, threshold: float) -> None:
    """What stops a protection whose settings can all be read."""
    settings, blocks = found.settings, found.settings["blocks"]
    start, end = settings["start_percent"], settings["end_percent"]
    if settings["strength"] == 0:
        found.stops.append("strength is 0")
    elif not any(part.counts for part in found.parts):
        found.stops.append(f"no concept has a strength of {LEAST_STRENGTH:g} or more")
    if start >= end:
        found.stops.append(f"its range of steps is empty ({start:g} to {end:g})")
    elif start > 0:
        found.stops.append(
            f"it starts at {start:g} of the steps: whether one of them comes after that is not in the file"
        )
    if settings["gate"] == FIXED and threshold >= 1:
        found.stops.append("its gate is fixed at 1, which no risk is above")
    if blocks.strip() and not _BLOCKS.fullmatch(blocks):
        found.stops.append(f"blocks are {blocks!r:.60}, which cannot be read")
    if all(part.file for part in found.parts):
        return
    if blocks.strip():
        found.stops.append(f"only the blocks {blocks.strip()!r:.60}; whether a concept has heads there {UNSEEN}")
    if settings["streams"] == "image":
        found.stops.append(f"only the image stream; whether a concept turns it {UNSEEN}")


def _try(found: Protection) -> None:
    """Lets the concepts whose files are at hand turn their own unsafe directions."""
    settings = found.settings
    concepts = [concept for part in found.parts for concept in part.concepts]
    if len(concepts) > MOST_CONCEPTS:
        found.stops.append(f"its files hold {len(concepts)} concepts, expected at most {MOST_CONCEPTS}")
        return
    effect = next(part.file.effect for part in found.parts if part.file)
    try:
        found.does = effect.rotations(
            concepts, settings["strength"], settings["threshold"], settings["blocks"], settings["streams"]
        )
    except ValueError as error:
        found.stops.append(f"its concepts do not go together ({error})")
        return
    chain = [found.does] if found.does else []
    found.parts = [replace(p, turns=effect.turned(p.file.concepts, chain)) if p.file else p for p in found.parts]
    if not any(part.counts for part in found.parts):
        found.stops.append("by their files, its concepts turn nothing")


def _weaken(found: Protection) -> None:
    """What makes a protection that acts less than whole. Rotations are periodic: more than 1 is not more than whole."""
    settings, weak = found.settings, found.weak
    for part in found.parts:
        if not math.isclose(part.strength, 1):
            weak.append(f"concept {part.name!r} has strength {part.strength:g}, expected 1")
        if part.turns and part.turns[0] < part.turns[1]:
            weak.append(f"concept {part.name!r} turns in {part.turns[0]} of its {part.turns[1]} heads")
    if settings["end_percent"] < 1:
        weak.append(f"only a part of the steps, 0 to {settings['end_percent']:g}")
    if settings["gate"] == FIXED and settings["threshold"] > PAPER_THRESHOLD:
        weak.append(f"a fixed gate of {settings['threshold']:g}, above the paper's {PAPER_THRESHOLD:g}")
    if settings["blocks"].strip():
        weak.append(f"only the blocks {settings['blocks'].strip()!r:.60}")
    if settings["streams"] != "both":
        weak.append(f"only the {settings['streams']} stream")
    if settings["conditionings"] != "all":
        weak.append("only the positive conditioning")
