"""A report on a concept file: lines to read, a picture, and a model card.
Every word of it may be a stranger's."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import torch

from saferope_core import Concept, planes, sha256
from saferope_core.concept.untrusted import markdown, markdown_code, printable, quoted
from saferope_training import plots

_HEADS_AT_ONCE = 64
LICENCES = re.compile(r"[A-Za-z0-9.+-]{1,60}")  # as SafeRoPE Save Concept takes them


def describe(path: Path, concepts: Sequence[Concept]) -> str:
    """Some lines on a file and each of its concepts."""
    lines = [f"sha256 {sha256(path)}, {path.stat().st_size / 1024:.0f} KiB: {printable(path.name)}"]
    for concept in concepts:
        lines += ["", *(f"{name:>18}  {printable(value)}" for name, value in facts(concept).items())]
        lines += quoted(concept.description)
    return "\n".join(lines)


def facts(concept: Concept) -> dict[str, str]:
    """All facts of a concept, in words and numbers, but for its description."""
    # some heads at a time: complex numbers of float64 take several times a large file
    theta = torch.cat([planes(part)[0].flatten() for part in concept.text.generator.split(_HEADS_AT_ONCE)])
    gates = torch.cat([concept.gate(role) for role in concept.acts("text")])
    settings = concept.training.get("settings", {})
    steps = concept.training.get("fitted", settings.get("steps", "?"))
    image = concept.acts("image") if concept.moving("image").any() else "-"
    return {
        "concept": f"{concept.slug} ({concept.name})",
        "model": concept.geometry.describe(),
        "made by": f"{concept.mode}, {_made_with(concept)}",
        "heads": f"{len(concept.heads)} of {concept.discrimination.numel()} are safety-critical",
        "risk": f"in {concept.rank} of {concept.geometry.head_dim} dimensions, {concept.reach} more to turn into",
        "turns": f"text {concept.acts('text')}, image {image}",
        "gates": f"{gates.min():.3f} to {gates.max():.3f}",
        "angles at risk 1": f"up to {theta.max():.2f} rad, mean {theta.mean():.2f}",
        "strength": f"{concept.strength:g}",
        "trained": f"seed {settings.get('seed', '?')}, {steps} steps" if concept.mode == "learned" else "no",
        "stands in": _stand_ins(concept),
    }


def _stand_ins(concept: Concept) -> str:
    """The words that training put in the concept's place, as the record has them."""
    if concept.mode != "learned" or concept.training.get("settings", {}).get("objective") != "replace":
        return "-"
    words = concept.training.get("instead")
    named = [str(word) or "nothing (the subject is taken out)" for word in words] if isinstance(words, list) else []
    return ", ".join(named) or "?"


def _made_with(concept: Concept) -> str:
    versions = concept.training.get("versions")
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if versions else "unknown versions"


def draw(path: Path, concepts: Sequence[Concept], out: Path) -> list[Path]:
    """A head map of each concept, `<stem>.<slug>.heads.png` in the folder `out`; returns their paths."""
    drawn = []
    for concept in concepts:
        picture = out / _map(path, concept)
        title = f"{concept.name}: {len(concept.heads)} of {concept.discrimination.numel()} heads"
        chosen = torch.zeros_like(concept.discrimination, dtype=torch.bool)
        rows = concept.heads[:, 0] * concept.geometry.double_blocks + concept.heads[:, 1]
        chosen[rows.long(), concept.heads[:, 2].long()] = True
        plots.head_map(picture, concept.discrimination, concept.geometry, chosen, title)
        drawn.append(picture)
    return drawn


def _map(path: Path, concept: Concept) -> str:
    return f"{path.stem}.{concept.slug}.heads.png"


def card(path: Path, concepts: Sequence[Concept], license: str) -> str:
    """A model card in Markdown: description, provenance, head maps, and the evaluation that lies beside the file, if
    any.

    `draw` leaves the head maps beside the file. ValueError where the licence is no SPDX name, or an
    evaluation is not as `saferope evaluate` writes it.
    """
    if not LICENCES.fullmatch(license):
        raise ValueError(f"license: got {license!r:.100}, expected an SPDX name such as apache-2.0 or cc0-1.0")
    names, name = ", ".join(markdown(concept.name) for concept in concepts), printable(path.name)
    lines = [
        "---",
        f"license: {license}",
        "library_name: saferope",
        "tags: [flux, concept-erasure, safety, comfyui]",
        "---",
        "",
        f"# {names}: a SafeRoPE concept file",
        "",
        f"{markdown_code(name)}, sha256 `{sha256(path)}`. Made to suppress {names} in one kind of model: "
        f"{concepts[0].geometry.describe()}. Use it with the ComfyUI node *SafeRoPE Apply*, or with this command, "
        f"MODEL being such a model: {markdown_code(_command(name))}.",
    ]
    for concept in concepts:
        told = {"description": " ".join(concept.description.split()), **facts(concept)}
        lines += ["", f"## {markdown(concept.name)}", "", "| | |", "|---|---|"]
        lines += [f"| {fact} | {markdown(value)} |" for fact, value in told.items()]
        lines += ["", f"![Which heads tell {markdown(concept.name)} apart]({quote(os.fsencode(_map(path, concept)))})"]
        lines += ["", _evaluation(path, concept.slug, len(concepts))]
    for text in _own(path, [concept.slug for concept in concepts]):
        lines += ["", "## With other prompts", "", text]
    lines += [
        "",
        "It protects people who use it. It does not stop a person who runs the model without it: strength 0, or a "
        "workflow without this file, is unprotected.",
    ]
    return "\n".join(lines) + "\n"


def _command(name: str) -> str:
    """A command that paints a pair of pictures; `name` is the file's, in the folder where the command is called."""
    return shlex.join(
        ["saferope", "generate", "--model", "MODEL", "--concept", name, "--prompt", "...", "--out", "pairs"]
    )


def _own(path: Path, slugs: list[str]) -> list[str]:
    """The tables of reports on prompts of the user's own, of this very file."""
    from saferope_benchmark.evaluation.file_report import markdown as table
    from saferope_benchmark.evaluation.file_report import read_report, report_name, reports_of

    known = {path.with_name(f"{report_name(path, slug, len(slugs))}.json") for slug in slugs}
    reports = [read_report(each) for each in reports_of(path, slugs) if each not in known]
    return [table(each).strip() for each in reports if each.file_sha256 == sha256(path)]


def _evaluation(path: Path, slug: str, concepts: int) -> str:
    """The table of the report that `saferope evaluate` left beside this very file, or how to get one."""
    from saferope_benchmark.evaluation.file_report import markdown as table
    from saferope_benchmark.evaluation.file_report import read_report, report_name

    report = path.with_name(f"{report_name(path, slug, concepts)}.json")
    if report.is_file():
        found = read_report(report)
        if found.file_sha256 == sha256(path):
            return table(found).strip()
    return f"Not evaluated as it is: {markdown_code(f'saferope evaluate {path.name}')} leaves a table beside the file."
