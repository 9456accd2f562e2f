"""`saferope audit`: was a workflow, or a picture that ComfyUI saved, protected? Loads no model and no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

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
            help="Only whole protection counts: all steps, blocks, streams, conditionings, strength 1 or more."
        ),
    ] = False,
    concepts: Annotated[
        Path | None,
        typer.Option(help="Folder of concept files: those that a workflow names must be there, and fit its pins."),
    ] = None,
) -> None:
    """Tell whether every path from a model to a sampler passes a SafeRoPE Apply that acts.

    Exit code: 0 protected, 1 not protected, 2 cannot be read; of several files, the highest. Whatever cannot be followed
    counts as not protected.

    It reads what a file says, and a file can lie: nothing here proves how a picture was made, a pinned sha256 neither. A node
    that loads and samples by itself, without a model going in, looks like any other node and is not seen.
    """
    from ..audit.file import Unreadable, read
    from ..audit.report import LONG, as_json, as_text, plain, unreadable
    from ..audit.verdict import Required, audit_file

    required = Required(tuple(_digest(each) for each in require_sha256 or ()), require_full)
    digest = _digests(concepts) if concepts else None
    reports, texts = [], []
    for file in files:
        try:
            verdict = audit_file(read(file), required, digest)
            reports.append(as_json(str(file), verdict))
            texts.append(as_text(str(file), verdict))
        except (Unreadable, OSError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            reports.append(unreadable(str(file), reason))
            texts.append(f"{plain(str(file))}: CANNOT BE READ: {plain(reason, LONG)}")
    _print(_dumps(reports) if json else "\n\n".join(texts))
    if worst := max(report["exit_code"] for report in reports):
        raise typer.Exit(worst)


def _dumps(reports: list[dict]) -> str:
    from json import dumps

    return dumps(reports, indent=1)


def _digest(text: str) -> str:
    from ..audit.protections import SHA256

    if not SHA256.fullmatch(found := text.strip().lower()):
        raise ValueError(f"--require-sha256: got {text!r:.80}, expected the 64 hexadecimal digits of a file's SHA-256")
    return found


def _digests(folder: Path):
    """The sha256 of a file in the folder by its name, None where there is none; files outside are never looked at."""
    import hashlib
    from functools import cache

    if not folder.is_dir():
        raise ValueError(f"--concepts: {str(folder)!r} is no folder, expected the one that holds the concept files")
    root = folder.resolve()

    @cache
    def digest(name: str) -> str | None:
        try:
            path = (root / name).resolve()
            if not path.is_relative_to(root) or not path.is_file():
                return None
            found = hashlib.sha256()
            with open(path, "rb") as file:
                while chunk := file.read(2**20):
                    found.update(chunk)
        except (OSError, ValueError):  # a name that no file can have
            return None
        return found.hexdigest()

    return digest


def _print(text: str) -> None:
    """Letters that the terminal's encoding does not have are told by their numbers."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    typer.echo(text.encode(encoding, "backslashreplace").decode(encoding))
