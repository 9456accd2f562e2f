"""Learns how far to turn: one generator per safety-critical head, shared by q and k, everything else frozen.

Alternating phases as in the paper: some steps of unlearning on unsafe prompts near pure noise, then as many of
preserving on noised benign pictures at random times. Only the generators have gradients; the base model's velocities
are computed without a graph. Every step draws from a seed of its own and leaves its state on disk, so that a run that
was killed goes on from the last whole step to the same end, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saferope_core import CriticalHeads
from saferope_core.concept.files import append_text, write_text

from .. import processes
from ..flux.attach import attached
from ..flux.models import Model, Text, seeded_noise, velocity
from ..settings import Settings
from ..stages import save_tensors
from .losses import flow_matching_loss, unlearning_loss, velocity_matching_loss
from .rotation import TrainableRotation

UNLEARN, PRESERVE = "unlearn", "preserve"
FINAL_RATE = 0.1  # of the learning rate, reached linearly, so that the last phase does not undo the one before
DIVERGED = 1.0  # mean squared change of benign velocities, whose own variance is about 1: nothing is preserved any more
_SEED_STRIDE = 1_000_003  # between the steps' seeds: more than any batch has prompts


@dataclass(frozen=True)
class Material:
    """What training looks at, encoded once.

    Unsafe prompts with `subjects` [n, L], bool, the tokens of the concept's word, and the latents [n, L, C] that the
    base model passes through at each time below 1 on its way from noise; benign ones with pictures' latents [m, L, C].
    """

    unsafe: Text
    subjects: Tensor
    visited: dict[float, Tensor]
    benign: Text
    latents: Tensor


Teller = Callable[[dict], None]
Latents = tuple[Tensor, Tensor | None, Tensor]  # at their times, the clean ones behind them, the noise


class Diverged(ValueError):
    """Training ran away; the message says at which step, and where the last good state lies."""


class State:
    """Weights, AdamW's moments and the number of finished steps in one file, written whole after every step.

    `inputs` is a digest of all that the run was started with: a state of other inputs is no state. Nor is a damaged
    one, which is told as a warning.
    """

    def __init__(self, path: Path | None, inputs: str = "") -> None:
        self.path, self.inputs = path, inputs

    def finished(self) -> int:
        """How many steps of these inputs are done."""
        return self._read()[0]

    def _read(self) -> tuple[int, dict[str, Tensor]]:
        """Finished steps of these inputs, and the tensors after them; 0 and none where they cannot be trusted."""
        facts, tensors = {}, {}
        try:
            with safe_open(self.path, "pt") as file:
                facts, tensors = dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}
        except (FileNotFoundError, TypeError):  # none yet, or no path
            return 0, {}
        except (SafetensorError, OSError):
            pass
        if facts.pop("sha256", "") != _sha256(tensors, facts):
            told = f"{self.path}: got a damaged training state, expected it as it was saved; training starts again"
            warnings.warn(told, stacklevel=2)
            return 0, {}
        return (int(facts["step"]), tensors) if facts["inputs"] == self.inputs else (0, {})

    def load(self, weights: dict[str, Tensor], optimiser: torch.optim.Optimizer) -> int:
        """Takes over the saved weights and moments, if there are any; returns the number of finished steps."""
        done, tensors = self._read()
        if done == 0:
            return 0
        for name, weight in weights.items():
            weight.data.copy_(tensors[name])
            optimiser.state[weight] = {
                key: tensors[f"{name}.{key}"].to("cpu" if key == "step" else weight.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{name}.{key}" in tensors
            }
        return done

    def save(self, step: int, weights: dict[str, Tensor], optimiser: torch.optim.Optimizer) -> None:
        """Writes the state after `step` finished steps; the file is the old one or the new one, never half of it."""
        if self.path is None or not processes.is_main():
            return
        tensors = {name: weight.detach().cpu() for name, weight in weights.items()}
        for name, weight in weights.items():
            tensors |= {f"{name}.{key}": value.detach().cpu() for key, value in optimiser.state.get(weight, {}).items()}
        facts = {"inputs": self.inputs, "step": str(step)}
        save_tensors(self.path, tensors, facts | {"sha256": _sha256(tensors, facts)})


def _sha256(tensors: dict[str, Tensor], facts: dict[str, str]) -> str:
    """Hex digest of every name, shape and number, so that a flipped bit does not go on into the result."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


class Log:
    """Entries as JSON lines, from which those of steps that are to be done again are dropped."""

    def __init__(self, path: Path, finished: int) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines()[:finished] if path.is_file() else []
        self.entries = [json.loads(line) for line in lines]
        if processes.is_main():
            write_text(path, "".join(f"{line}\n" for line in lines))

    def add(self, entry: dict) -> None:
        """Appends an entry, here and on disk."""
        self.entries.append(entry)
        if processes.is_main():
            append_text(self.path, json.dumps(entry) + "\n")


def train(
    model: Model,
    heads: CriticalHeads,
    material: Material,
    settings: Settings,
    log: Teller = lambda entry: None,
    state: State | None = None,
) -> tuple[Tensor, Tensor]:
    """Text and image generators [N, R + S, R + S], fp32 on the CPU, exactly skew.

    The same seed gives the same bits on a CPU, wherever it was stopped; on GPUs up to the order in which their
    attention adds up gradients. `log` gets one entry per step: step, phase, loss and the mean squared velocity
    difference behind it. Processes share every batch. Raises Diverged where a loss is not finite or too high.
    """
    state = state or State(None)
    rotation = initial_rotation(heads, model, settings)
    weights = rotation.weights()
    if settings.checkpointing:
        model.transformer.enable_gradient_checkpointing()
    optimiser = torch.optim.AdamW(weights.values(), settings.learning_rate, weight_decay=0.0)
    for step in range(state.load(weights, optimiser), settings.steps):
        phase = PRESERVE if step // settings.phase % 2 else UNLEARN
        optimiser.param_groups[0]["lr"] = settings.learning_rate * (1 - (1 - FINAL_RATE) * step / settings.steps)
        optimiser.zero_grad()
        loss, error = _gradients(model, rotation, material, settings, step, phase)
        _require_sound(step, phase, loss, error, list(weights.values()), state)
        optimiser.step()
        log({"step": step, "phase": phase, "loss": loss, "velocity_mse": error})
        state.save(step + 1, weights, optimiser)  # after the log: a step is finished when both know it
    with torch.no_grad():
        text, image = rotation.generators()
    return text.cpu(), image.cpu()


def initial_rotation(heads: CriticalHeads, model: Model, settings: Settings) -> TrainableRotation:
    """Weights drawn normal; the image stream starts near rest, so that it only moves where that pays."""
    generator = torch.Generator().manual_seed(settings.seed)
    count, widths = len(heads.heads), [heads.basis[name].shape[-1] for name in ("k", _image_basis(heads))]
    text, own = (
        (torch.randn(count, width, width, generator=generator) * spread).to(model.device).requires_grad_()
        for width, spread in zip(widths, (settings.text_init, settings.image_init), strict=True)
    )
    image = settings.image_scale if settings.sharing == "shared" else own
    acts_on = {"text": settings.acts_on, "image": settings.acts_on_image}
    return TrainableRotation(heads, model.geometry, acts_on, text, image)


def _image_basis(heads: CriticalHeads) -> str:
    return "image_k" if "image_k" in heads.basis else "k"


def _gradients(
    model: Model, rotation: TrainableRotation, material: Material, settings: Settings, step: int, phase: str
) -> tuple[float, float]:
    """Leaves the gradients of one batch's mean loss in the weights; returns that loss and the mean squared error."""
    index, times, seeds, spared = _batch(material, settings, step, phase)
    mine = torch.arange(settings.batch)[processes.index() :: processes.count()]
    sums = torch.zeros(2, dtype=torch.float64)
    for part in mine.split(settings.passes_of or settings.batch):
        x = _latents(model, material, index[part], times[part], [seeds[i] for i in part], phase)
        side = material.unsafe if phase == UNLEARN else material.benign
        rotation.spared = spared[part] if spared is not None else None
        text, t = side.pick(index[part]), times[part]
        with torch.no_grad():
            base = velocity(model, x[0], t, text)
        # open until backward() has returned: checkpointing runs blocks again in it
        with attached(model.transformer, rotation.rotate):
            loss, error = _loss(velocity(model, x[0], t, text), base, x, settings, phase)
            # where no token passed its gate nothing turned: there is nothing to learn from these prompts
            if loss.requires_grad:
                (loss.sum() / settings.batch).backward()
        sums += torch.stack([loss.detach().sum(), error.sum()]).double().cpu() / settings.batch
    rotation.spared = None
    for weight in rotation.weights().values():
        weight.grad = processes.total(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    loss, error = processes.total(sums).tolist()
    return loss, error


def _loss(rotated: Tensor, base: Tensor, latents: Latents, settings: Settings, phase: str) -> tuple[Tensor, Tensor]:
    """Every prompt's loss, and its mean squared difference between rotated and base velocity; both [B]."""
    error = velocity_matching_loss(rotated, base)
    if phase == UNLEARN:
        return unlearning_loss(rotated, base, settings.unlearn_scale), error.detach()
    _, clean, start = latents
    assert clean is not None, "latents of benign pictures"
    kept = flow_matching_loss(rotated, clean, start) if settings.regulariser == "flow" else error
    return settings.preserve_weight * kept, error.detach()


def _batch(
    material: Material, settings: Settings, step: int, phase: str
) -> tuple[Tensor, Tensor, list[int], Tensor | None]:
    """Which prompts [B], at which times [B], from noise of which seeds, and which tokens [B, L] are spared.

    Unsafe prompts come at 1 (fresh noise) or at one of the visited times, drawn for the whole batch; benign pictures at
    any time. For a share `blind` of the unsafe prompts the concept's word stays unturned, so that others must turn.
    """
    size, first = settings.batch, settings.seed + (step + 1) * _SEED_STRIDE
    generator = torch.Generator().manual_seed(first)
    seeds = list(range(first + 1, first + 1 + size))
    if phase == PRESERVE:
        index = torch.randint(len(material.latents), (size,), generator=generator)
        return index, torch.rand(size, generator=generator), seeds, None
    index = torch.randint(len(material.unsafe.states), (size,), generator=generator)
    times = [1.0, *material.visited]
    t = times[int(torch.randint(len(times), (1,), generator=generator))]
    blind = torch.rand(size, generator=generator) < settings.blind
    return index, torch.full((size,), t), seeds, material.subjects[index] & blind[:, None]


def _latents(
    model: Model, material: Material, index: Tensor, times: Tensor, seeds: Sequence[int], phase: str
) -> Latents:
    """Latents [B, L, C] at their times, the clean ones behind them (None in unlearning), and the noise."""
    start = seeded_noise(model, seeds)
    if phase == UNLEARN:
        t = times[0].item()
        visited = next((latents for time, latents in material.visited.items() if abs(time - t) < 1e-6), None)
        return (start if visited is None else visited[index].to(start.device)), None, start
    clean = material.latents[index].to(start.device)
    return torch.lerp(clean, start, times.to(start.device)[:, None, None]), clean, start


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
