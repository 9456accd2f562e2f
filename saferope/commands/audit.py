"""`saferope audit`: what a workflow, or a picture that ComfyUI saved, says of its protection. Loads no model.

It loads torch only to look into concept files (`--concepts`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saferope_training.console import say
from workflow_lint.effect import Files

from .common import command


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
    require_full: Annotated[
        bool,
        typer.Option(
            help="Only whole protection counts: all steps, blocks, streams and conditionings, each concept once at "
            "strength 1."
        ),
    ] = False,
    concepts: Annotated[
        Path | None,
        typer.Option(
            help="Folder of concept files. A file that a workflow names must be there, fit its pin, and turn something."
        ),
    ] = None,
) -> None:
    """Check that every path of a workflow from a model to a sampler passes a SafeRoPE Apply that acts.

    Exit code: 0 protected, 1 not protected, 2 cannot be read. Of several files the highest counts. An uncertain
    workflow counts as not protected, such as one with an unknown node that takes a model.

    A file can lie. Nothing here proves how a picture was made, and a pinned sha256 proves it neither. The audit does
    not see a node that loads and samples by itself, without a model input.
    """
    from workflow_lint.file import Unreadable, read
    from workflow_lint.report import LONG, as_json, as_text, plain, unreadable
    from workflow_lint.verdict import Required, audit_file

    required = Required(tuple(_digest(each) for each in require_sha256 or ()), require_full)
    if concepts and not concepts.is_dir():
        raise ValueError(f"--concepts: {str(concepts)!r} is no folder, expected the one that holds the concept files")
    files_at_hand = _files_in(concepts) if concepts else None
    reports, texts = [], []
    for file in files:
        try:
            verdict = audit_file(read(file), required, files_at_hand)
            reports.append(as_json(str(file), verdict))
            texts.append(as_text(str(file), verdict))
        except (Unreadable, OSError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            reports.append(unreadable(str(file), reason))
            texts.append(f"{plain(str(file))}: CANNOT BE READ: {plain(reason, LONG)}")
    say(_dumps(reports) if json else "\n\n".join(texts))
    if worst := max(report["exit_code"] for report in reports):
        raise typer.Exit(worst)


def _files_in(folder: Path) -> Files:
    from ..concept_effect import in_folder

    return in_folder(folder)


def _dumps(reports: list[dict]) -> str:
    from json import dumps

    return dumps(reports, indent=1)


def _digest(text: str) -> str:
    from workflow_lint.concepts import SHA256

    if not SHA256.fullmatch(found := text.strip().lower()):
        raise ValueError(f"--require-sha256: got {text!r:.80}, expected the 64 hexadecimal digits of a file's SHA-256")
    return found
