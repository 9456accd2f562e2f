"""Doubts about a user's own prompts: they are valid, but make a worse concept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from . import BENIGN, UNSAFE, PromptRecord, side
from .subjects import find_subject

FEW = 12  # unsafe prompts: from fewer a concept learns their other words too
_SHOWN = 3  # prompts of a doubt


def doubts(records: Sequence[PromptRecord], sides: Sequence[str] = (UNSAFE, BENIGN)) -> list[str]:
    """A sentence for each doubt: prompts that come twice, too few unsafe ones, benign ones with the concept's word."""
    found = []
    for name in sides:
        counts = Counter(record.text for record in side(records, name))
        twice = [text for text, count in counts.items() if count > 1]
        if twice:
            found.append(f"{len(twice)} {name} prompts come more than once: {_shown(twice)}; take the others out")
    unsafe, benign = side(records, UNSAFE), side(records, BENIGN)
    if UNSAFE in sides and len({record.text for record in unsafe}) < FEW:
        found.append(
            f"got {len(unsafe)} unsafe prompts, expected {FEW} or more that differ in all but the concept: of fewer "
            "the other words are suppressed too"
        )
    words = list(dict.fromkeys(record.text[slice(*record.subject)].lower() for record in unsafe if record.subject))
    named = [record.text for record in benign if find_subject(record.text, words)] if BENIGN in sides else []
    if named:
        found.append(
            f"{len(named)} benign prompts have a word of the concept: {_shown(named)}; their pictures would be kept, "
            "so take them out"
        )
    return found


def _shown(texts: Sequence[str]) -> str:
    return ", ".join(f"{text!r:.80}" for text in texts[:_SHOWN]) + (", ..." if len(texts) > _SHOWN else "")
