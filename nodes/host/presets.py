"""Prompt sets that come with the pack, for SafeRoPE Calibrate Concept: no prompt to write, no trainer to install."""

from __future__ import annotations

from ...saferope_core import presets
from ...tinyworld import world

OWN, TINY, LIKENESS = "your own", "tiny world: star", "a person's likeness"
STORED = {"nudity": "nudity", "gore": "gore", "Van Gogh": "van-gogh", "Pikachu": "pikachu"}
STORED |= {"weapons": "weapons", "hate symbols": "hate-symbols"}
CHOICES = [OWN, TINY, *STORED, LIKENESS]
SHORT, LONG = "short", "long"
COUNT, SEED = 24, 0  # Unsafe prompts, and as many safe ones of either kind.
EVERYDAY_SEED = 1_000_003  # The trainer's distance between the seeds of both sides.
TAILS = (  # Of prompts as long as FLUX users write them. They are harmless, and the same on both sides.
    ", soft daylight through a large window, shallow depth of field, calm and balanced composition, fine film grain",
    ", seen at eye level, muted colours, detailed background with many small things, sharp focus, high resolution",
    ", wide shot with plenty of space around it, warm evening light, long shadows, natural texture, subtle contrast",
    ", centred in the frame, plain backdrop, even studio light, crisp edges, carefully arranged, professional quality",
    ", low angle, overcast sky, cool tones, gentle haze in the distance, realistic materials, thirty-five millimetre",
)


def preset_prompts(preset: str, style: str, name: str) -> tuple[list[str], list[str]]:
    """Unsafe lines with the concept's word in brackets, and safe lines: the same with another thing, and everyday ones.

    Empty lists for OWN. Raises ValueError for an unknown preset or style, and for a likeness without a name.
    """
    for asked, value, known in (("preset", preset, CHOICES), ("style", style, [SHORT, LONG])):
        if value not in known:
            raise ValueError(f"{asked} is {value!r:.60}, expected one of {', '.join(known)}.")
    if preset == OWN:
        return [], []
    if preset == TINY:
        return _tiny_world()
    tails = TAILS if style == LONG else ("",)
    unsafe, alike = presets.lines(_stored(preset, name), COUNT, SEED, tails)
    return unsafe, alike + presets.everyday(COUNT, SEED + EVERYDAY_SEED, tails)


def _stored(preset: str, name: str) -> dict[str, list[str]]:
    if preset != LIKENESS:
        return presets.load(STORED[preset])
    if not name:
        raise ValueError(f"preset is {LIKENESS!r}, and name holds no person. Write the person's name into name.")
    return presets.likeness(name.translate(str.maketrans("", "", "[]")))


def _tiny_world() -> tuple[list[str], list[str]]:
    unsafe = [
        f"{each.text[: each.subject[0]]}[{each.text[slice(*each.subject)]}]{each.text[each.subject[1] :]}"
        for each in world.unsafe_prompts("star", COUNT, SEED)
        if each.subject
    ]
    return unsafe, [each.text for each in world.benign_prompts("star", 2 * COUNT, SEED)]
