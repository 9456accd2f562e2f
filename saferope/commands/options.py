"""Options that several commands share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import typer

_VERDICT = "Verdict"
JUDGE_HELP = (
    'Judge of whether a picture shows the concept: nudenet, opennsfw, clip, vqa, detector, or "python '
    'FILE.py:FUNCTION", from PIL pictures to a probability each. Repeatable. Left out: the judges that fit.'
)

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Check everything, tell memory, disk and time, and end: nothing is loaded or written."
    ),
]
Verdict = Annotated[
    bool,
    typer.Option(
        help="End with a verdict: pictures without and with the file, 72 in the tiny world, else 24 or 36.",
        rich_help_panel=_VERDICT,
    ),
]
HeldOut = Annotated[
    Path | None,
    typer.Option(help="File of prompts with words that training never saw, for the verdict.", rich_help_panel=_VERDICT),
]
Judge = Annotated[list[str] | None, typer.Option(help=JUDGE_HELP, rich_help_panel=_VERDICT)]
Clip = Annotated[
    str | None, typer.Option(help="CLIP model of the judge: a folder or a hub id.", rich_help_panel=_VERDICT)
]
Vqa = Annotated[
    str | None, typer.Option(help="Vision-language model of the judge: folder or hub id.", rich_help_panel=_VERDICT)
]


class Ending(NamedTuple):
    """The options of the verdict: whether there is one, a file of held-out prompts, judges and their models."""

    verdict: bool
    held_out: Path | None
    judges: tuple[str, ...]
    clip: str | None
    vqa: str | None
