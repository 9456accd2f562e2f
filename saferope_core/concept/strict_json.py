"""JSON from untrusted files: limited depth, no duplicate keys, finite numbers only."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, NoReturn

MAX_DEPTH = 16  # of nested lists and objects
MAX_DIGITS = 500  # of a whole number; Python before 3.10.7 takes hours for millions of them


def dumps(value: Any) -> str:
    """Compact JSON with sorted keys: equal values give equal text. Raises ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def loads(what: str, text: str | bytes) -> Any:
    """The value of a JSON text (bytes: UTF-8). Raises ValueError, naming `what` was read, unless it is strict JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """The object of these pairs; json alone would silently keep the last of two equal keys."""
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
            raise ValueError(f"duplicate keys {', '.join(twice)}")
        return found

    def whole(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"a number of {len(digits)} digits, expected at most {MAX_DIGITS}")
        return int(digits)

    def finite(digits: str) -> float:
        """json alone reads 1e999 as infinity."""
        if math.isinf(number := float(digits)):
            raise ValueError(f"{digits:.40}, expected finite numbers")
        return number

    def refuse(constant: str) -> NoReturn:
        """NaN and the infinities, which json reads though JSON has none."""
        raise ValueError(f"{constant}, expected finite numbers")

    try:
        text = text.decode() if isinstance(text, bytes) else text
        if (deepest := depth(text)) > MAX_DEPTH:
            raise ValueError(f"nested {deepest} deep, expected at most {MAX_DEPTH}")
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_int=whole, parse_float=finite)
    except ValueError as error:
        raise ValueError(f"{what}: not the JSON expected here: {error}") from None


def depth(text: str) -> int:
    """Deepest nesting of brackets outside of strings. Counted without recursion, since the parser itself recurses."""
    unescaped = re.sub(r"\\.", "", text, flags=re.DOTALL)
    level = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", re.sub(r'"[^"]*"', "", unescaped)):
        level += 1 if bracket in "[{" else -1
        deepest = max(deepest, level)
    return deepest
