"""Prompts as JSON lines: the text, the place of the concept's word, and the scene where it is known."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from saferope_core import BENIGN, UNSAFE
from saferope_core.concept.files import write_text

from .lines import json_line, numbered, read_text

# The two sides draw from seeds of their own, so that more prompts of one leave the other as it was.
_BENIGN_SEED = 1_000_003
_KINDS = (
    ("text", str, "a string"),
    ("scene", (dict, type(None)), "an object or null"),
    ("image", (str, type(None)), "a string or null"),
    ("instead", (str, type(None)), "a string or null"),
)
_EXAMPLE = '{"side": "unsafe", "text": "a star", "subject": [2, 6]}'


@dataclass(frozen=True)
class PromptRecord:
    """One prompt. `subject` spans characters of `text`, `instead` is the same prompt with something else in its place
    (both None on the benign side).

    Its picture, where training wants one, is rendered from `scene` (a tiny-world Scene's fields), read from `image` (a
    path), or painted by the model itself where there is neither.
    """

    side: str
    text: str
    subject: tuple[int, int] | None = None
    scene: dict | None = None
    image: str | None = None
    instead: str | None = None

    def __post_init__(self) -> None:
        if self.side not in (UNSAFE, BENIGN):
            raise ValueError(f"prompt {self.text!r}: side is {self.side!r}, expected {UNSAFE!r} or {BENIGN!r}")
        for name, kinds, expected in _KINDS:
            if not isinstance(getattr(self, name), kinds):
                raise ValueError(f"prompt {self.text!r}: {name} is {getattr(self, name)!r:.80}, expected {expected}")
        if any("\ud800" <= character <= "\udfff" for character in self.text + (self.instead or "")):
            raise ValueError(f"prompt {self.text!r}: text has half of a character, expected whole ones; write it anew")
        if not (self.side == BENIGN and self.subject is None) and not self._spans_something():
            raise ValueError(
                f"{self.side} prompt {self.text!r}: subject is {self.subject!r}, expected the (start, end) characters "
                "of the concept's word in the text"
            )

    def _spans_something(self) -> bool:
        span = self.subject
        if not isinstance(span, tuple) or len(span) != 2 or not all(type(place) is int for place in span):
            return False
        return 0 <= span[0] < span[1] <= len(self.text)


def tiny_world_prompts(slug: str, unsafe: int, benign: int, seed: int) -> list[PromptRecord]:
    """Training prompts of a tiny-world concept, unsafe ones first: no held-out word, no test combination among them."""
    from tinyworld import world

    if slug not in world.CONCEPTS:
        raise ValueError(f"concept {slug!r} is not in the tiny world; it has {', '.join(world.CONCEPTS)}")
    records = [
        PromptRecord(UNSAFE, p.text, p.subject, asdict(p.scene), instead=world.instead(p, slug))
        for p in world.unsafe_prompts(slug, unsafe, seed)
    ]
    others = world.benign_prompts(slug, benign, seed + _BENIGN_SEED)
    return records + [PromptRecord(BENIGN, p.text, None, asdict(p.scene)) for p in others]


def write_prompts(path: Path, records: Iterable[PromptRecord]) -> None:
    """Writes JSON lines, one prompt each, UTF-8."""
    write_text(path, "".join(json_line(asdict(record)) for record in records))


def read_prompts(path: Path) -> list[PromptRecord]:
    """Reads JSON lines back, blank ones left out; ValueError names the line that is not a prompt."""
    return [record_of(path, number, object_of(path, number, line)) for number, line in numbered(read_text(path))]


def object_of(path: Path, number: int, line: str) -> dict:
    """The object that a line of JSON lines holds; ValueError, naming the line, where it holds none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _no_prompt(path, number, f"got no JSON: {error}, expected {_EXAMPLE}") from None
    if not isinstance(found, dict):
        raise _no_prompt(path, number, f"got {line.strip()!r:.80}, expected {_EXAMPLE}")
    return found


def record_of(path: Path, number: int, found: dict) -> PromptRecord:
    """The prompt that a line's object says, in our own fields; ValueError, naming the line, where it says none."""
    known = [entry.name for entry in fields(PromptRecord)]
    if not {"side", "text"} <= set(found) <= set(known):
        got = ", ".join(map(repr, found)) or "none"
        raise _no_prompt(path, number, f"got the fields {got:.200}, expected side and text, and of others {known[2:]}")
    subject = found.get("subject")
    try:
        return PromptRecord(**found | {"subject": tuple(subject) if isinstance(subject, list) else subject})
    except ValueError as error:
        raise _no_prompt(path, number, str(error)) from None


def _no_prompt(path: Path, number: int, why: str) -> ValueError:
    return ValueError(
        f"{path}, line {number}: not a prompt ({why}); correct the line, or delete the file if it was made here"
    )


def side(records: Iterable[PromptRecord], name: str) -> list[PromptRecord]:
    """The prompts of one side, in order."""
    return [record for record in records if record.side == name]
