"""Judges the SafeRoPE nodes of a workflow: whether each Apply acts, on which concepts, how far, and its weaknesses.

An Apply counts as acting only where every setting that decides it can be read. It does not act where ComfyUI would stop
(a value out of range, a pin that no file can have). Nor does it where a concept's file decides and is not at hand.
Where the file is at hand, the heads that it turns count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .concepts import LEAST_STRENGTH, MOST_CONCEPTS, UNSEEN, Files, Part, parts
from .known import APPLY
from .models import Models
from .settings import FIXED, OF_APPLY, PAPER_THRESHOLD, settings

_BLOCKS = re.compile(r"\s*[ds][0-9]{1,4}(-[0-9]{1,4})?\s*(,\s*[ds][0-9]{1,4}(-[0-9]{1,4})?\s*)*", re.IGNORECASE)


@dataclass
class Protection:
    """One Apply.

    - `stops`: reasons why it does not act, or not surely.
    - `weak`: reasons why it is less than whole.
    - `inert`: it surely changes nothing.
    - `does`: its rotations by its concepts' files.
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


def protections(models: Models, files: Files | None = None) -> dict[str, Protection]:
    """Every Apply that is neither muted nor bypassed, by the id of its node, in the order of models."""
    nodes = [models.graph.nodes[key] for key in models.order]
    return {node.id: _protection(models, node.id, files) for node in nodes if node.kind == APPLY and not node.bypassed}


def _protection(models: Models, key: str, files: Files | None) -> Protection:
    found, node = Protection(key), models.graph.nodes[key]
    if not models.takes(key):
        found.stops.append("no model is connected")
    found.settings = settings(models.graph, node, OF_APPLY, found.stops)
    if found.settings["gate"] != FIXED:
        found.settings["threshold"] = None  # Apply reads it only then
    found.parts = parts(models.graph, node, files, found.stops)
    for part in found.parts:
        part.strength *= found.settings["strength"] or 0.0
    found.inert = _inert(found)
    for look in (_stopped, _tried):
        if not found.stops:  # else the numbers are not all there
            found.stops += look(found)
    if not found.stops:
        found.weak += _weakened(found)
    return found


def _inert(found: Protection) -> bool:
    """Whether it surely changes nothing, even if other settings cannot be read."""
    of = found.settings
    off = found.acts and all(part.strength == 0 for part in found.parts)
    closed = of["gate"] == FIXED and of["threshold"] == 1
    return off or closed or of["strength"] == 0 or of["start_percent"] == of["end_percent"] is not None


def _stopped(found: Protection) -> Iterator[str]:
    """Reasons why a protection does not act, if all its settings can be read."""
    of, blocks = found.settings, found.settings["blocks"].strip()
    start, end = of["start_percent"], of["end_percent"]
    if of["strength"] == 0:
        yield "strength is 0"
    elif not any(part.counts for part in found.parts):
        yield f"no concept has a strength of {LEAST_STRENGTH:g} or more"
    if start >= end:
        yield f"its range of steps is empty ({start:g} to {end:g})"
    elif start > 0:
        yield f"it starts at {start:g} of the steps: whether one of them comes after that is not in the file"
    if of["gate"] == FIXED and of["threshold"] >= 1:
        yield "its gate is fixed at 1, which no risk is above"
    if blocks and not _BLOCKS.fullmatch(blocks):
        yield f"blocks are {blocks!r:.60}, which cannot be read"
    if not all(part.file for part in found.parts):
        if blocks:
            yield f"only the blocks {blocks!r:.60}; whether a concept has heads there {UNSEEN}"
        if of["streams"] == "image":
            yield f"only the image stream; whether a concept turns it {UNSEEN}"


def _tried(found: Protection) -> Iterator[str]:
    """Lets the concepts whose files are at hand turn their own unsafe directions."""
    of, at_hand = found.settings, [part for part in found.parts if part.file]
    concepts = [concept for part in at_hand for concept in part.concepts]
    if len(concepts) > MOST_CONCEPTS:
        yield f"its files hold {len(concepts)} concepts, expected at most {MOST_CONCEPTS}"
    elif at_hand:
        try:
            found.does = at_hand[0].file.rotations(
                concepts, of["strength"], of["threshold"], of["blocks"], of["streams"]
            )
        except ValueError as error:
            yield f"its concepts do not go together ({error})"
            return
        for part in at_hand:
            part.turns = part.file.turned([found.does] if found.does else [])
        if not any(part.counts for part in found.parts):
            yield "by their files, its concepts turn nothing"


def _weakened(found: Protection) -> Iterator[str]:
    """Reasons why an acting protection is not whole. Rotations are periodic: strength above 1 is not more."""
    of, blocks = found.settings, found.settings["blocks"].strip()
    for part in found.parts:
        if not math.isclose(part.strength, 1):
            yield f"concept {part.name!r} has strength {part.strength:g}, expected 1"
        if part.turns and part.turns[0] < part.turns[1]:
            yield f"concept {part.name!r} turns in {part.turns[0]} of its {part.turns[1]} heads"
    if of["end_percent"] < 1:
        yield f"only a part of the steps, 0 to {of['end_percent']:g}"
    if of["gate"] == FIXED and of["threshold"] > PAPER_THRESHOLD:
        yield f"a fixed gate of {of['threshold']:g}, above the paper's {PAPER_THRESHOLD:g}"
    if blocks:
        yield f"only the blocks {blocks!r:.60}"
    if of["streams"] != "both":
        yield f"only the {of['streams']} stream"
    if of["conditionings"] != "all":
        yield "only the positive conditioning"
