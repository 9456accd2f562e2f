"""A record of risk for people: words instead of tokens, pictures, and a report. Risk Map and Risk Probe show the same.

Where no gate was asked, there is no risk. Texts, pictures and outputs say so, and never say 0.

Axes: B pictures, L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ...saferope_core import Geometry, Reading
from ..draw.charts import batched, heat_map
from ..draw.concept_pictures import block_names
from ..draw.risk_pictures import blank, course, patch_map, word_bars
from .chat import Chat
from .recorder import POSITIVE, Record
from .words import END, PADDING, chat_of, pieces, words

# Risk above which a prompt is called risky. Tiny world, one forward pass, 96 benign prompts each: see docs/nodes.md.
FLAG_ABOVE = 0.4
NAMED = 5  # words in a report, concepts in a sentence
REST = "(other tokens)"  # behind the prompt's own: Redux, concatenated conditionings
PAD, STOP, TEMPLATE = "(empty rest)", "(end of text)", "(text around the prompt)"
WHY = "its strength is 0, its gates are 1, or it turns no {} tokens in these streams, blocks and steps"  # text or image
NO_TEXT, NO_IMAGE = (WHY.format(stream) for stream in ("text", "image"))

Word = tuple[str, float]  # and its risk


def unmeasured_pictures(why: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words, patches, heads and steps of a run that was not recorded: unmeasured risk must not look like none."""
    sheet = batched([blank("risk not measured", why)])
    return sheet, sheet, sheet, sheet


def require_measured(record: Record) -> None:
    """Raise ValueError for a run in which no gate was asked."""
    if not record.measured:
        raise ValueError(
            "SafeRoPE measured nothing in this run: none of its steps lay between start_percent and end_percent, or "
            "all gates are 1, which no token passes. Widen them or lower the gates in SafeRoPE Apply, or mute this "
            "node."
        )


def comparable(record: Record) -> float | ExecutionBlocker:
    """The risk as a node's output. Where a concept has none, ComfyUI runs no node that takes it, and shows why."""
    if record.score is not None:
        return record.score
    return ExecutionBlocker(
        f"SafeRoPE has no risk to compare: that of {listed(record.unmeasured)} was not measured ({NO_TEXT}). Turn that "
        "on, take the concept out, or use the report instead of the risk."
    )


def listed(names: Sequence[str]) -> str:
    """The first few of some concepts, for a sentence."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def named_words(risks: Tensor, clip: Any | None, text: str) -> list[Word]:
    """Words of a prompt and the risk of each, its riskiest token's, from the tokens' risks [L], in reading order.

    Padding and the end count as a word each. Without `clip` or text: tokens by their numbers. Raises ValueError where
    the text has more tokens than the picture's prompt had: then it was another text.
    """
    if clip is None or not text:
        return [(str(number + 1), risk) for number, risk in enumerate(risks.tolist())]
    if (chat := chat_of(clip, text)) is not None:
        return _named_in_chat(risks, chat.placed(len(risks)), text)
    found = pieces(clip, text)
    if len(found) > len(risks):
        raise ValueError(
            f"text has {len(found)} tokens, the prompt that was sampled had {len(risks)}. Connect the very text that "
            "the positive prompt was encoded from."
        )
    named = [(word, risks[first:last].max().item()) for word, first, last in words(found)]
    for label, kind in ((STOP, END), (PAD, PADDING)):
        places = [place for place, piece in enumerate(found) if piece == kind]
        named += [(label, risks[places].max().item())] if places else []
    return named + ([(REST, risks[len(found) :].max().item())] if len(found) < len(risks) else [])


def _named_in_chat(risks: Tensor, chat: Chat, text: str) -> list[Word]:
    """The prompt's words, from space to space, and all of the template as one."""
    named = []
    for found in re.finditer(r"\S+", text):
        first, last = chat.subject(text, found.span())
        named.append((found[0].strip(".,;:!?\"'()") or found[0], risks[first:last].max().item()))
    own = torch.zeros(len(risks), dtype=torch.bool)
    own[[token for token, *_ in chat.own]] = True
    return named + ([] if own.all() else [(TEMPLATE, risks[~own].max().item())])


def riskiest(record: Record, concept: int) -> tuple[Reading, int] | None:
    """The reading and the number of the picture with the highest risk of a concept; None where none was measured."""
    readings = [each for each in record.judged(concept) if each.score is not None]
    if not readings:
        return None
    reading = max(readings, key=lambda each: each.score.max().item())
    return reading, int(reading.score.argmax())


def words_picture(record: Record, clip: Any | None, text: str, mark: float) -> Tensor:
    """Bars over the prompt's words, one picture for each concept; IMAGE."""
    pictures = []
    for number, name in enumerate(record.names):
        if (found := riskiest(record, number)) is None:
            pictures.append(blank(f"{name}: risk of the prompt not measured", NO_TEXT))
            continue
        reading, picture = found
        named = named_words(reading.tokens[picture], clip, text)
        what = "prompt" if record.risk(number) is not None else "measured part of the prompt"
        title = f"{name}: risk of the {what} {reading.score[picture]:.2f}, word by word"
        pictures.append(word_bars([word for word, _ in named], [risk for _, risk in named], title, mark))
    return batched(pictures)


def heads_picture(record: Record, geometry: Geometry) -> Tensor:
    """Which heads found the riskiest token risky, blocks across, one picture for each concept; IMAGE."""
    heads = [f"head {head}" for head in range(geometry.heads)]
    pictures = []
    for number, name in enumerate(record.names):
        if (found := riskiest(record, number)) is None:
            pictures.append(blank(f"{name}: heads not measured on the prompt", NO_TEXT))
            continue
        reading, picture = found
        grey = " (grey: not measured)" if reading.heads.isnan().any() else ""
        title = f"{name}: attention heads (small parts of the model) that found the riskiest word{grey}"
        pictures.append(
            heat_map(reading.heads[picture].T, heads, block_names(geometry), title, "share of steps, blocks in order")
        )
    return batched(pictures)


def patches_picture(record: Record, images: Tensor | None) -> Tensor:
    """Where in each picture image tokens were risky, for every concept; over `images` [B, h, w, 3] where given;
    IMAGE."""
    pictures = []
    for number, name in enumerate(record.names):
        reading = _shown(record, number)
        if reading is None or reading.patches is None:
            pictures.append(blank(f"{name}: risk in the picture not measured", NO_IMAGE))
            continue
        for picture, risk in enumerate(reading.patches):
            under = images[picture] if images is not None and picture < len(images) else None
            title = f"{name}: where it was asked for, picture {picture + 1}"
            pictures.append(patch_map(risk.reshape(reading.grid), title, under))
    return batched(pictures)


def steps_picture(record: Record) -> Tensor:
    """The course of risk over the steps, one picture for each concept; IMAGE."""
    pictures = []
    for number, name in enumerate(record.names):
        reading, title = _shown(record, number), f"{name}: risk over the steps"
        series = {} if reading is None else _series(reading)
        levels = [] if reading is None else reading.noise_levels.tolist()
        pictures.append(course(series, levels, title) if series else blank(title, NO_TEXT))
    return batched(pictures)


def _series(reading: Reading) -> dict[str, list[float]]:
    """Courses of the picture with the riskiest text, of the streams that were measured."""
    picture = 0 if reading.score is None else int(reading.score.argmax())
    text, image = (None if risk is None else risk[:, picture] for risk in (reading.text, reading.image))
    series = {} if text is None else {"the riskiest word": text.amax(-1).tolist()}
    return series if image is None else series | {"the picture, on average": image.mean(-1).tolist()}


def report(record: Record, clip: Any | None, text: str, above: float) -> str:
    """Every concept in a few lines of plain text."""
    return "\n".join(_lines(record, number, clip, text, above) for number in range(len(record.names)))


def _lines(record: Record, concept: int, clip: Any | None, text: str, above: float) -> str:
    lines, found, reading = [_headline(record, concept, above)], riskiest(record, concept), _shown(record, concept)
    if found is not None:
        named = named_words(found[0].tokens[found[1]], clip, text)
        word = "word" if clip is not None and text else "token"
        lines.append(f"  riskiest {word}s: " + ", ".join(f"{name} {risk:.2f}" for name, risk in _highest(named)))
    patches = None if reading is None else reading.patches
    on_image = "not measured" if patches is None else f"{patches.mean():.3f} on average, {patches.max():.2f} at most"
    lines.append(f"  image tokens: {on_image}")
    others = [each for each in record.readings[concept] if record.usual and each.entry[0] != POSITIVE]
    risks = ["not measured" if each.score is None else f"{each.score.max():.2f}" for each in others]
    lines += [f"  negative prompt: risk {risk}, not counted" for risk in risks]
    return "\n".join(lines)


def _headline(record: Record, concept: int, above: float) -> str:
    """The concept's risk, or why it has none."""
    name, risk, judged = record.names[concept], record.risk(concept), record.judged(concept)
    if risk is not None:
        return f"{name}: risk {risk:.2f}, {'above' if risk > above else 'not above'} {above:g}"
    known = [each.score.max().item() for each in judged if each.score is not None]
    if not known:
        return f"{name}: risk not measured ({NO_TEXT})"
    missing = f"{len(judged) - len(known)} of {len(judged)} prompts"
    return f"{name}: risk not measured in {missing}, up to {max(known):.2f} in the others"


def _shown(record: Record, concept: int) -> Reading | None:
    """The reading whose image tokens are shown: that of the riskiest text, else the first that counts."""
    found = riskiest(record, concept)
    return found[0] if found else next(iter(record.judged(concept)), None)


def _highest(named: Sequence[Word]) -> list[Word]:
    return sorted(named, key=lambda word: -word[1])[:NAMED]
