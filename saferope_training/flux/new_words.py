"""Words that no tokenizer knows: vectors in the place of word embeddings, found by gradient and used like any word.

As in textual inversion (Gal et al., 2023), a new word is one token of both tokenizers. It has a vector for each of the
two text encoders, which read it in the place of a word embedding.

Axes: n words, C width of T5, C' width of CLIP.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken
from torch import Tensor, nn

from ..stages import save_tensors
from .models import Model, load_encoders

_PREFIX = "saferope"  # before the digits that name a word
_DIGITS = 12  # of its vectors' sha256: two words of a million agree with a chance of 1 in 500


@dataclass(frozen=True)
class NewWords:
    """Vectors of n words: `t5` [n, C] and `clip` [n, C'], fp32."""

    t5: Tensor
    clip: Tensor

    @property
    def names(self) -> list[str]:
        """The words' names in prompts: digests of their vectors, so that a name always means the same word."""
        pairs = zip(self.t5.detach().cpu(), self.clip.detach().cpu(), strict=True)
        digests = (hashlib.sha256(a.numpy().tobytes() + b.numpy().tobytes()).hexdigest() for a, b in pairs)
        return [f"{_PREFIX}{digest[:_DIGITS]}" for digest in digests]

    def __add__(self, other: NewWords) -> NewWords:
        return NewWords(torch.cat([self.t5, other.t5]), torch.cat([self.clip, other.clip]))


def save_words(path: Path, words: NewWords) -> None:
    """Writes safetensors."""
    save_tensors(path, {"t5": words.t5, "clip": words.clip})


def load_words(path: Path) -> NewWords:
    """Reads a file of `save_words`."""
    return NewWords(**load_file(path))


def random_words(model: Model, count: int, generator: torch.Generator) -> NewWords:
    """Normal random words, with the mean and standard deviation of each encoder's embeddings."""
    clip, t5 = (_embeddings(encoder)[0].weight.float() for encoder in load_encoders(model))

    def drawn(weight: Tensor) -> Tensor:
        noise = torch.randn(count, weight.shape[1], generator=generator)
        return weight.mean(0).cpu() + weight.std(0).cpu() * noise

    return NewWords(drawn(t5), drawn(clip))


@contextmanager
def spoken(model: Model, words: NewWords, names: list[str] | None = None) -> Iterator[None]:
    """While the context is open, the model's tokenizers and encoders know the words by their names, or by `names`.

    Gradients pass to the words' vectors. The model's own tokenizers come back at the end.
    """
    pipe, names = model.pipe, names or words.names
    own = pipe.tokenizer, pipe.tokenizer_2
    encoders = load_encoders(model)
    with ExitStack() as stack:
        stack.callback(_restore, pipe, own)
        for attribute, encoder, vectors in zip(
            ("tokenizer", "tokenizer_2"), encoders, (words.clip, words.t5), strict=True
        ):
            tokenizer = copy.deepcopy(getattr(pipe, attribute))
            first = len(tokenizer)
            added = tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
            assert added == len(names), "no tokenizer knows a name of ours"
            setattr(pipe, attribute, tokenizer)
            for embedding in _embeddings(encoder):
                _read(stack, embedding, first, vectors)
        yield


def _restore(pipe: Any, tokenizers: tuple[Any, Any]) -> None:
    pipe.tokenizer, pipe.tokenizer_2 = tokenizers


def _embeddings(encoder: nn.Module) -> list[nn.Embedding]:
    """The modules that look words up. T5 has two, which share one matrix."""
    weight = encoder.get_input_embeddings().weight  # type: ignore[operator]  # transformers adds it to Module
    return [each for each in encoder.modules() if isinstance(each, nn.Embedding) and each.weight is weight]


def _read(stack: ExitStack, embedding: nn.Embedding, first: int, vectors: Tensor) -> None:
    """Lets the module look tokens first, first + 1, ... up in `vectors`."""
    asked: list[Tensor] = []

    def ours(ids: Tensor) -> Tensor:
        return (ids >= first) & (ids < first + len(vectors))

    def before(module: nn.Module, args: tuple) -> tuple:
        asked.append(args[0])
        return (args[0].masked_fill(ours(args[0]), 0), *args[1:])

    def after(module: nn.Module, args: tuple, found: Tensor) -> Tensor:
        ids = asked.pop()
        place = (ids - first).clamp(0, len(vectors) - 1)
        return torch.where(ours(ids)[..., None], vectors.to(found)[place], found)

    for handle in (embedding.register_forward_pre_hook(before), embedding.register_forward_hook(after)):
        stack.callback(handle.remove)
