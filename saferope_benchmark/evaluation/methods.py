"""The methods to paint under: none, concept files at a strength, baselines at a strength."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from saferope_core import Protection, load_concepts, sha256
from saferope_core.concept.files import require_no_link
from saferope_training.flux.attach import attached
from saferope_training.flux.models import Model
from saferope_training.stages import Progress, save_tensors, sha256_of

from ..prompt_sets import PromptSet

UNPROTECTED, PROTECTED = "unprotected", "protected"
_FITTED = "fitted_with"  # metadata of a baseline's state: model, task and seed of the fit


@dataclass(frozen=True)
class Method:
    """`context(model)` is open while pictures are painted. `identity` names all that decides them beside model and
    prompt.

    `concept` is the concept that it was made for, empty if all. It paints the sets of that concept and the sets of no
    concept. `default`: its users get this strength, so that it is reported and never searched.
    """

    name: str
    identity: str
    context: Callable[[Model], AbstractContextManager]
    concept: str = ""
    strength: float | None = None
    default: bool = False

    @property
    def folder(self) -> str:
        """The name of its folder."""
        parts = (self.name, self.concept, "" if self.strength is None else f"{self.strength:g}")
        return re.sub(r"[^a-z0-9.]+", "-", " ".join(part for part in parts if part).lower()).strip("-")

    @property
    def label(self) -> str:
        """As tables and figures name it: with its strength, if it has one."""
        return self.name if self.strength is None else f"{self.name}, {self.strength:g}"

    def paints(self, asked: PromptSet) -> bool:
        """Whether the set is one of its own."""
        return not (self.concept and asked.concept) or self.concept == asked.concept


def unprotected() -> Method:
    """The base model as it is."""
    return Method(UNPROTECTED, "", lambda model: nullcontext())


def concept_file(path: Path, strength: float = 1.0, name: str = PROTECTED, concept: str = "") -> Method:
    """All concepts of a file, each at `strength`; 1, as trained, is the default. The file is read and
    checked at once."""
    concepts = load_concepts(path)
    ready: dict[int, Protection] = {}  # folding the rotations of FLUX takes seconds, and every chunk opens the context

    def context(model: Model) -> AbstractContextManager:
        if id(model) not in ready:
            ready[id(model)] = Protection(concepts, model.geometry, strengths=[strength] * len(concepts))
        return attached(model.transformer, ready[id(model)].rotate)

    return Method(name, f"concepts {sha256(path)} at {strength!r}", context, concept, strength, strength == 1)


def baselines() -> Mapping[str, object]:
    """The project's baselines by name: modules with STRENGTHS, fit and applied. ImportError where there are none."""
    from ..baselines import BASELINES

    return BASELINES


def fit_baseline(
    name: str,
    module: Any,
    model: Model,
    task: Any,
    slug: str,
    folder: Path,
    weights: str,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> None:
    """Fits a baseline to a concept once and keeps its state in `folder`. For one process: see `processes.share_out`.

    `weights` is a digest of the base model. The state is fitted again when it, the task or the seed is another one.
    """
    path = state_of(name, slug, folder)
    fitted_with = sha256_of([name, weights, repr(task), seed])
    if _metadata(path).get(_FITTED) == fitted_with:
        return
    require_no_link(folder.parent, folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = module.fit(model, task, seed, lambda *step: progress(f"fit {name}", *step[-2:]))
    save_tensors(path, state, {_FITTED: fitted_with})


def baseline(name: str, module: Any, slug: str, folder: Path, strengths: Sequence[float] = ()) -> list[Method]:
    """A baseline that was fitted to a concept, at each of `strengths` (the module's own if empty)."""
    path = state_of(name, slug, folder)
    state, digest = load_file(path), sha256(path)

    def at(strength: float) -> Method:
        def context(other: Model) -> AbstractContextManager:
            return module.applied(other, state, strength)

        return Method(name, f"{name} {digest} at {strength!r}", context, slug, strength)

    return [at(strength) for strength in strengths or module.STRENGTHS]


def state_of(name: str, slug: str, folder: Path) -> Path:
    """Where the state of a baseline that was fitted to a concept lies."""
    return folder / f"{name}-{slug}.safetensors"


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):  # none yet, or cut off
        return {}
