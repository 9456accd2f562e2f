"""The tokens of text encoders that are language models: a chat template around the prompt, some of it cut off again.

FLUX.2, Qwen-Image, Z-Image, Krea 2 and others put the prompt into a template. Their encoders drop the template's
beginning. LongCat's encoder drops its end too. Networks pad the rest. Positions here count in the tokenizer's row.
`placed` moves them to a network's stream. Nothing is encoded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

SLOT = "{}"  # in a template: the prompt


@dataclass(frozen=True)
class Chat:
    """A prompt within its template. `own`: (token, first character, one after the last) of the prompt's tokens.

    `length`: tokens in all; `tail`: tokens of the end that the encoder cuts off; `first`: padding is in front.
    """

    length: int
    own: tuple[tuple[int, int, int], ...]
    tail: int
    first: bool

    def subject(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """Tokens (first, one after the last) that touch the characters `span` of the text. ValueError for none."""
        hit = [token for token, start, end in self.own if start < span[1] and span[0] < end]
        if not hit:
            raise ValueError(f"Prompt {text!r:.200}: {text[slice(*span)]!r:.60} has no token of its own.")
        return hit[0], hit[-1] + 1

    def placed(self, length: int) -> Chat:
        """The chat in a stream of `length` tokens. Raises ValueError where some of the prompt was cut off."""
        kept = self.length - self.tail
        if length < kept:
            move = length - kept
        else:
            move = length - kept if self.first else 0
        own = tuple((token + move, start, end) for token, start, end in self.own)
        if own and not 0 <= own[0][0] <= own[-1][0] < length:
            raise ValueError(
                f"The text has {len(own)} tokens within a template of {self.length}, which do not fit in the stream of "
                f"{length} that was encoded. Connect the very text that the prompt was encoded from."
            )
        return replace(self, length=length, own=own, tail=0)


def read_chat(tokenizer: Any, inner: Any, row: list[Any], text: str) -> Chat:
    """The prompt's tokens in a row of tokens. `tokenizer` is ComfyUI's for the CLIP, `inner` its SDTokenizer.

    ValueError for a tokenizer that does not tell where in the text its tokens stand, and for a row of another text.
    """
    words = inner.tokenizer
    if not getattr(words, "is_fast", False):
        raise ValueError(
            f"The CLIP's tokenizer {type(words).__name__} does not tell tokens' places, so words cannot be found in it."
        )
    template = getattr(tokenizer, "llama_template", None) or SLOT
    whole = template.format(text) if not text.startswith("<|im_start|>") else text
    start = template.index(SLOT) if whole != text else 0
    told = words(whole, return_offsets_mapping=True)
    ids, offsets = (told[name][inner.tokens_start :] for name in ("input_ids", "offset_mapping"))
    place = next((i for i in range(len(row)) if row[i : i + len(ids)] == ids), None)
    if place is None:
        raise ValueError(
            f"Prompt {text!r:.200}: its tokens were not found in the text stream. Expected plain text, without "
            "embeddings, within the length that the CLIP takes."
        )
    own = [(place + i, first - start, last - start) for i, (first, last) in enumerate(offsets)]
    inside = tuple(each for each in own if each[1] < len(text) and each[2] > 0 and each[1] < each[2])
    tail = words(tokenizer.SUFFIX)["input_ids"] if hasattr(tokenizer, "SUFFIX") else ()  # LongCat's
    return Chat(len(row), inside, len(tail), bool(inner.pad_left))
