"""The words behind the tokens of FLUX's text stream, from the CLIP that made it: pieces, words, and where a marked word
stands.

FLUX's text stream is T5's states, token by token, padding included. Positions here are positions in that stream, as of
q and k in every block. This module works on text alone: it encodes nothing and needs no weights.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from ...saferope_core import unknown_parts
from .chat import Chat, read_chat

SPACE = "\u2581"  # SentencePiece's mark of a word's beginning
END, PADDING = "</s>", ""
IDENTIFIER = "embedding:"  # before an embedding's name in a prompt; ComfyUI's SDTokenizer
EMBEDDING = "<embedding>"  # a textual inversion's vector, which is no token
BIG_CLIP = "g"
CLIPS = ("l", BIG_CLIP, "h")  # the token streams of CLIPs
T5, BYT5 = "t5", "byt5"  # in the names of T5's token streams: t5xxl, t5base, pile_t5xl, umt5xxl; not ByT5's


def chat_of(clip: Any, text: str) -> Chat | None:
    """Where the prompt stands in the stream of a language model; None for a CLIP with T5, whose stream is all prompt.

    Raises ValueError where it is not to be found.
    """
    rows = clip.tokenize(text)
    if not isinstance(rows, dict) or _t5(rows) or rows.keys() & set(CLIPS):
        return None
    key = next(iter(rows))
    return read_chat(clip.tokenizer, _tokenizer(clip, key), [token for row in rows[key] for token, *_ in row], text)


def pieces(clip: Any, text: str) -> list[str]:
    """T5's piece for every token of the text stream, such as "▁star"; "" for padding, "</s>" for the end.

    `clip` is a ComfyUI CLIP. Prompt weights, as in "(star:1.2)", are taken out as ComfyUI takes them out. A tokenizer
    of whole words, as the tiny world's, has no mark of a word's beginning. Raises ValueError for a CLIP without T5.
    """
    key = _stream(clip, rows := clip.tokenize(text))
    tokenizer = _tokenizer(clip, key)
    return [_piece(token, tokenizer) for row in rows[key] for token, *_ in row]


def words(pieces: list[str]) -> list[tuple[str, int, int]]:
    """The words of a text stream: (word, its first token, one after its last).

    Punctuation around a word is left out, inside it ("don't", "well-known") it stays. Padding and the end are no words.
    """
    marked = any(piece.startswith(SPACE) for piece in pieces)
    groups: list[list[int]] = []
    for place, piece in enumerate(pieces):
        if piece in (PADDING, END):
            groups.append([])
        elif not groups or not marked or piece.startswith(SPACE) or piece == EMBEDDING:
            groups.append([place])
        else:
            groups[-1].append(place)
    found = (_trimmed(group, pieces) for group in groups)
    return [("".join(pieces[first:last]).replace(SPACE, ""), first, last) for first, last in found if first < last]


def unknown(clip: Any, text: str) -> list[tuple[int, int]]:
    """Characters [start, end) of `text` that T5's vocabulary has no token for, as far as they are in the stream.

    Empty for a tokenizer that does not tell tokens' places: `located` refuses it.
    """
    if not _t5(rows := clip.tokenize(text)):
        return []  # language models spell every text out in bytes
    key = _stream(clip, rows)
    inner = _tokenizer(clip, key).tokenizer
    strange = getattr(inner, "unk_token_id", None)
    stream = [token for row in rows[key] for token, *_ in row]
    if not getattr(inner, "is_fast", False) or not any(isinstance(token, int) and token == strange for token in stream):
        return []
    own = inner(text, return_offsets_mapping=True)
    return unknown_parts(own["input_ids"], own["offset_mapping"], strange)


def located(clip: Any, text: str, span: tuple[int, int]) -> tuple[int, int]:
    """Tokens (first, one after the last) of the text stream that touch the characters `span` of `text`.

    Raises ValueError where the span holds no token or is cut off, and for texts with weights, embeddings or a tokenizer
    that does not say where in the text its tokens stand.
    """
    key = _stream(clip, rows := clip.tokenize(text))
    stream = [token for row in rows[key] for token, *_ in row]
    inner = _tokenizer(clip, key).tokenizer
    if not getattr(inner, "is_fast", False):
        raise ValueError(
            f"The CLIP's tokenizer {type(inner).__name__} does not tell tokens' places. Use FLUX's own T5."
        )
    own = inner(text, return_offsets_mapping=True)
    hit = [i for i, (first, last) in enumerate(own["offset_mapping"]) if first < span[1] and span[0] < last]
    until = stream[: hit[-1] + 1] if hit else []
    if any(not isinstance(token, int) for token in until):
        named = re.search(rf"{IDENTIFIER}\S+", text)
        raise ValueError(
            f"Prompt {text!r:.200}: the embedding {named[0] if named else 'of a name unknown'!r:.60} stands in or "
            f"before {text[slice(*span)]!r:.60}, and the word's tokens cannot be told behind it. Put it after the "
            "word, or leave it out."
        )
    if hit and until == own["input_ids"][: hit[-1] + 1]:
        return hit[0], hit[-1] + 1
    raise ValueError(
        f"Prompt {text!r:.200}: the tokens of {text[slice(*span)]!r:.60} were not found in the text stream. Expected "
        f"plain text, without weights such as (word:1.2) or embeddings, and the word within the {len(stream)} tokens "
        "of the stream."
    )


def _stream(clip: Any, rows: dict[str, list]) -> str:
    """The name of T5's tokens among the tokens of all the CLIP's encoders."""
    found = _t5(rows)
    if found and BIG_CLIP in rows:
        raise ValueError(
            "The CLIP is SD3's, whose text stream has CLIP's tokens before T5's: words cannot be told in it. Leave "
            "clip empty. Then tokens go by their numbers."
        )
    if not found:
        have = ", ".join(rows) if isinstance(rows, dict) else type(rows).__name__
        raise ValueError(
            f"The CLIP has the text streams {have}, none of T5. Expected FLUX's text encoders: load them with "
            "DualCLIPLoader (clip_l and t5xxl, type flux), or connect SafeRoPE Tiny World."
        )
    return found[0]


def _t5(rows: Any) -> list[str]:
    return [key for key in rows if T5 in key and BYT5 not in key] if isinstance(rows, dict) else []


def _tokenizer(clip: Any, key: str) -> Any:
    """ComfyUI's SDTokenizer of a stream: an attribute of its name, with or without `clip_` before it."""
    return getattr(clip.tokenizer, key, None) or getattr(clip.tokenizer, f"clip_{key}")


def _piece(token: Any, tokenizer: Any) -> str:
    if not isinstance(token, int):
        return EMBEDDING
    if token == tokenizer.pad_token:
        return PADDING
    return END if token == tokenizer.end_token else tokenizer.inv_vocab[token]


def _trimmed(group: list[int], pieces: list[str]) -> tuple[int, int]:
    """The group's first token that holds a letter, digit or symbol, and one after its last such token."""
    speaking = [place for place in group if any(_speaks(character) for character in pieces[place])]
    return (speaking[0], speaking[-1] + 1) if speaking else (0, 0)


def _speaks(character: str) -> bool:
    """Letters, digits, and symbols such as emoji: all but punctuation, spaces and SentencePiece's mark."""
    return character != SPACE and unicodedata.category(character)[0] not in "PZC"
