"""OCE, orthogonal concept erasure (Sun et al., ICML 2026, arXiv 2605.28902): a rotation of FLUX's text input layer.

The layer's weight W becomes Q W with Q a rotation, so that the lengths of its outputs and the angles between them stay:

    Q = argmax tr(Q^T M) = U V^T of M = U S V^T        M = 0.5 W K W^T + 1.5 W W^T - a R (I - R*)

R projects onto the concept's outputs W c, and R* onto the outputs of its stand-in. K is E[c c^T] of the kept tokens.
The first terms are orthogonal Procrustes: ||Q W c - W c||² of kept tokens. The last term turns away from the concept
all that the stand-in does not share. Layer, weights, T5's state of the concept's last token: as in the authors' script
for FLUX, with a = 1. Where U V^T mirrors, the direction that matters least is turned round.

Here the kept tokens are the words of the benign prompts instead of COCO's. The kept terms are divided by their largest
eigenvalue, so that the strength a means the same in any model. R has as many dimensions as the concept has words: the
leading ones of the words alone and in the unsafe prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from saferope_core import SUBJECT, WORDS
from saferope_training.flux.models import Model, encode, text_tokens

from .task import Progress, Task, silent
from .uce import _at, _last, _product

STRENGTHS = (0.1, 0.3, 1.0, 3.0)
TOKENS, WEIGHTS = 0.5, 1.5  # of the kept terms


def fit(model: Model, task: Task, seed: int, progress: Progress = silent) -> dict[str, Tensor]:
    """`concept` [D, n] and `anchor` [D, 1], orthonormal, and `kept` [D, D], its largest eigenvalue 1."""
    layer, words = model.transformer.context_embedder, list(task.words)
    texts = words + [record.text for record in task.unsafe]
    spans = [(0, len(word)) for word in words] + [record.subject for record in task.unsafe]
    last = _last(text_tokens(model, texts, spans)[SUBJECT])
    guide = _last(text_tokens(model, [task.anchor], [None])[WORDS], before_end=bool(task.anchor))
    benign = [record.text for record in task.benign]
    kept = encode(model, benign).states[text_tokens(model, benign, [None] * len(benign))[WORDS]]
    concept = _product(layer, _at(encode(model, texts).states, last))
    anchor = _product(layer, _at(encode(model, [task.anchor]).states, guide))
    outputs = _product(layer, kept).double()
    weight = _product(layer, torch.eye(kept.shape[-1])).double()  # W^T, in any form that W is held in
    gram = TOKENS * outputs.T @ outputs / len(outputs) + WEIGHTS * weight.T @ weight
    return {
        "concept": torch.linalg.svd(concept.T, full_matrices=False).U[:, : len(words)].contiguous(),
        "anchor": torch.linalg.svd(anchor.T, full_matrices=False).U.contiguous(),
        "kept": (gram / torch.linalg.eigvalsh(gram)[-1]).float(),
    }


@contextmanager
def applied(model: Model, state: dict[str, Tensor], strength: float) -> Iterator[None]:
    """The layer computes Q W x with a = `strength`; 0 changes nothing."""
    if not state or strength == 0:
        yield
        return
    layer = model.transformer.context_embedder
    turn = rotation(state["kept"], state["concept"], state["anchor"], strength).to(model.device)

    def hook(layer: nn.Linear, _args: tuple, output: Tensor) -> Tensor:
        bias = layer.bias.to(output)
        return ((output - bias).float() @ turn.T).to(output.dtype) + bias

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def rotation(kept: Tensor, concept: Tensor, anchor: Tensor, scale: float) -> Tensor:
    """Q [D, D], of determinant 1, of symmetric `kept` [D, D], orthonormal `concept` [D, n] and `anchor` [D, m]."""
    keep, erase, stay = kept.double(), concept.double(), anchor.double()
    unshared = erase.T - erase.T @ stay @ stay.T
    u, _, vt = torch.linalg.svd(keep - scale * erase @ unshared)
    u[:, -1] *= torch.linalg.det(u @ vt).sign()
    return (u @ vt).float()
