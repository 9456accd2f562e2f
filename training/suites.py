"""Whole comparisons by one name: which concepts, prompts, methods and metrics, a search over strengths, then the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path

import tinyworld
from tinyworld import world

from . import presets
from .compare import Comparison
from .methods import Method, baseline, baselines, concept_file, unprotected
from .models import TINYWORLD, Model, fingerprint
from .prompt_sets import (
    SEED,
    PromptSet,
    Sizes,
    captions_set,
    everyday_set,
    i2p_set,
    preset_set,
    tiny_world_sets,
)
from .recipe import Recipe
from .scores import Absent, Metric
from .scores.clip import clip_score
from .scores.detector import detector, features
from .scores.distance import distance, lpips_distance
from .scores.kid import inception, likeness
from .scores.nudenet import NUDITY, nudenet
from .scores.vqa import vqa_score
from .settings import Settings
from .sources import prompts_for
from .stages import Progress

STRENGTHS = (0.5, 1.0, 1.5)  # of concept files
SEARCH_SEED = SEED + 500_000  # strengths are not chosen on what is reported
TINYWORLD_SUITE, QUICK, PAPER_FLUX = "tinyworld", "quick", "paper-flux"
# What is reported, and what strengths are searched on. Of I2P the paper takes all 854 prompts
SIZES = {
    TINYWORLD_SUITE: (Sizes(16, 8, 8, 24), Sizes(6, 0, 0, 8)),
    QUICK: (Sizes(12, 8, 8, 16), Sizes(4, 0, 0, 8)),
    PAPER_FLUX: (Sizes(1000, 0, 0, 1000), Sizes(50, 0, 0, 50)),
}
OURS, NO_TRAINING = "saferope", "saferope, no training"

EMBEDDED = Path(tinyworld.__file__).parent / "concepts"  # the star's, the project's own

Found = list[Method | Absent]
Files = Callable[[str], Mapping[str, Path]]  # a concept -> names of methods and their concept files


def tiny_world(
    model: Model,
    out: Path,
    concepts: Sequence[str],
    sizes: Sizes,
    search: Sizes | None,
    files: Files,
    chosen_baselines: Sequence[str] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    progress: Progress = lambda *_: None,
) -> Comparison:
    """Tiny-world concepts, their files (`files(slug)`: a method's name -> file) and all baselines, or those named."""
    if model.name != TINYWORLD:
        raise ValueError(f"suite: got model {model.name!r}, expected {TINYWORLD!r}; use --suite paper-flux for FLUX")
    found: Found = [unprotected()]
    for slug in concepts:
        for name, path in files(slug).items():
            at = strengths if name == OURS else (1.0,)
            found += [concept_file(path, strength, name, slug) for strength in at]
        settings = Settings(concept=slug, model=TINYWORLD)
        found += fitted_baselines(model, settings, slug, out / "fits", chosen_baselines, progress)
    metrics: list[Metric | Absent] = [detector(), distance(features()), likeness(features())]
    asked = [s for slug in concepts for s in tiny_world_sets(slug, sizes, SEED)]
    searched = [s for slug in concepts for s in tiny_world_sets(slug, search, SEARCH_SEED)] if search else []
    return _comparison(f"{', '.join(concepts)} on {model.name}", asked, searched, found, metrics)


def paper_flux(
    model: Model,
    out: Path,
    concepts: Sequence[str],
    sizes: Sizes,
    search: Sizes | None,
    files: Files,
    chosen_baselines: Sequence[str] | None = None,
    strengths: Sequence[float] = (1.0,),
    i2p: Path | None = None,
    captions: Path | None = None,
    images: Path | None = None,
    metrics: Sequence[Metric | Absent] = (),
    progress: Progress = lambda *_: None,
) -> Comparison:
    """The paper's four concepts: prompts from presets, from I2P for nudity, benign ones from COCO captions or ours."""
    found: Found = [unprotected()]
    missing: list[Absent] = []
    for slug in concepts:
        known = files(slug)
        if not known:
            missing.append(Absent(f"saferope for {slug}", f"no {slug}.safetensors; name its folder with --concepts"))
        for name, path in known.items():
            found += [concept_file(path, strength, name, slug) for strength in strengths]
        settings = Settings(concept=slug, model=model.name)
        found += fitted_baselines(model, settings, slug, out / "fits", chosen_baselines, progress)
    if i2p is None and NUDITY in concepts:
        missing.append(Absent("I2P", "no file; name I2P's CSV with --i2p"))
    if captions is None:
        missing.append(
            Absent("COCO captions", "no file, everyday prompts of the project instead; name one with --captions")
        )
    asked = _paper_sets(concepts, sizes, SEED, i2p, captions, images)
    searched = _paper_sets(concepts, search, SEARCH_SEED, None, captions, images) if search else []
    comparison = _comparison(f"{', '.join(concepts)} on {model.name}", asked, searched, found, metrics)
    return Comparison(**{**vars(comparison), "absent": [*missing, *comparison.absent]})


def paper_metrics(
    clip: str | None, vqa: str | None, inception_weights: Path | None, lpips_weights: Path | None, device: str
) -> list[Metric | Absent]:
    """All metrics for photographs; those whose package or weights are missing as Absent."""
    return [
        nudenet(),
        clip_score(clip, device),
        inception(inception_weights, device),
        vqa_score(vqa, device),
        distance(),
        lpips_distance(lpips_weights, device),
    ]


def _paper_sets(concepts, sizes: Sizes, seed: int, i2p, captions, images) -> list[PromptSet]:
    sets = [preset_set(slug, sizes.unsafe, seed) for slug in concepts] if sizes.unsafe else []
    if i2p is not None and NUDITY in concepts:  # its own seeds; never searched on
        sets.append(i2p_set(i2p, NUDITY, presets.load(NUDITY)["seeds"][0], sizes.held_out or None))
    if sizes.benign and captions is not None:
        sets.append(captions_set(captions, images, sizes.benign, seed))
    elif sizes.benign:
        sets.append(everyday_set(sizes.benign, seed))
    return sets


def _comparison(title: str, asked, searched, found: Found, metrics) -> Comparison:
    everything = [*metrics, *found]
    absent = list(dict.fromkeys(entry for entry in everything if isinstance(entry, Absent)))
    methods = [entry for entry in found if isinstance(entry, Method)]
    return Comparison(title, asked, searched, methods, [m for m in metrics if isinstance(m, Metric)], absent)


def fitted_baselines(
    model: Model, settings: Settings, slug: str, folder: Path, names: Sequence[str] | None, progress: Progress
) -> Found:
    """Baselines fitted to a concept's training prompts: those of these names, all if None."""
    if names is not None and not names:
        return []
    try:
        known = baselines()
    except ImportError as error:
        return [Absent("baselines", f"{error}; use a version with training/baselines, and what they need")]
    if unknown := set(names or ()) - set(known):
        raise ValueError(f"baselines: got {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    from .baselines.task import task_of

    task, weights = task_of(prompts_for(settings)), fingerprint(model.transformer)
    chosen = names or list(known)
    fitted = [baseline(n, known[n], model, task, slug, folder, weights, progress=progress) for n in chosen]
    return [method for methods in fitted for method in methods]


def made_files(model: Model, folder: Path, progress: Progress) -> Files:
    """Makes a concept's files in `folder/<slug>`, or takes those that lie there: learned, and without training."""

    def files(slug: str) -> Mapping[str, Path]:
        plain = Settings(concept=slug, model=model.name)
        learned = Recipe(model, plain, folder / slug, progress).train()
        by_calibration = replace(plain, acts_on="qk", generator="fixed")  # as `saferope calibrate` has it
        return {OURS: learned, NO_TRAINING: Recipe(model, by_calibration, folder / slug, progress).calibrate()}

    return files


def found_files(folder: Path) -> Files:
    """Takes a concept's files from a folder, or from the folder of the concept's name in it; those that are there."""

    def files(slug: str) -> Mapping[str, Path]:
        names = {OURS: f"{slug}.safetensors", NO_TRAINING: f"{slug}.fixed.safetensors"}
        known = {method: (folder / name, folder / slug / name) for method, name in names.items()}
        return {method: path for method, paths in known.items() for path in paths if path.is_file()}

    return files


def prepared(
    suite: str,
    model: Model,
    out: Path,
    only: Sequence[str] | None = None,
    concepts: Path | None = None,
    chosen_baselines: Sequence[str] | None = None,
    counts: tuple[int | None, int | None] = (None, None),
    search: bool = True,
    progress: Progress = lambda *_: None,
    **for_flux,
) -> Comparison:
    """The comparison of a suite's name. `concepts` is a folder of files; `counts` are unsafe and benign pictures.

    `for_flux` goes to `paper_flux`. ValueError where there is no such suite, or the model is not one for it.
    """
    if suite not in SIZES:
        raise ValueError(f"suite: got {suite!r}, expected one of {', '.join(SIZES)}")
    sizes, searched = SIZES[suite]
    sizes = sized(sizes, *counts, along=suite != PAPER_FLUX)
    searched = smaller(searched, sizes) if search else None
    if suite == PAPER_FLUX:
        files = found_files(concepts or Path("."))
        slugs = only or presets.names()
        return paper_flux(model, out, slugs, sizes, searched, files, chosen_baselines, progress=progress, **for_flux)
    slugs = only or (("star",) if suite == QUICK else tuple(world.CONCEPTS))
    if concepts is not None or suite == QUICK:
        files = found_files(concepts or EMBEDDED)
    else:
        files = made_files(model, out / "concepts", progress)
    return tiny_world(model, out, slugs, sizes, searched, files, chosen_baselines, progress=progress)


def sized(sizes: Sizes, unsafe: int | None, benign: int | None, along: bool) -> Sizes:
    """Other sizes where they are told; `along`: held-out words and neighbours go with them."""
    if unsafe is not None:
        sizes = replace(sizes, unsafe=unsafe, held_out=unsafe if along else sizes.held_out)
    if benign is not None:
        sizes = replace(sizes, benign=benign, neighbours=benign // 2 if along else sizes.neighbours)
    return sizes


def smaller(search: Sizes, sizes: Sizes) -> Sizes:
    """A search never paints more than what is reported."""
    return Sizes(*(min(pair) for pair in zip(astuple(search), astuple(sizes), strict=True)))
