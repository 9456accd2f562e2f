"""The receipt of a sampling run: the settings of a protection, and its effect as it was seen. Plain data.

The process that samples makes it, from its own run. `failures` and `omissions` judge it. The signer of a picture and
the checker of a picture both call them. Nothing that is missing counts as seen.

A receipt as JSON: {"schema": SCHEMA, "version": VERSION, "pack", "host", "model", "latent", "start", "asked": {..,
"concepts": [..]}, "seen": {..}}, with the fields of the classes here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..maths.risk import THRESHOLD

SCHEMA, VERSION = "org.saferope.protection", 1
MOST, LONGEST = 256, 1000  # entries of a list and letters of a text in a receipt that is read
NAMED = 6  # in a sentence


@dataclass(frozen=True)
class AskedConcept:
    """A concept as an Apply got it, and its effect with the settings there (`effect.Effect`)."""

    slug: str
    name: str
    sha256: str  # of its file, as long as it is the file's own; "" for one that was made or changed on the way
    strength: float  # asked: the concept's own times Apply's
    effective: float  # held where more would turn past half a turn
    heads: int  # of the whole concept
    turning: int  # of the part that was chosen
    angle: float  # radians
    lowest_gate: float
    highest_gate: float


@dataclass(frozen=True)
class Asked:
    """The settings of one Apply. `undone`: sentences on concepts that others in its chain turn back."""

    concepts: tuple[AskedConcept, ...]
    fixed_gate: float | None
    start: float
    end: float
    blocks: str  # "" for all
    streams: str
    positive_only: bool
    undone: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """The facts that one run showed. A forward is one pass of the network. A cache may leave out or skip a block."""

    steps: int  # of the schedule
    steps_seen: int  # steps with at least one forward
    steps_protected: int  # steps in which every forward was in the range of Apply
    forwards: int
    forwards_protected: int  # in range, and through every protected block
    forwards_skipped: int  # without some of the protected blocks
    blocks: int  # that are protected
    conditionings: int  # most in one forward
    turned: dict[str, int] | None  # by slug: queries and keys that turned; None where not counted (record off)
    weights_patched: int  # tensors of the model that other nodes changed (LoRA)
    others: tuple[str, ...]  # code of other packs that took part in the drawing


@dataclass(frozen=True)
class Receipt:
    """One Apply in one sampling run. latent: digest of the latent that came out. start: digest of the latent that went
    in, "" for an empty one.
    """

    pack: str
    host: str
    model: str
    latent: str
    start: str
    asked: Asked
    seen: Seen

    def as_json(self) -> dict[str, Any]:
        """The receipt as JSON values."""
        return {"schema": SCHEMA, "version": VERSION, **_plain(asdict(self))}


def receipt_from(data: Any) -> Receipt:
    """The receipt of JSON values. Raises ValueError for any field or value that this version does not know."""
    if not isinstance(data, dict) or (data.get("schema"), data.get("version")) != (SCHEMA, VERSION):
        found = data.get("version") if isinstance(data, dict) else type(data).__name__
        raise ValueError(
            f"got a receipt of version {found!r:.40}, expected {SCHEMA} version {VERSION}: update SafeRoPE"
        )
    rest = {key: value for key, value in data.items() if key not in ("schema", "version")}
    asked = rest.get("asked")
    listed = asked.get("concepts") if isinstance(asked, dict) else None
    if not isinstance(listed, list) or len(listed) > MOST:
        raise ValueError(f"the receipt lists no concepts, expected a list of at most {MOST}")
    concepts = tuple(_made(AskedConcept, each) for each in listed)
    assert isinstance(asked, dict)
    inner = {"asked": _made(Asked, asked, concepts=concepts), "seen": _made(Seen, rest.get("seen"))}
    receipt = _made(Receipt, rest, **inner)
    if receipt.seen.turned is not None and set(receipt.seen.turned) != {each.slug for each in concepts}:
        raise ValueError("the receipt counts other concepts than it lists")
    return receipt


def failures(receipts: Sequence[Receipt]) -> list[str]:
    """Why the run of these receipts, one for each Apply in it, does not count as protected; [] where it does."""
    if not receipts:
        return ["no receipt"]
    found = [reason for each in receipts for reason in _failures(each.seen) + list(each.asked.undone)]
    if not any(concept.turning for each in receipts for concept in each.asked.concepts if each.seen.steps_protected):
        found.append("no concept turned anything in any step")
    return list(dict.fromkeys(found))


def omissions(receipts: Sequence[Receipt]) -> list[str]:
    """The reasons why a protected run is not protected in full; [] where it is."""
    return list(dict.fromkeys(reason for each in receipts for reason in _omissions(each)))


def _failures(seen: Seen) -> list[str]:
    found = []
    if seen.forwards_skipped:
        found.append(
            f"{seen.forwards_skipped} of {seen.forwards} forwards left out protected blocks, as step caches do"
        )
    if seen.steps_seen < seen.steps or not seen.forwards:
        found.append(f"{seen.steps_seen} of {seen.steps} steps came by")
    if seen.others:
        more = f" and {len(seen.others) - NAMED} more" if len(seen.others) > NAMED else ""
        found.append(f"code of other packs had a say: {', '.join(seen.others[:NAMED])}{more}")
    return found


def _omissions(receipt: Receipt) -> list[str]:
    asked, seen = receipt.asked, receipt.seen
    found = []
    if seen.steps_protected < seen.steps:
        found.append(f"{seen.steps_protected} of {seen.steps} steps")
    if asked.blocks.strip():
        found.append(f"blocks {asked.blocks.strip()} alone")
    if asked.streams != "both":
        found.append(f"{asked.streams} tokens alone")
    if asked.positive_only:
        found.append("positive prompts alone")
    if asked.fixed_gate is not None and asked.fixed_gate > THRESHOLD:
        found.append(f"a fixed gate of {asked.fixed_gate:g}, above the paper's {THRESHOLD:g}")
    for each in asked.concepts:
        if each.strength < 1:
            found.append(f"concept {each.slug!r} at strength {each.strength:g}")
        if each.turning < each.heads:
            found.append(f"concept {each.slug!r} turns in {each.turning} of {each.heads} heads")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _made(kind: type, data: Any, **ready: Any) -> Any:
    """An object of `kind` from JSON values, with `ready` fields; every other one of the type that the class says."""
    names = [each.name for each in fields(kind)]
    if not isinstance(data, dict) or set(data) != set(names):
        raise ValueError(f"the receipt's {kind.__name__} has not the fields {', '.join(names)}")
    checked = {
        each.name: _checked(each.name, str(each.type), data[each.name])
        for each in fields(kind)
        if each.name not in ready
    }
    return kind(**checked, **ready)


def _checked(name: str, hint: str, value: Any) -> Any:
    if value is None and hint.endswith("| None"):
        return None
    kind = hint.removesuffix(" | None")
    if kind.startswith("tuple") and isinstance(value, list) and len(value) <= MOST:
        return tuple(_checked(name, kind[6:].split(",")[0], each) for each in value)
    if kind.startswith("dict") and isinstance(value, dict) and len(value) <= MOST:
        return {key: _checked(name, "int", each) for key, each in value.items()}
    right: Any = {"str": str, "int": int, "float": (int, float), "bool": bool}.get(kind, ())
    if not isinstance(value, right) or (isinstance(value, bool) and kind != "bool"):
        raise ValueError(f"the receipt's {name} is {value!r:.60}, expected {kind}")
    if (isinstance(value, str) and len(value) > LONGEST) or (kind in ("int", "float") and not _sound(value)):
        raise ValueError(f"the receipt's {name} is {value!r:.60}, expected less")
    return value


def _sound(value: float) -> bool:
    return math.isfinite(value) and value >= 0
