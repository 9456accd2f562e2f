"""The settings, their defaults and reasons. The command line takes its options and its help from here. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

# The stages that a setting decides. A change of the setting makes these again, and the stages after them. Settings of
# MODEL do so through the model: stages depend on digests of its parts and on its sizes, see making/recipe.py.
MODEL, PROMPTS, EXTRACT, HEADS = "model", "prompts", "extract", "heads"
LATENTS, TRAIN, CALIBRATE, HARDEN = "latents", "train", "calibrate", "harden"
# The suites of `saferope evaluate --suite`; see saferope_benchmark.suites
SUITES = ("tinyworld", "quick", "paper-flux", "ablations", "crossed", "positions", "rotations", "dial")

# The paper's form: its subspace, its gate (0.7 everywhere, from its code), its losses and their times
PAPER: dict[str, Any] = {"relative_rank": 0, "rank": 5, "padding_rank": 0, "words_rank": 0, "image_rank": 0, "reach": 0}
PAPER |= {"acts_on": "qk", "blind": 0.0, "image_init": 0.01, "unlearn_at": (1.0,), "unlearn_scale": 1.0}
PAPER |= {"gate": "fixed", "objective": "away", "strengths": (1.0, 1.0), "max_angle": 0.0}
# `--recipe`: settings that an option has not named. The paper's form with the numbers of its code for training too.
DEFAULT = "default"
RECIPES: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "paper": {**PAPER, "blind_text": 0.0, "learning_rate": 1e-3, "phase": 10},
}

_LARGEST_SEED = 2**62  # seeds of single prompts are sums with it, and torch takes 63 bits
_PATCH = 16  # pixels of an image token


def _choice(stages: str, default: object, help: str, decides: bool = True) -> Any:  # a Field, where a type is declared
    return field(default=default, metadata={"help": help, "stages": tuple(stages.split()), "decides": decides})


@dataclass(frozen=True)
class Settings:
    """All settings that decide a concept file. They are saved in it, so that it can be made again."""

    concept: str = _choice(
        "prompts heads train calibrate",
        "star",
        "What to suppress: star, splatter, zappy or swirl in the tiny world; a preset (nudity, gore, van-gogh, "
        "pikachu); or a name of your own for prompts from a file.",
    )
    model: str = _choice(
        "model",
        "tinyworld",
        "`tinyworld`, a diffusers folder, a hub id, or a single file of FLUX.1 (.safetensors, .gguf).",
    )
    quantise: str | None = _choice(
        "model", None, "Hold the frozen model in fewer bits: nf4, int8 (GPU), torchao-int8 or torchao-float8."
    )
    encoders: str | None = _choice(
        "model", None, "Diffusers folder or hub id with everything but the transformer, for a single file."
    )
    resolution: int | None = _choice("model", None, "Pixels, a multiple of 16; 512, or the tiny world's own.")
    seed: int = _choice(
        "prompts extract latents train calibrate",
        0,
        "Decides prompts, noise, pictures and the generators' first values.",
    )
    unsafe: str | None = _choice(
        "prompts",
        None,
        "File of prompts that show the concept: .txt, .jsonl, .csv (I2P's), .parquet or COCO captions.",
    )
    category: str | None = _choice(
        "prompts",
        None,
        "Rows of this category alone, of `unsafe` and of pairs, such as Nudity.",
    )
    subjects: tuple[str, ...] = _choice(
        "prompts", (), "Words for the concept, to be found in the prompts of the file; commas between."
    )
    instead: tuple[str, ...] = _choice(
        "prompts",
        (),
        "Words that stand in for the concept in protected pictures; commas between, they take turns. Without them: "
        "the words of the preset or the tiny world; else the subject is taken out.",
    )
    benign: str | None = _choice("prompts", None, "File of prompts without the concept, formats as for `unsafe`.")
    similarity_model: str | None = _choice(
        "prompts",
        None,
        "Keep a preset's subjects by meaning: sentence-transformers folder or hub id (all-MiniLM-L6-v2).",
    )
    similarity: float = _choice("prompts", 0.4, "Least cosine similarity, -1 to 1, of a subject to a seed word.")
    images: str | None = _choice("prompts", None, "Folder of the benign captions' pictures (COCO layout).")
    unsafe_prompts: int = _choice("prompts", 96, "Prompts that show the concept; of a file at most so many, drawn.")
    benign_prompts: int = _choice("prompts", 192, "Prompts without the concept; of a file at most so many, drawn.")
    timesteps: tuple[float, ...] = _choice(
        "extract", (1.0, 0.8, 0.5), "Where on the sampling trajectory q and k are collected; 1 is pure noise."
    )
    reservoir: int = _choice("extract", 4096, "Vectors kept per head and side for discrimination and gates.")
    relative_rank: int = _choice(
        "heads",
        4,
        "Dimensions in which risk is measured: where unsafe energy is largest relative to benign energy. 0: the unsafe "
        "subspace itself, as in the paper.",
    )
    relative_padding: int | None = _choice(
        "heads",
        None,
        "More of them for the padding, or the chat template's end, behind an unsafe prompt. Unless given: 4 where the "
        "text encoder is a language model, else 0. The paper: 0.",
    )
    rank: int = _choice("heads", 6, "Dimensions of the subject's unsafe subspace in a head. The paper's R is 5.")
    padding_rank: int = _choice(
        "heads", 5, "More of them for the padding behind an unsafe prompt, against benign padding. The paper: 0."
    )
    words_rank: int = _choice("heads", 5, "More of them for the other words of an unsafe prompt. The paper: 0.")
    image_rank: int = _choice(
        "heads", 16, "Dimensions of the image tokens' own unsafe subspace; 0: they share the text's, as in the paper."
    )
    reach: int = _choice(
        "heads", 8, "Directions outside the unsafe subspace that turn too: the most looked-at ones. The paper: 0."
    )
    basis: str = _choice(
        "heads", "svd", "The subject's: `svd` (the paper's) or `contrastive` (unsafe minus safe Gram matrix)."
    )
    threshold: float = _choice("heads train calibrate", 0.7, "The gate where it is `fixed`; the paper's. LRS, 0 to 1.")
    cut: float = _choice("heads", 0.5, "Heads with a discrimination score of at least this are safety-critical.")
    gate: str = _choice(
        "heads", "calibrated", "`calibrated` (per head, from benign tokens) or `fixed` (the threshold)."
    )
    quantile: float | None = _choice(
        "heads",
        None,
        "Share of benign tokens that a calibrated gate lets pass unturned. Unless given: 0.995 where the text encoder "
        "is a language model, else 0.999.",
    )
    acts_on: str = _choice("train calibrate", "k", "Vectors of text tokens that turn: `qk` (the paper), `q` or `k`.")
    acts_on_image: str = _choice("train calibrate", "qk", "Vectors of image tokens that turn: `qk`, `q` or `k`.")
    angle: float = _choice("calibrate", 2.1, "Radians by which `calibrate` turns a plane at LRS 1.")
    fit: int = _choice(
        "calibrate",
        18,
        "Steps by which `calibrate` fits its fixed turn to the stand-in's velocities, a tenth of training; 0: none.",
    )
    generator: str = _choice(
        "calibrate", "fixed", "`fixed` (the leading planes by one angle) or `random` (the Rand baseline)."
    )
    objective: str = _choice(
        "train calibrate",
        "replace",
        "Unsafe velocities go to the velocities of the prompt with other words for the concept (`replace`), or away "
        "from their own (`away`, the paper's).",
    )
    strengths: tuple[float, ...] = _choice(
        "train calibrate",
        (0.75, 2.0),
        "Each prompt is trained at a strength drawn from this range, so that the file works at all of them. The paper: "
        "1,1.",
    )
    max_angle: float = _choice(
        "train calibrate",
        math.pi,
        "Radians that no plane turns past, half a turn; 0: no limit, as in the paper.",
    )
    blind: float = _choice(
        "train calibrate",
        0.5,
        "Share of unlearning prompts whose subject stays unturned, so that other tokens must turn. Catches words that "
        "training never saw. The paper: 0.",
    )
    blind_text: float = _choice(
        "train calibrate",
        0.1,
        "Share of unlearning prompts whose text tokens all stay unturned, so that image tokens turn. The paper: 0.",
    )
    beyond: float = _choice(
        "train calibrate",
        0.5,
        "Where a subject is only taken out, its velocities go this much further from the concept's own than the prompt "
        "without it, which may still show it by chance.",
    )
    sharing: str = _choice(
        "train calibrate",
        "independent",
        "Image tokens turn by generators of their own (`independent`), or the text's.",
    )
    image_scale: float = _choice("train calibrate", 0.01, "Factor on the text's generators where they are `shared`.")
    harden: int = _choice(
        "harden",
        0,
        "Rounds of hardening: each finds new words that bring the concept back, and trains anew with them.",
    )
    steps: int = _choice("train", 180, "Optimiser steps. The paper's code: up to 10,000 of one prompt.")
    phase: int = _choice(
        "train", 5, "Steps of unlearning, then as many of preserving, and so on. The paper's code: 10."
    )
    batch: int = _choice("train calibrate", 24, "Prompts per step.")
    passes_of: int = _choice(
        "extract latents train calibrate",
        0,
        "Prompts per forward pass, in every stage (training accumulates); 0: the whole batch at once, 48 where nothing "
        "is learned.",
        decides=False,
    )
    checkpointing: bool = _choice(
        "train calibrate", False, "Recompute blocks in the backward pass: slower, far less memory.", decides=False
    )
    learning_rate: float = _choice(
        "train", 3e-2, "AdamW's for the generators at the start; falls to a tenth. The paper's code: 1e-3."
    )
    unlearn_at: tuple[float, ...] = _choice(
        "latents train calibrate",
        (1.0, 0.9, 0.8),
        "Times of the base model's trajectories to unlearn at; the paper's is 1 alone.",
    )
    unlearn_scale: float = _choice(
        "train calibrate", 4.0, "Velocity change at which unlearning `away` has had enough; the paper's is 1."
    )
    preserve_weight: float = _choice("train", 1.0, "Weight of the preserving loss against the unlearning one.")
    text_init: float = _choice("train calibrate", 1.0, "Standard deviation of the text generators' first values.")
    image_init: float = _choice("train calibrate", 0.3, "The same for the image generators. The paper: 0.01.")
    regulariser: str = _choice(
        "train", "velocity", "`velocity` (match the base model's, the paper's) or `flow` (flow matching)."
    )

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            numbers = [each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, float)]
            _require(all(map(math.isfinite, numbers)), entry.name, value, "finite numbers")
        self._require_used()
        _require(self.basis in ("svd", "contrastive"), "basis", self.basis, "svd or contrastive")
        _require(self.gate in ("calibrated", "fixed"), "gate", self.gate, "calibrated or fixed")
        for name in ("acts_on", "acts_on_image"):
            _require(getattr(self, name) in ("qk", "q", "k"), name, getattr(self, name), "qk, q or k")
        _require(self.regulariser in ("velocity", "flow"), "regulariser", self.regulariser, "velocity or flow")
        share = self.quantile
        _require(share is None or 0 < share <= 1, "quantile", share, "a number above 0, at most 1")
        more = self.relative_padding or 0
        _require(more >= 0, "relative_padding", more, "at least 0")
        good = not more or self.relative_rank > 0
        _require(good, "relative_padding", more, "0 where relative_rank is 0: risk has no relative dimensions")
        _require(0 <= self.threshold <= 1, "threshold", self.threshold, "a number from 0 to 1")
        _require(0 <= self.angle <= math.pi, "angle", self.angle, "radians from 0 to half a turn, 3.1415")
        _require(self.rank >= 1, "rank", self.rank, "at least 1")
        for name in (
            "harden",
            "relative_rank",
            "padding_rank",
            "words_rank",
            "image_rank",
            "reach",
            "passes_of",
            "fit",
        ):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        width = self.rank + self.padding_rank + self.words_rank + self.reach
        _require(width >= 2, "rank", self.rank, "at least 2 with padding_rank, words_rank and reach: one plane")
        _require(self.generator in ("fixed", "random"), "generator", self.generator, "fixed or random")
        _require(self.sharing in ("independent", "shared"), "sharing", self.sharing, "independent or shared")
        calibrated = self.relative_rank == 0 or self.gate == "calibrated"
        _require(
            calibrated, "relative_rank", self.relative_rank, "0 with a fixed gate: relative risks are small numbers"
        )
        most = self.rank + self.padding_rank + self.words_rank + self.reach
        fits = self.relative_rank == 0 or self.image_rank <= most
        _require(fits, "image_rank", self.image_rank, f"at most {most}, the dimensions in which text turns")
        apart = self.sharing == "independent" or self.image_rank == 0
        _require(apart, "image_rank", self.image_rank, "0 where generators are shared")
        good = self.blind >= 0 <= self.blind_text and self.blind + self.blind_text <= 1
        _require(good, "blind", (self.blind, self.blind_text), "two shares, with blind_text, of at most 1 together")
        _require(self.beyond >= 0, "beyond", self.beyond, "at least 0")
        _require(self.objective in ("replace", "away"), "objective", self.objective, "replace or away")
        _require(self.max_angle >= 0, "max_angle", self.max_angle, "radians, at least 0")
        drawn = self.strengths
        good = len(drawn) == 2 and 0 <= drawn[0] <= drawn[1] < math.inf and drawn[1] > 0
        _require(good, "strengths", drawn, "two numbers, the least and the largest, at least 0")
        for name in ("timesteps", "unlearn_at"):
            times = getattr(self, name)
            good = bool(times) and list(times) == sorted(times, reverse=True) and times[0] <= 1 and times[-1] > 0
            _require(good, name, times, "falling numbers in (0, 1]")
        _require(self.unlearn_at[0] == 1, "unlearn_at", self.unlearn_at, "1 (pure noise) as its first time")
        _require(self.unlearn_scale > 0, "unlearn_scale", self.unlearn_scale, "a number above 0")
        for name in ("learning_rate", "preserve_weight", "text_init", "image_init"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _require(-1 <= self.similarity <= 1, "similarity", self.similarity, "a cosine, from -1 to 1")
        _require(0 <= self.seed <= _LARGEST_SEED, "seed", self.seed, f"a number from 0 to {_LARGEST_SEED}")
        good = self.resolution is None or (self.resolution > 0 and self.resolution % _PATCH == 0)
        _require(good, "resolution", self.resolution, f"a multiple of {_PATCH} pixels")
        for name in ("unsafe_prompts", "benign_prompts", "reservoir", "steps", "phase", "batch"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")

    @property
    def fits(self) -> bool:
        """Whether `calibrate` fits its turn to the model."""
        return self.fit > 0 and self.generator == "fixed"

    def _require_used(self) -> None:
        """ValueError for a setting that has no effect beside the others."""
        presets = self.unsafe is None and (self.model != "tinyworld" or self.benign is not None)
        _require(
            not self.subjects or self.unsafe is not None,
            "subjects",
            self.subjects,
            "none without --unsafe FILE: they are looked for in a file's prompts, and others mark their own",
        )
        _require(
            self.category is None or self.unsafe is not None,
            "category",
            self.category,
            "none without --unsafe FILE, whose rows it chooses among",
        )
        _require(
            self.images is None or self.benign is not None,
            "images",
            self.images,
            "none without --benign FILE, whose captions' pictures they are",
        )
        _require(
            self.similarity_model is None or presets,
            "similarity_model",
            self.similarity_model,
            "none but with a preset, whose subjects it chooses among",
        )


# Settings that make nothing again: they change time and memory alone, and results up to the order in which sums are
# added up. So a training that ran out of memory resumes with less of it.
DECIDE_NOTHING = tuple(entry.name for entry in fields(Settings) if not entry.metadata["decides"])


def settings_of(*stages: str) -> tuple[str, ...]:
    """Names of the settings that decide any of these stages, in the order of their definition."""
    return tuple(entry.name for entry in fields(Settings) if set(stages) & set(entry.metadata["stages"]))


def deciding(stage: str) -> tuple[str, ...]:
    """Names of the settings whose values are inputs of a stage: `settings_of` less DECIDE_NOTHING."""
    return tuple(name for name in settings_of(stage) if name not in DECIDE_NOTHING)


def _require(good: bool, name: str, got: object, expected: str) -> None:
    if not good:
        raise ValueError(f"setting {name!r}: got {got!r}, expected {expected}")
