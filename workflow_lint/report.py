"""A verdict in words, and as JSON. Names come from strangers' files: nothing in them may play with a terminal."""

from __future__ import annotations

from typing import Any

from .concepts import Part
from .protections import FIXED, Protection
from .verdict import Sampler, Verdict

PROMISE = "this is what the file asks for; what ran, a file cannot show: a signed picture can (saferope verify)"
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
    """All there is to say, for machines; level: as `level_of`, else by the verdict alone."""
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
    concepts = [
        {
            "node": p.node,
            "name": p.name,
            "strength": p.strength,
            "sha256": p.sha256,
            "made_of_prompts": p.made_of_prompts,
            "turns_in_heads": p.turns,
        }
        for p in each.parts
    ]
    told = {"node": each.node, "acts": each.acts, "full": each.full(), "on_no_path": idle, "concepts": concepts}
    return told | each.settings | {"does_not_act_because": each.stops, "weakened_by": each.weak}


def _word(sampler: Sampler) -> str:
    return "asks for protection" if sampler.protected else "does not"


def as_text(file: str, verdict: Verdict, level: str | None = None) -> str:
    """A short report for people; level: as in `as_json`."""
    lines = [f"{plain(file)}: {level or level_of(verdict.protected, False)} ({verdict.form})"]
    if not verdict.samplers:
        lines.append("  no sampler was found: nothing that draws with a model can be seen in it")
    for sampler in verdict.samplers[:SHOWN]:
        lines += _sampler_lines(verdict, sampler)
    if len(verdict.samplers) > SHOWN:
        lines.append(f"  and {len(verdict.samplers) - SHOWN} samplers more (--json tells of all)")
    lines += [
        f"  {plain(verdict.names[node])}: {plain(reason, LONG)}; it counts as no protection"
        for node, reason in verdict.opaque[:SHOWN]
    ]
    for each in list(verdict.protections.values())[:SHOWN]:
        lines += _protection_lines(verdict, each)
    lines += [f"  note: {plain(note, LONG)}" for note in verdict.notes[:SHOWN]]
    return "\n".join([*lines, f"  note: {PROMISE}"] if verdict.protected else lines)


def _sampler_lines(verdict: Verdict, sampler: Sampler) -> list[str]:
    lines = [f"  {plain(verdict.names[sampler.node])}: {_word(sampler)}"]
    for reason, path in sampler.failures:
        lines.append(f"    {plain(reason, LONG)}" + (f": {_arrows(verdict, path)}" if path else ""))
    shown = [path for _, path in sampler.failures]
    lines += [f"    path: {_arrows(verdict, path)}" for path in sampler.paths if path not in shown]
    if sampler.more_paths:
        lines.append("    and more paths")
    return lines


def _arrows(verdict: Verdict, path: list[str]) -> str:
    names = [plain(verdict.names[node]) for node in path]
    if len(names) > LONGEST:
        names[LONGEST // 2 : -(LONGEST // 2)] = [f"({len(names) - LONGEST} more)"]
    return " -> ".join(names)


def _protection_lines(verdict: Verdict, each: Protection) -> list[str]:
    name = plain(verdict.names[each.node])
    if each.node in verdict.idle:
        return [f"  {name} is on no path to a sampler"]
    if not each.acts:
        return [f"  {name} does not act: {plain(reason, LONG)}" for reason in each.stops[:SHOWN]]
    lines = [f"  {name} acts: {plain(_settings(each), LONG)}"]
    lines += [f"    concept {_concept(part)}" for part in each.parts[:SHOWN]]
    return lines + [f"    weakened: {plain(reason, LONG)}" for reason in each.weak[:SHOWN]]


def _settings(each: Protection) -> str:
    found = each.settings
    gate = f"fixed at {found['threshold']:g}" if found["gate"] == FIXED else found["gate"]
    steps = (found["start_percent"], found["end_percent"])
    streams = "both streams" if found["streams"] == "both" else f"{found['streams']} stream"
    return ", ".join(
        [
            f"strength {found['strength']:g}",
            f"gate {gate}",
            "all steps" if steps == (0, 1) else f"steps {steps[0]:g} to {steps[1]:g}",
            "all blocks" if not found["blocks"].strip() else f"blocks {found['blocks'].strip()}",
            streams,
            "all conditionings" if found["conditionings"] == "all" else found["conditionings"],
        ]
    )


def _concept(part: Part) -> str:
    if part.made_of_prompts:
        return f"{plain(part.name)}, strength {part.strength:g}, without a file to pin"
    pin = f"pinned to sha256 {part.sha256}" if part.sha256 else "not pinned"
    turns = f", turns in {part.turns[0]} of {part.turns[1]} heads" if part.turns else ""
    return f"{plain(part.name)}, strength {part.strength:g}, {pin}{turns}"
