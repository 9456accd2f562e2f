"""A record of risk for people: words instead of tokens, pictures, and a report. Risk Map and Risk Probe show the same.

Axes: B pictures, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..saferope_core import Geometry, Reading
from .inspect import batched, block_names
from .pictures import heat_map
from .recorder import Record, Recorder
from .risk_pictures import course, patch_map, word_bars
from .words import END, PADDING, pieces, words

# Risk above which a prompt is called risky. Tiny world, one forward pass, 96 benign prompts each: see docs/nodes.md.
FLAG_ABOVE = 0.4
NAMED = 5  # words in a report
REST = "(other tokens)"  # behind the prompt's own: Redux, concatenated conditionings
PAD, STOP = "(padding)", "(end)"

Word = tuple[str, float]  # and its risk


def require_recorded(recorder: Recorder) -> None:
    """Raise ValueError where nothing is ever recorded: risk that nobody measured must not look like none."""
    if recorder.off:
        raise ValueError(
            f"SafeRoPE Apply recorded nothing: {recorder.off}. Expected a protected model that records. Change that in "
            "SafeRoPE Apply, or mute this node."
        )


def require_measured(record: Record) -> None:
    """Raise ValueError for a run in which no gate was asked."""
    if not record.measured:
        raise ValueError(
            "SafeRoPE measured nothing in this run: none of its steps lay between start_percent and end_percent. Widen them "
            "in SafeRoPE Apply, or mute this node."
        )


def named_words(risks: Tensor, clip: Any | None, text: str) -> list[Word]:
    """Words of a prompt and the risk of each, its riskiest token's, from the tokens' risks [L], in reading order.

    Padding and the end count as a word each. Without `clip` or text: tokens by their numbers. Raises ValueError where the
    text has more tokens than the picture's prompt had: then it was another text.
    """
    if clip is None or not text:
        return [(str(number + 1), risk) for number, risk in enumerate(risks.tolist())]
    found = pieces(clip, text)
    if len(found) > len(risks):
        raise ValueError(
            f"text has {len(found)} tokens, the prompt that was sampled had {len(risks)}. Connect the very text that the "
            "positive prompt was encoded from."
        )
    named = [(word, risks[first:last].max().item()) for word, first, last in words(found)]
    for label, kind in ((STOP, END), (PAD, PADDING)):
        places = [place for place, piece in enumerate(found) if piece == kind]
        named += [(label, risks[places].max().item())] if places else []
    return named + ([(REST, risks[len(found) :].max().item())] if len(found) < len(risks) else [])


def riskiest(record: Record, concept: int) -> tuple[Reading, int]:
    """The reading and the number of the picture with the highest risk of a concept."""
    readings = record.judged(concept)
    reading = max(readings, key=lambda each: each.score.max().item())
    return reading, int(reading.score.argmax())


def words_picture(record: Record, clip: Any | None, text: str, mark: float) -> Tensor:
    """Bars over the prompt's words, one picture for each concept; IMAGE."""
    pictures = []
    for number, name in enumerate(record.names):
        reading, picture = riskiest(record, number)
        named = named_words(reading.tokens[picture], clip, text)
        title = f"{name}: risk of the prompt {reading.score[picture]:.2f}, word by word"
        pictures.append(word_bars([word for word, _ in named], [risk for _, risk in named], title, mark))
    return batched(pictures)


def heads_picture(record: Record, geometry: Geometry) -> Tensor:
    """Which heads found the riskiest token risky, blocks across, one picture for each concept; IMAGE."""
    heads = [f"head {head}" for head in range(geometry.heads)]
    pictures = []
    for number, name in enumerate(record.names):
        reading, picture = riskiest(record, number)
        title = f"{name}: heads that found the riskiest token risky"
        pictures.append(heat_map(reading.heads[picture].T, heads, block_names(geometry), title, "share of steps"))
    return batched(pictures)


def patches_picture(record: Record, images: Tensor | None) -> Tensor:
    """Where in each picture image tokens were risky, for every concept; over `images` [B, h, w, 3] where given; IMAGE."""
    pictures = []
    for number, name in enumerate(record.names):
        reading, _ = riskiest(record, number)
        for picture, risk in enumerate(reading.patches):
            grid = risk.reshape(reading.grid) if len(risk) > 1 else risk.expand(reading.grid)
            under = images[picture] if images is not None and picture < len(images) else None
            pictures.append(patch_map(grid, f"{name}: image tokens, picture {picture + 1}", under))
    return batched(pictures)


def steps_picture(record: Record) -> Tensor:
    """The course of risk over the steps, one picture for each concept; IMAGE."""
    pictures = []
    for number, name in enumerate(record.names):
        reading, picture = riskiest(record, number)
        series = {
            "riskiest token of the text": reading.text[:, picture].amax(-1).tolist(),
            "image tokens, mean": reading.image[:, picture % reading.image.shape[1]].mean(-1).tolist(),
        }
        pictures.append(course(series, reading.noise_levels.tolist(), f"{name}: risk over the steps"))
    return batched(pictures)


def report(record: Record, clip: Any | None, text: str, above: float) -> str:
    """Every concept in a few lines of plain text."""
    return "\n".join(_lines(record, number, clip, text, above) for number in range(len(record.names)))


def _lines(record: Record, concept: int, clip: Any | None, text: str, above: float) -> str:
    reading, picture = riskiest(record, concept)
    named = named_words(reading.tokens[picture], clip, text)
    score = reading.score[picture].item()
    word = "word" if clip is not None and text else "token"
    lines = [f"{record.names[concept]}: risk {score:.2f}, {'above' if score > above else 'not above'} {above:g}"]
    lines.append(f"  riskiest {word}s: " + ", ".join(f"{name} {risk:.2f}" for name, risk in _highest(named)))
    lines.append(f"  image tokens: {reading.patches.mean():.3f} on average, {reading.patches.max():.2f} at most")
    others = [each for each in record.readings[concept] if each not in record.judged(concept)]
    lines += [f"  negative prompt: risk {each.score.max():.2f}, not counted" for each in others]
    return "\n".join(lines)


def _highest(named: Sequence[Word]) -> list[Word]:
    return sorted(named, key=lambda word: -word[1])[:NAMED]
