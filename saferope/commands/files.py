"""`saferope inspect`, `merge`, `convert`, `card`: work on concept files. None of them loads a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saferope_training.console import say

from .common import command, read_concepts

File = Annotated[Path, typer.Argument(help="A concept file.")]
Half = Annotated[bool, typer.Option(help="Hold bases and generators in half precision: half the size.")]


@command()
def inspect(
    file: File,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for a head map of every concept; none if left out.")
    ] = None,
) -> None:
    """Print the record of a concept file. Writes nothing, unless a folder for pictures is named."""
    from saferope_core import load_concepts

    from .. import concept_report

    concepts = load_concepts(file)
    say(concept_report.describe(file, concepts))
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for picture in concept_report.draw(file, concepts, pictures):
            say(f"head map: {picture}")


@command()
def merge(
    files: Annotated[list[str], typer.Argument(help="Concept files, each FILE or FILE:STRENGTH, in order of use.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    half: Half = False,
) -> None:
    """Pack concepts into one file, and report how much they overlap."""
    from dataclasses import replace
    from itertools import combinations

    import torch

    from saferope_core import STREAMS, overlap, save_concepts
    from saferope_core.concept.concept_file import require_together

    concepts = [replace(c, strength=c.strength * s) for c, s in zip(*read_concepts(files), strict=True)]
    require_together(concepts)  # pairs of too many take hours
    say("overlap (mean squared cosine of the principal angles, 0 none, 1 all; the larger of text and image tokens):")
    for first, second in combinations(concepts, 2):
        found = overlap(first, second)
        streams = ", ".join(f"{stream} {found.of(stream):.3f}" for stream in STREAMS)
        say(f"  {first.slug} / {second.slug}: {found.most:.3f} ({streams}) in {len(found.heads)} shared heads")
    save_concepts(out, concepts, dtype=torch.float16 if half else torch.float32)
    say(f"concept file: {out}")


@command()
def convert(
    file: Annotated[Path, typer.Argument(help="The authors' RotaryAdapter state dict, .pth.")],
    out: Annotated[Path, typer.Option(help="The concept file to write.")],
    slug: Annotated[str, typer.Option(help="The concept's name: small letters, digits, hyphens.")],
    half: Half = False,
) -> None:
    """Make a concept file of the authors' RotaryAdapter. Only tensors are unpickled. Generators become exactly skew."""
    import torch

    from saferope_core import save_concepts

    from ..convert import convert as converted

    save_concepts(out, [converted(file, slug)], dtype=torch.float16 if half else torch.float32)
    say(f"concept file: {out}")


@command()
def card(
    file: File,
    license: Annotated[str, typer.Option(help="SPDX name of the licence that you give the file, such as cc0-1.0.")],
) -> None:
    """Write a model card beside a concept file: provenance, sha256, head map, and its evaluation where there is one."""
    from saferope_core import load_concepts
    from saferope_core.concept.files import write_text

    from .. import concept_report

    concepts = load_concepts(file)
    out = file.with_suffix(".md")
    text = concept_report.card(file, concepts, license)
    concept_report.draw(file, concepts, file.parent)
    write_text(out, text)
    say(f"model card: {out}")
