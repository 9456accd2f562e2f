"""Untrusted bytes and words: read regular files alone, whole or not at all, and print words without their tricks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

LONGEST_MESSAGE = 1000  # characters of an error: a file must not fill a log with its own words
MOST_LINES, LONGEST_LINE = 20, 500  # of a description where it is shown: a screen of it
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|!#~&$@]")  # characters that are markup within a line of CommonMark or GitHub


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading bytes. ValueError for a pipe, a device and the like.

    A pipe would wait for a writer for ever and a device never ends, so neither is waited for nor read.
    """
    file = open(path, "rb", opener=_without_waiting)
    if not S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("not a regular file, expected one: put a copy of the file itself there")
    return file


def read_whole(path: str | os.PathLike, most: int) -> bytes:
    """All bytes of a regular file. ValueError for more than `most`, before any is read, and
    where it changes meanwhile."""
    with open_regular(path) as file:
        before = os.fstat(file.fileno())
        if before.st_size > most:
            raise ValueError(f"{before.st_size} bytes, expected at most {most}: this is no concept file")
        data = file.read(before.st_size + 1)
        after = os.fstat(file.fileno())
    changed = (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
    if changed or len(data) != before.st_size:
        raise ValueError("changed while it was read: wait until it is written, then try again")
    return data


def printable(text: object, longest: int = LONGEST_MESSAGE) -> str:
    """`text` on one line, at most `longest` characters. Characters that do not print, or that turn the reading
    direction, are escaped.
    """
    whole = str(text)
    shown = whole if len(whole) <= longest else f"{whole[: longest - 4]} ..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in shown)


def quoted(text: str) -> list[str]:
    """A text of several lines, each behind a bar, so that none passes for a line of ours;
    the first MOST_LINES of them."""
    lines = text.rstrip().replace("\t", " ").split("\n") if text.strip() else []
    shown = [f"  | {printable(line, LONGEST_LINE)}" for line in lines[:MOST_LINES]]
    return shown + ([f"  | ... and {len(lines) - MOST_LINES} lines more"] if len(lines) > MOST_LINES else [])


def markdown(text: object) -> str:
    """`text` on one line, as words in Markdown. It makes no table, picture, formula, mention, HTML or link with other
    words.
    """
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def markdown_code(text: object) -> str:
    """`text` on one line as code in Markdown."""
    shown = printable(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def _without_waiting(path: str, flags: int) -> int:
    return os.open(Path(path), flags | getattr(os, "O_NONBLOCK", 0))
