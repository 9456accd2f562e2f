"""The questions that an audit asks about the content of concept files.

The audit itself reads no concept file. A caller that can read them hands in `Files`, and with each file an `Effect`
that answers the questions. Concepts and protections are opaque here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Concept, Rotations = Any, Any  # opaque; a concept has a `strength`


class Effect(Protocol):
    """The effect of concepts, as an Apply and a Load node have it."""

    def scaled(self, concepts: Sequence[Concept], strength: float) -> list[Concept]:
        """The concepts with the strength of a Load node."""

    def rotations(
        self, concepts: Sequence[Concept], strength: float, threshold: float | None, blocks: str, streams: str
    ) -> Rotations | None:
        """The rotations of an Apply node, None where it turns nothing. ValueError where the node would stop."""

    def turned(self, concepts: Sequence[Concept], chain: Sequence[Rotations]) -> tuple[int, int]:
        """(heads in which the chain moves any unsafe direction of the concepts, all heads of the concepts)."""


@dataclass(frozen=True)
class File:
    """A concept file that was read whole."""

    sha256: str
    concepts: tuple[Concept, ...]
    effect: Effect


Files = Callable[[str], "File | str"]  # the file of a name in a workflow, or the reason why there is none
