"""SafeRoPE without a host: concepts, their files, and the rotation of queries and keys.

Imports inside are relative, so that every host may reach the core under its own name.

Axes: B batch, H heads, L tokens, D head dimension, R subspace rank, P = R // 2 planes, N safety-critical heads.
"""

from .calibration import calibrate_gate, fixed_generator
from .concept import Concept
from .concept_file import ConceptFileError, load_concepts, save_concepts, sha256
from .geometry import BLOCK_TYPES, DOUBLE, FLUX1, SINGLE, Geometry
from .merge import Overlap, orthogonalised, overlap
from .protection import Protection
from .recorder import Forward, Reading, Run
from .risk import discrimination, gated, head_discrimination_score, latent_risk_score
from .rotation import exact, fold, planes, rotate_by_generator, skew, turn, wide
from .selection import STREAM_CHOICES, parse_blocks, restricted
from .subspace import GramSum, contrast, contrastive_basis, extended, orthonormal, unsafe_basis
from .version import __version__

__all__ = [
    "BLOCK_TYPES",
    "DOUBLE",
    "FLUX1",
    "SINGLE",
    "STREAM_CHOICES",
    "Concept",
    "ConceptFileError",
    "Forward",
    "Geometry",
    "GramSum",
    "Overlap",
    "Protection",
    "Reading",
    "Run",
    "__version__",
    "calibrate_gate",
    "contrast",
    "contrastive_basis",
    "discrimination",
    "exact",
    "extended",
    "fixed_generator",
    "fold",
    "gated",
    "head_discrimination_score",
    "latent_risk_score",
    "load_concepts",
    "orthogonalised",
    "orthonormal",
    "overlap",
    "parse_blocks",
    "planes",
    "restricted",
    "rotate_by_generator",
    "save_concepts",
    "sha256",
    "skew",
    "turn",
    "unsafe_basis",
    "wide",
]
