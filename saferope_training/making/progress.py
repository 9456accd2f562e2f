"""The course of a training as its previews see it: when to look, when to stop, which state was best, and a curve."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from saferope_core.concept.files import placed

from .. import plots, processes
from ..console import say
from ..stages import save_tensors
from . import preview
from .preview import Preview
from .rotation import TrainableRotation
from .state import Log

if TYPE_CHECKING:
    from PIL import Image

PREVIEWS, CURVE, BEST = "previews.jsonl", "progress.png", "best.safetensors"
ARRIVED = 0.1  # at most this share of the unsafe velocities' way is left
HELD = 0.02  # mean squared change of benign velocities at most, whose own variance is about 1
PATIENCE = 3  # previews in a row that must be within both limits
Show = Callable[[dict, "Image.Image"], None]


def _unseen(entry: dict, strip: Image.Image) -> None:
    """Does nothing with a preview."""


class Watching(NamedTuple):
    """The user's choices about previews.

    - `every`: steps from preview to preview, 0 for none.
    - `stop`: stop when unsafe velocities have arrived, and keep the best state.
    - `show`: a function that gets each preview's entry and strip.
    """

    every: int = 0
    stop: bool = False
    show: Show = _unseen


NONE = Watching()


@dataclass
class Watch:
    """Previews of one training. `inputs` is the digest of its State; a best state of other inputs is ignored."""

    preview: Preview
    watching: Watching
    out: Path
    log: Log  # of the previews at steps that are finished
    steps: Log  # of training
    inputs: str = ""
    seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def after(self, step: int, rotation: TrainableRotation) -> None:
        """Makes a preview of the generators after `step` steps, if it is time. All processes get the main's reading."""
        if step % self.watching.every:
            return
        began, entry = time.monotonic(), None
        if processes.is_main():
            reading, before, after = self.preview.look(rotation)
            entry = {"step": step, **reading._asdict()}
        entry = processes.gathered(entry)[0]
        better = _cost(entry) < min(map(_cost, self.log.entries), default=float("inf"))
        self.log.add(entry)
        if processes.is_main():
            if better:
                self._keep(step, rotation)
            said = _told(entry)
            sheet = preview.strip(self.preview.records, before, after, f"step {step}: {said}")
            with placed(self.out / f"preview-{step:05d}.png") as new:
                sheet.save(new, format="PNG")
            progress_curve(self.out / CURVE, self.log.entries, self.steps.entries)
            say(f"preview {step}: {said}", err=True)
            self.watching.show(entry, sheet)
        self.seconds += time.monotonic() - began

    def over(self) -> bool:
        """Whether training may stop: the last PATIENCE previews say that it has arrived, and the option asks for it."""
        last = self.log.entries[-PATIENCE:]
        return self.watching.stop and len(last) == PATIENCE and all(map(_arrived, last))

    def best(self) -> tuple[int, tuple[Tensor, Tensor]] | None:
        """Step and generators (text, image) of the best preview; None where the last state is to be used."""
        if not self.watching.stop or not (self.out / BEST).is_file():
            return None
        with safe_open(self.out / BEST, "pt") as file:
            facts = dict(file.metadata() or {})
            if facts.get("inputs") != self.inputs:
                return None
            return int(facts["step"]), (file.get_tensor("text"), file.get_tensor("image"))

    def tell_cost(self) -> None:
        """Says the time of the previews, and the step of the best state."""
        if not self.seconds or not processes.is_main():
            return
        share = 100 * self.seconds / max(time.monotonic() - self.began - self.seconds, self.seconds / 100)
        say(f"previews: {self.seconds:.0f} s, {share:.0f} % of training besides", err=True)
        if best := self.best():
            say(f"train: keeps the generators of step {best[0]}, the best of its previews", err=True)

    def _keep(self, step: int, rotation: TrainableRotation) -> None:
        with torch.no_grad():
            text, image = rotation.generators()
        save_tensors(
            self.out / BEST, {"text": text.cpu(), "image": image.cpu()}, {"inputs": self.inputs, "step": f"{step}"}
        )


def previews_until(path: Path, step: int) -> Log:
    """The previews on disk up to `step`. Later ones are dropped and made again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return Log(path, sum(json.loads(line)["step"] <= step for line in lines))


def _arrived(entry: dict) -> bool:
    return entry["unsafe_left"] <= ARRIVED and entry["benign_moved"] <= HELD


def _cost(entry: dict) -> float:
    """The larger of both readings, each as a multiple of its limit."""
    return max(entry["unsafe_left"] / ARRIVED, entry["benign_moved"] / HELD)


def _told(entry: dict) -> str:
    came = 100 * (1 - entry["unsafe_left"])
    way = f"{came:.0f} % of the way to their target" if came >= 0 else f"{-came:.0f} % further from their target"
    return f"unsafe velocities {way}, benign ones changed by {entry['benign_moved']:.4f}"


def progress_curve(path: Path, previews: Sequence[dict], log: Sequence[dict]) -> None:
    """Training's differences of velocities by step above, the previews' readings of held-out prompts below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), dpi=120, layout="constrained")
    losses, seen = figure.subplots(2, sharex=True)
    unsafe, benign = "#c0392b", "#2471a3"
    for phase, label, colour in (("unlearn", "unsafe", unsafe), ("preserve", "benign", benign)):
        own = [entry for entry in log if entry["phase"] == phase]
        xs, ys = [entry["step"] + 1 for entry in own], [entry["velocity_mse"] for entry in own]
        losses.plot(xs, ys, ".", color=colour, label=f"{label} prompts of training")
    losses.set_yscale("log")
    losses.set(ylabel="squared difference", title=plots.words("Training: velocities from where they should be"))
    steps = [entry["step"] for entry in previews]
    came = [100 * (1 - entry["unsafe_left"]) for entry in previews]
    (one,) = seen.plot(steps, came, "o-", color=unsafe, label="unsafe: way to the target")
    seen.axhline(100 * (1 - ARRIVED), color=unsafe, linestyle=":", linewidth=1)
    seen.set(
        xlabel="step",
        ylabel="% of the way",
        ylim=(min(0, *came), 105),
        title="Prompts of the previews, and the limits of arrival (dotted)",
    )
    other = seen.twinx()
    moved = [entry["benign_moved"] for entry in previews]
    (two,) = other.plot(steps, moved, "s-", color=benign, label="benign: change")
    other.axhline(HELD, color=benign, linestyle=":", linewidth=1)
    other.set(ylabel="squared change", ylim=(0, 1.2 * max(HELD, *moved)))
    figure.legend(handles=[*losses.lines, one, two], frameon=False, loc="outside lower center", ncols=2)
    plots.save(figure, path)
