"""Pictures and latents: the pipelines' own samplers, asked with encoded prompts, and their autoencoders.

Packed latents are tokens of 2 x 2 latents, the channel outermost, in every family. Model space is the autoencoder's,
each channel moved and scaled as its pipeline does.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .models import Model, Text, encode
from .pipelines import asked
from .tokens import own_states, packed, unpacked

_PATCH = 4  # latents of a token, each with a channel of its own


def paint(model: Model, text: Text, noise: Tensor, steps: int, **choices: Any) -> Tensor:
    """Packed latents [B, L, C] of the pictures that the pipeline paints of the prompts, from packed noise.

    Where a second pass guides the family, and the model's guidance asks for it, that pass has the empty prompt.
    `choices` go to the pipeline.
    """
    pipe, row = model.pipe, asked(model)
    prompts = _prompts(model, text)
    if model.guidance > row.free_above and not model.transformer.config.get("guidance_embeds"):
        empty = _prompts(model, encode(model, [""] * len(noise)))
        prompts |= {f"negative_{name}": value for name, value in empty.items()}
        if "negative_prompt" in signature(pipe.__call__).parameters:
            prompts["negative_prompt"] = None  # Ovis-Image's is "" unless told
    found = pipe(
        **prompts,
        **{row.scale: model.guidance},
        num_inference_steps=steps,
        latents=_start(model, noise),
        height=8 * model.latent_side,
        width=8 * model.latent_side,
        output_type="latent",
        **choices,
    ).images
    if model.geometry.family == "z-image":  # in model space
        return packed(found)
    return _to_model(pipe.vae, found) if found.ndim == 4 else found


def _start(model: Model, noise: Tensor) -> Tensor:
    """The noise as the pipeline takes it."""
    side, start = model.latent_side // 2, noise.to(model.transformer.dtype)
    if model.geometry.family == "flux2":  # its pipelines pack noise themselves; klein's undoes all
        return rearrange(start, "b (h w) c -> b c h w", h=side)
    return unpacked(noise, side) if model.geometry.family == "z-image" else start  # whose latents stay in fp32


def _prompts(model: Model, text: Text) -> dict[str, Any]:
    row, dtype = asked(model), model.transformer.dtype
    if row.pads_to:
        return {"prompt_embeds": [each.to(model.device, dtype) for each in own_states(text)]}
    found: dict[str, Tensor | None] = {"prompt_embeds": text.states.to(model.device, dtype)}
    if row.pooled:
        found[row.pooled] = text.pooled.to(model.device, torch.bool if row.pooled == "prompt_embeds_mask" else dtype)
    return found


@torch.no_grad()
def encode_pictures(model: Model, pictures: Tensor) -> Tensor:
    """Pictures [B, 3, h, w] in [-1, 1] -> packed latents [B, L, C] in model space."""
    vae = model.pipe.vae
    pixels = pictures.to(model.device, vae.dtype)
    raw = vae.encode(pixels[:, :, None] if _of_videos(vae) else pixels).latent_dist.mode()
    return _to_model(vae, (raw[:, :, 0] if _of_videos(vae) else raw).float())


@torch.no_grad()
def decode_pictures(model: Model, tokens: Tensor) -> Tensor:
    """Packed latents [B, L, C] in model space -> pictures [B, 3, h, w] in [-1, 1], fp32 on the CPU."""
    vae = model.pipe.vae
    mean, factor = _scaling(vae)
    latents = unpacked(tokens.float() / factor + mean, model.latent_side // 2).to(vae.dtype)
    pixels = vae.decode(latents[:, :, None] if _of_videos(vae) else latents).sample
    return (pixels[:, :, 0] if _of_videos(vae) else pixels).float().clamp(-1, 1).cpu()


def _to_model(vae: Any, latents: Tensor) -> Tensor:
    """An autoencoder's latents [B, C, h, w] -> packed, in model space."""
    mean, factor = _scaling(vae)
    return (packed(latents) - mean) * factor


def _scaling(vae: Any) -> tuple[Tensor | float, Tensor | float]:
    """(mean, factor) of packed channels: model space is (latents - mean) * factor."""
    if hasattr(vae, "bn"):  # FLUX.2's, of packed channels
        return vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).rsqrt()
    if _of_videos(vae):
        mean, std = (torch.tensor(vae.config[name], device=vae.device) for name in ("latents_mean", "latents_std"))
        return mean.repeat_interleave(_PATCH), 1 / std.repeat_interleave(_PATCH)
    return vae.config.shift_factor, vae.config.scaling_factor


def _of_videos(vae: Any) -> bool:
    """Whether it is Qwen-Image's, which takes pictures for videos of one frame."""
    return vae.config.get("latents_mean") is not None
