"""`saferope generate`: pictures through diffusers, without and with protection, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saferope_training.console import say
from saferope_training.settings import MODEL, Settings

from .common import ConceptFiles, Device, command, load, progress_bars, read_concepts


@command(MODEL)
def generate(
    settings: Settings,
    out: Annotated[Path, typer.Option(help="Folder for the pictures, the grid and their record.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What to paint. May be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of prompts: .txt, .jsonl, .csv, .json.")] = None,
    concept: ConceptFiles = None,
    picture_seed: Annotated[
        list[int] | None, typer.Option("--seed", help="A picture per prompt and seed, 0 if left out. Repeatable.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps; the model's own if left out (dev 28, schnell 4).")
    ] = None,
    start: Annotated[float, typer.Option(help="Where in the steps protection starts, 0 to 1.")] = 0.0,
    end: Annotated[float, typer.Option(help="Where in the steps protection ends, 0 to 1.")] = 1.0,
    device: Device = "cpu",
) -> None:
    """Paint prompts without and with protection: pictures, a grid of pairs, and a record of the risk of each."""
    from ..generate import GRID, RECORD, paint

    if not 0 <= start <= end <= 1:
        raise ValueError(f"steps: got {start:g} to {end:g}, expected 0 <= start <= end <= 1")
    texts = [*(prompt or []), *_read(prompts)]
    if not texts:
        raise ValueError("prompts: got none, expected --prompt or a file with --prompts")
    concepts, strengths = read_concepts(concept or [])
    with progress_bars() as progress:
        model = load(settings, device)
        for note in _notes(concepts, strengths, steps or model.steps, (start, end)):
            say(f"saferope: {note}", err=True)
        paint(model, texts, picture_seed or [0], concepts, strengths, out, steps, (start, end), progress)
    say(f"record: {out / RECORD}\npairs:  {out / GRID}")


def _notes(concepts: list, strengths: list[float], steps: int, span: tuple[float, float]) -> list[str]:
    """Notes about settings of the concepts that have no effect."""
    from saferope_benchmark.sample import active_steps
    from saferope_core import strength_notes

    notes = strength_notes(concepts, [c.strength * factor for c, factor in zip(concepts, strengths, strict=True)])
    if concepts and not active_steps(steps, span):
        notes.append(f"none of the {steps} steps starts from {span[0]:g} to below {span[1]:g}: nothing is protected")
    return notes


def _read(path: Path | None) -> list[str]:
    if path is None:
        return []
    from saferope_training.prompts.readers import read_texts

    return read_texts(path)
