"""The questions that an audit asks about the content of concept files. It reads none: a caller hands in `Files`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

Concept, Rotations = Any, Any  # opaque; a concept has a `strength`


class File(Protocol):
    """A concept file that was read whole, and the effect of its concepts in Load and Apply nodes."""

    @property
    def sha256(self) -> str: ...

    def scaled(self, strength: float) -> list[Concept]:
        """The concepts with the strength of a Load node."""

    def rotations(
        self, concepts: Sequence[Concept], strength: float, threshold: float | None, blocks: str, streams: str
    ) -> Rotations | None:
        """Those of an Apply with concepts of any files; None: it turns nothing. ValueError where it would stop."""

    def turned(self, chain: Sequence[Rotations]) -> tuple[int, int]:
        """(heads in which the chain moves any unsafe direction of the file's concepts, all heads of these)."""


Files = Callable[[str], File | str]  # the file of a name in a workflow, or the reason why there is none
