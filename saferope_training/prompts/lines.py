"""Text files and their lines. Only a newline ends a line: U+2028, U+0085, form feeds stand inside of prompts.

`str.splitlines` ends a line at each of these, and so do readers of JSON lines that use it. So `json_line` escapes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

NUL = "\0"  # in no prompt, and in every UTF-16 text of Latin letters
# Characters that JSON leaves in a text and str.splitlines takes for a line's end. JSON's own escapes cover the others.
_SEPARATORS = {ord(character): f"\\u{ord(character):04x}" for character in "\u0085\u2028\u2029"}


def read_text(path: Path) -> str:
    """A UTF-8 file's text, with or without a byte order mark; `\\r\\n` and `\\r` are newlines too.

    ValueError names the file and the line of the first byte that is not UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: got bytes that are not UTF-8 text ({error.reason}), expected UTF-8; save it as UTF-8"
        ) from None
    if NUL in text:
        line = text[: text.index(NUL)].count("\n") + 1
        raise ValueError(f"{path}, line {line}: got a NUL character, as UTF-16 has, expected UTF-8; save it as UTF-8")
    return text


def numbered(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def json_line(value: object) -> str:
    """The value as JSON, readable in any script, on one line that ends with its only line end."""
    return json.dumps(value, ensure_ascii=False).translate(_SEPARATORS) + "\n"
