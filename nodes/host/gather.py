"""Statistics of a ComfyUI model's queries and keys on some prompts. A concept is made from them.

ComfyUI's own sampler samples the prompts by Euler's method, on a clone of the model. A patch listens at a few times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ...saferope_core import BENIGN, UNSAFE, Gathering, Geometry, Statistics, schedule, seeded_noise, token_kinds
from .families import grid_of, masks_in_network
from .listening import ListeningPatch
from .patch import patched
from .prompts import Prompt, masks_in

SAME_TIME = 1e-3  # Sigmas closer than this are one: they come back in the sampler's precision.
GRAMS = 16  # Gram matrices of a head: seven kinds of tokens, and `met`, of queries and of keys.
SAMPLE_BYTES = 700 << 20  # Memory for vectors that are kept whole.
SMALL_FROM = 1 << 30  # Bytes. Where whole Gram matrices take more, only small ones are kept.
SAMPLED_SETS = 8  # Four kinds of tokens, of queries and of keys.
GIVEN = ("pooled_output", "attention_mask")  # Outputs of encoders, beside the states, for known families.
GUIDED = ("flux", "flux2")  # Families that FluxGuidance is for. Chroma's own guidance is 0.
RESERVOIR = 4096  # Vectors kept of each kind, as in the trainer.


@dataclass(frozen=True)
class Look:
    """A prompt as the model gets it, with the seed of its noise.

    - states: of the text, [1, L, C].
    - more: other outputs of the encoder, such as the pooled vector and an attention mask, [1, ...] each.
    - used, subject: masks of the prompt's tokens and of its concept's word, [1, L].
    """

    side: str
    states: Tensor
    more: dict[str, Tensor]
    used: Tensor
    subject: Tensor
    seed: int


def gather(
    model: Any,
    geometry: Geometry,
    looks: Sequence[Look],
    size: tuple[int, int],
    batch: int,
    timesteps: Sequence[float],
    guidance: float,
    tell: Callable[[int], None],
) -> Statistics:
    """Statistics of every head. Samples looks in batches, latents of `size` rows and columns, and listens at the
    timesteps.

    Calls `tell(count)` after every forward of `count` looks. Where ComfyUI is told to stop, its own exception ends it.
    Raises RuntimeError where a forward at one of the times was left out, as step caches do.
    """
    device = _device(model)
    _make_room(geometry, device)
    gathering = Gathering(geometry, capacity(geometry), device, small=_whole(geometry) > SMALL_FROM)
    sigmas = torch.tensor([*schedule(timesteps), 0.0])  # the last step makes the forward at the last time
    for some in batches(looks, batch):
        _sample(model, gathering, some, size, sigmas, timesteps, guidance, tell)
    return gathering.statistics()


def looks_of(
    clip: Any, prompts: Sequence[Prompt], rounds: int, seed: int, tell: Callable[[int], None] = lambda count: None
) -> list[Look]:
    """Encodes every prompt once, for looks from `rounds` noises. Both sides start from the same noises."""
    looks: list[Look] = []
    for side in (UNSAFE, BENIGN):
        chosen = [prompt for prompt in prompts if prompt.side == side]
        for place, prompt in enumerate(chosen):
            comfy.model_management.throw_exception_if_processing_interrupted()
            encoded = _encoded(clip, prompt)
            looks += [Look(side, *encoded, seed + place + turn * len(chosen)) for turn in range(rounds)]
            tell(1)
    return looks


def batches(looks: Sequence[Look], batch: int) -> list[list[Look]]:
    """Looks of one side and one text length together, at most `batch` of them."""
    groups = groupby(sorted(looks, key=_kind), key=_kind)
    whole = [list(group) for _, group in groups]
    return [group[first : first + batch] for group in whole for first in range(0, len(group), batch)]


def capacity(geometry: Geometry) -> int:
    """How many vectors of each kind are kept: RESERVOIR, or fewer where that would take more than SAMPLE_BYTES."""
    each = 2 * SAMPLED_SETS * geometry.blocks * geometry.heads * geometry.head_dim  # bytes of bf16
    return min(RESERVOIR, SAMPLE_BYTES // each)


def _encoded(clip: Any, prompt: Prompt) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """States, the encoder's other outputs, and masks of the prompt's tokens and of the concept's word."""
    states, extra = clip.encode_from_tokens_scheduled(clip.tokenize(prompt.text))[0]
    used, subject = masks_in(clip, prompt, states.shape[1])
    if states.shape[1] != used.shape[1]:
        raise ValueError(
            f"The CLIP gives {states.shape[1]} vectors for {used.shape[1]} tokens of T5. Expected text encoders whose "
            "text stream is T5's alone, such as FLUX's, or a language model's."
        )
    return states, {name: extra[name] for name in GIVEN if torch.is_tensor(extra.get(name))}, used, subject


def _kind(look: Look) -> tuple:
    return look.side == BENIGN, look.states.shape[1], sorted(look.more)


def _sample(
    model: Any,
    gathering: Gathering,
    looks: Sequence[Look],
    size: tuple[int, int],
    sigmas: Tensor,
    timesteps: Sequence[float],
    guidance: float,
    tell: Callable[[int], None],
) -> None:
    """Samples some looks of one side, and listens."""
    network, device = model.get_model_object("diffusion_model"), _device(model)
    family, seeds = gathering.geometry.family, [look.seed for look in looks]
    noise = seeded_noise(seeds, noise_shape(model, size))
    masks = (torch.cat([getattr(look, name) for look in looks]) for name in ("used", "subject"))
    kinds = token_kinds(*(masks_in_network(family, each, network) for each in masks))
    visit = gathering.visit(looks[0].side, kinds, math.prod(grid_of(network, noise)), seeds)
    heard: list[float] = []

    def at_sigma(sigma: float) -> Callable | None:
        if not any(abs(sigma - t) < SAME_TIME for t in timesteps):
            return None
        heard.append(sigma)
        visit.at_time()
        return lambda x, turned, *where: visit.listen(x.to(device), turned.to(device), *where)

    def after_step(*_: Any) -> None:
        tell(len(looks))
        comfy.model_management.throw_exception_if_processing_interrupted()

    listened = patched(model, ListeningPatch(gathering.geometry, at_sigma))
    extra: dict[str, Any] = {name: torch.cat([look.more[name] for look in looks]) for name in looks[0].more}
    extra |= {"guidance": guidance} if family in GUIDED else {}
    prompts = [[torch.cat([look.states for look in looks]), extra]]
    euler = comfy.samplers.sampler_object("euler")
    comfy.sample.sample_custom(
        listened,
        noise,
        1.0,
        euler,
        sigmas,
        prompts,
        prompts,
        torch.zeros_like(noise),
        callback=after_step,
        disable_pbar=True,
    )
    if len(heard) != len(timesteps):
        raise RuntimeError(
            f"The model was asked at {len(heard)} of the {len(timesteps)} times at which it was to be heard. Connect "
            "it without nodes that skip steps or replace the sampling."
        )


def noise_shape(model: Any, size: tuple[int, int]) -> tuple[int, ...]:
    """The shape of one picture's latent with `size` rows and columns."""
    form = model.get_model_object("latent_format")
    frames = [1] if form.latent_dimensions == 3 else []  # a picture is a film of one frame
    return (form.latent_channels, *frames, *size)


def _device(model: Any) -> torch.device:
    """The device that sums up Gram matrices in float64, which not every device has."""
    return model.load_device if torch.device(model.load_device).type == "cuda" else torch.device("cpu")


def _make_room(geometry: Geometry, device: torch.device) -> None:
    """Lets ComfyUI unload models where the Gram matrices need the memory."""
    if device.type == "cuda":
        comfy.model_management.free_memory(min(_whole(geometry), SMALL_FROM), device)


def _whole(geometry: Geometry) -> int:
    """Bytes of all Gram matrices in float64; small ones take about a quarter."""
    return GRAMS * geometry.blocks * geometry.heads * geometry.head_dim**2 * 8
