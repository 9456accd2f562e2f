"""EraseAnything (Gao et al., ICML 2025): a LoRA that alternates between erasing and keeping.

Even steps erase: ESD's loss with η = 1, plus 0.001 Σ ||A_c||, the attention that image tokens pay the concept's tokens
in the last double block. Odd steps keep: 0.1 times flow matching on pictures, plus 0.1 times a reverse InfoNCE (τ =
0.07)

    - log [ Σ_k exp(F·F_k / τ) / (Σ_k exp(F·F_k / τ) + exp(F·F_syn / τ)) ]

of unit attention maps F: the concept's map is drawn to the maps of K = 3 irrelevant things and away from a synonym's.
The authors ask a language model for irrelevant things and WordNet for the synonym. Here the irrelevant things are words
of benign prompts, and the synonym is the concept itself as the frozen model sees it. The pictures are the frozen
model's own of benign prompts, so that no data is needed. The published code's teacher carries the adapter that learns;
this one is frozen.

LoRA of rank 8 on the queries and keys of the text in double blocks; 200 steps of one prompt, AdamW, lr 1e-3 (here 60 of
several). FLUX has 19 double blocks of 57, the tiny model two. There single blocks do most of the reading, and their
queries and keys learn as well. The strength is the weight of the LoRA, 1 being the weight that was learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saferope_core import SUBJECT, WORDS
from saferope_training.flux.attach import Span, attached, positioned
from saferope_training.flux.models import Model, Text, encode, text_tokens
from saferope_training.making.losses import flow_matching_loss, mean_squared_error

from . import lora
from .task import Progress, Task, silent
from .teacher import Lessons, erasing_lessons, live_velocity, trajectories

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
TARGETS = r"transformer_blocks\.\d+\.attn\.(add_q_proj|add_k_proj)"
TINY_TARGETS = TARGETS + r"|single_transformer_blocks\.\d+\.attn\.(to_q|to_k)"
FEW_DOUBLE_BLOCKS = 4  # a model with at most this many learns in its single blocks too
RANK = 8
ETA, GUIDANCE = 1.0, 3.5
ATTENTION_WEIGHT, FLOW_WEIGHT, CONTRAST_WEIGHT = 0.001, 0.1, 0.1
TEMPERATURE, IRRELEVANT = 0.07, 3
PROMPTS = 8
STEPS, BATCH, LEARNING_RATE = 60, 8, 1e-3


def targets_of(model: Model) -> str:
    """The layers that learn."""
    return TINY_TARGETS if model.geometry.double_blocks <= FEW_DOUBLE_BLOCKS else TARGETS


def fit(model: Model, task: Task, seed: int, progress: Progress = silent) -> dict[str, Tensor]:
    """The LoRA's weights, named as in LoRA files."""
    sides = [list(side[:PROMPTS]) for side in (task.unsafe, task.benign)]
    texts = [[record.text for record in side] for side in sides]
    unsafe, benign = (encode(model, side) for side in texts)
    subject = text_tokens(model, texts[0], [record.subject for record in sides[0]])[SUBJECT]
    words = text_tokens(model, texts[1], [None] * len(texts[1]))[WORDS]
    lessons = erasing_lessons(model, texts[0], seed, ETA, GUIDANCE)
    pictures = trajectories(model, benign, [seed + place for place in range(len(texts[1]))])[2]
    draw = torch.Generator().manual_seed(seed)
    with lora.added(model.transformer, targets_of(model), RANK, seed) as weights:
        optimiser = torch.optim.AdamW(weights.values(), LEARNING_RATE, weight_decay=0.0)
        for step in range(STEPS):
            optimiser.zero_grad()
            if step % 2 == 0:
                loss = _erase(model, unsafe, subject, lessons, draw)
            else:
                loss = _keep(model, benign, pictures, draw) + _contrast(
                    model, unsafe, subject, benign, words, lessons, draw
                )
            loss.backward()
            optimiser.step()
            progress(step + 1, STEPS)
        return lora.state_of(weights)


@contextmanager
def applied(model: Model, state: dict[str, Tensor], strength: float) -> Iterator[None]:
    """The transformer carries the LoRA, times `strength`; 0 changes nothing."""
    with lora.applied(model.transformer, state, targets_of(model), strength):
        yield


def _erase(model: Model, unsafe: Text, subject: Tensor, lessons: Lessons, draw: torch.Generator) -> Tensor:
    """ESD's loss and the attention on the concept's tokens."""
    some = torch.randint(len(lessons.latents), (BATCH,), generator=draw)
    asked, prompts = _asked(unsafe, lessons, some), lessons.prompts[some]
    learned, maps = _with_maps(model, asked, subject[prompts])
    error = mean_squared_error(learned, lessons.targets[some].to(learned)).mean()
    return error + ATTENTION_WEIGHT * maps.norm(dim=1).sum()


def _keep(model: Model, benign: Text, pictures: Tensor, draw: torch.Generator) -> Tensor:
    """Flow matching on benign pictures at uniform times."""
    some = torch.randint(len(pictures), (BATCH // 2,), generator=draw)
    clean, t = pictures[some], torch.rand(BATCH // 2, generator=draw)
    noise, at = torch.randn(clean.shape, generator=draw), t[:, None, None]
    learned = live_velocity(model, (1 - at) * clean + at * noise, t, benign.pick(some), GUIDANCE)
    return FLOW_WEIGHT * flow_matching_loss(learned, clean.to(learned), noise.to(learned)).mean()


def _contrast(
    model: Model, unsafe: Text, subject: Tensor, benign: Text, words: Tensor, lessons: Lessons, draw: torch.Generator
) -> Tensor:
    """Reverse InfoNCE at one state of one unsafe prompt, against a word of each of K benign prompts."""
    one = torch.randint(len(lessons.latents), (1,), generator=draw)
    asked, marked = _asked(unsafe, lessons, one), subject[lessons.prompts[one]]
    others = torch.randperm(len(words), generator=draw)[:IRRELEVANT]
    chosen = torch.multinomial(words[others].float(), 1, generator=draw)
    irrelevant = torch.zeros_like(words[others]).scatter_(1, chosen, True)
    latents, times = (part.repeat_interleave(IRRELEVANT, 0) for part in asked[:2])
    with torch.no_grad():
        negatives = _with_maps(model, (latents, times, benign.pick(others)), irrelevant)[1]
        with without_adapter(model):
            synonym = _with_maps(model, asked, marked)[1]
    concept = _with_maps(model, asked, marked)[1]
    return CONTRAST_WEIGHT * reverse_info_nce(concept[0], synonym[0], negatives)


@contextmanager
def without_adapter(model: Model) -> Iterator[None]:
    """The frozen model, while the context is open."""
    model.transformer.disable_adapters()
    try:
        yield
    finally:
        model.transformer.enable_adapters()


def reverse_info_nce(concept: Tensor, synonym: Tensor, irrelevant: Tensor) -> Tensor:
    """The contrast of attention maps [L], [L] and [K, L]: 0 where the concept's is nothing like the synonym's."""
    concept, synonym, irrelevant = (normalize(part, dim=-1) for part in (concept, synonym, irrelevant))
    wanted, unwanted = irrelevant @ concept / TEMPERATURE, (synonym @ concept / TEMPERATURE)[None]
    return torch.cat([wanted, unwanted]).logsumexp(0) - wanted.logsumexp(0)


def _asked(text: Text, lessons: Lessons, some: Tensor) -> tuple[Tensor, Tensor, Text]:
    return lessons.latents[some], lessons.times[some], text.pick(lessons.prompts[some])


def _with_maps(model: Model, asked: tuple[Tensor, Tensor, Text], marked: Tensor) -> tuple[Tensor, Tensor]:
    """The velocity, and the attention [B, image tokens] of the last double block on marked text tokens,
    heads averaged."""
    last, met = model.geometry.double_blocks - 1, {}

    def note(x: Tensor, role: str, block_type: str, block_index: int, text: Span, image: Span) -> None:
        if (block_type, block_index) == ("double", last):
            met[role, "text" if text[1] else "image"] = x

    with attached(model.transformer, note):
        velocity = live_velocity(model, *asked, GUIDANCE)
    length = marked.shape[1]
    turn = positioned(None, model.transformer.pos_embed(model.image_ids))
    query, key = (torch.cat([met[role, "text"], met[role, "image"]], 2).float() for role in "qk")
    query, key = (turn(x, (0, length), (length, x.shape[2])) for x in (query, key))
    scores = query[:, :, length:] @ key.mT / query.shape[-1] ** 0.5
    attention = scores.softmax(-1)[..., :length].mean(1)
    return velocity, (attention * marked[:, None].to(attention)).sum(-1)
