"""Words for a terminal. They may come from a stranger's file, and a terminal obeys control characters.

No torch: the command line starts with this.
"""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Callable


def plain(text: object) -> str:
    """`text` with its line ends; every other character that is not printable is escaped."""
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in str(text))


def say(text: object, err: bool = False) -> None:
    """Prints `text` as `plain` gives it. A character that the terminal's encoding does not have is escaped as well."""
    stream = sys.stderr if err else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(plain(text).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def guarded(work: Callable[[], None]) -> None:
    """Does `work` with everything that libraries print, warn and log told as `say` tells it; an error exits with 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.setLogRecordFactory(_PlainRecord)
    told = warnings.formatwarning
    warnings.formatwarning = lambda *given, **more: plain(told(*given, **more))
    try:
        work()
    except Exception:
        say(traceback.format_exc(), err=True)
        raise SystemExit(1) from None


class _PlainRecord(logging.LogRecord):
    def getMessage(self) -> str:  # the name that logging calls
        return plain(super().getMessage())


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()
