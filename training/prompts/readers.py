"""Prompts from files that people have: plain text, JSON lines, I2P's CSV, COCO captions with or without pictures."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import UNSAFE, PromptRecord, read_prompts

I2P_COLUMN = "prompt"
FORMATS = ".txt (a prompt a line), .jsonl (ours), .csv (I2P's columns), .json (COCO captions)"


def read_file(
    path: Path, side: str, subjects: Sequence[str] = (), images: Path | None = None, count: int | None = None
) -> list[PromptRecord]:
    """The first `count` prompts of a file, all of them if None; on the unsafe side with the span of the first subject found.

    `images`: the folder of a COCO file's pictures. ValueError names the file, the line and what was expected; also where
    a file has no prompt or no subject stands in one.
    """
    if path.suffix == ".jsonl":
        records = [record for record in read_prompts(path) if record.side == side]
    else:
        records = [_marked(path, side, text, subjects, image) for text, image in _texts(path, images)]
    if not records:
        raise ValueError(f"{path}: got no {side} prompt, expected at least one; formats: {FORMATS}")
    if count is not None and len(records) < count:
        raise ValueError(f"{path}: got {len(records)} {side} prompts, expected {count}; ask for fewer or add some")
    return records[:count]


def read_texts(path: Path) -> list[str]:
    """All prompts of a file, of whatever side."""
    if path.suffix == ".jsonl":
        return [record.text for record in read_prompts(path)]
    return [text for text, _ in _texts(path, None)]


def _texts(path: Path, images: Path | None) -> Iterable[tuple[str, str | None]]:
    readers = {".txt": _plain, ".csv": _i2p, ".json": _coco}
    if path.suffix not in readers:
        raise ValueError(f"{path}: got a {path.suffix or 'nameless'} file, expected {FORMATS}")
    try:
        data = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    return readers[path.suffix](path, data, images)


def _plain(path: Path, data: str, images: Path | None) -> list[tuple[str, None]]:
    return [(line.strip(), None) for line in data.splitlines() if line.strip()]


def _i2p(path: Path, data: str, images: Path | None) -> list[tuple[str, None]]:
    rows = csv.DictReader(data.splitlines(keepends=True))
    if I2P_COLUMN not in (rows.fieldnames or ()):
        raise ValueError(f"{path}: got columns {rows.fieldnames}, expected one named {I2P_COLUMN!r}, as I2P has")
    return [(row[I2P_COLUMN].strip(), None) for row in rows if (row[I2P_COLUMN] or "").strip()]


def _coco(path: Path, data: str, images: Path | None) -> list[tuple[str, str | None]]:
    """One caption a picture, the first one listed, in the file's order."""
    try:
        content = json.loads(data)
        names = {image["id"]: image["file_name"] for image in content["images"]}
        captions = {}
        for entry in content["annotations"]:
            captions.setdefault(entry["image_id"], entry["caption"].strip())
        pairs = [(text, names[key]) for key, text in captions.items() if text]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not COCO captions ({error!r}); expected `images` with id and file_name, `annotations` with "
            "image_id and caption"
        ) from None
    return [(text, str(_inside(images, name)) if images else None) for text, name in pairs]


def _inside(folder: Path, name: str) -> Path:
    """The path of a picture; a caption file from a stranger may not name files outside the folder."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"picture {name!r}: leads out of {folder}, expected a file in it")
    return path


def _marked(path: Path, side: str, text: str, subjects: Sequence[str], image: str | None) -> PromptRecord:
    return PromptRecord(side, text, find_subject(text, subjects, path) if side == UNSAFE else None, image=image)


def find_subject(text: str, subjects: Sequence[str], path: Path) -> tuple[int, int]:
    """Characters [start, end) of the first of the subjects that stands in the text as whole words, in any case."""
    if not subjects:
        raise ValueError(f"{path}: got no subjects, expected the words that name the concept; give --subjects A,B")
    for subject in subjects:
        found = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", text, re.IGNORECASE)
        if found:
            return found.span()
    raise ValueError(f"{path}: none of {', '.join(subjects)} stands in the prompt {text!r}; add its word to --subjects")
