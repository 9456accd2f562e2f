"""Pre-trains the tiny world's text encoders on captions alone. From then on they are frozen, as FLUX's are.

T5 learns to fill in masked words of captions (and to keep the others), CLIP's pooled vector to tell which words a
caption has.
"""

import random
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from .model import MASK, TEXT_LENGTH, TEXT_WIDTH, make_text_encoders, make_tokenizer
from .world import training_captions

MASK_SHARE = 0.3
STEPS, BATCH, LEARNING_RATE = 1200, 128, 2e-3
CAPTIONS = 20_000

Progress = Callable[[float], None]  # is told the loss of each step


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Token ids [n, TEXT_LENGTH], padded as FLUX's pipelines pad."""
    return tokenizer(
        texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def _train(parameters: Iterable[nn.Parameter], loss_of: Callable[[Tensor], Tensor], progress: Progress) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS)
    for _ in range(STEPS):
        loss = loss_of(torch.randint(CAPTIONS, (BATCH,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(loss.item())


def _train_t5(t5: T5EncoderModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], progress: Progress) -> None:
    ids, mask = tokenize(tokenizer, texts), tokenizer.convert_tokens_to_ids(MASK)
    head = nn.Linear(TEXT_WIDTH, len(tokenizer))

    def loss_of(chosen: Tensor) -> Tensor:
        target = ids[chosen]
        masked = (torch.rand(target.shape) < MASK_SHARE) & (target != tokenizer.pad_token_id)
        logits = head(t5(target.masked_fill(masked, mask)).last_hidden_state)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    _train([*t5.parameters(), *head.parameters()], loss_of, progress)


def _train_clip(clip: CLIPTextModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], progress: Progress) -> None:
    ids = tokenize(tokenizer, texts)
    bags = F.one_hot(ids, len(tokenizer)).amax(1).float()
    head = nn.Linear(TEXT_WIDTH, len(tokenizer))

    def loss_of(chosen: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(head(clip(ids[chosen]).pooler_output), bags[chosen])

    _train([*clip.parameters(), *head.parameters()], loss_of, progress)


def train_text_encoders(seed: int, progress: Progress) -> tuple[CLIPTextModel, T5EncoderModel]:
    """CLIP and T5 encoders trained on captions; `progress(loss)` is called after each of 2 * STEPS steps."""
    torch.manual_seed(seed)
    clip, t5 = make_text_encoders()
    texts = [prompt.text for prompt in training_captions(CAPTIONS, seed)] + [""]
    random.Random(seed).shuffle(texts)
    _train_t5(t5.train(), make_tokenizer(clip=False), texts, progress)
    _train_clip(clip.train(), make_tokenizer(clip=True), texts, progress)
    return clip.eval().requires_grad_(False), t5.eval().requires_grad_(False)
