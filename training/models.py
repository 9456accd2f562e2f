"""A FLUX pipeline as training sees it: encode prompts, find their tokens, ask for a velocity. Knows diffusers' pipeline, not its attention.

Latents are packed, `[B, L, C]`, in model space; t runs from 1 (pure noise) to 0; velocity points from picture to noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from saferope_core import Geometry

from .attach import geometry_of

TINYWORLD = "tinyworld"
GUIDANCE = 3.5  # FLUX.1-dev's default
TEXT_LENGTH = 512  # FLUX.1-dev's
LATENT_SIDE = 64  # 512 x 512 pictures: statistics and rotations do not depend on resolution, time does
_ENCODE_BATCH = 64


@dataclass(frozen=True)
class Model:
    """A frozen pipeline in eval mode. `latent_side`: height and width of the unpacked latents."""

    name: str
    pipe: object
    geometry: Geometry
    text_length: int
    latent_side: int
    guidance: float = GUIDANCE

    @property
    def transformer(self) -> nn.Module:
        return self.pipe.transformer

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device


@dataclass(frozen=True)
class Text:
    """Encoded prompts: T5's states [B, L, C] and the pooled CLIP vectors [B, C']."""

    states: Tensor
    pooled: Tensor

    def pick(self, index: Tensor | slice) -> Text:
        """Some of the prompts."""
        return Text(self.states[index], self.pooled[index])


def load_model(name: str, device: str = "cpu") -> Model:
    """The embedded model (`tinyworld`) or a folder laid out like a diffusers FLUX pipeline.

    ValueError where the folder is none.
    """
    if name == TINYWORLD:
        return _tiny_world(device)
    from diffusers import FluxPipeline

    if not (Path(name) / "model_index.json").is_file():
        raise ValueError(
            f"model {name!r}: got no folder with a model_index.json, expected `{TINYWORLD}` or a diffusers FLUX "
            "pipeline; download one first and name its folder"
        )
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipe = FluxPipeline.from_pretrained(name, torch_dtype=dtype, local_files_only=True).to(device)
    return from_pipeline(name, pipe, TEXT_LENGTH, LATENT_SIDE)


def from_pipeline(name: str, pipe, text_length: int, latent_side: int, guidance: float = GUIDANCE) -> Model:
    """Freezes the pipeline and wraps it."""
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False).eval()
    return Model(name, pipe, geometry_of(pipe.transformer), text_length, latent_side, guidance)


def _tiny_world(device: str) -> Model:
    from tinyworld import model, render

    pipe = model.load_pipeline().to(device)
    return from_pipeline(TINYWORLD, pipe, model.TEXT_LENGTH, render.SIZE // 8, model.GUIDANCE)


@torch.no_grad()
def encode(model: Model, texts: Sequence[str]) -> Text:
    """Both encoders' view of the prompts, on the transformer's device."""
    parts = []
    for start in range(0, len(texts), _ENCODE_BATCH):
        chunk = list(texts[start : start + _ENCODE_BATCH])
        states, pooled, _ = model.pipe.encode_prompt(
            chunk, None, device=model.device, max_sequence_length=model.text_length
        )
        parts.append((states.float(), pooled.float()))
    return Text(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))


def token_mask(model: Model, texts: Sequence[str], spans: Sequence[tuple[int, int] | None]) -> Tensor:
    """Bool [B, L] over T5's tokens: those that touch the characters of the span; None marks the whole prompt.

    FLUX attends to padding as to words, so a whole prompt comes with as many padding tokens as it has others (with all
    of them, 512 in FLUX's own pipeline, words would hardly count). ValueError where a span has no token (cut off, or empty).
    """
    batch = model.pipe.tokenizer_2(
        list(texts), padding="max_length", max_length=model.text_length, truncation=True, return_offsets_mapping=True
    )
    mask = torch.tensor(batch["attention_mask"], dtype=torch.bool)
    for row, (text, span, offsets) in enumerate(zip(texts, spans, batch["offset_mapping"], strict=True)):
        if span is None:
            mask[row, : 2 * int(mask[row].sum())] = True
            continue
        mask[row] &= torch.tensor([first < span[1] and span[0] < last for first, last in offsets])
        if not mask[row].any():
            raise ValueError(
                f"prompt {text!r}: characters {span} have no token within the first {model.text_length}; "
                "shorten the prompt or correct the span"
            )
    return mask


def noise(model: Model, count: int, generator: torch.Generator) -> Tensor:
    """Packed standard normal latents [count, L, C], drawn on the CPU so that every device sees the same."""
    tokens, channels = (model.latent_side // 2) ** 2, model.transformer.config.in_channels
    return torch.randn(count, tokens, channels, generator=generator).to(model.device)


def velocity(model: Model, latents: Tensor, t: Tensor, text: Text) -> Tensor:
    """The transformer's velocity [B, L, C] in fp32 at times t [B] in [0, 1]; runs in bf16 autocast."""
    side, device = model.latent_side // 2, model.device
    image_ids = model.pipe._prepare_latent_image_ids(len(latents), side, side, device, torch.float32)
    guidance = None
    if model.transformer.config.guidance_embeds:
        guidance = torch.full((len(latents),), model.guidance, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        (result,) = model.transformer(
            hidden_states=latents,
            timestep=t.to(device),
            guidance=guidance,
            encoder_hidden_states=text.states,
            pooled_projections=text.pooled,
            txt_ids=torch.zeros(text.states.shape[1], 3, device=device),
            img_ids=image_ids,
            return_dict=False,
        )
    return result.float()


def encode_pictures(model: Model, pictures: Tensor) -> Tensor:
    """Pictures [B, 3, h, w] in [-1, 1] -> packed latents [B, L, C] in model space."""
    vae = model.pipe.vae
    with torch.no_grad():
        raw = vae.encode(pictures.to(model.device, vae.dtype)).latent_dist.mode()
    latents = (raw.float() - vae.config.shift_factor) * vae.config.scaling_factor
    return model.pipe._pack_latents(latents, *latents.shape)


def fingerprint(module: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
