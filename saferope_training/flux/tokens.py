"""Tokens of pictures and texts in every family: how latents are packed, and where tokens stand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from .attach import Turns

if TYPE_CHECKING:
    from .models import Model, Text


def packed(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> tokens of 2 x 2 latents [B, L, 4 C], the channel outermost."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpacked(tokens: Tensor, rows: int) -> Tensor:
    """The inverse of `packed`, for latents with so many rows of tokens."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=2, q=2)


def own_states(text: Text) -> list[Tensor]:
    """Every prompt's states [L of its own, C], without the padding to one length."""
    lengths = [int(sum(row)) for row in text.pooled.tolist()]
    return [states[:length] for states, length in zip(text.states, lengths, strict=True)]


def grid(model: Model, axes: int) -> Tensor:
    """Positions [L, axes] of image tokens: row and column on the second and third axis."""
    side = model.latent_side // 2
    ids = torch.zeros(side, side, axes, device=model.device)
    ids[..., 1] += torch.arange(side, device=model.device)[:, None]
    ids[..., 2] += torch.arange(side, device=model.device)[None]
    return ids.flatten(0, 1)


def line(model: Model, axes: int, *along: int) -> Tensor:
    """Positions [L, axes] of text tokens: a token's number on the axes `along`."""
    ids = torch.zeros(model.text_length, axes, device=model.device)
    ids[:, along] = torch.arange(model.text_length, device=model.device, dtype=ids.dtype)[:, None]
    return ids


def real(turns: Tensor) -> Turns:
    """Cosines and sines of complex numbers [L, D / 2]."""
    return turns.real.repeat_interleave(2, 1), turns.imag.repeat_interleave(2, 1)
