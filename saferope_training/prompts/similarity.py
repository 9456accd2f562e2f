"""Keeps subjects close in meaning to the concept's seed words, by sentence embeddings (the paper's filter)."""

from __future__ import annotations

from collections.abc import Sequence

from ..flux.quantise import require_library

MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # 23 M parameters; runs on a CPU


def similarities(subjects: Sequence[str], seeds: Sequence[str], model: str = MODEL) -> list[float]:
    """For every subject its largest cosine similarity, in [-1, 1], to one of the seeds.

    `model` is a sentence-transformers folder or hub id. OSError or ValueError where there is none. Where the
    library is missing, a ValueError says which to install.
    """
    require_library("sentence-transformers", "subject filter")
    from sentence_transformers import SentenceTransformer

    safe = {"use_safetensors": True}  # its own modules' weights are read as tensors alone in any format
    encoder = SentenceTransformer(model, device="cpu", trust_remote_code=False, model_kwargs=safe)
    subject, seed = (
        encoder.encode(list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
        for texts in (subjects, seeds)
    )
    return (subject @ seed.T).max(1).values.tolist()


def filtered(subjects: Sequence[str], seeds: Sequence[str], least: float, model: str = MODEL) -> list[str]:
    """The subjects with a similarity of at least `least`, in order. ValueError where none is left."""
    scores = similarities(subjects, seeds, model)
    kept = [subject for subject, score in zip(subjects, scores, strict=True) if score >= least]
    if not kept:
        raise ValueError(f"subject filter: no subject reaches {least:g}, the best {max(scores):.2f}; lower it")
    return kept
