"""A FLUX pipeline as training sees it: encode prompts, find their tokens, ask for a velocity. Knows diffusers'
pipeline, not its attention.

Latents are packed, `[B, L, C]`, in model space; t runs from 1 (pure noise) to 0; velocity points from picture to noise.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saferope_core import Geometry, token_kinds
from saferope_core import seeded_noise as core_noise

from .attach import geometry_of
from .encoders import EmbeddingCache, EncoderSource, is_lent, lend, lends
from .identity import encoders_fingerprint
from .pipelines import asked, asked_of, tokens_of
from .tokens import grid

if TYPE_CHECKING:
    from diffusers import FluxPipeline

TINYWORLD = "tinyworld"
GUIDANCE = 3.5  # FLUX.1-dev's default
STEPS = 28  # diffusers' default for FLUX.1-dev
_ENCODE_BATCH = 64
ENCODE_TOKENS = 4096  # of text at once: T5-XXL makes MADE bytes for each, see `encoders`
X86 = ("x86_64", "amd64")  # as Linux and macOS, and Windows, name it


@dataclass(frozen=True)
class Model:
    """A frozen pipeline in eval mode. `latent_side`: height and width of the unpacked latents.

    `guidance` and `steps` set its sampling. `source` gives the text encoders where the pipeline has none yet,
    `cache` keeps their embeddings on disk. `edits` change the results of `encode`, see `edited`.
    """

    name: str
    pipe: FluxPipeline
    geometry: Geometry
    text_length: int
    latent_side: int
    guidance: float = GUIDANCE
    steps: int = STEPS
    source: EncoderSource | None = None
    cache: EmbeddingCache | None = None
    edits: list[Edit] = field(default_factory=list, compare=False)

    @property
    def transformer(self) -> Any:  # a FluxTransformer2DModel; diffusers is not typed
        return self.pipe.transformer

    @property
    def tiny(self) -> bool:
        """Whether its pictures are of the tiny world: the embedded model, or a folder of weights made from it."""
        from tinyworld.model import AutoencoderDCT

        return isinstance(self.pipe.vae, AutoencoderDCT)

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def channels(self) -> int:
        """Of its packed latents."""
        return asked(self).channels(self.transformer.config)

    @property
    def image_ids(self) -> Tensor:
        """RoPE positions [L, 3] of the image tokens: 0, row, column."""
        return grid(self, 3)


@dataclass(frozen=True)
class Text:
    """Encoded prompts: states [B, L, C], and `pooled`, FLUX.1's pooled CLIP vectors [B, C'] (others: see pipelines)."""

    states: Tensor
    pooled: Tensor

    def pick(self, index: Tensor | slice) -> Text:
        """Some of the prompts."""
        return Text(self.states[index], self.pooled[index])


Edit = Callable[[Sequence[str], Text], Text]


def from_pipeline(
    name: str,
    pipe: FluxPipeline,
    text_length: int,
    latent_side: int,
    guidance: float = GUIDANCE,
    steps: int = STEPS,
    source: EncoderSource | None = None,
) -> Model:
    """Freezes the pipeline and wraps it. Encoders that it lacks are loaded from `source` when needed."""
    geometry = geometry_of(pipe.transformer)
    for part in (pipe.transformer, *(getattr(pipe, name) for name in asked_of(geometry.family).encoders)):
        if part is not None:
            part.requires_grad_(False).eval()
    return Model(name, pipe, geometry, text_length, latent_side, guidance, steps, source)


@torch.no_grad()
def encode(model: Model, texts: Sequence[str]) -> Text:
    """The encoded prompts, in fp32 on the CPU. `velocity` moves its inputs to the device.

    A batch comes from the model's cache if all of it lies there; else the encoders embed all of it. So batches, and
    with them the last bits, are always the same. The encoders stay until `release_encoders`.
    """
    parts, size = [], max(1, min(_ENCODE_BATCH, ENCODE_TOKENS // model.text_length))
    for start in range(0, len(texts), size):
        chunk = list(texts[start : start + size])
        known = model.cache.read(chunk) if model.cache else None
        if known is None:
            known = embed(model, chunk)
            if model.cache:
                model.cache.write(chunk, *known)
        parts.append(known)
    text = Text(*(torch.cat(part).float() for part in zip(*parts, strict=True)))
    for edit in model.edits:
        text = edit(texts, text)
    return text


@contextmanager
def edited(model: Model, edit: Edit) -> Iterator[None]:
    """While the context is open, `encode` gives `edit(texts, text)`, where `text` has the encoders' own embeddings.

    The cache keeps the encoders' own embeddings, never edited ones. Contexts may be nested: the inner edit comes last.
    """
    model.edits.append(edit)
    try:
        yield
    finally:
        model.edits.remove(edit)


@torch.no_grad()
def embed(model: Model, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """States and pooled vectors as the encoders give them now, on the CPU: no cache, no edit.

    Encoders that have to be loaded stay in the machine's memory, and each of their layers moves to the device to
    compute. Whole, they would weigh more there than a quantised transformer.
    """
    if model.source is not None and lends(model.device) and any(each is None for each in _encoders(model)):
        _load_encoders(model)
        for encoder in _encoders(model):
            lend(encoder, model.device)
    elif not any(map(is_lent, _encoders(model))):
        load_encoders(model)
    states, pooled = asked(model).encode(model.pipe, list(texts), model.text_length, model.device)
    return states.cpu(), pooled.cpu()


def embed_with_gradients(model: Model, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """As `embed`, but on the model's device, with gradients for all tensors in the encoders that require them."""
    load_encoders(model)
    return asked(model).encode(model.pipe, list(texts), model.text_length, model.device)


def load_encoders(model: Model) -> tuple[nn.Module, ...]:
    """The text encoders, FLUX.1's CLIP and T5, whole on the model's device, loaded where they are missing or lent."""
    if any(each is None or is_lent(each) for each in _encoders(model)):
        _load_encoders(model)
    return tuple(each.to(model.device) for each in _encoders(model))


def _encoders(model: Model) -> tuple[Any, ...]:
    return tuple(getattr(model.pipe, name) for name in asked(model).encoders)


def _load_encoders(model: Model) -> None:
    assert model.source is not None, "a pipeline without text encoders has a source of them"
    for name, encoder in zip(asked(model).encoders, model.source.load(), strict=True):
        setattr(model.pipe, name, encoder)


def release_encoders(model: Model) -> None:
    """Takes the text encoders off the device: dropped where they can be loaded again, else moved to the CPU."""
    for name in asked(model).encoders:
        if model.source is not None:
            setattr(model.pipe, name, None)
        else:
            getattr(model.pipe, name).to("cpu")
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def with_cache(model: Model, folder: Path) -> Model:
    """The same model, keeping embeddings in `folder`."""
    return replace(model, cache=EmbeddingCache(folder, encoders_fingerprint(model), model.text_length))


def text_tokens(model: Model, texts: Sequence[str], subjects: Sequence[tuple[int, int] | None]) -> dict[str, Tensor]:
    """Bool [B, L] over the text's tokens for each kind: SUBJECT (tokens that touch the span's characters), other WORDS,
    and PADDING, which includes the end of a chat template.

    ValueError where a subject has no token: cut off, or empty.
    """
    row_of = asked(model)
    attended, places = tokens_of(model.pipe, row_of, texts, model.text_length)
    # without a template all tokens but padding belong to the prompt, the end token too
    plain = row_of.written(model.pipe, "a")[0] == "a"
    used = attended if plain else torch.tensor([[first < last for first, last in row] for row in places])
    subject = torch.zeros_like(used)
    for row, (text, span, offsets) in enumerate(zip(texts, subjects, places, strict=True)):
        if span is None:
            continue
        subject[row] = used[row] & torch.tensor([first < span[1] and span[0] < last for first, last in offsets])
        if not subject[row].any() or max(last for _, last in offsets) < span[1]:
            raise ValueError(
                f"prompt {text!r}: its subject {text[slice(*span)]!r}, characters {span}, is not whole within the "
                f"first {model.text_length} tokens; shorten the prompt or correct the span"
            )
    return token_kinds(used, subject, attended if row_of.masked and not plain else None)


def noise(model: Model, count: int, generator: torch.Generator) -> Tensor:
    """Packed standard normal latents [count, L, C], drawn on the CPU so that every device sees the same."""
    return torch.randn(count, *_packed(model), generator=generator).to(model.device)


def _packed(model: Model) -> tuple[int, int]:
    """Image tokens L and channels C of the model's latents."""
    return (model.latent_side // 2) ** 2, model.channels


def seeded_noise(model: Model, seeds: Sequence[int]) -> Tensor:
    """Packed standard normal latents [len(seeds), L, C] on the model's device, each from a seed of its own."""
    return core_noise(seeds, _packed(model)).to(model.device)


def velocity(model: Model, latents: Tensor, t: Tensor, text: Text, autocast: bool = True) -> Tensor:
    """The transformer's velocity [B, L, C] in fp32 at times t [B] in [0, 1]; runs in bf16 autocast unless told not to.

    On a CPU without bf16 instructions fp32 weights run without autocast, which would take eight times as long.
    """
    device = model.device
    with torch.autocast(
        device.type, torch.bfloat16, enabled=autocast and not _faster_in_fp32(model.transformer, device)
    ):
        return asked(model).called(model, latents, t, text).float()


def cpu_has_bf16() -> bool:
    """Whether PyTorch multiplies bf16 numbers by instructions of this CPU. Without them it emulates, many times slower.

    On x86 oneDNN answers yes for every CPU with AVX-512, also for the Xeons that have no bf16 instructions; and
    ATEN_CPU_CAPABILITY may have taken AVX-512 away. A PyTorch too old to be asked counts as one without.
    """
    onednn = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)  # a PyTorch for Macs is built without oneDNN
    if not onednn():
        return False
    if platform.machine().lower() not in X86:
        return True
    asked = (getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and any(ask() for ask in asked)


def _faster_in_fp32(transformer: nn.Module, device: torch.device) -> bool:
    """On a CPU that can only emulate bf16, where all weights are plain fp32 ones."""
    if device.type != "cpu" or cpu_has_bf16():
        return False
    return all(type(each) is nn.Parameter and each.dtype == torch.float32 for each in transformer.parameters())
