"""The effect of concept files, for the audit of workflows: the directions that they turn, sent through Apply nodes in
a row.

`in_folder` gives them as `workflow_lint.concepts` asks for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from saferope_core import Concept, Protection, parse_blocks, restricted
from saferope_core.concept.concept_file import MAX_BYTES, parse_concepts
from saferope_core.concept.untrusted import read_whole
from saferope_core.run.effect import LEAST_TURN, moved
from workflow_lint.concepts import Files


@dataclass(frozen=True)
class ConceptFile:
    """The content of one file; see `workflow_lint.concepts.File`."""

    sha256: str
    concepts: tuple[Concept, ...]

    def scaled(self, strength: float) -> list[Concept]:
        return [replace(each, strength=each.strength * strength) for each in self.concepts]

    @staticmethod
    def rotations(
        concepts: Sequence[Concept], strength: float, threshold: float | None, blocks: str, streams: str
    ) -> Protection | None:
        geometry = concepts[0].geometry
        for each in concepts:
            geometry.require(each.geometry, f"concept {each.slug!r}")
        chosen = parse_blocks(blocks, geometry)
        kept = [part for each in concepts if (part := restricted(each, chosen, streams)) is not None]
        count = len(kept)
        return Protection(kept, geometry, [strength] * count, [threshold] * count) if kept else None

    def turned(self, chain: Sequence[Protection]) -> tuple[int, int]:
        found = [moved(each, chain) for each in self.concepts]
        return sum(int((far >= LEAST_TURN).sum()) for far in found), sum(len(far) for far in found)


def in_folder(folder: Path) -> Files:
    """The concept files of a folder. Files outside of it are never read, wherever links or names lead."""
    root = folder.resolve()

    @cache
    def find(name: str) -> ConceptFile | str:
        for spelled in (name, name.replace("\\", "/")):  # Windows writes sub\star.safetensors
            try:
                path = (root / spelled).resolve()
                if not path.is_relative_to(root) or not path.is_file():
                    continue
                data = read_whole(path, MAX_BYTES)
                return ConceptFile(hashlib.sha256(data).hexdigest(), tuple(parse_concepts(data)))
            except (OSError, ValueError) as error:  # a name that no file can have, or no concept file
                return f"the file there cannot be read ({error})"
        return "there is no file of this name in the folder of concepts"

    return find
