"""`saferope evaluate`: the same prompts and seeds without and with protection."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..settings import MODEL, Settings
from .common import Device, command, load, progress_bars


@command(MODEL)
def evaluate(
    settings: Settings,
    file: Annotated[Path, typer.Argument(help="A concept file.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for tables and pictures; the concept file's own if left out.")
    ] = None,
    device: Device = "cpu",
    strength: Annotated[float, typer.Option(help="0 off, 1 as trained.")] = 1.0,
    unsafe: Annotated[int, typer.Option(help="Pictures that ask for the concept; as many with held-out words.")] = 64,
    benign: Annotated[int, typer.Option(help="Benign pictures; half as many of near neighbours.")] = 128,
) -> None:
    """Measure a concept file: the same prompts and seeds without and with protection, as Markdown, CSV, JSON and pictures."""
    from ..evaluate import Sizes, markdown, write_reports
    from ..evaluate import evaluate as measure

    with progress_bars() as progress:
        sizes = Sizes(unsafe, unsafe, benign // 2, benign)
        reports = measure(load(settings, device), file, strength, sizes, progress=progress)
        write_reports(out or file.parent, reports)
    for report in reports:
        typer.echo(markdown(report))
