"""DES (Ahn et al., NeurIPS 2025): the text encoders learn to read unsafe prompts as harmless ones.

With E the encoder that learns, E0 the frozen one, embeddings flattened, and d the unit vector along E0(concept):

    safe       λ [1 - cos(E(s), E0(s)) + 1 - cos(E(s) + k d, E0(s))]
    unsafe     (1 - λ) [1 - cos(E(u), E0(far(u)) - k d)]        far(u): the safe prompt least like u
    concept    (1 - λ) [1 - cos(E(concept), E0(∅))]

λ = 0.3. E is the part that FLUX reads: all of T5's states, and CLIP's pooled vector. The paper's k = 200 belongs to
CLIP's 77 states, whose flat embedding is about as long. Here k is a share of the mean length of E0(s), so that it means
the same for any encoder. The paper trains with AdamW 1e-5 for two epochs of 6,911 pairs. The tiny encoders (two layers
of 64) take a larger rate, fewer steps and the task's own prompts. Synonyms that are not in these prompts are erased far
less. The strength is the weight of the learned change of the encoders' parameters, 1 being all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from saferope_training.flux.models import Model, Text, edited, embed, load_encoders

from .task import Progress, Task, silent

STRENGTHS = (0.5, 0.75, 1.0, 1.25)
SAFE_WEIGHT = 0.3  # λ
SHARE = 0.8  # k over the mean length of a safe embedding
STEPS, BATCH, LEARNING_RATE = 200, 16, 1e-3
PARTS = ("clip", "t5")


def fit(model: Model, task: Task, seed: int, progress: Progress = silent) -> dict[str, Tensor]:
    """The learned change of every parameter of both encoders, fp32, as `clip.<name>` and `t5.<name>`."""
    state = {}
    for index, (part, encoder) in enumerate(zip(PARTS, load_encoders(model), strict=True)):
        before = {name: value.detach().clone() for name, value in encoder.named_parameters()}
        try:
            _learn(model, encoder, part, task, seed, lambda step, at=index * STEPS: progress(at + step, 2 * STEPS))
            moved = {name: (value.detach() - before[name]).float() for name, value in encoder.named_parameters()}
            state |= {f"{part}.{name}": value.cpu() for name, value in moved.items()}
        finally:
            encoder.requires_grad_(False)
            for name, value in encoder.named_parameters():
                value.data.copy_(before[name])
    return state


@contextmanager
def applied(model: Model, state: dict[str, Tensor], strength: float) -> Iterator[None]:
    """`encode` reads prompts with encoders moved by `strength` times their learned change; 0 changes nothing."""
    if not state or strength == 0:
        yield
        return

    def edit(texts: Sequence[str], _text: Text) -> Text:
        with _moved(model, state, strength):
            return Text(*(part.float() for part in embed(model, texts)))

    with edited(model, edit):
        yield


def des_losses(
    safe: Tensor, safe0: Tensor, unsafe: Tensor, far0: Tensor, word: Tensor, empty0: Tensor, kd: Tensor
) -> tuple[Tensor, ...]:
    """The three losses of flat embeddings [B, C] (0: frozen), `word` and `empty0` [1, C] and k d [C]."""
    kept = 2 - cosine_similarity(safe, safe0) - cosine_similarity(safe + kd, safe0)
    erased = 1 - cosine_similarity(unsafe, far0 - kd)
    named = 1 - cosine_similarity(word, empty0)
    return SAFE_WEIGHT * kept.mean(), (1 - SAFE_WEIGHT) * erased.mean(), (1 - SAFE_WEIGHT) * named.mean()


def _learn(model: Model, encoder: nn.Module, part: str, task: Task, seed: int, progress: Progress) -> None:
    safe, unsafe = ([record.text for record in side] for side in (task.benign, task.unsafe))
    ids = {name: _ids(model, part, texts) for name, texts in (("safe", safe), ("unsafe", unsafe))}
    ids |= {"word": _ids(model, part, [task.concept]), "empty": _ids(model, part, [""])}
    with torch.no_grad():
        frozen = {name: _flat(encoder, part, some) for name, some in ids.items()}
    unit = nn.functional.normalize(frozen["word"][0], dim=0)
    kd = SHARE * frozen["safe"].norm(dim=1).mean() * unit
    far = _likeness(frozen["unsafe"], frozen["safe"]).argmin(1)
    encoder.requires_grad_()
    optimiser = torch.optim.AdamW(encoder.parameters(), LEARNING_RATE)
    draw = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        s, u = (torch.randint(len(texts), (BATCH,), generator=draw) for texts in (safe, unsafe))
        flat = _flat(encoder, part, torch.cat([ids["safe"][s], ids["unsafe"][u], ids["word"]]))
        own, theirs, word = flat.split([BATCH, BATCH, 1])
        loss = sum(des_losses(own, frozen["safe"][s], theirs, frozen["safe"][far[u]], word, frozen["empty"], kd))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        progress(step + 1)


def _likeness(a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.normalize(a, dim=1) @ nn.functional.normalize(b, dim=1).T


def _ids(model: Model, part: str, texts: Sequence[str]) -> Tensor:
    pipe = model.pipe
    tokenizer, length = (
        (pipe.tokenizer, pipe.tokenizer_max_length) if part == "clip" else (pipe.tokenizer_2, model.text_length)
    )
    batch = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return batch.input_ids.to(model.device)


def _flat(encoder: nn.Module, part: str, ids: Tensor) -> Tensor:
    """The part of an encoder's output that FLUX reads, flat, [B, C]."""
    output = encoder(ids)
    return (output.pooler_output if part == "clip" else output[0]).flatten(1).float()


@contextmanager
def _moved(model: Model, state: dict[str, Tensor], strength: float) -> Iterator[None]:
    kept = []
    try:
        for part, encoder in zip(PARTS, load_encoders(model), strict=True):
            for name, value in encoder.named_parameters():
                kept.append((value, value.data))
                value.data = value.data + strength * state[f"{part}.{name}"].to(value)
        yield
    finally:
        for value, data in kept:
            value.data = data
