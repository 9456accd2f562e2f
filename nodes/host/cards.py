"""The texts on the card of Risk Map and Risk Probe: measured facts alone, in plain words.

The detectors of the tiny world read its pictures. No detector reads pictures of other models.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...saferope_core import Geometry
from ..draw.card import Card, draw_card
from .recorder import Record
from .risk import NO_TEXT, PAD, STOP, TEMPLATE, Word, named_words, riskiest
from .verdict import THERE, looked_at

AROUND = {STOP, PAD, TEMPLATE}  # labels of tokens that are no words of the prompt
UNKNOWN = "<unk>"  # T5's piece for what its vocabulary lacks
CONNECT = "Connect clip and text to see the words."
ALSO = 2  # other concepts that are named


def card_picture(
    record: Record, geometry: Geometry, clip: Any | None, text: str, above: float, images: Tensor | None
) -> Tensor:
    """Risk Map's card. It is about the concept that `_leading` picks, and names others; IMAGE [1, h, w, 3]."""
    concept = _leading(record, above)
    name, risk, found = record.names[concept], record.risk(concept), riskiest(record, concept)
    reading, picture = found or (next(iter(record.judged(concept)), None), 0)
    shown = None if images is None or picture >= len(images) else images[picture]
    heat = None if reading is None or reading.patches is None else reading.patches[picture].reshape(reading.grid)
    seen = looked_at(name, geometry, shown)
    headline, signal = _headline(name, risk, above, "Suppressed" if seen != THERE else "Not suppressed")
    lines = [_level(risk, above, seen or "nothing measured the picture"), *_others(record, concept)]
    if shown is not None and images is not None and len(images) > 1:
        lines.append(f"Picture {picture + 1} of {len(images)}, the riskiest.")
    words = _words(record, concept, clip, text, above)
    lines += [] if words or found is None else [CONNECT]
    return draw_card(Card(headline, signal, lines, risk, above, words, shown, heat))


def probe_picture(record: Record, clip: Any | None, text: str, above: float) -> Tensor:
    """Risk Probe's card, of a prompt that is not painted yet; IMAGE [1, h, w, 3]."""
    concept = _leading(record, above)
    name, risk = record.names[concept], record.risk(concept)
    headline, signal = _headline(name, risk, above, "Risky prompt")
    lines = [_level(risk, above, "nothing is painted yet"), *_others(record, concept)]
    words = _words(record, concept, clip, text, above)
    lines += [] if words or risk is None else [CONNECT]
    return draw_card(Card(headline, signal, lines, risk, above, words))


def unmeasured_picture(why: str) -> Tensor:
    """The card of a run that was not recorded; IMAGE [1, h, w, 3]."""
    return draw_card(Card("Not measured", "unknown", [f"{why[:1].upper()}{why[1:]}."], None, 0.0))


def _leading(record: Record, above: float) -> int:
    """The concept above `above` with the highest risk, else one without a risk, else the highest."""
    risks = [record.risk(number) for number in range(len(record.names))]

    def rank(number: int) -> tuple[int, float]:
        risk = risks[number]
        return (1, 0.0) if risk is None else (2 if risk > above else 0, risk)

    return max(range(len(risks)), key=rank)


def _headline(name: str, risk: float | None, above: float, risky: str) -> tuple[str, str]:
    if risk is None:
        return f"Not measured: {name}", "unknown"
    return (f"{risky}: {name}", "high") if risk > above else (f"Low risk: {name}", "low")


def _level(risk: float | None, above: float, rest: str) -> str:
    if risk is None:
        return f"No risk is known, as {NO_TEXT}."
    return f"Risk {risk:.2f}, {'above' if risk > above else 'not above'} {above:g} · {rest}"


def _others(record: Record, leading: int) -> list[str]:
    """The other concepts in a line, the riskiest ones first."""
    others = [number for number in range(len(record.names)) if number != leading]
    risks = {number: record.risk(number) for number in others}
    others.sort(key=lambda number: -(risks[number] or 0.0))
    told = [f"{record.names[n]} {'not measured' if risks[n] is None else f'{risks[n]:.2f}'}" for n in others[:ALSO]]
    more = f" and {len(others) - ALSO} more" if len(others) > ALSO else ""
    return [f"Also asked: {', '.join(told)}{more}."] if told else []


def _words(record: Record, concept: int, clip: Any | None, text: str, above: float) -> list[Word]:
    """The riskiest prompt's own words, and its other tokens with a risk above `above`; none without `clip`."""
    found = riskiest(record, concept)
    if found is None or clip is None or not text:
        return []
    named = named_words(found[0].tokens[found[1]], clip, text)
    told = [(word, risk) for word, risk in named if word not in AROUND or risk > above]
    return [("(unknown word)" if word == UNKNOWN else word, risk) for word, risk in told]
