"""A verdict in words, and as JSON. Names come from strangers' files: nothing in them may play with a terminal."""

from __future__ import annotations

from typing import Any

from .concepts import Part
from .graph import Graph
from .protections import Protection
from .settings import FIXED
from .verdict import Sampler, Verdict

PROMISE = "the file asks for this protection; a file cannot show that it ran: a signed picture can (saferope verify)"
WHOLE, PART, NOT = "asks for protection on every path", "asks for protection in part", "does not ask for protection"
EXIT_CODES = {WHOLE: 0, NOT: 1, PART: 3}
SHOWN = 20  # samplers that are told in full
LONGEST = 12  # nodes of a path that are shown
WIDEST, LONG = 120, 500  # letters of a name from a file, of a sentence


def plain(text: str, widest: int = WIDEST) -> str:
    """Printable letters alone (no escapes, no line ends, no marks that turn the direction), not too many of them."""
    kept = "".join(letter if letter.isprintable() else "?" for letter in text[: widest + 1])
    return kept if len(kept) <= widest else kept[: widest - 3] + "..."


def unreadable(file: str, reason: str) -> dict[str, Any]:
    """The report on a file that cannot be judged."""
    return {"file": file, "verdict": "unreadable", "exit_code": 2, "reason": reason}


def level_of(whole: bool, part: bool) -> str:
    """WHOLE, PART or NOT, from whether full protection, and any, is asked for on every path."""
    return WHOLE if whole else PART if part else NOT


def as_json(file: str, verdict: Verdict, level: str | None = None) -> dict[str, Any]:
    """The whole verdict for machines. level: as `level_of`, else by the verdict alone."""
    level = level or level_of(verdict.protected, False)
    return {
        "file": file,
        "verdict": level,
        "exit_code": EXIT_CODES[level],
        "form": verdict.form,
        "samplers": [_sampler_json(sampler) for sampler in verdict.samplers],
        "protections": [_protection_json(each, key in verdict.idle) for key, each in verdict.protections.items()],
        "opaque": [{"node": node, "reason": reason} for node, reason in verdict.opaque],
        "notes": verdict.notes,
    }


def _sampler_json(sampler: Sampler) -> dict[str, Any]:
    return {
        "node": sampler.node,
        "class": sampler.kind,
        "verdict": _word(sampler),
        "failures": [{"reason": reason, "path": path} for reason, path in sampler.failures],
        "paths": sampler.paths,
        "more_paths": sampler.more_paths,
        "protections": sampler.protections,
        "unknown_nodes": sampler.unknown,
    }


def _protection_json(each: Protection, idle: bool) -> dict[str, Any]:
    told = {"node": each.node, "acts": each.acts, "full": each.full(), "on_no_path": idle}
    concepts = [
        {name: getattr(part, name) for name in ("node", "name", "strength", "sha256", "made_of_prompts")}
        | {"turns_in_heads": part.turns}
        for part in each.parts
    ]
    why = {"does_not_act_because": each.stops, "weakened_by": each.weak}
    return told | {"concepts": concepts} | each.settings | why


def _word(sampler: Sampler) -> str:
    return "asks for protection" if sampler.protected else "does not"


def as_text(file: str, verdict: Verdict, level: str | None = None) -> str:
    """A short report for people; level: as in `as_json`."""
    lines = [f"{plain(file)}: {level or level_of(verdict.protected, False)} ({verdict.form})"]
    lines += [line for sampler in verdict.samplers[:SHOWN] for line in _sampler_lines(verdict.graph, sampler)]
    if not verdict.samplers:
        lines.append("  no sampler was found: nothing that draws with a model can be seen in it")
    if len(verdict.samplers) > SHOWN:
        lines.append(f"  and {len(verdict.samplers) - SHOWN} samplers more (--json tells of all)")
    for key, reason in verdict.opaque[:SHOWN]:
        lines.append(f"  {_name(verdict.graph, key)}: {plain(reason, LONG)}; it counts as no protection")
    for each in list(verdict.protections.values())[:SHOWN]:
        lines += _protection_lines(_name(verdict.graph, each.node), each, each.node in verdict.idle)
    notes = verdict.notes[:SHOWN] + [PROMISE] * verdict.protected
    return "\n".join([*lines, *(f"  note: {plain(note, LONG)}" for note in notes)])


def _name(graph: Graph, key: str) -> str:
    return plain(str(graph.nodes[key]))


def _sampler_lines(graph: Graph, sampler: Sampler) -> list[str]:
    lines = [f"  {_name(graph, sampler.node)}: {_word(sampler)}"]
    for reason, path in sampler.failures:
        lines.append(f"    {plain(reason, LONG)}" + (f": {_arrows(graph, path)}" if path else ""))
    shown = [path for _, path in sampler.failures]
    lines += [f"    path: {_arrows(graph, path)}" for path in sampler.paths if path not in shown]
    return [*lines, "    and more paths"] if sampler.more_paths else lines


def _arrows(graph: Graph, path: list[str]) -> str:
    names = [_name(graph, key) for key in path]
    if len(names) > LONGEST:
        names[LONGEST // 2 : -(LONGEST // 2)] = [f"({len(names) - LONGEST} more)"]
    return " -> ".join(names)


def _protection_lines(name: str, each: Protection, idle: bool) -> list[str]:
    if idle:
        return [f"  {name} is on no path to a sampler"]
    if not each.acts:
        return [f"  {name} does not act: {plain(reason, LONG)}" for reason in each.stops[:SHOWN]]
    lines = [f"  {name} acts: {plain(_settings(each.settings), LONG)}"]
    lines += [f"    concept {_concept(part)}" for part in each.parts[:SHOWN]]
    return lines + [f"    weakened: {plain(reason, LONG)}" for reason in each.weak[:SHOWN]]


def _settings(of: dict[str, Any]) -> str:
    start, end, blocks = of["start_percent"], of["end_percent"], of["blocks"].strip()
    told = [
        f"strength {of['strength']:g}",
        f"gate fixed at {of['threshold']:g}" if of["gate"] == FIXED else f"gate {of['gate']}",
        "all steps" if (start, end) == (0, 1) else f"steps {start:g} to {end:g}",
        f"blocks {blocks}" if blocks else "all blocks",
        "both streams" if of["streams"] == "both" else f"{of['streams']} stream",
        "all conditionings" if of["conditionings"] == "all" else of["conditionings"],
    ]
    return ", ".join(told)


def _concept(part: Part) -> str:
    pin = f"pinned to sha256 {part.sha256}" if part.sha256 else "not pinned"
    if part.made_of_prompts:
        pin = "without a file to pin"
    turns = f", turns in {part.turns[0]} of {part.turns[1]} heads" if part.turns else ""
    return f"{plain(part.name)}, strength {part.strength:g}, {pin}{turns}"
