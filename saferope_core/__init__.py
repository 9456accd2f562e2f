"""SafeRoPE without a host: concepts, their files, and the rotation of queries and keys.

Imports inside are relative, so that every host may reach the core under its own name.

Axes: B batch, H heads, L tokens, D head dimension, R subspace rank, P = R // 2 planes, N safety-critical heads.
"""

from .concept.concept import Concept, require_names
from .concept.concept_file import MAX_CONCEPTS, ConceptFileError, load_concepts, made_for, save_concepts, sha256
from .concept.families import FAMILIES, Family, titles
from .concept.geometry import BLOCK_TYPES, DOUBLE, FLUX1, SINGLE, Geometry
from .concept.merge import Overlap, overlap
from .concept.selection import STREAM_CHOICES, parse_blocks, restricted
from .concept.stream import NAMES, ROLES, STREAMS, Roles, Stream, stream_of, tensors_of
from .concept.strength import held_strengths, strength_notes
from .maths.calibration import calibrate_gate, fixed_generator
from .maths.exponential import eigen
from .maths.noise import seeded_noise
from .maths.risk import (
    CRITICAL,
    THRESHOLD,
    discrimination,
    gated,
    head_discrimination_score,
    latent_risk_score,
    saturated,
)
from .maths.rotation import bounded, exact, fold, planes, rotate_by_generator, skew, turn, wide
from .maths.subspace import GramSum, contrast, contrastive_basis, extended, orthonormal, relative_basis, unsafe_basis
from .measure.before import require_known, require_vectors, require_widths, unknown_parts, unknown_words
from .measure.generators import fixed_generators, random_generators
from .measure.heads import CriticalHeads, HeadTable, Ranks, critical_heads, histogram, read_heads
from .measure.statistics import (
    BENIGN,
    COLLECTED,
    EULER_STEP,
    IMAGE,
    PADDING,
    SUBJECT,
    UNSAFE,
    WORDS,
    Gathering,
    Reservoir,
    Statistics,
    Vectors,
    schedule,
    token_kinds,
)
from .run.effect import Effect, effect_of, moved, require_effect, undone
from .run.protection import Protection
from .run.receipt import Asked, AskedConcept, Receipt, Seen, failures, omissions, receipt_from
from .run.recorder import Forward, Reading, Run
from .version import __version__

__all__ = [
    "BENIGN",
    "BLOCK_TYPES",
    "COLLECTED",
    "CRITICAL",
    "DOUBLE",
    "EULER_STEP",
    "FAMILIES",
    "FLUX1",
    "IMAGE",
    "MAX_CONCEPTS",
    "NAMES",
    "PADDING",
    "ROLES",
    "SINGLE",
    "STREAMS",
    "STREAM_CHOICES",
    "SUBJECT",
    "THRESHOLD",
    "UNSAFE",
    "WORDS",
    "Asked",
    "AskedConcept",
    "Concept",
    "ConceptFileError",
    "CriticalHeads",
    "Effect",
    "Family",
    "Forward",
    "Gathering",
    "Geometry",
    "GramSum",
    "HeadTable",
    "Overlap",
    "Protection",
    "Ranks",
    "Reading",
    "Receipt",
    "Reservoir",
    "Roles",
    "Run",
    "Seen",
    "Statistics",
    "Stream",
    "Vectors",
    "__version__",
    "bounded",
    "calibrate_gate",
    "contrast",
    "contrastive_basis",
    "critical_heads",
    "discrimination",
    "effect_of",
    "eigen",
    "exact",
    "extended",
    "failures",
    "fixed_generator",
    "fixed_generators",
    "fold",
    "gated",
    "head_discrimination_score",
    "held_strengths",
    "histogram",
    "latent_risk_score",
    "load_concepts",
    "made_for",
    "moved",
    "omissions",
    "orthonormal",
    "overlap",
    "parse_blocks",
    "planes",
    "random_generators",
    "read_heads",
    "receipt_from",
    "relative_basis",
    "require_effect",
    "require_known",
    "require_names",
    "require_vectors",
    "require_widths",
    "restricted",
    "rotate_by_generator",
    "saturated",
    "save_concepts",
    "schedule",
    "seeded_noise",
    "sha256",
    "skew",
    "stream_of",
    "strength_notes",
    "tensors_of",
    "titles",
    "token_kinds",
    "turn",
    "undone",
    "unknown_parts",
    "unknown_words",
    "unsafe_basis",
    "wide",
]
