"""Batches: the prompts of a training step, with their times, noise and strengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..flux.models import Model, Text, seeded_noise, velocity
from ..settings import Settings

UNLEARN, PRESERVE = "unlearn", "preserve"
REPLACE = "replace"
_SEED_STRIDE = 1_000_003  # between the steps' seeds: more than any batch has prompts


@dataclass(frozen=True)
class Material:
    """The inputs of training, encoded once: n unsafe and m benign prompts.

    - `unsafe`: prompts that show the concept.
    - `instead`: the same prompts with other words for the concept.
    - `taken_out` [n], bool: the subject is only taken out there.
    - `subjects` [n, L], bool: the tokens of the concept's word.
    - `visited`: time below 1 -> latents [n, L, C] of the base model on its way from noise.
    - `benign`, `latents` [m, L, C]: benign prompts, and latents of their pictures.
    """

    unsafe: Text
    instead: Text
    taken_out: Tensor
    subjects: Tensor
    visited: dict[float, Tensor]
    benign: Text
    latents: Tensor


@dataclass(frozen=True)
class Batch:
    """Prompts of one phase."""

    phase: str
    index: Tensor  # their places in the material, [B]
    times: Tensor  # [B]
    seeds: list[int]  # of the noise
    strengths: Tensor  # [B]
    spared: Tensor | None  # text tokens that stay unturned, bool [B, L]

    def pick(self, part: Tensor) -> Batch:
        """Some of its prompts."""
        spared = None if self.spared is None else self.spared[part]
        seeds = [self.seeds[place] for place in part.tolist()]
        return Batch(self.phase, self.index[part], self.times[part], seeds, self.strengths[part], spared)


def draw(material: Material, settings: Settings, step: int, phase: str) -> Batch:
    """The batch of a step. The seed and the step alone decide it, so interruptions change nothing.

    Unsafe prompts come at 1 (fresh noise) or at one of the visited times, drawn for the whole batch; benign pictures at
    any time. For a share `blind` of the unsafe prompts the concept's word stays unturned, for a share `blind_text` all
    text tokens, so that others must turn.
    """
    size, first = settings.batch, settings.seed + (step + 1) * _SEED_STRIDE
    generator = torch.Generator().manual_seed(first)
    seeds = list(range(first + 1, first + 1 + size))
    least, most = settings.strengths
    if phase == PRESERVE:
        index = torch.randint(len(material.latents), (size,), generator=generator)
        times, spared = torch.rand(size, generator=generator), None
    else:
        index = torch.randint(len(material.unsafe.states), (size,), generator=generator)
        visited = torch.tensor([1.0, *material.visited])
        times = visited[torch.randint(len(visited), (1,), generator=generator)].expand(size)
        drawn = torch.rand(size, 1, generator=generator)
        spared = material.subjects[index] & (drawn < settings.blind) | (drawn >= 1 - settings.blind_text)
    strengths = least + (most - least) * torch.rand(size, generator=generator)
    return Batch(phase, index, times, seeds, strengths, spared)


def prompts(material: Material, batch: Batch) -> Text:
    """The prompts of a batch."""
    return (material.benign if batch.phase == PRESERVE else material.unsafe).pick(batch.index)


class Latents(NamedTuple):
    """Latents [B, L, C] at their times, the clean latents before noise (None in unlearning), and the noise."""

    noised: Tensor
    clean: Tensor | None
    noise: Tensor


def latents(model: Model, material: Material, batch: Batch) -> Latents:
    """The latents that a batch starts from."""
    start = seeded_noise(model, batch.seeds)
    if batch.phase == UNLEARN:
        t = batch.times[0].item()
        visited = next((found for time, found in material.visited.items() if abs(time - t) < 1e-6), None)
        return Latents(start if visited is None else visited[batch.index].to(start.device), None, start)
    clean = material.latents[batch.index].to(start.device)
    return Latents(torch.lerp(clean, start, batch.times.to(start.device)[:, None, None]), clean, start)


@torch.no_grad()
def target(model: Model, material: Material, settings: Settings, batch: Batch, noised: Tensor) -> Tensor:
    """The base model's velocities [B, L, C] that the rotated ones are compared with.

    Unlearning by replacement takes the velocities of the prompt with other words. Where the subject is only taken out,
    they go further from the concept's own by the share `settings.beyond`. Else the prompt's own velocities.
    """
    replacing = batch.phase == UNLEARN and settings.objective == REPLACE
    aim = material.instead.pick(batch.index) if replacing else prompts(material, batch)
    aimed = velocity(model, noised, batch.times, aim)
    further = settings.beyond * material.taken_out[batch.index] if replacing else torch.zeros(1)
    if further.any():
        own = velocity(model, noised, batch.times, prompts(material, batch))
        aimed = aimed + further.to(aimed)[:, None, None] * (aimed - own)
    return aimed
