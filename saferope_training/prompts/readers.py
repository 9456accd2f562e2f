"""Prompts from files that people have, as records: with the concept's word found and the pictures' places checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import UNSAFE, PromptRecord
from .formats import FORMATS, Entry, entries
from .subjects import find_subject


def read_file(
    path: Path, side: str, subjects: Sequence[str] = (), images: Path | None = None, count: int | None = None
) -> list[PromptRecord]:
    """The first `count` prompts of a file, all of them if None; on the unsafe side with the first subject's span.

    `images`: the folder of the captions' pictures. ValueError names the file, the line and what was expected; also
    where a file has too few prompts, no subject stands in one, or a picture is not there.
    """
    found = [entry for entry in entries(path) if entry.record is None or entry.record.side == side]
    if not found:
        raise ValueError(f"{path}: got no {side} prompt, expected at least one; formats: {FORMATS}")
    if count is not None and len(found) < count:
        raise ValueError(f"{path}: got {len(found)} {side} prompts, expected {count}; ask for fewer or add some")
    return [entry.record or _record(path, side, entry, subjects, images) for entry in found[:count]]


def read_texts(path: Path) -> list[str]:
    """All prompts of a file, of whatever side."""
    return [entry.text for entry in entries(path)]


def _record(path: Path, side: str, entry: Entry, subjects: Sequence[str], images: Path | None) -> PromptRecord:
    span = _marked(path, entry, subjects) if side == UNSAFE else None
    image = str(_inside(images, entry, entry.image)) if images and entry.image else None
    try:
        return PromptRecord(side, entry.text, span, image=image)
    except ValueError as error:
        raise ValueError(f"{entry.where}: {error}") from None


def _marked(path: Path, entry: Entry, subjects: Sequence[str]) -> tuple[int, int]:
    """Where the concept's word stands."""
    if not subjects:
        raise ValueError(f"{path}: got no subjects, expected the words that name the concept; give --subjects A,B")
    span = find_subject(entry.text, subjects)
    if span is None:
        raise ValueError(
            f"{entry.where}: none of {', '.join(subjects)} stands in the prompt {entry.text!r}, expected one; add its "
            "word to --subjects, or take the prompt out"
        )
    return span


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
