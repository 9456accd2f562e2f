"""Learns how far to turn: one generator per safety-critical head, shared by q and k, everything else frozen.

Phases alternate as in the paper: some steps of unlearning on unsafe prompts near pure noise, then as many of preserving
on noised benign pictures at random times. Unlearning leads the velocity of an unsafe prompt to the base model's
velocity for the same prompt with other words for the concept. So the picture stays whole. The paper leads the velocity
away from its own.

Each prompt has its own strength, and no plane turns past half a turn, so that the file works at every strength. Only
the generators have gradients; the base model's velocities are computed without a graph. Every step draws from its own
seed and leaves its state on disk. So a killed run resumes at the last whole step and ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from saferope_core import CriticalHeads

from .. import processes
from ..flux.attach import attached
from ..flux.models import Model, velocity
from ..settings import Settings
from .batch import PRESERVE, REPLACE, UNLEARN, Batch, Latents, Material, draw, latents, prompts, target
from .losses import flow_matching_loss, unlearning_loss, velocity_matching_loss
from .rotation import TrainableRotation
from .state import State

FINAL_RATE = 0.1  # of the learning rate, reached linearly, so that the last phase does not undo the one before
FIT_RATE = 0.1  # of AdamW in `fit`: 4 % of 48 stars are shown after 18 steps, 31 % after none
DIVERGED = 1.0  # mean squared change of benign velocities, whose own variance is about 1: nothing is preserved any more
Teller = Callable[[dict], None]


class Watcher(Protocol):
    """An observer: it gets `after` each step, and says before each whether training is `over`. It changes nothing."""

    def after(self, step: int, rotation: TrainableRotation) -> None: ...
    def over(self) -> bool: ...


class Course(NamedTuple):
    """The number of steps, the steps of a turn, and AdamW's rate at the start."""

    steps: int
    turn: int
    rate: float

    def phase(self, step: int) -> str:
        """Unlearning and preserving take turns."""
        return PRESERVE if step // self.turn % 2 else UNLEARN


class Diverged(ValueError):
    """Training ran away; the message says at which step, and where the last good state lies."""


def train(
    model: Model,
    heads: CriticalHeads,
    material: Material,
    settings: Settings,
    log: Teller = lambda entry: None,
    state: State | None = None,
    start: tuple[Tensor, Tensor] | None = None,
    course: Course | None = None,
    watch: Watcher | None = None,
) -> tuple[Tensor, Tensor]:
    """Text and image generators [N, R + S, R + S], fp32 on the CPU, exactly skew. They start at `start`, or at random.

    The same seed gives the same bits on a CPU, wherever it was stopped; on GPUs up to the order in which their
    attention adds up gradients. `log` gets one entry per step: step, phase, loss and the mean squared velocity
    difference behind it. Processes share every batch. A `state` of fewer steps resumes at this course's rates. Raises
    Diverged where a loss is not finite or too high.
    """
    state, course = state or State(None), course or Course(settings.steps, settings.phase, settings.learning_rate)
    rotation = initial_rotation(heads, model, settings, start)
    weights = rotation.weights()
    if settings.checkpointing:
        model.transformer.enable_gradient_checkpointing()
    optimiser = torch.optim.AdamW(weights.values(), course.rate, weight_decay=0.0)
    for step in range(state.load(weights, optimiser, course.steps), course.steps):
        if watch is not None and watch.over():
            break
        phase = course.phase(step)
        optimiser.param_groups[0]["lr"] = course.rate * (1 - (1 - FINAL_RATE) * step / course.steps)
        optimiser.zero_grad()
        loss, error = _gradients(model, rotation, draw(material, settings, step, phase), material, settings)
        _require_sound(step, phase, loss, error, list(weights.values()), state)
        optimiser.step()
        rotation.hold(settings.max_angle)
        log({"step": step, "phase": phase, "loss": loss, "velocity_mse": error})
        if watch is not None:
            watch.after(step + 1, rotation)
        state.save(step + 1, weights, optimiser)  # after the log: a step is finished when both know it
    with torch.no_grad():
        text, image = rotation.generators()
    return text.cpu(), image.cpu()


def fit(
    model: Model,
    heads: CriticalHeads,
    material: Material,
    settings: Settings,
    start: tuple[Tensor, Tensor],
    log: Teller = lambda entry: None,
) -> tuple[Tensor, Tensor]:
    """The generators after `settings.fit` steps of unlearning from `start`: no preserving, and so no picture."""
    course = Course(settings.fit, settings.fit, FIT_RATE)
    return train(model, heads, material, settings, log, start=start, course=course)


def initial_rotation(
    heads: CriticalHeads, model: Model, settings: Settings, start: tuple[Tensor, Tensor] | None = None
) -> TrainableRotation:
    """A rotation with the generators `start`, or normal random ones: small for image tokens, to grow where it pays."""
    generator = torch.Generator().manual_seed(settings.seed)
    count, widths = len(heads.heads), [heads.basis[name].shape[-1] for name in ("k", _image_basis(heads))]
    drawn = (
        torch.randn(count, width, width, generator=generator) * spread
        for width, spread in zip(widths, (settings.text_init, settings.image_init), strict=True)
    )
    halves = drawn if start is None else (each / 2 for each in start)  # W - W^T of half of a skew matrix is the whole
    text, own = (each.to(model.device).requires_grad_() for each in halves)
    image = settings.image_scale if settings.sharing == "shared" else own
    acts_on = {"text": settings.acts_on, "image": settings.acts_on_image}
    rotation = TrainableRotation(heads, model.geometry, acts_on, text, image)
    rotation.hold(settings.max_angle)
    return rotation


def _image_basis(heads: CriticalHeads) -> str:
    return "image_k" if "image_k" in heads.basis else "k"


def _gradients(
    model: Model, rotation: TrainableRotation, batch: Batch, material: Material, settings: Settings
) -> tuple[float, float]:
    """Leaves the gradients of the batch's mean loss in the weights; returns that loss and the mean squared error."""
    mine = torch.arange(settings.batch)[processes.index() :: processes.count()]
    sums = torch.zeros(2, dtype=torch.float64)
    for part in map(batch.pick, mine.split(settings.passes_of or settings.batch)):
        x = latents(model, material, part)
        text, base = prompts(material, part), target(model, material, settings, part, x.noised)
        rotation.spared, rotation.strengths = part.spared, part.strengths
        # open until backward() has returned: checkpointing runs blocks again in it
        with attached(model.transformer, rotation.rotate):
            loss, error = _loss(velocity(model, x.noised, part.times, text), base, x, settings, part.phase)
            # where no token passed its gate nothing turned: there is nothing to learn from these prompts
            if loss.requires_grad:
                (loss.sum() / settings.batch).backward()
        sums += torch.stack([loss.detach().sum(), error.sum()]).double().cpu() / settings.batch
    rotation.spared = rotation.strengths = None
    for weight in rotation.weights().values():
        weight.grad = processes.total(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    loss, error = processes.total(sums).tolist()
    return loss, error


def _loss(rotated: Tensor, base: Tensor, x: Latents, settings: Settings, phase: str) -> tuple[Tensor, Tensor]:
    """Every prompt's loss, and its mean squared difference between rotated and base velocity; both [B]."""
    error = velocity_matching_loss(rotated, base)
    if phase == UNLEARN and settings.objective == REPLACE:
        return error, error.detach()
    if phase == UNLEARN:
        return unlearning_loss(rotated, base, settings.unlearn_scale), error.detach()
    assert x.clean is not None, "latents of benign pictures"
    kept = flow_matching_loss(rotated, x.clean, x.noise) if settings.regulariser == "flow" else error
    return settings.preserve_weight * kept, error.detach()


def _require_sound(step: int, phase: str, loss: float, error: float, weights: list[Tensor], state: State) -> None:
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    finite = all(bool(each.isfinite().all()) for each in gradients) and abs(loss) < float("inf")
    if finite and (phase == UNLEARN or error <= DIVERGED):
        return
    found = "a loss or gradient that is not finite" if not finite else f"benign velocities changed by {error:.3g}"
    kept = f"the state after step {step} is kept in {state.path.name}; " if state.path else ""
    raise Diverged(
        f"training diverged at step {step + 1}: got {found}, expected finite numbers and at most {DIVERGED:g}; {kept}"
        "lower --learning-rate or raise --preserve-weight"
    )
