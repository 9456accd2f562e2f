"""The methods of a suite: concept files, made or found, and fitted baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from saferope_training import processes
from saferope_training.flux.identity import identity
from saferope_training.flux.models import TINYWORLD, Model
from saferope_training.making.recipe import Recipe
from saferope_training.prompts.sources import prompts_for
from saferope_training.settings import Settings
from saferope_training.stages import Progress

from ..evaluation.methods import Method, baseline, baselines, concept_file, fit_baseline
from ..scores import Absent

OURS, CALIBRATED = "saferope", "saferope, calibrated"
STRENGTHS = (0.75, 1.0, 1.25, 1.5)  # of learned concept files, for the Pareto plot; 1 is reported

Found = list[Method | Absent]
Files = Callable[[str], Mapping[str, Path]]  # a concept -> names of methods and their concept files


def settings_for(model: Model, slug: str, **changes) -> Settings:
    """The defaults for a concept, with the prompts of the world that the model paints.

    A real model trains a prompt at a time and recomputes its blocks: less memory, and the same file but for last bits.
    """
    if model.tiny:
        return Settings(concept=slug, model=TINYWORLD, **changes)
    return Settings(concept=slug, model=model.name, passes_of=1, checkpointing=True, **changes)


def by_calibration(settings: Settings) -> Settings:
    """The settings as `saferope calibrate` has them."""
    return replace(settings, acts_on="qk", generator="fixed")


def made_files(model: Model, folder: Path, progress: Progress) -> Files:
    """Makes a concept's files in `folder/<slug>`, trained and calibrated, or takes the files that lie there."""

    def files(slug: str) -> Mapping[str, Path]:
        plain = settings_for(model, slug)
        learned = Recipe(model, plain, folder / slug, progress).train()
        return {OURS: learned, CALIBRATED: Recipe(model, by_calibration(plain), folder / slug, progress).calibrate()}

    return files


def found_files(folder: Path) -> Files:
    """Takes the concept's files that lie in a folder, or in the folder of the concept's name in it."""

    def files(slug: str) -> Mapping[str, Path]:
        names = {OURS: f"{slug}.safetensors", CALIBRATED: f"{slug}.fixed.safetensors"}
        known = {method: (folder / name, folder / slug / name) for method, name in names.items()}
        return {method: path for method, paths in known.items() for path in paths if path.is_file()}

    return files


def with_baselines(
    model: Model,
    out: Path,
    concepts: Sequence[str],
    files: Files,
    strengths: Sequence[float] = STRENGTHS,
    chosen_baselines: Sequence[str] | None = None,
    progress: Progress = lambda *_: None,
) -> Found:
    """For each concept its files, the learned one at every strength, and all baselines or the named ones.

    Of several processes each makes whole concepts' files, where there are enough of them, and fits whole baselines.
    """
    found: Found = []
    if len(concepts) >= processes.count():  # fewer: all share the batches of each
        processes.share_out([partial(files, slug) for slug in concepts])
    for slug in concepts:
        known = files(slug)
        if not known:
            found.append(Absent(f"{OURS} for {slug}", f"no {slug}.safetensors; name its folder with --concepts"))
        for name, path in known.items():
            at = strengths if name == OURS else (1.0,)
            found += [concept_file(path, strength, name, slug) for strength in at]
        settings = settings_for(model, slug)
        found += fitted_baselines(model, settings, slug, out / "fits", chosen_baselines, progress)
    return found


def fitted_baselines(
    model: Model, settings: Settings, slug: str, folder: Path, names: Sequence[str] | None, progress: Progress
) -> Found:
    """Baselines fitted to a concept's training prompts: the named ones, all if None."""
    if names is not None and not names:
        return []
    try:
        known = baselines()
    except ImportError as error:
        return [Absent("baselines", f"{error}; use a version with saferope_benchmark/baselines and their packages")]
    if unknown := set(names or ()) - set(known):
        raise ValueError(f"baselines: got {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    from ..baselines.task import task_of

    task, weights = task_of(prompts_for(settings)), identity(model)
    chosen = names or list(known)
    fit = partial(fit_baseline, model=model, task=task, slug=slug, folder=folder, weights=weights, progress=progress)
    processes.share_out([partial(fit, name, known[name]) for name in chosen])
    return [method for name in chosen for method in baseline(name, known[name], slug, folder)]


def one_for_all(concepts: Sequence[str], files: Files) -> Found:
    """Each concept's file on the prompts of all of them: does it suppress its own alone?"""
    known = {slug: files(slug) for slug in concepts}
    return [
        concept_file(known[slug][OURS], 1.0, f"{slug}'s file")
        if OURS in known[slug]
        else Absent(f"{slug}'s file", f"no {slug}.safetensors; name its folder with --concepts")
        for slug in concepts
    ]
