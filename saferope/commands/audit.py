"""`saferope audit`: the protection that a workflow, or a picture that ComfyUI saved, asks for. Loads no model.

It loads torch only to look into concept files (`--concepts`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saferope_training.console import say
from workflow_lint.concepts import Files

from .common import command

WORSE = (0, 3, 1, 2)  # exit codes: asks, in part, does not, cannot be read


@command()
def audit(
    files: Annotated[
        list[Path], typer.Argument(help="Workflows (JSON of the editor or the API), PNG or WEBP of ComfyUI.")
    ],
    json: Annotated[bool, typer.Option("--json", help="One JSON list, an object for each file.")] = False,
    require_sha256: Annotated[
        list[str] | None,
        typer.Option(help="Every path must pass a concept that is pinned to this file. May be repeated: each of them."),
    ] = None,
    every_concept_pinned: Annotated[
        bool,
        typer.Option("--every-concept-pinned", help="Every concept on a path must be pinned to some file's sha256."),
    ] = False,
    concepts: Annotated[
        Path | None,
        typer.Option(
            help="Folder of concept files. A file that a workflow names must be there, fit its pin, and turn something."
        ),
    ] = None,
) -> None:
    """Check, before it runs, that a workflow asks for protection on every path from a model to a sampler.

    Whole protection counts: all steps, blocks, streams and conditionings, each concept once at strength 1.
    Exit code: 0 it asks for it on every path, 3 in part, 1 it does not, 2 it cannot be read. Of several files the worst
    counts: 2, then 1, then 3. An uncertain workflow does not ask, such as one with an unknown node that takes a model.

    A file can lie. Nothing here proves how a picture was made: `saferope verify` does. The audit does not see a node
    that loads and samples by itself, without a model input.
    """
    from workflow_lint.file import Unreadable, read
    from workflow_lint.report import LONG, as_json, as_text, level_of, plain, unreadable
    from workflow_lint.verdict import Required, audit_file

    digests = tuple(_digest(each) for each in require_sha256 or ())
    if concepts and not concepts.is_dir():
        raise ValueError(f"--concepts: {str(concepts)!r} is no folder, expected the one that holds the concept files")
    files_at_hand = _files_in(concepts) if concepts else None
    reports, texts = [], []
    for file in files:
        try:
            documents = read(file)
            whole, part = (Required(digests, full, every_concept_pinned) for full in (True, False))
            verdict = audit_file(documents, whole, files_at_hand)
            some = verdict if verdict.protected else audit_file(documents, part, files_at_hand)
            level = level_of(verdict.protected, some.protected)
            verdict = verdict if some.protected else some
            reports.append(as_json(str(file), verdict, level))
            texts.append(as_text(str(file), verdict, level))
        except (Unreadable, OSError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            reports.append(unreadable(str(file), reason))
            texts.append(f"{plain(str(file))}: CANNOT BE READ: {plain(reason, LONG)}")
    say(_dumps(reports) if json else "\n\n".join(texts))
    if worst := max((report["exit_code"] for report in reports), key=WORSE.index):
        raise typer.Exit(worst)


def _files_in(folder: Path) -> Files:
    from ..concept_effect import in_folder

    return in_folder(folder)


def _dumps(reports: list[dict]) -> str:
    from json import dumps

    return dumps(reports, indent=1)


def _digest(text: str) -> str:
    from workflow_lint.settings import SHA256

    if not SHA256.fullmatch(found := text.strip().lower()):
        raise ValueError(f"--require-sha256: got {text!r:.80}, expected the 64 hexadecimal digits of a file's SHA-256")
    return found
