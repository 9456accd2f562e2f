"""`saferope keys init` and `saferope verify`: the keys that sign pictures, and the gate that checks signed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from saferope_training.console import plain, say

from .common import command

keys = typer.Typer(no_args_is_help=True, help="Keys that sign pictures (content credentials).")
SHA256 = "[0-9a-f]{64}"


@keys.command("init")
@command()
def init(
    name: Annotated[str, typer.Option(help="The signer's name, in every picture.")] = "SafeRoPE signer",
    renew: Annotated[bool, typer.Option(help="A new signer by the same authority: trust in it stays.")] = False,
) -> None:
    """Make a local authority and a signing key in your own folder, for SafeRoPE Save Image."""
    from saferope_core.concept.files import write_bytes
    from saferope_credentials import folder, init_keys
    from saferope_credentials.keys import AUTHORITY, AUTHORITY_KEY, CONFIG, PRIVATE

    home = folder()
    if not renew and any((home / each).exists() for each in (CONFIG, AUTHORITY, AUTHORITY_KEY)):
        raise ValueError(f"{home} holds keys already. Give --renew for a new signer by their authority, or move them.")
    old = ((home / AUTHORITY).read_bytes(), (home / AUTHORITY_KEY).read_bytes()) if renew else None
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    for file, data in init_keys(name, old).items():
        write_bytes(home / file, data, private=file in PRIVATE)
    say(f"Wrote keys to {home}. Give {home / AUTHORITY} to people who check your pictures. Give no other file away.")


@command()
def verify(
    files: Annotated[list[Path], typer.Argument(help="PNG, JPEG or WEBP.")],
    trust: Annotated[
        list[Path] | None,
        typer.Option(help="Certificate (PEM) of an authority that is trusted; may be repeated. Default: your own."),
    ] = None,
    require_concept: Annotated[
        list[str] | None,
        typer.Option(help="Every sampling run must have turned concepts of the file of this sha256. May be repeated."),
    ] = None,
    require_full: Annotated[bool, typer.Option(help="Every run must be protected in full.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON list, an object for each file.")] = False,
) -> None:
    """Check the signed receipt of a picture: who signed it, that no byte changed, that it was protected.

    Exit code: 0 protected, by a trusted signature; 1 not; 2 cannot be read. Of several files the highest counts.
    """
    from json import dumps

    wanted = tuple(_digest(each) for each in require_concept or ())
    anchors = _anchors(trust)
    reports = [_report(file, anchors, wanted, require_full) for file in files]
    say(dumps(reports, indent=1) if json else "\n\n".join(map(_text, reports)))
    if worst := max(report["exit_code"] for report in reports):
        raise typer.Exit(worst)


def _report(file: Path, anchors: str, wanted: tuple[str, ...], full: bool) -> dict[str, Any]:
    from saferope_core.concept.untrusted import read_whole
    from saferope_credentials import credential
    from saferope_credentials.verify import MAX_BYTES

    try:
        found = credential(read_whole(file, MAX_BYTES), anchors)
    except (OSError, ValueError) as error:
        return {"file": str(file), "exit_code": 2, "verdict": "unreadable", "reasons": [str(error)]}
    wrong = list(found.wrong)
    left: list[str] = []
    runs: list[list[dict]] = []
    try:
        runs = _judged(found.runs, wrong, left, wanted)
    except ValueError as error:
        wrong.append(str(error))
    wrong += [f"not in full: {each}" for each in left] if full else []
    word = "NOT PROVEN" if wrong else "protected in part" if left else "protected"
    told = {"file": str(file), "exit_code": int(bool(wrong)), "verdict": word, "signer": found.signer, "reasons": wrong}
    return told | {"left_out": left, "runs": runs, "workflow_sha256": found.workflow_sha256}


def _judged(runs: tuple, wrong: list[str], left: list[str], wanted: tuple[str, ...]) -> list[list[dict]]:
    """The runs as JSON. Adds their faults to `wrong`, and the parts that they leave out to `left`."""
    from saferope_core import failures, omissions, receipt_from

    read = [[receipt_from(each) for each in run] for run in runs]
    starts = [run[0].start for run in read if run]
    if not read or len(starts) != len(read) or starts[-1] or starts[:-1] != [run[0].latent for run in read[1:]]:
        wrong.append("its receipts do not lead from the picture back to an empty latent")
    for run in read:
        wrong += failures(run)
        left += omissions(run)
        turned = {each.sha256 for receipt in run for each in receipt.asked.concepts if each.turning}
        wrong += [f"a sampling run did not turn the concept {digest}" for digest in wanted if digest not in turned]
    return [[each.as_json() for each in run] for run in read]


def _text(report: dict[str, Any]) -> str:
    lines = [f"{report['file']}: {report['verdict']}"]
    lines += [f"  {reason}" for reason in report["reasons"]]
    if report.get("signer"):
        lines.append(f"  signed by {report['signer']}")
    lines += [f"  left out: {each}" for each in report.get("left_out", [])]
    for run in report.get("runs", []):
        for receipt in run:
            lines += [_concept(each) for each in receipt["asked"]["concepts"]]
    return "\n".join(plain(line) for line in lines)


def _concept(told: dict[str, Any]) -> str:
    pin = f"sha256 {told['sha256']}" if told["sha256"] else "from no file"
    return f"  concept {told['name']}: turns in {told['turning']} of {told['heads']} heads, {pin}"


def _anchors(trust: list[Path] | None) -> str:
    from saferope_credentials import folder
    from saferope_credentials.keys import AUTHORITY

    own = folder() / AUTHORITY
    if not trust and not own.is_file():
        raise ValueError(f"No signer is trusted: there is no {own}. Give --trust with the certificate of an authority.")
    return "\n".join(path.read_text(encoding="ascii") for path in trust or [own])


def _digest(text: str) -> str:
    import re

    if not re.fullmatch(SHA256, found := text.strip().lower()):
        raise ValueError(f"--require-concept: got {text!r:.80}, expected the 64 digits of a concept file's SHA-256")
    return found
