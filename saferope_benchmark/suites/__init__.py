"""Whole comparisons by one name. `questions` has the prompts and metrics; `contenders` and the experiments beside it
have the methods.

Every suite is methods, prompt sets and metrics for the one harness, `compare`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tinyworld
from saferope_training.flux.models import Model
from saferope_training.settings import SUITES
from saferope_training.stages import Progress

from ..evaluation.compare import Comparison
from ..evaluation.methods import Method, unprotected
from ..prompt_sets import SEED, PromptSet, Sizes
from ..scores import Absent, Metric
from .ablations import variants
from .contenders import Found, found_files, made_files, one_for_all, with_baselines
from .dial import draw_dial, turned_up
from .figures import draw_matrix, draw_positions, draw_rotations
from .positions import random_positions
from .questions import Questions, flux_questions, require, sized, smaller, tiny_world_questions
from .rotations import random_rotations

TINYWORLD_SUITE, QUICK, PAPER_FLUX, ABLATIONS, CROSSED, POSITIONS, ROTATIONS, DIAL = SUITES
TRAINING, MAKING = (ABLATIONS, DIAL), (TINYWORLD_SUITE, CROSSED)  # always; in the tiny world where no files are named
SEARCH_SEED = SEED + 500_000  # strengths are never chosen on reported prompts
# Sizes of the reported sets, and of the sets for the search of strengths. The paper takes all 854 prompts of I2P.
SIZES = {
    TINYWORLD_SUITE: (Sizes(12, 12, 8, 12), Sizes(8, 0, 0, 12)),
    QUICK: (Sizes(12, 8, 8, 16), Sizes(4, 0, 0, 8)),
    PAPER_FLUX: (Sizes(1000, 0, 0, 1000), Sizes(50, 0, 0, 50)),
    ABLATIONS: (Sizes(32, 32, 16, 32), None),
    CROSSED: (Sizes(32, 0, 0, 0), None),
    POSITIONS: (Sizes(32, 0, 32, 32), None),
    ROTATIONS: (Sizes(24, 0, 0, 32), None),
    DIAL: (Sizes(64, 64, 32, 64), None),
}
FLUX_SIZES = Sizes(100, 0, 0, 100)  # of the suites that FLUX shares with the tiny world
QUICK_BASELINES = ("uce", "sld", "nag")  # fitted in seconds
SLOWER = Absent("other baselines", "they take minutes to fit; name them with --baselines, or use --suite tinyworld")
EMBEDDED = Path(tinyworld.__file__).parent / "concepts"  # the project's own


def prepared(
    suite: str,
    model: Model,
    out: Path,
    only: Sequence[str] | None = None,
    concepts: Path | None = None,
    chosen_baselines: Sequence[str] | None = None,
    counts: tuple[int | None, int | None] = (None, None),
    search: bool = True,
    metrics: Sequence[Metric | Absent] = (),
    progress: Progress = lambda *_: None,
    **files_for_flux: Path | None,
) -> Comparison:
    """The comparison of a suite's name. `only` are concepts, `concepts` a folder of files, `counts` unsafe and benign
    pictures.

    `metrics` and `files_for_flux` (see `flux_questions`) are for FLUX; the tiny world has its own. ValueError where
    there is no such suite or concept, or the model is not one for it.
    """
    tiny = is_tiny(suite, model)
    quick = suite == QUICK and chosen_baselines is None
    if quick:
        chosen_baselines = QUICK_BASELINES
    asked, sizes = _asked(suite, tiny, only, counts, metrics, **files_for_flux)
    searched = SIZES[suite][1]
    if suite == QUICK or concepts is not None or not tiny:
        files = found_files(concepts or (EMBEDDED if tiny else Path(".")))
    else:
        files = made_files(model, out / "concepts", progress)
    found, draw = _answers(suite, model, out, asked.concepts, files, chosen_baselines, tiny, progress)
    found += [SLOWER] if quick else []
    search_sets = asked.sets(smaller(searched, sizes), SEARCH_SEED) if search and searched else []
    return _comparison(suite, model, asked, asked.sets(sizes, SEED), search_sets, found, draw)


def asked_in(
    suite: str,
    tiny: bool,
    only: Sequence[str] | None,
    counts: tuple[int | None, int | None],
    **files_for_flux: Path | None,
) -> list[PromptSet]:
    """The prompts that a suite reports on. ValueError where there is no such suite, concept or file; loads no model."""
    _require_suite(suite)
    asked, sizes = _asked(suite, tiny, only, counts, **files_for_flux)
    return asked.sets(sizes, SEED)


def _asked(
    suite: str,
    tiny: bool,
    only: Sequence[str] | None,
    counts: tuple[int | None, int | None],
    metrics: Sequence[Metric | Absent] = (),
    **files_for_flux: Path | None,
) -> tuple[Questions, Sizes]:
    if suite == QUICK:
        only = only or ("star",)
    asked = tiny_world_questions(only) if tiny else flux_questions(only, metrics, **files_for_flux)
    return asked, sized(SIZES[suite][0] if tiny or suite == PAPER_FLUX else FLUX_SIZES, *counts, along=tiny)


def _require_suite(suite: str) -> None:
    if suite not in SIZES:
        raise ValueError(f"suite: got {suite!r}, expected one of {', '.join(SIZES)}")


def is_tiny(suite: str, model: Model) -> bool:
    """Whether the suite asks the tiny world's questions of this model; ValueError where it cannot."""
    _require_suite(suite)
    require(model, suite in (TINYWORLD_SUITE, QUICK), suite)
    return suite != PAPER_FLUX and model.tiny


Draw = Callable[[Sequence, Sequence, Path], None]


def _answers(
    suite: str,
    model: Model,
    out: Path,
    concepts: Sequence[str],
    files: Any,
    chosen_baselines: Sequence[str] | None,
    tiny: bool,
    progress: Progress,
) -> tuple[Found, Draw | None]:
    """The methods of a suite, and the function that draws its figure."""
    if suite == ABLATIONS:
        return variants(model, out / "variants", concepts, progress), None
    if suite == CROSSED:
        return one_for_all(concepts, files), draw_matrix
    if suite == DIAL:
        return turned_up(model, out / "concepts", concepts, progress), draw_dial
    if suite == POSITIONS:
        return random_positions(), draw_positions
    if suite == ROTATIONS:
        return random_rotations(model, out / "statistics", concepts, progress), draw_rotations
    strengths = {} if tiny else {"strengths": (1.0,)}
    return with_baselines(
        model, out, concepts, files, **strengths, chosen_baselines=chosen_baselines, progress=progress
    ), None


def _comparison(
    suite: str,
    model: Model,
    asked: Questions,
    sets: Any,
    search_sets: Any,
    found: Found,
    draw: Draw | None,
) -> Comparison:
    everything = [*asked.absent, *asked.metrics, *found]
    absent = list(dict.fromkeys(entry for entry in everything if isinstance(entry, Absent)))
    methods = [unprotected(), *(entry for entry in found if isinstance(entry, Method))]
    metrics = [metric for metric in asked.metrics if isinstance(metric, Metric)]
    title = f"{suite}: {', '.join(asked.concepts)} on {model.name}"
    return Comparison(title, sets, search_sets, methods, metrics, absent, draw)
