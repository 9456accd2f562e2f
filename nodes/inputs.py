"""Inputs that nodes share, and the settings of SafeRoPE Calibrate Concept.

The defaults of Calibrate are the trainer's, except two that suppress more with the few prompts that people write by
hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

ConceptType = io.Custom("SAFEROPE_CONCEPT")  # list[Concept]
STRENGTH_MAX = 2.0
# Words that people search nodes by, in English, Chinese and Japanese; 安全 is both
SEARCHED = ["saferope", "censor", "protect", "nude", "gore", "style", "block", "filter", "safety", "nsfw"]
SEARCHED += ["安全", "色情", "裸", "审查", "ヌード", "検閲"]

TURNED = ("k", "q", "qk")
RANGES = {
    "rank": (2, 32),
    "angle": (0.0, 3.14),  # half a turn; a larger angle turns less
    "quantile": (0.5, 1.0),
    "cut": (0.0, 1.0),
    "rounds": (1, 64),
    "seed": (0, 2**53),
    "guidance": (0.0, 100.0),
}


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high. ComfyUI checks widgets, but not values that come over a link."""
    if not low <= value <= high:  # false for NaN too
        raise ValueError(f"{name} is {value}, expected a number from {low:g} to {high:g}. Check the linked node.")


@dataclass(frozen=True)
class Choices:
    """The inputs of the node beside model, prompts and size; kept in the concept's record."""

    rank: int = 6
    turned: str = "qk"  # the trainer's is k; see quantile
    turned_image: str = "qk"
    angle: float = 2.1
    quantile: float = 0.99  # the trainer's is 0.999. Stars left of 24: 50 %, with 0.99 25 %, with qk too 12 %
    cut: float = 0.5
    timesteps: tuple[float, ...] = (1.0, 0.8, 0.5)
    rounds: int = 1
    seed: int = 0
    guidance: float = 3.5


def choices_from(settings: dict[str, Any]) -> Choices:
    """Choices from settings, checked, as links may bring any value. Raises ValueError."""
    try:
        times = tuple(float(part) for part in str(settings.pop("timesteps", "1, 0.8, 0.5")).split(","))
    except ValueError:
        times = ()
    if not times or list(times) != sorted(set(times), reverse=True) or not 0 < times[-1] <= times[0] <= 1:
        raise ValueError(
            "timesteps: expected falling numbers above 0 and up to 1, commas between, such as 1, 0.8, 0.5."
        )
    choices = Choices(timesteps=times, **settings)
    for field, (low, high) in RANGES.items():
        require_range(field, getattr(choices, field), low, high)
    for field in ("turned", "turned_image"):
        if getattr(choices, field) not in TURNED:
            raise ValueError(f"{field} is {getattr(choices, field)!r}, expected one of {', '.join(TURNED)}.")
    return choices


def settings() -> list:
    """The inputs that can stay as they are."""
    default = Choices()

    def number(kind: Any, name: str, step: float, text: str, **more: Any) -> Any:
        low, high = RANGES[name]
        value = getattr(default, name)
        return kind.Input(
            name, default=value, min=low, max=high, step=step, optional=True, advanced=True, tooltip=text, **more
        )

    def choice(name: str, text: str) -> Any:
        return io.Combo.Input(
            name, options=list(TURNED), default=getattr(default, name), optional=True, advanced=True, tooltip=text
        )

    return [
        number(io.Int, "rounds", 1, "1 to 64 starting noises for each prompt. Take more for few prompts."),
        number(
            io.Float,
            "angle",
            0.1,
            "0 to 3.14: the angle, in radians, of a plane at risk 1. 3.14 is half a turn, the most. "
            "0 turns nothing: SafeRoPE Apply refuses such a concept.",
        ),
        number(
            io.Float,
            "quantile",
            0.0005,
            "0.5 to 1: the share of the safe prompts' tokens that stays as it is. A lower value suppresses more and "
            "changes harmless pictures more.",
        ),
        number(io.Int, "rank", 1, "2 to 32 dimensions for the concept's word. The paper has 5."),
        number(io.Float, "cut", 0.05, "0 to 1: heads with at least this Δ turn. The paper has 0.5."),
        choice("turned", "Turn the keys (k) of text tokens, their queries (q), or both."),
        choice("turned_image", "Turn the keys (k) of image tokens, their queries (q), or both."),
        io.String.Input(
            "timesteps",
            default=", ".join(f"{t:g}" for t in default.timesteps),
            optional=True,
            advanced=True,
            tooltip="Times to look at, from 1 (pure noise) down towards 0, with commas between.",
        ),
        number(
            io.Int,
            "seed",
            1,
            "The seed of the noise. The same seed gives the same concept.",
            control_after_generate=False,
        ),
        number(io.Float, "guidance", 0.1, "0 to 100: the FLUX guidance of the sampling, as FluxGuidance sets it."),
    ]
