"""How Z-Image is asked: each of its prompts has a length of its own, and its picture stands behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from .attach import Turns
from .tokens import grid, own_states, packed, real, unpacked

if TYPE_CHECKING:
    from .models import Model, Text

PADS_TO = 32  # diffusers' transformer (0.42.1) pads text and picture to so many tokens, by one that it has learnt


def encode(pipe: Any, texts: list[str], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """States [B, L, C], behind each prompt's own 0, and which tokens a prompt has [B, L]."""
    own, _ = pipe.encode_prompt(  # a list of its own: its template is written into that
        list(texts), device=device, do_classifier_free_guidance=False, max_sequence_length=length
    )
    used = torch.arange(length, device=device) < torch.tensor([[len(each)] for each in own], device=device)
    states = pad_sequence(own, batch_first=True)
    return pad(states, (0, 0, 0, length - states.shape[1])), used.float()


def called(model: Model, latents: Tensor, t: Tensor, text: Text) -> Tensor:
    """It takes lists, a time that grows towards the picture, and gives the way there; as its pipeline asks it."""
    pictures = unpacked(latents, model.latent_side // 2)[:, :, None]  # videos of one frame
    states = [each.to(model.device) for each in own_states(text)]
    (found,) = model.transformer(list(pictures), 1 - t.to(model.device), states, return_dict=False)
    return -packed(torch.stack(found)[:, :, 0])


def turns(model: Model, text: Text) -> tuple[Turns, Turns]:
    """Text stands at 1, 2, ... on the first axis, its padding too, and the picture one behind that; the picture's
    padding at 0. So a picture's turns [B, L, D] depend on its prompt's length.
    """
    rope = model.transformer.rope_embedder
    lengths = [-(-len(each) // PADS_TO) * PADS_TO for each in own_states(text)]
    texts, place = torch.zeros(max(lengths), 3, device=model.device), grid(model, 3)
    texts[:, 0] = torch.arange(1, len(texts) + 1)
    places = place.repeat(len(lengths), 1, 1)
    places[..., 0] = torch.tensor(lengths, device=model.device)[:, None] + 1
    places = pad(places, (0, 0, 0, -len(place) % PADS_TO)).long()
    cos, sin = (each.unflatten(0, places.shape[:2]) for each in real(rope(places.flatten(0, 1))))
    return real(rope(texts.long())), (cos, sin)
