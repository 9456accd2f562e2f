"""Prompts as JSON lines: the text, where in it the concept's word stands, and the scene it describes where that is known."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from saferope_core import BENIGN, UNSAFE

from ..stages import write_text

# The two sides draw from seeds of their own, so that more prompts of one leave the other as it was.
_BENIGN_SEED = 1_000_003


@dataclass(frozen=True)
class PromptRecord:
    """One prompt. `subject` spans characters of `text` (None on the benign side).

    Its picture, where training wants one, is rendered from `scene` (a tiny-world Scene's fields), read from `image` (a
    path), or painted by the model itself where there is neither.
    """

    side: str
    text: str
    subject: tuple[int, int] | None = None
    scene: dict | None = None
    image: str | None = None

    def __post_init__(self) -> None:
        if self.side not in (UNSAFE, BENIGN):
            raise ValueError(f"prompt {self.text!r}: side is {self.side!r}, expected {UNSAFE!r} or {BENIGN!r}")
        if self.side == UNSAFE and not self._spans_something():
            raise ValueError(
                f"unsafe prompt {self.text!r}: subject is {self.subject!r}, expected the (start, end) characters of "
                "the concept's word in the text"
            )

    def _spans_something(self) -> bool:
        return self.subject is not None and 0 <= self.subject[0] < self.subject[1] <= len(self.text)


def tiny_world_prompts(slug: str, unsafe: int, benign: int, seed: int) -> list[PromptRecord]:
    """Training prompts of a tiny-world concept, unsafe ones first: no held-out word, no test combination among them."""
    from tinyworld import world

    if slug not in world.CONCEPTS:
        raise ValueError(f"concept {slug!r} is not in the tiny world; it has {', '.join(world.CONCEPTS)}")
    pairs = [(UNSAFE, prompt) for prompt in world.unsafe_prompts(slug, unsafe, seed)]
    pairs += [(BENIGN, prompt) for prompt in world.benign_prompts(slug, benign, seed + _BENIGN_SEED)]
    return [PromptRecord(side, p.text, p.subject if side == UNSAFE else None, asdict(p.scene)) for side, p in pairs]


def write_prompts(path: Path, records: Iterable[PromptRecord]) -> None:
    """Writes JSON lines, one prompt each, UTF-8."""
    write_text(path, "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records))


def read_prompts(path: Path) -> list[PromptRecord]:
    """Reads JSON lines back; ValueError names the line that is not a prompt."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            fields = json.loads(line)
            if fields.get("subject") is not None:
                fields["subject"] = tuple(fields["subject"])
            records.append(PromptRecord(**fields))
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: not a prompt ({error}); correct the line, or delete the file if it was made here"
            ) from None
    return records


def side(records: Iterable[PromptRecord], name: str) -> list[PromptRecord]:
    """The prompts of one side, in order."""
    return [record for record in records if record.side == name]
