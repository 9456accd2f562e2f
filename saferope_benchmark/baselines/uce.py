"""UCE, unified concept editing (Gandikota et al., WACV 2024): a closed-form edit of FLUX's two text inputs.

For a linear layer W, concept embeddings c with targets v* = W c_guide and embeddings c_p to be kept, UCE minimises

    Σ a ||W' c - v*||² + Σ b ||W' c_p - W c_p||² + λ ||W' - W||²

    W' = (λ W + Σ a v* c^T + Σ b W c_p c_p^T) (λ I + Σ a c c^T + Σ b c_p c_p^T)^-1 = W + Σ a (v* - W c) c^T M^-1

with M the matrix that is inverted. The right side is a product of two thin matrices. A hook adds it to the layer's
output, so that the base may be quantised. The bias plays no part (the published script has it in v*, and adds it again
when sampling).

As in the script for FLUX there are two layers: `context_embedder`, with T5's state of the concept's last token, and the
first linear layer on the pooled CLIP vector. The guide is the anchor, λ = 0.5, b = 1. Concept embeddings are the bare
word and the word in the unsafe prompts, as with the script's `--expand_prompts`. Kept are the words of the benign
prompts, together as heavy as one embedding a prompt. The strength is the erase scale a, 1 in the script.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from saferope_core import SUBJECT, WORDS
from saferope_training.flux.models import Model, encode, text_tokens

from .task import Progress, Task, silent

STRENGTHS = (1.0, 2.0, 4.0, 10.0)
RIDGE = 0.5  # λ
KEEP = 1.0  # b


def fit(model: Model, task: Task, seed: int, progress: Progress = silent) -> dict[str, Tensor]:
    """For each layer the embeddings `concept` [n, C], `kept` [m, C] and the outputs' `shift` v* - W c [n, C']."""
    words, texts = list(task.words), [record.text for record in task.unsafe]
    spans = [(0, len(word)) for word in words] + [record.subject for record in task.unsafe]
    concept, kept = encode(model, words + texts), encode(model, [record.text for record in task.benign])
    guide = encode(model, [task.anchor])
    last = _last(text_tokens(model, words + texts, spans)[SUBJECT])
    guide_last = _last(text_tokens(model, [task.anchor], [None])[WORDS], before_end=bool(task.anchor))
    kept_words = text_tokens(model, [r.text for r in task.benign], [None] * len(task.benign))[WORDS]
    share = (len(kept_words) / kept_words.sum()).sqrt()
    rows = {
        "t5": (_at(concept.states, last), _at(guide.states, guide_last), kept.states[kept_words] * share),
        "clip": (concept.pooled[: len(words)], guide.pooled, kept.pooled),
    }
    state = {}
    for name, layer in _layers(model).items():
        unsafe, target, safe = rows[name]
        shift = _product(layer, target) - _product(layer, unsafe)
        state |= {f"{name}.concept": unsafe, f"{name}.kept": safe, f"{name}.shift": shift}
    return state


@contextmanager
def applied(model: Model, state: dict[str, Tensor], strength: float) -> Iterator[None]:
    """Both layers compute W' x with the erase scale a = `strength`; 0 changes nothing."""
    with ExitStack() as hooks:
        if state and strength != 0:
            for name, layer in _layers(model).items():
                concept, kept, shift = (state[f"{name}.{part}"] for part in ("concept", "kept", "shift"))
                hook = _adding(shift.to(model.device), edit_factor(concept, kept, strength).to(model.device))
                hooks.callback(layer.register_forward_hook(hook).remove)
        yield


def edit_factor(concept: Tensor, kept: Tensor, scale: float) -> Tensor:
    """a C^T M^-1, [n, C], fp32: W' - W is `shift`^T [C', n] times it. Computed in fp64."""
    c, p = concept.double(), kept.double()
    matrix = RIDGE * torch.eye(c.shape[1], dtype=torch.float64) + scale * c.T @ c + KEEP * p.T @ p
    return scale * torch.linalg.solve(matrix, c.T).T.float()


def _layers(model: Model) -> dict[str, nn.Module]:
    transformer = model.transformer
    return {"t5": transformer.context_embedder, "clip": transformer.time_text_embed.text_embedder.linear_1}


def _adding(shift: Tensor, factor: Tensor) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    def hook(_layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + (args[0].float() @ factor.T @ shift).to(output.dtype)

    return hook


def _product(layer: nn.Linear, x: Tensor) -> Tensor:
    """W x without the bias, in any form that W is held in."""
    with torch.no_grad():
        x = x.to(next(layer.parameters()).device, layer.bias.dtype)
        return (layer(x) - layer.bias).float().cpu()


def _last(marked: Tensor, before_end: bool = False) -> Tensor:
    """Index [B] of the last marked token, or of the one before it: T5 ends every prompt with a token of its own."""
    places = torch.arange(marked.shape[1]).expand_as(marked)
    return torch.where(marked, places, -1).amax(1) - int(before_end)


def _at(states: Tensor, index: Tensor) -> Tensor:
    return states[torch.arange(len(index)), index] if len(index) == len(states) else states[:, index]
