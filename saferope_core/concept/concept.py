"""A concept: everything that is known about what to suppress, checked once, then never changed.

Axes: N safety-critical heads, D head dimension, R subspace rank, S reach, H heads of a block.

Risk is measured in the unsafe subspace, the first R columns of a basis. A rotation may need to leave it: a key that all
pictures look at cannot be turned away from them within directions that they all look at. The last S columns, the
reach, are such directions outside: never part of the risk, but of the space that is turned. S = 0 is the paper.

Image tokens in which the concept is being painted can be told apart as text tokens can, whatever word asked for it, but lie
elsewhere: they may have bases of their own, with another rank. Without them they use the text's, as in the paper.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..maths.risk import THRESHOLD
from .geometry import BLOCK_TYPES, SLUG, Geometry

ACTS_ON = ("qk", "q", "k")
MODES = ("learned", "fixed", "random")

LONGEST_NAME = 200  # characters: fits a menu
LONGEST_TEXT = 20_000  # characters of a description
LARGEST_ANGLE = 100.0  # radians; beyond it float32 no longer resolves an angle to 1e-5
LARGEST_STRENGTH = 100.0
LOOSEST = 0.01  # ten times what rounding to float16 does to UᵀU at any rank; beyond 0.1 columns could be missing
_HEADS_AT_ONCE = 64  # in float64


@dataclass(frozen=True, eq=False)
class Concept:
    """One concept. Tensors are taken over as float32 copies on the CPU (`heads`: int32), out of anybody's reach.

    Raises ValueError, saying what was found and what was expected, unless every field is in its documented range.
    """

    slug: str  # [a-z0-9-]+, the prefix of its tensors in a file
    name: str  # for people; one printable line
    description: str
    geometry: Geometry
    heads: Tensor  # int32 [N, 3]: block type (DOUBLE, SINGLE), block, head; sorted, unique
    basis_q: Tensor  # [N, D, R + S], orthonormal columns: the unsafe subspace of queries, then the reach
    basis_k: Tensor  # [N, D, R + S], of keys
    generator_text: Tensor  # [N, R + S, R + S], skew: how text tokens turn, q and k alike
    generator_image: Tensor  # as wide as the image tokens' bases, skew: how they turn; zero where they do not
    discrimination: Tensor  # [blocks, H] in [-1, 1]: Δ of every head, double blocks first
    threshold: float = THRESHOLD  # gate of every head that has no own gate, in [0, 1]
    gate_q: Tensor | None = None  # [N] in [0, 1]: the LRS above which a query turns
    gate_k: Tensor | None = None  # [N] in [0, 1], for keys
    strength: float = 1.0  # factor on every angle; 0 = off, 1 = as trained
    acts_on: str = "qk"  # which vectors of text tokens turn: "qk", "q" or "k"
    acts_on_image: str | None = None  # the same for image tokens; None: as acts_on
    mode: str = "learned"  # where the generators come from: "learned", "fixed" or "random"
    training: dict = field(default_factory=dict)  # what is needed to repeat it, as JSON
    singular_values: Tensor | None = None  # [N, R] >= 0
    reach: int = 0  # S, how many of the bases' last columns are outside the unsafe subspace
    basis_image_q: Tensor | None = None  # as basis_q, for image tokens; both or neither
    basis_image_k: Tensor | None = None  # as basis_k
    gate_image_q: Tensor | None = None  # as gate_q; only with bases for image tokens
    gate_image_k: Tensor | None = None  # as gate_k

    def __post_init__(self):
        _check_words(self)
        _check_numbers(self)
        _take(self, "training", _as_json(self.training))
        _take(self, "heads", _taken_heads(self.heads, self.geometry))
        for name, (shape, low, high) in _layout(self).items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                _take(self, name, _taken(name, value, shape, low, high))
        for name in ("basis_q", "basis_k", "basis_image_q", "basis_image_k"):
            if getattr(self, name) is not None:
                require_orthonormal(name, getattr(self, name))
        for name in ("generator_text", "generator_image"):
            require_skew(name, getattr(self, name))

    @property
    def rank(self) -> int:
        """R, the dimension of the unsafe subspace of every head."""
        return self.basis_q.shape[-1] - self.reach

    @property
    def places(self) -> Tensor:
        """A number for every head, int64 [N], ascending: the head's place among all heads of the geometry."""
        block_type, block, head = self.heads.long().unbind(1)
        return (block_type * self.geometry.double_blocks + block) * self.geometry.heads + head

    def acts(self, stream: str) -> str:
        """The roles of a stream, "text" or "image", whose vectors turn."""
        return self.acts_on_image or self.acts_on if stream == "image" else self.acts_on

    def basis(self, role: str, stream: str = "text") -> Tensor:
        """The space that is turned, [N, D, R + S], for the role 'q' or 'k' of a stream; all but S columns are U."""
        return getattr(self, f"basis_{self._owner(stream)}{role}")

    def gate(self, role: str, stream: str = "text") -> Tensor:
        """Gates [N] of the role 'q' or 'k' of a stream: the heads' own, else the concept's threshold."""
        own = getattr(self, f"gate_{self._owner(stream)}{role}")
        return torch.full((len(self.heads),), self.threshold) if own is None else own

    def generator(self, stream: str) -> Tensor:
        """How a stream's tokens turn, [N, R + S, R + S]."""
        return self.generator_image if stream == "image" else self.generator_text

    def moving(self, stream: str) -> Tensor:
        """bool [N]: heads whose generator for a stream is not zero."""
        return self.generator(stream).ne(0).flatten(1).any(1)

    def _owner(self, stream: str) -> str:
        """In names of tensors: whose a stream's bases and gates are."""
        return "image_" if stream == "image" and self.basis_image_q is not None else ""


_OPTIONAL = (
    "gate_q",
    "gate_k",
    "singular_values",
    "basis_image_q",
    "basis_image_k",
    "gate_image_q",
    "gate_image_k",
)


def require_orthonormal(name: str, basis: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Raise ValueError unless the columns of basis [N, D, R] are orthonormal as far as `dtype` can tell."""
    rank = basis.shape[-1]
    identity = torch.eye(rank, dtype=torch.float64)
    wide = (part.double() for part in basis.split(_HEADS_AT_ONCE))  # all heads would be four times the basis
    error = torch.stack([(part.mT @ part - identity).abs().max() for part in wide]).max().item()
    allowed = min(10 * rank * torch.finfo(dtype).eps, LOOSEST)
    if not error <= allowed:
        raise ValueError(
            f"{name}: columns are not orthonormal, UᵀU differs from I by {error:.2g}, expected at most {allowed:.2g}:"
            f" the basis is damaged or was never orthonormalised"
        )


def require_skew(name: str, generator: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Raise ValueError unless generator [N, R, R] equals minus its transpose as far as `dtype` can tell."""
    error = (generator + generator.mT).abs().max().item()
    allowed = 10 * torch.finfo(dtype).eps * max(1.0, generator.abs().max().item())
    if not error <= allowed:
        raise ValueError(
            f"{name}: not skew, A + Aᵀ reaches {error:.2g}, expected at most {allowed:.2g}:"
            f" take its skew part, (A − Aᵀ) / 2, before it becomes a concept"
        )


def _layout(concept: Concept) -> dict[str, tuple[tuple[int, ...], float, float]]:
    """Shape and range of every float tensor; N comes from `heads`, R + S from `basis_q`, the rest from the geometry."""
    geometry, count = concept.geometry, len(concept.heads)
    width = _width_of("basis_q", concept.basis_q, geometry.head_dim)
    image = _image_width(concept, width)
    least = min(width, image)
    if type(concept.reach) is not int or not 0 <= concept.reach < least:
        raise ValueError(
            f"reach is {concept.reach!r:.40}, expected 0 to {least - 1}: of {least} columns one at least tells the risk"
        )
    basis, basis_image = (count, geometry.head_dim, width), (count, geometry.head_dim, image)
    return {
        "basis_q": (basis, -1.0, 1.0),
        "basis_k": (basis, -1.0, 1.0),
        "basis_image_q": (basis_image, -1.0, 1.0),
        "basis_image_k": (basis_image, -1.0, 1.0),
        "generator_text": ((count, width, width), -LARGEST_ANGLE, LARGEST_ANGLE),
        "generator_image": ((count, image, image), -LARGEST_ANGLE, LARGEST_ANGLE),
        "discrimination": ((geometry.blocks, geometry.heads), -1.0, 1.0),
        "gate_q": ((count,), 0.0, 1.0),
        "gate_k": ((count,), 0.0, 1.0),
        "gate_image_q": ((count,), 0.0, 1.0),
        "gate_image_k": ((count,), 0.0, 1.0),
        "singular_values": ((count, width - concept.reach), 0.0, torch.finfo(torch.float32).max),
    }


def _image_width(concept: Concept, width: int) -> int:
    """Columns of the image tokens' bases, `width` where they have none of their own."""
    bases = concept.basis_image_q, concept.basis_image_k
    if any(basis is None for basis in bases):
        names = ("basis_image_q", "basis_image_k", "gate_image_q", "gate_image_k")
        alone = [name for name in names if getattr(concept, name) is not None]
        if alone:
            raise ValueError(
                f"{', '.join(alone)}: without basis_image_q and basis_image_k, expected both or none of them"
            )
        return width
    return _width_of("basis_image_q", concept.basis_image_q, concept.geometry.head_dim)


def _width_of(name: str, basis: Tensor, head_dim: int) -> int:
    if not isinstance(basis, Tensor) or basis.ndim != 3:
        found = tuple(basis.shape) if isinstance(basis, Tensor) else type(basis).__name__
        raise ValueError(f"{name}: got {found}, expected a tensor of shape [heads, head dimension, rank]")
    width = basis.shape[-1]
    if not 2 <= width <= head_dim:
        raise ValueError(f"rank is {width}, expected 2 (one plane) to {head_dim} (the head dimension)")
    return width


def _taken(name: str, value: Tensor, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """`value` as a float32 copy on the CPU, of this shape, finite and in [low, high] up to rounding."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: got {found}, expected a tensor of floating point numbers")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: shape is {tuple(value.shape)}, expected {shape}")
    taken = _copy(value, torch.float32)
    if not taken.isfinite().all():
        raise ValueError(f"{name}: holds NaN or infinity, expected finite numbers: the concept is damaged")
    rounding = 10 * torch.finfo(torch.float32).eps
    if taken.min() < low - rounding or taken.max() > high + rounding:
        raise ValueError(f"{name}: reaches from {taken.min():.4g} to {taken.max():.4g}, expected {low:g} to {high:g}")
    return taken


def _taken_heads(value: Tensor, geometry: Geometry) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        found = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"heads: got {found}, expected an int32 tensor")
    if value.ndim != 2 or value.shape[1] != 3 or len(value) == 0:
        raise ValueError(
            f"heads: shape is {tuple(value.shape)}, expected (N, 3) with at least one head: a concept without"
            f" safety-critical heads protects from nothing"
        )
    _check_heads(value.long(), geometry)
    return _copy(value, torch.int32)


def _check_heads(rows: Tensor, geometry: Geometry) -> None:
    """Whether all rows [N, 3] name a head, each once and in order. In tensors: a file may hold millions."""
    block_type, block, head = rows.unbind(1)
    counts = torch.tensor([geometry.double_blocks, geometry.single_blocks])
    known = (block_type >= 0) & (block_type < len(BLOCK_TYPES))
    known &= (block >= 0) & (block < counts[block_type.clamp(0, len(BLOCK_TYPES) - 1)])
    if not known.all():
        place = tuple(rows[~known][0, :2].tolist())
        raise ValueError(f"heads: no block {place} (0 double, 1 single) in {geometry.describe()}")
    if not (there := (head >= 0) & (head < geometry.heads)).all():
        raise ValueError(f"heads: no head {head[~there][0].item()} in {geometry.describe()}")
    order = (block_type * max(counts.tolist()) + block) * geometry.heads + head
    if not (order.diff() > 0).all():
        raise ValueError("heads: rows are not sorted or not unique, expected ascending (block type, block, head)")


def _check_words(concept: Concept) -> None:
    if not isinstance(concept.slug, str) or not SLUG.fullmatch(concept.slug) or len(concept.slug) > LONGEST_NAME:
        raise ValueError(f"slug is {concept.slug!r}, expected small letters, digits and hyphens: [a-z0-9-]+")
    _check_text("name", concept.name, LONGEST_NAME)
    if not concept.name.strip():
        raise ValueError("name is empty, expected a name for people to choose by")
    _check_text("description", concept.description, LONGEST_TEXT, also="\n\t")
    for what, choices in (("acts_on", ACTS_ON), ("acts_on_image", (*ACTS_ON, None)), ("mode", MODES)):
        if getattr(concept, what) not in choices:
            raise ValueError(f"{what} is {getattr(concept, what)!r}, expected one of {choices}")


def _check_text(what: str, text: str, longest: int, also: str = "") -> None:
    if not isinstance(text, str) or len(text) > longest:
        found = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
        raise ValueError(f"{what}: got {found}, expected text of at most {longest} characters")
    # control characters and invisible ones, such as those that reverse the reading direction
    strange = sorted({character for character in text if not character.isprintable()} - set(also))
    if strange:
        raise ValueError(f"{what}: holds control characters {strange[:5]}, expected printable text")


def _check_numbers(concept: Concept) -> None:
    if not isinstance(concept.geometry, Geometry):
        raise ValueError(f"geometry: got {type(concept.geometry).__name__}, expected a Geometry")
    for what, high in (("threshold", 1.0), ("strength", LARGEST_STRENGTH)):
        value = getattr(concept, what)
        if type(value) not in (int, float) or not 0 <= value <= high:  # NaN is not in any range
            raise ValueError(f"{what} is {value!r:.40}, expected a number from 0 to {high:g}")
        _take(concept, what, float(value))


def _as_json(training: dict) -> dict:
    """A deep copy of `training` as a file would give it back: string keys, lists, finite numbers."""
    if not isinstance(training, dict):
        raise ValueError(f"training: got {type(training).__name__}, expected a dict")
    for key in ("settings", "versions"):  # whoever shows a concept looks into these
        if not isinstance(training.get(key, {}), dict):
            raise ValueError(f"training: {key} is {type(training[key]).__name__}, expected a dict")
    try:
        return json.loads(json.dumps(training, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"training: cannot be written as JSON ({error}), expected plain finite values") from None


def _copy(value: Tensor, dtype: torch.dtype) -> Tensor:
    # ComfyUI runs nodes in inference mode, and a tensor born there could never take part in training
    with torch.inference_mode(False), torch.no_grad():
        return value.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


def _take(concept: Concept, name: str, value) -> None:
    object.__setattr__(concept, name, value)
