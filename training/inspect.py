"""What a concept file says of itself: lines to read, a picture, and a model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from saferope_core import Concept, planes, sha256
from saferope_core.untrusted import printable

from . import plots


def describe(path: Path, concepts: Sequence[Concept]) -> str:
    """Some lines on a file and each of its concepts."""
    lines = [f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, sha256 {sha256(path)}"]
    for concept in concepts:
        lines += ["", *(f"{name:>18}  {printable(value)}" for name, value in facts(concept).items())]
    return "\n".join(lines)


def facts(concept: Concept) -> dict[str, str]:
    """What there is to know of a concept, in words and numbers."""
    theta = planes(concept.generator_text)[0].flatten()
    gates = torch.cat([concept.gate(role) for role in concept.acts_on])
    settings = concept.training.get("settings", {})
    return {
        "concept": f"{concept.slug} ({concept.name})",
        "description": concept.description,
        "model": concept.geometry.describe(),
        "made by": f"{concept.mode}, {_made_with(concept)}",
        "heads": f"{len(concept.heads)} of {concept.discrimination.numel()} are safety-critical",
        "risk": f"in {concept.rank} of {concept.geometry.head_dim} dimensions, {concept.reach} more to turn into",
        "turns": f"text {concept.acts('text')}, image {concept.acts('image') if concept.generator_image.any() else '-'}",
        "gates": f"{gates.min():.3f} to {gates.max():.3f}",
        "angles at risk 1": f"up to {theta.max():.2f} rad, mean {theta.mean():.2f}",
        "strength": f"{concept.strength:g}",
        "trained": f"seed {settings.get('seed', '?')}, {settings.get('steps', '?')} steps"
        if concept.mode == "learned"
        else "no",
    }


def _made_with(concept: Concept) -> str:
    versions = concept.training.get("versions")
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if versions else "unknown versions"


def _cell(value: str) -> str:
    """A file's own words as words in Markdown: no table, link, picture or HTML comes of them."""
    return "".join(f"\\{character}" if character in "\\`*_[]<>|!#" else character for character in printable(value))


def draw(path: Path, concepts: Sequence[Concept]) -> list[Path]:
    """A head map of each concept, `<stem>.<slug>.heads.png` beside the file; returns their paths."""
    drawn = []
    for concept in concepts:
        picture = path.with_suffix(f".{concept.slug}.heads.png")
        title = f"{concept.name}: {len(concept.heads)} of {concept.discrimination.numel()} heads"
        chosen = torch.zeros_like(concept.discrimination, dtype=torch.bool)
        rows = concept.heads[:, 0] * concept.geometry.double_blocks + concept.heads[:, 1]
        chosen[rows.long(), concept.heads[:, 2].long()] = True
        plots.head_map(picture, concept.discrimination, concept.geometry, chosen, title)
        drawn.append(picture)
    return drawn


def card(path: Path, concepts: Sequence[Concept], maps: Sequence[Path], license: str) -> str:
    """A model card in Markdown: what it is, provenance, head maps, and the evaluation that lies beside the file, if any."""
    names = ", ".join(_cell(concept.name) for concept in concepts)
    lines = [
        "---",
        f"license: {license}",
        "library_name: saferope",
        "tags: [flux, concept-erasure, safety, comfyui]",
        "---",
        "",
        f"# {names}: a SafeRoPE concept file",
        "",
        f"`{path.name}`, sha256 `{sha256(path)}`. Suppresses {names} in FLUX while pictures without it stay as they are. Use it "
        "with the ComfyUI node *SafeRoPE Apply*, or `saferope generate --concept " + path.name + "`.",
    ]
    for concept, picture in zip(concepts, maps, strict=True):
        lines += ["", f"## {_cell(concept.name)}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in facts(concept).items()]
        lines += ["", f"![Which heads tell {_cell(concept.name)} apart]({picture.name})"]
        evaluation = path.with_name(f"{concept.slug}.evaluation.md")
        if evaluation.is_file():
            lines += ["", evaluation.read_text(encoding="utf-8").strip()]
        else:
            lines += ["", f"Not evaluated: `saferope evaluate {path.name}` leaves a table beside the file."]
    lines += [
        "",
        "It protects whoever uses it, not from whoever runs the model: strength 0, or a workflow without it, is unprotected.",
    ]
    return "\n".join(lines) + "\n"
