"""The example workflows and the blueprint: what is in them, and how they are built.

python -m dev.workflows      # builds example_workflows/ and subgraphs/ against a ComfyUI of its own, thumbnails included
"""

from __future__ import annotations

from . import flux, tiny
from .blueprint import safe_sampler

RUNNABLE = {  # at once, with the embedded model: file name without its ending -> what builds it
    "SafeRoPE tiny world": tiny.tiny_world,
    "SafeRoPE several concepts": tiny.several_concepts,
    "SafeRoPE probe and refuse": tiny.probe_and_refuse,
    "SafeRoPE risk map": tiny.risk_map,
}
FLUX = {
    "SafeRoPE FLUX.1-dev": flux.dev,
    "SafeRoPE FLUX.1-schnell": flux.schnell,
    "SafeRoPE FLUX.1 Kontext edit": flux.kontext,
}
BLUEPRINT = "Safe FLUX sampler"


def build(object_info: dict) -> dict[str, dict]:
    """All example workflows by name, in the editor's form."""
    return {name: make(object_info).workflow() for name, make in (RUNNABLE | FLUX).items()}


def blueprint(object_info: dict) -> dict:
    return safe_sampler(object_info)
