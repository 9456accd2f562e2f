"""Reads the workflow in a file: a workflow's JSON, or the metadata of a PNG or WEBP that ComfyUI has saved.

Files are untrusted. Every size is capped before anything is read or inflated. JSON that two readers could understand
differently (equal keys, two texts of one name) is refused. NaN is let through: older versions of ComfyUI wrote it into
harmless places, and no value that counts may be one.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from stat import S_ISREG
from typing import Any

from .picture import MAX_TEXT, Unreadable, texts_of

MAX_DEPTH = 100  # of nested lists and objects; workflows have about 15


@dataclass(frozen=True)
class Documents:
    """The workflows in a file: the API form that ran, the editor's form, or both. A JSON file holds one of them."""

    prompt: Any = None
    workflow: Any = None
    picture: bool = False


def read(path: Path) -> Documents:
    """The workflow in a file. Raises Unreadable for a file without one, OSError for a missing file."""
    without_waiting = getattr(os, "O_NONBLOCK", 0)  # a pipe would wait for a writer for ever
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | without_waiting)) as file:
        if not S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Unreadable("is a pipe, a device or the like, expected a regular file")
        texts = texts_of(file)
        if texts is not None:
            return _documents(texts)
        file.seek(0)
        text = file.read(MAX_TEXT + 1)
    if len(text) > MAX_TEXT:
        raise Unreadable(f"is larger than {MAX_TEXT} bytes, expected a workflow (JSON), or a PNG or WEBP of ComfyUI")
    return sorted_out(loads(text))


def sorted_out(value: Any) -> Documents:
    """A JSON value as the form it is in: the editor's has a list of nodes, the API's an object for each node."""
    if not isinstance(value, dict):
        raise Unreadable(f"holds a JSON {type(value).__name__}, expected a workflow, which is an object")
    if isinstance(value.get("nodes"), list):
        return Documents(workflow=value)
    inner = value.get("prompt")
    request = isinstance(inner, dict) and "class_type" not in inner  # the body of a request to ComfyUI
    return Documents(prompt=inner if request else value)


def loads(text: bytes) -> Any:
    """The value of a JSON text. Raises Unreadable where it is none, too deep, or has an object with equal keys."""
    try:
        decoded = text.decode("utf-8-sig")
        if _depth(decoded) > MAX_DEPTH:  # before the parser, which recurses
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        return json.loads(decoded, object_pairs_hook=_unique)
    except ValueError as error:
        wanted = "a workflow, or a PNG or WEBP made by ComfyUI"
        raise Unreadable(f"is not JSON that can be read ({error}), expected {wanted}") from None


def _depth(text: str) -> int:
    """How deep brackets nest outside of strings."""
    bare = re.sub(r'"[^"]*"', "", text.replace("\\\\", "").replace('\\"', ""))
    return max(accumulate(1 if each in "[{" else -1 for each in re.findall(r"[\[\]{}]", bare)), default=0)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _documents(texts: dict[str, bytes]) -> Documents:
    found = {}
    for name, text in texts.items():
        try:
            found[name] = loads(text)
        except Unreadable as error:
            raise Unreadable(f"its text {name!r} {error}") from None
        if found[name] is None:
            raise Unreadable(f"its text {name!r} is null, expected a workflow")
    if not found:
        other = "ComfyUI was told not to save one, or another program has written the picture since"
        raise Unreadable(f"holds no workflow: {other}")
    return Documents(**found, picture=True)
