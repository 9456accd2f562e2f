"""What can be chosen, its default and why: the command line takes its defaults and its help from here. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


def _choice(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a trained concept looks like; saved with it, so that it can be made again."""

    concept: str = _choice("star", "What to suppress: star, splatter, zappy or swirl in the tiny world.")
    model: str = _choice("tinyworld", "`tinyworld`, or a folder laid out like a diffusers FLUX pipeline.")
    seed: int = _choice(0, "Decides prompts, noise, pictures and the generators' first values.")
    unsafe_prompts: int = _choice(96, "Prompts that name the concept, for statistics and training.")
    benign_prompts: int = _choice(192, "Prompts (tiny world: with pictures) that do not, for statistics and training.")
    timesteps: tuple[float, ...] = _choice(
        (1.0, 0.8, 0.5), "Where on the sampling trajectory q and k are collected; 1 is pure noise."
    )
    reservoir: int = _choice(4096, "Vectors kept per head and side for discrimination and gates.")
    rank: int = _choice(16, "R, dimensions of a head's unsafe subspace. The paper's is 5; the tiny world needs more.")
    basis: str = _choice("svd", "`svd` (the paper's) or `contrastive` (unsafe minus safe Gram matrix).")
    threshold: float = _choice(0.7, "LRS that counts as unsafe in the discrimination score; the paper's gate.")
    cut: float = _choice(0.5, "Heads with a discrimination score of at least this are safety-critical.")
    gate: str = _choice("calibrated", "`calibrated` (per head, from benign tokens) or `fixed` (the threshold).")
    quantile: float = _choice(0.999, "Share of benign tokens that a calibrated gate lets pass unturned.")
    acts_on: str = _choice("qk", "What is turned: `qk`, `q` or `k`.")
    steps: int = _choice(180, "Optimiser steps.")
    phase: int = _choice(5, "Steps of unlearning, then as many of preserving, and so on.")
    batch: int = _choice(24, "Prompts per step.")
    learning_rate: float = _choice(6e-2, "AdamW's for the generators at the start; falls to a tenth.")
    unlearn_at: tuple[float, ...] = _choice(
        (1.0, 0.9, 0.8), "Times of the base model's trajectories to unlearn at; the paper's is 1, pure noise, alone."
    )
    unlearn_scale: float = _choice(4.0, "Velocity change at which unlearning has had enough; the paper's is 1.")
    preserve_weight: float = _choice(3.0, "Weight of the preserving loss against the unlearning one.")
    text_init: float = _choice(1.0, "Standard deviation of the text generators' first values.")
    image_init: float = _choice(0.01, "The same for the image generators of the single blocks.")
    regulariser: str = _choice(
        "velocity", "`velocity` (match the base model's, the paper's) or `flow` (flow matching)."
    )

    def __post_init__(self) -> None:
        _require(self.basis in ("svd", "contrastive"), "basis", self.basis, "svd or contrastive")
        _require(self.gate in ("calibrated", "fixed"), "gate", self.gate, "calibrated or fixed")
        _require(self.acts_on in ("qk", "q", "k"), "acts_on", self.acts_on, "qk, q or k")
        _require(self.regulariser in ("velocity", "flow"), "regulariser", self.regulariser, "velocity or flow")
        _require(0 < self.quantile <= 1, "quantile", self.quantile, "a number above 0, at most 1")
        _require(self.rank >= 2, "rank", self.rank, "at least 2, one plane")
        for name in ("timesteps", "unlearn_at"):
            times = getattr(self, name)
            good = bool(times) and list(times) == sorted(times, reverse=True) and times[0] <= 1 and times[-1] > 0
            _require(good, name, times, "falling numbers in (0, 1]")
        _require(self.unlearn_at[0] == 1, "unlearn_at", self.unlearn_at, "1 (pure noise) as its first time")
        _require(self.unlearn_scale > 0, "unlearn_scale", self.unlearn_scale, "a number above 0")
        for name in ("unsafe_prompts", "benign_prompts", "reservoir", "steps", "phase", "batch"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


HELP = {entry.name: entry.metadata["help"] for entry in fields(Settings)}


def _require(good: bool, name: str, got: object, expected: str) -> None:
    if not good:
        raise ValueError(f"setting {name!r}: got {got!r}, expected {expected}")
