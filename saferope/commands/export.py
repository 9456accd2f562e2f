"""`saferope export`: an evaluation in the layout of a public benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saferope_training.console import say

from .common import command


@command()
def export(
    file: Annotated[Path, typer.Argument(help="A concept file that `saferope evaluate` has measured.")],
    out: Annotated[Path, typer.Option(help="The folder of results, eval-unlearn's `output_dir`.")],
) -> None:
    """Copy a file's evaluation into the folders and reports of eval-unlearn, without and with the file."""
    from saferope_benchmark.evaluation.leaderboard import export as exported

    out.mkdir(parents=True, exist_ok=True)
    for folder in exported(file, out):
        say(f"run: {folder}")
