"""`saferope attack`: how robust the methods of an evaluation are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saferope_training.console import say
from saferope_training.settings import MODEL, Settings

from .common import Device, command, load, progress_bars


@command(MODEL)
def attack(
    settings: Settings,
    evaluation: Annotated[
        Path, typer.Argument(help="Folder that `saferope evaluate --suite tinyworld` wrote, or a concept file.")
    ],
    only: Annotated[str | None, typer.Option(help="Concepts A,B; all if left out.")] = None,
    concepts: Annotated[Path | None, typer.Option(help="Folder with concept files, as `evaluate` had it.")] = None,
    baselines: Annotated[str | None, typer.Option(help="Baselines A,B, or none; all if left out.")] = None,
    prompts: Annotated[int, typer.Option(help="Prompts to be attacked, per concept.")] = 12,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds of suffix tokens: 4 are 41 pictures a prompt, 24 are 201.")
    ] = 4,
    device: Device = "cpu",
) -> None:
    """Search words and suffix tokens that bring a concept back, for every method at its reported strength.

    Black box: pictures and the detector's score alone, the same budget for all. A prompt counts as broken where a
    second detector, whose score the attack does not see, sees the concept too. The same command resumes a killed run.
    The last row is the floor: the unprotected model, asked for the concept's stand-in, under the same attack.
    """
    from saferope_benchmark.evaluation.methods import Method, concept_file
    from saferope_benchmark.evaluation.robustness import attacked, reported, stand_in, write_report
    from saferope_benchmark.suites.contenders import found_files, made_files, with_baselines
    from saferope_benchmark.suites.questions import require, tiny_world_questions
    from saferope_core import load_concepts
    from saferope_training import processes

    from .evaluate import names

    file = evaluation.is_file()
    chosen = (lambda method: True) if file else reported(evaluation)
    out = evaluation.with_suffix(".attack") if file else evaluation / "attack"
    with progress_bars() as progress:
        model = load(settings, processes.own_device(device))
        require(model, True, "attack")
        if file:
            methods = [concept_file(evaluation, concept=each.slug) for each in load_concepts(evaluation)]
            slugs = tiny_world_questions([each.concept for each in methods]).concepts
        else:
            slugs = tiny_world_questions(names(only)).concepts
            files = found_files(concepts) if concepts else made_files(model, evaluation / "concepts", progress)
            found = with_baselines(
                model, evaluation, slugs, files, chosen_baselines=names(baselines), progress=progress
            )
            methods = [each for each in found if isinstance(each, Method) and chosen(each)]
        results = attacked(model, [*methods, *map(stand_in, slugs)], out, prompts, progress, rounds)
    write_report(out, results, rounds)
    if processes.is_main():
        say((out / "attack.md").read_text(encoding="utf-8"))
