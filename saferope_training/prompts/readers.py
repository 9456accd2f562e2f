"""Prompts from a user's files, as records: with the concept's word found and the pictures' places checked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from .. import processes
from ..console import say
from . import UNSAFE, PromptRecord
from .formats import FORMATS, Entry, entries
from .subjects import find_subject

_TOLD = 10  # prompts of an error


def read_file(
    path: Path,
    side: str,
    subjects: Sequence[str] = (),
    images: Path | None = None,
    count: int | None = None,
    seed: int | None = None,
    category: str | None = None,
) -> list[PromptRecord]:
    """The first `count` prompts of a file, all of them if None; on the unsafe side with the first subject's span.

    With a `seed`, at most `count` are drawn from all, in the file's order; a message says so where some are left out.
    `images`: the folder of the captions' pictures. `category`: see `entries`. ValueError names the file, the line and
    the expected value, also where a file has too few prompts, a prompt has no subject, or a picture is missing.
    """
    found = [entry for entry in entries(path, category) if entry.record is None or entry.record.side == side]
    if not found:
        raise ValueError(f"{path}: got no {side} prompt, expected at least one; formats: {FORMATS}")
    if count is not None and seed is not None:
        found = _drawn(path, side, found, count, seed)
    elif count is not None and len(found) < count:
        raise ValueError(f"{path}: got {len(found)} {side} prompts, expected {count}; ask for fewer or add some")
    spans = _marked(path, found[:count], subjects) if side == UNSAFE else {}
    records = [entry.record or _record(side, entry, spans.get(entry), images) for entry in found[:count]]
    if images is not None and not any(record.image for record in records):
        raise ValueError(
            f"{path}: got no {side} prompt with a picture, expected names of files in {images}; name COCO's captions, "
            "or leave --images out"
        )
    return records


def read_side(path: Path, side: str, count: int | None = None, seed: int = 0) -> list[str]:
    """The texts of a file that are of this side, or of none. At most `count` of them, if given, drawn by the seed.

    No subject is looked for. ValueError as in `read_file`.
    """
    found = [entry for entry in entries(path) if entry.record is None or entry.record.side == side]
    if not found:
        raise ValueError(f"{path}: got no {side} prompt, expected at least one; formats: {FORMATS}")
    if count is not None and count < len(found):
        found = [found[place] for place in sorted(random.Random(seed).sample(range(len(found)), count))]
    return [entry.text for entry in found]


def _drawn(path: Path, side: str, found: Sequence[Entry], count: int, seed: int) -> list[Entry]:
    """At most `count` of the entries, drawn, in their order."""
    if len(found) <= count:
        return list(found)
    if processes.is_main():
        say(
            f"{path}: of {len(found)} {side} prompts {count} are used, drawn by the seed; --{side}-prompts "
            f"{len(found)} takes all",
            err=True,
        )
    return [found[place] for place in sorted(random.Random(seed).sample(range(len(found)), count))]


def read_texts(path: Path) -> list[str]:
    """All prompts of a file, of either side."""
    return [entry.text for entry in entries(path)]


def _record(side: str, entry: Entry, span: tuple[int, int] | None, images: Path | None) -> PromptRecord:
    image = str(_inside(images, entry, entry.image)) if images and entry.image else None
    try:
        return PromptRecord(side, entry.text, span, image=image)
    except ValueError as error:
        raise ValueError(f"{entry.where}: {error}") from None


def _marked(path: Path, found: Sequence[Entry], subjects: Sequence[str]) -> dict[Entry, tuple[int, int]]:
    """The span of the concept's word in each entry without a record. One ValueError lists all entries without it."""
    asked = [entry for entry in found if entry.record is None]
    if asked and not subjects:
        raise ValueError(f"{path}: got no subjects, expected the words that name the concept; give --subjects A,B")
    spans = {entry: find_subject(entry.text, subjects) for entry in asked}
    lost = [entry for entry, span in spans.items() if span is None]
    if lost:
        lines = [f"{entry.where}: none of {', '.join(subjects)} stands in the prompt {entry.text!r}" for entry in lost]
        more = f", nor in {len(lost) - _TOLD} more" if len(lost) > _TOLD else ""
        told = "\n".join(lines[:_TOLD])
        raise ValueError(f"{told}{more}, expected one; add its word to --subjects, or take the prompt out")
    return {entry: span for entry, span in spans.items() if span is not None}


def _inside(folder: Path, entry: Entry, image: str) -> Path:
    """The path of a picture; a caption file from a stranger may not name files outside the folder."""
    try:
        path = (folder / image).resolve()
    except ValueError as error:  # a NUL
        raise ValueError(f"{entry.where}: picture {image!r} has no name of a file ({error}); correct it") from None
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(
            f"{entry.where}: picture {image!r} leads out of {folder}, expected a file in it; correct the name"
        )
    if not path.is_file():
        raise ValueError(
            f"{entry.where}: got no picture {image!r} in {folder}, expected it there; name its folder with --images, "
            "or take the caption out"
        )
    return path
