"""Checks before the model runs: names, ranks, and whether the prompts give enough vectors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from saferope_core import (
    BENIGN,
    FLUX1,
    UNSAFE,
    require_known,
    require_names,
    require_vectors,
    require_widths,
    unknown_parts,
    unknown_words,
)

from .. import processes
from ..flux import loading
from ..flux.models import Model, text_tokens
from ..flux.pipelines import tokenizer_of
from ..flux.quantise import require_library, require_usable
from ..prompts import PromptRecord, side
from ..settings import Settings
from .heads import for_family, ranks_of

_SHOWN = 5  # words in a warning


def require_settings(settings: Settings, device: str) -> None:
    """Raises ValueError where these settings could make no concept on this machine. Loads and fetches nothing; OSError
    where a file cannot be read.
    """
    require_model(settings, device)
    require_names(settings.concept, settings.concept.capitalize(), settings.concept)
    require_widths(ranks_of(settings), FLUX1.head_dim)
    if settings.similarity_model is not None:
        require_library("sentence-transformers", "subject filter")


def require_model(settings: Settings, device: str) -> None:
    """Requires the device, the model and the libraries of its form; errors as in `require_settings`."""
    processes.require_device(device)
    if settings.quantise is not None:
        require_usable(settings.quantise, device)
    if settings.model.endswith(".gguf"):
        require_library("gguf", f"model {settings.model!r}")
    if loading.is_here(settings.model):
        loading.config_of(settings.model, settings.encoders)


def require(model: Model, records: Sequence[PromptRecord], settings: Settings) -> None:
    """Raises ValueError where extraction or a later stage would end in an error or make a concept of no word.

    Warns of words beside the concept's that the text encoder does not know. Encodes nothing.
    """
    require_names(settings.concept, settings.concept.capitalize(), settings.concept)
    counts: dict[tuple[str, str], int] = {}
    for name in (UNSAFE, BENIGN):
        chosen = side(records, name)
        if not chosen:
            raise ValueError(f"prompts: got no {name} one, expected at least one; add some, or delete prompts.jsonl")
        kinds = text_tokens(model, [record.text for record in chosen], [record.subject for record in chosen])
        counts |= {(name, kind): int(mask.sum()) for kind, mask in kinds.items()}
    ranks = ranks_of(for_family(settings, model.geometry.family))
    require_vectors(counts, len(settings.timesteps), ranks, model.geometry.head_dim)
    _require_words(model, records)


def _require_words(model: Model, records: Sequence[PromptRecord]) -> None:
    """Raises ValueError where the text encoder does not know a word of the concept; warns of other unknown words."""
    tokenizer = tokenizer_of(model.pipe)
    batch = tokenizer(
        [record.text for record in records], max_length=model.text_length, truncation=True, return_offsets_mapping=True
    )
    found: list[str] = []
    for record, ids, offsets in zip(records, batch["input_ids"], batch["offset_mapping"], strict=True):
        parts = unknown_parts(ids, offsets, tokenizer.unk_token_id)
        if record.subject is not None:
            require_known(record.text, record.subject, parts)
        found += unknown_words(record.text, parts)
    words = list(dict.fromkeys(found))
    if words and processes.is_main():
        shown = ", ".join(f"{word!r:.60}" for word in words[:_SHOWN]) + (", ..." if len(words) > _SHOWN else "")
        warnings.warn(
            f"prompts: the text encoder does not know {len(words)} of their words, and takes them all for the same "
            f"one: {shown}; the prompts say less to the model than to you",
            stacklevel=3,
        )
