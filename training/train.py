"""Learns how far to turn: one generator per safety-critical head, shared by q and k, everything else frozen.

Alternating phases as in the paper: some steps of unlearning on unsafe prompts near pure noise, then as many of preserving
on noised benign pictures at random times. Only the generators have gradients; the base model's velocities are computed
without a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saferope_core import BLOCK_TYPES, Geometry, gated, latent_risk_score, rotate_by_generator

from .attach import Span, attached
from .heads import CriticalHeads
from .losses import flow_matching_loss, unlearning_loss, velocity_matching_loss
from .models import Model, Text, noise, velocity
from .settings import Settings

UNLEARN, PRESERVE = "unlearn", "preserve"
FINAL_RATE = 0.1  # of the learning rate, reached linearly, so that the last phase does not undo the one before


@dataclass(frozen=True)
class Material:
    """What training looks at, encoded once.

    Unsafe prompts, with the latents [n, L, C] that the base model passes through at each time below 1 on its way from
    noise; benign prompts, with the latents [m, L, C] of their pictures.
    """

    unsafe: Text
    visited: dict[float, Tensor]
    benign: Text
    latents: Tensor


class TrainableRotation:
    """The rotation of equation R(x) = U exp(s A) U^T + (I - U U^T), differentiable in A = W - W^T, which is exactly skew.

    `text` and `image` are the weights W [N, R, R]. In double blocks only text tokens turn, as in the paper's code: the
    image generators of those heads stay zero. `rotate` has the signature that `attached` expects and agrees with
    `Protection.rotate` of the concept made from the same tensors.
    """

    def __init__(self, heads: CriticalHeads, geometry: Geometry, acts_on: str, text: Tensor, image: Tensor) -> None:
        self.heads, self.acts_on = heads, acts_on
        device = text.device
        self.basis = {role: basis.to(device) for role, basis in heads.basis.items()}
        self.gate = {role: gate.to(device) for role, gate in heads.gate.items()}
        self.single = (heads.heads[:, 0] == BLOCK_TYPES.index("single")).float()[:, None, None].to(device)
        self.text, self.image = text, image
        self.members = _members(heads.heads, device)

    def generators(self) -> tuple[Tensor, Tensor]:
        """Skew generators A [N, R, R] for text and image tokens."""
        return self.text - self.text.mT, (self.image - self.image.mT) * self.single

    def rotate(self, x: Tensor, role: str, block_type: str, block_index: int, text: Span, image: Span) -> Tensor:
        """Turns x [B, H, L, D]; returns x itself where no critical head or no turning stream is."""
        members = self.members.get((block_type, block_index))
        if members is None or role not in self.acts_on or (block_type == "double" and text[0] == text[1]):
            return x
        index, head = members
        generators = [generator[index] for generator in self.generators()]
        turned = self._turn(x[:, head], role, index, zip((text, image), generators, strict=True))
        return x.index_copy(1, head, turned)

    def _turn(self, x: Tensor, role: str, index: Tensor, streams) -> Tensor:
        """All tokens of the block's critical heads x [B, h, L, D], text and image each by its own generators [h, R, R]."""
        basis = self.basis[role][index]
        scale = gated(latent_risk_score(x, basis), self.gate[role][index])
        parts = [
            rotate_by_generator(x[:, :, first:last], basis, generator, scale[:, :, first:last])
            for (first, last), generator in streams
            if last > first
        ]
        return torch.cat(parts, dim=2)


def train(
    model: Model,
    heads: CriticalHeads,
    material: Material,
    settings: Settings,
    log: Callable[[dict], None] = lambda entry: None,
) -> tuple[Tensor, Tensor]:
    """Text and image generators [N, R, R], fp32 on the CPU, exactly skew; the same for the same seed, bit for bit.

    `log` gets one entry per step: step, phase, loss and the mean squared velocity difference behind it.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    rotation = _initial_rotation(model, heads, settings, generator)
    weights = [rotation.text, rotation.image]
    optimiser = torch.optim.AdamW(weights, settings.learning_rate, weight_decay=0.0)
    for step in range(settings.steps):
        phase = PRESERVE if step // settings.phase % 2 else UNLEARN
        optimiser.param_groups[0]["lr"] = settings.learning_rate * (1 - (1 - FINAL_RATE) * step / settings.steps)
        loss, error = _loss(model, rotation, material, settings, phase, generator)
        # where no token passed its gate nothing turned: there is nothing to learn from this batch
        if loss.requires_grad:
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        log({"step": step, "phase": phase, "loss": loss.item(), "velocity_mse": error})
    with torch.no_grad():
        text, image = rotation.generators()
    return text.cpu(), image.cpu()


def _initial_rotation(model: Model, heads: CriticalHeads, settings: Settings, generator) -> TrainableRotation:
    """Weights drawn normal; the image stream starts near rest, so that it only moves where that pays."""
    count, rank = len(heads.heads), heads.basis["q"].shape[-1]
    weights = [
        (torch.randn(count, rank, rank, generator=generator) * spread).to(model.device).requires_grad_()
        for spread in (settings.text_init, settings.image_init)
    ]
    return TrainableRotation(heads, model.geometry, settings.acts_on, *weights)


def _loss(model, rotation, material, settings, phase, generator) -> tuple[Tensor, float]:
    """One batch's loss, and the mean squared difference between rotated and base velocity."""
    text, x, t, latents, start = _batch(model, material, settings.batch, phase, generator)
    with torch.no_grad():
        base = velocity(model, x, t, text)
    with attached(model.transformer, rotation.rotate):
        rotated = velocity(model, x, t, text)
    error = velocity_matching_loss(rotated, base)
    if phase == UNLEARN:
        return unlearning_loss(rotated, base, settings.unlearn_scale), error.item()
    kept = flow_matching_loss(rotated, latents, start) if settings.regulariser == "flow" else error
    return settings.preserve_weight * kept, error.item()


def _batch(model, material, size, phase, generator) -> tuple[Text, Tensor, Tensor, Tensor | None, Tensor]:
    """Text, latents at time t, t, clean latents and noise.

    Unsafe prompts come at 1 (fresh noise) or at one of the visited times, drawn for the whole batch; benign pictures at
    any time.
    """
    start = noise(model, size, generator)
    if phase == UNLEARN:
        index = torch.randint(len(material.unsafe.states), (size,), generator=generator)
        times = [1.0, *material.visited]
        t = times[int(torch.randint(len(times), (1,), generator=generator))]
        x = start if t == 1 else material.visited[t][index]
        return material.unsafe.pick(index), x, torch.full((size,), t, device=start.device), None, start
    index = torch.randint(len(material.latents), (size,), generator=generator)
    t = torch.rand(size, generator=generator).to(start.device)
    latents = material.latents[index]
    noised = torch.lerp(latents, start, t[:, None, None])
    return material.benign.pick(index), noised, t, latents, start


def _members(heads: Tensor, device: torch.device) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """(block type, block index) -> (rows of `heads`, head indices) of its critical heads."""
    members = {}
    for kind, block in {(int(kind), int(block)) for kind, block, _ in heads}:
        rows = ((heads[:, 0] == kind) & (heads[:, 1] == block)).nonzero()[:, 0]
        members[BLOCK_TYPES[kind], block] = (rows.to(device), heads[rows, 2].long().to(device))
    return members
