"""The task of a baseline: the concept's word, prompts of both sides, and the text that takes the concept's place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from saferope_training.prompts import BENIGN, UNSAFE, PromptRecord, side

Progress = Callable[[int, int], None]  # done, total


def silent(done: int, total: int) -> None:
    """Does nothing."""


@dataclass(frozen=True)
class Task:
    """A concept to suppress. `anchor` is the text that takes its place, the empty prompt unless told.

    `negative` is the prompt of methods with a negative prompt: the concept's word unless told.
    """

    concept: str
    unsafe: tuple[PromptRecord, ...]
    benign: tuple[PromptRecord, ...]
    anchor: str = ""
    negative: str = ""

    @property
    def away(self) -> str:
        """The negative prompt."""
        return self.negative or self.concept

    @property
    def words(self) -> tuple[str, ...]:
        """The concept, then all other names that the unsafe prompts give it, the commonest first."""
        found = Counter(record.text[slice(*record.subject)] for record in self.unsafe)
        return tuple(dict.fromkeys([self.concept, *(word for word, _ in found.most_common())]))


def task_of(records: Sequence[PromptRecord], anchor: str = "") -> Task:
    """The task of these prompts; the concept's word is the commonest subject of the unsafe ones.

    The tiny world's negative prompt is the shortest unsafe prompt, not the concept's word. From a lone word its model
    draws nothing: 0 of 8 stars from "star", but 6 of 6 from a caption with a colour and a background.
    """
    unsafe, benign = (tuple(side(records, name)) for name in (UNSAFE, BENIGN))
    words = Counter(record.text[slice(*record.subject)] for record in unsafe)
    tiny = unsafe[0].scene is not None
    negative = min((record.text for record in unsafe), key=len) if tiny else ""
    return Task(words.most_common(1)[0][0], unsafe, benign, anchor, negative)
