"""SAFREE (Yoon et al., ICLR 2025): tokens that carry the concept are projected out of its subspace, in T5's states.

    P_C = projection on the span of pooled embeddings of the concept's words
    p_i = pooled embedding of the prompt without token i      d_i = ||(I - P_C) p_i||
    token i is a trigger if d_i > (1 + α) mean over j ≠ i of d_j, α = 0.01; then e_i <- (I - P_C) P_I e_i

with P_I the projection on the span of all p_i. Nothing is learned, and nothing is added to sampling. As in the authors'
port to SD3, the edit holds for all steps and CLIP's pooled vector stays. They have no port to FLUX. Here "pooled" is
the mean over the prompt's tokens. Their port to SD3 takes the first token's state, which in a small T5 says nothing of
the other tokens. A token is taken out by padding in its place, which FLUX's T5 sees as it sees all padding. The paper's
own strength would be α. Here the strength is the share of the way that a trigger token goes, 1 being the paper's.

In the tiny world it cannot do much: T5's other tokens take the concept up. With the states of the concept's own tokens
set to zero the model still draws 7 of 8 stars.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from saferope_training.flux.models import Model, Text, edited, encode, load_encoders

from .task import Progress, Task, silent

STRENGTHS = (0.5, 1.0, 1.5, 2.0)
MARGIN = 0.01  # α
_BATCH = 64


def fit(model: Model, task: Task, seed: int, progress: Progress = silent) -> dict[str, Tensor]:
    """An orthonormal `basis` [C, r] of the concept's words' pooled embeddings."""
    words = list(task.words)
    states, used = encode(model, words).states, _tokens(model, words)[1]
    return {"basis": span_of(pooled(states, used))}


@contextmanager
def applied(model: Model, state: dict[str, Tensor], strength: float) -> Iterator[None]:
    """`encode` gives trigger tokens moved by `strength` of the way to their projection; 0 changes nothing."""
    if not state or strength == 0:
        yield
        return

    def edit(texts: Sequence[str], text: Text) -> Text:
        rows = [_projected(model, *pair, state["basis"], strength) for pair in zip(texts, text.states, strict=True)]
        return Text(torch.stack(rows), text.pooled)

    with edited(model, edit):
        yield


def _projected(model: Model, text: str, states: Tensor, basis: Tensor, strength: float) -> Tensor:
    """One prompt's states [L, C] with its trigger tokens moved."""
    without = _without_each(model, text)
    if len(without) < 2:
        return states
    trigger = triggers(without, basis)
    moved = projected(states[: len(without)], without, basis)
    changed = states.clone()
    changed[: len(without)][trigger] += strength * (moved - states[: len(without)])[trigger]
    return changed


def triggers(without: Tensor, basis: Tensor) -> Tensor:
    """Bool [n]: tokens without which the prompt, `without` [n, C], lies further from the concept than on average."""
    distance = outside(without, basis).norm(dim=-1)
    others = (distance.sum() - distance) / (len(distance) - 1)
    return distance > (1 + MARGIN) * others


def projected(tokens: Tensor, without: Tensor, basis: Tensor) -> Tensor:
    """(I - P_C) P_I e for each of the tokens e [n, C]."""
    prompt = span_of(without)
    return outside(tokens @ prompt @ prompt.T, basis)


def outside(x: Tensor, basis: Tensor) -> Tensor:
    """(I - P_C) x for rows x [..., C] and an orthonormal basis [C, r]."""
    return x - x @ basis @ basis.T


def span_of(rows: Tensor) -> Tensor:
    """Orthonormal basis [C, r] of the span of rows [n, C]; directions below fp32's accuracy are left out.

    Contiguous, as it comes from a file: by another layout products round otherwise.
    """
    _, values, vectors = torch.linalg.svd(rows.double(), full_matrices=False)
    kept = values > values[0] * max(rows.shape) * torch.finfo(torch.float32).eps
    return vectors[kept].T.float().contiguous()


def pooled(states: Tensor, used: Tensor) -> Tensor:
    """Mean [B, C] over the used tokens of states [B, L, C]."""
    return (states * used[..., None]).sum(1) / used.sum(1, keepdim=True)


@torch.no_grad()
def _without_each(model: Model, text: str) -> Tensor:
    """Pooled embeddings [n, C] of the prompt with each of its n tokens replaced by padding."""
    t5 = load_encoders(model)[1]
    ids, used = _tokens(model, [text])
    count = int(used.sum())
    ids, used = ids.repeat(count, 1), used.repeat(count, 1)
    ids.fill_diagonal_(model.pipe.tokenizer_2.pad_token_id)
    used.fill_diagonal_(False)
    states = torch.cat([t5(part.to(model.device))[0].float().cpu() for part in ids.split(_BATCH)])
    return pooled(states, used)


def _tokens(model: Model, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """T5's ids [B, L] and which of them are words, bool [B, L]: neither padding nor T5's own last token."""
    batch = model.pipe.tokenizer_2(
        list(texts), padding="max_length", max_length=model.text_length, truncation=True, return_tensors="pt"
    )
    return batch.input_ids, batch.attention_mask.bool() & (batch.input_ids != model.pipe.tokenizer_2.eos_token_id)
