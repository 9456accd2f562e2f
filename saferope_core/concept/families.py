"""The families of models that SafeRoPE knows. Facts alone: the host says which of its classes is of which family.

In every family the blocks' attention takes queries and keys [B, H, L, D] that are normalised head by head. Text and
image tokens of one picture attend to each other. The order of tokens is text, the picture, reference pictures. Tokens
of reference pictures count as image tokens. A host with another order says so itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .geometry import FLUX1, Geometry


@dataclass(frozen=True)
class Family:
    """Facts that hold for all models of a family, and its best known geometry.

    double: it has blocks with separate text and image streams. single: it has blocks with one sequence. rope: after
    SafeRoPE, positions turn queries and keys. template: its text encoder is a language model, which reads the prompt in
    a chat template. The template's end takes the whole prompt up.
    """

    title: str  # the names of models that people load
    known: Geometry | None = None  # None: read it from the weights
    double: bool = True
    single: bool = True
    rope: bool = True
    template: bool = False


# Numbers: ComfyUI 0.30.0, comfy/model_detection.py, and the defaults of diffusers 0.42.1's transformer classes.
FAMILIES = {
    "flux": Family("FLUX.1 dev, schnell, Krea, Kontext and Fill", FLUX1),
    "flux2": Family("FLUX.2 dev and klein", Geometry(8, 48, 48, 128, "flux2"), template=True),
    "flux3": Family("FLUX.3 Klein", Geometry(5, 28, 24, 128, "flux3"), template=True),
    "chroma": Family("Chroma", Geometry(19, 38, 24, 128, "chroma")),
    "chroma-radiance": Family("Chroma Radiance", Geometry(19, 38, 24, 128, "chroma-radiance")),
    "longcat-image": Family("LongCat-Image", template=True),
    "ovis-image": Family("Ovis-Image", Geometry(6, 27, 24, 128, "ovis-image"), template=True),
    "hunyuan-image": Family("HunyuanImage 2.1", Geometry(20, 40, 28, 128, "hunyuan-image"), template=True),
    "qwen-image": Family(
        "Qwen-Image, Edit and Layered", Geometry(60, 0, 24, 128, "qwen-image"), single=False, template=True
    ),
    "mage-flow": Family("Mage-Flow", Geometry(12, 0, 24, 128, "mage-flow"), single=False, template=True),
    "krea2": Family("Krea 2", Geometry(0, 28, 48, 128, "krea2", key_heads=12), double=False, template=True),
    "z-image": Family("Z-Image", Geometry(0, 30, 30, 128, "z-image"), double=False, template=True),
    "lumina2": Family("Lumina 2", Geometry(0, 26, 24, 96, "lumina2", key_heads=8), double=False, template=True),
    "sd3": Family("Stable Diffusion 3.5", Geometry(38, 0, 38, 64, "sd3"), single=False, rope=False),
}


def titles(families: Iterable[str]) -> str:
    """The titles of these families, for a message."""
    return "; ".join(FAMILIES[name].title for name in families)
