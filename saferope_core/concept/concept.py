"""A concept: its safety-critical heads and how text and image tokens turn in them. Checked once, then never changed.

Axes: N safety-critical heads, D head dimension, R subspace rank, S reach, H heads of a block.

Risk is measured in the unsafe subspace, the first R columns of a basis. A rotation may need to leave that subspace: a
key at which every picture looks cannot turn away within directions at which every picture looks. The last S columns,
the reach, are directions outside of the unsafe subspace. They turn, and never count as risk. S = 0 is the paper.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..maths.risk import THRESHOLD
from .geometry import BLOCK_TYPES, SLUG, Geometry
from .stream import NAMES, ROLES, STREAMS, Names, Stream, stream_of, tensors_of

ACTS_ON = ("qk", "q", "k")
MODES = ("learned", "fixed", "random")

LONGEST_NAME = 200  # characters: fits a menu
LONGEST_TEXT = 20_000  # characters of a description
LARGEST_ANGLE = 100.0  # radians; beyond it float32 no longer resolves an angle to 1e-5
LARGEST_STRENGTH = 100.0
LEAST_FULL = 1e-4  # LRS: a tenth of the least calibrated gate. Nearer 0, rounding would decide which vectors turn.
LOOSEST = 0.01  # ten times the error that rounding to float16 makes in UᵀU at any rank. From 0.1 on a column may lack.
_HEADS_AT_ONCE = 64  # in float64


@dataclass(frozen=True, eq=False)
class Concept:
    """One concept. Its tensors are float32 copies on the CPU (`heads`: int32) that no other object holds.

    Raises ValueError, with the value found and the value expected, unless every field is in its documented range.
    """

    slug: str  # [a-z0-9-]+, the prefix of its tensors in a file
    name: str  # for people: one printable line
    description: str
    geometry: Geometry
    heads: Tensor  # int32 [N, 3]: block type (DOUBLE, SINGLE), block, head; sorted, unique
    text: Stream  # with bases and roles of its own
    image: Stream | None  # None: image tokens do not turn
    discrimination: Tensor  # [blocks, H] in [-1, 1]: Δ of every head, double blocks first
    threshold: float = THRESHOLD  # in [0, 1]: the gate of heads without a gate of their own
    strength: float = 1.0  # factor on the risk: 0 is off, 1 is as trained
    mode: str = "learned"  # source of the generators: "learned", "fixed" or "random"
    training: dict = field(default_factory=dict)  # the record needed to repeat the training, as JSON.
    singular_values: Tensor | None = None  # [N, R] >= 0
    reach: int = 0  # S: the number of the bases' last columns that are outside of the unsafe subspace
    source: str = ""  # sha256 of its file. Only the strength and the slug may have changed since, else "".

    def __post_init__(self) -> None:
        _check_words(self)
        _check_numbers(self)
        _take(self, "training", _as_json(self.training))
        _take(self, "heads", _taken_heads(self.heads, self.geometry))
        layout = _layout(self)
        _take(self, "text", _taken_stream(self.text, NAMES["text"], layout))
        if self.image is not None:
            _take(self, "image", _taken_stream(self.image, NAMES["image"], layout))
        _take(self, "discrimination", _taken("discrimination", self.discrimination, *layout["discrimination"]))
        if self.singular_values is not None:
            _take(self, "singular_values", _taken("singular_values", self.singular_values, *layout["singular_values"]))

    @property
    def rank(self) -> int:
        """R, the dimension of the unsafe subspace of every head."""
        return self.basis("q").shape[-1] - self.reach

    @property
    def places(self) -> Tensor:
        """A number for every head, int64 [N], ascending: the head's place among all heads of the geometry."""
        block_type, block, head = self.heads.long().unbind(1)
        return (block_type * self.geometry.double_blocks + block) * self.geometry.heads + head

    def owners(self, role: str) -> Tensor:
        """bool [N]: the heads whose basis, gate and generator turn a role. All heads turn their queries.

        Where keys are grouped, several query heads share a key head. The first safety-critical one of them turns it.
        """
        shared = self.places // (self.geometry.group if role == "k" else 1)
        return torch.cat([torch.ones(1, dtype=torch.bool), shared.diff() != 0])

    def acts(self, stream: str) -> str:
        """The roles of a stream, "text" or "image", that turn."""
        own = self.image.acts_on if stream == "image" and self.image else None
        return own or self.text.acts_on or ""

    def basis(self, role: str, stream: str = "text") -> Tensor:
        """The space that turns, [N, D, R + S], for the role "q" or "k" of a stream."""
        basis = self._owner(stream).basis
        assert basis is not None  # checked when the concept was made
        return basis[role]

    def gate(self, role: str, stream: str = "text") -> Tensor:
        """Gates [N] of the role "q" or "k" of a stream: the heads' own, else the concept's threshold."""
        own = self._owner(stream).gate[role]
        return torch.full((len(self.heads),), self.threshold) if own is None else own

    def full(self, role: str, stream: str = "text") -> Tensor:
        """The LRS [N] at which a vector of a stream turns by its full angle: the heads' own, else 1."""
        own = self._owner(stream).full[role]
        return torch.ones(len(self.heads)) if own is None else own

    @property
    def least_full(self) -> float:
        """The lowest LRS at which a vector turns by its full angle, of all heads and of the roles that turn."""
        roles = [(role, stream) for stream in STREAMS for role in self.acts(stream)]
        return min(self.full(role, stream).min().item() for role, stream in roles)

    def generator(self, stream: str) -> Tensor:
        """How a stream turns, [N, R + S, R + S]."""
        if stream == "text":
            return self.text.generator
        return torch.zeros_like(self.text.generator) if self.image is None else self.image.generator

    def moving(self, stream: str) -> Tensor:
        """bool [N]: heads whose generator for a stream is not zero."""
        return self.generator(stream).ne(0).flatten(1).any(1)

    def _owner(self, stream: str) -> Stream:
        """The stream whose bases and gates the tokens of `stream` use."""
        return self.image if stream == "image" and self.image and self.image.basis else self.text


def require_names(slug: str, name: str, description: str) -> None:
    """Raise ValueError unless a concept may have this slug, name and description."""
    if not isinstance(slug, str) or not SLUG.fullmatch(slug) or len(slug) > LONGEST_NAME:
        raise ValueError(f"slug is {slug!r}, expected small letters, digits and hyphens: [a-z0-9-]+")
    _check_text("name", name, LONGEST_NAME)
    if not name.strip():
        raise ValueError("name is empty, expected a name for people to choose by")
    _check_text("description", description, LONGEST_TEXT, also="\n\t")


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


Layout = dict[str, tuple[tuple[int, ...], float, float]]  # tensor's name in a file -> shape, lowest and highest value


def _layout(concept: Concept) -> Layout:
    """Shape and range of every float tensor; N comes from `heads`, R + S from the first basis, the rest from the
    geometry.
    """
    geometry, count = concept.geometry, len(concept.heads)
    widths = {"text": _width_of("basis_q", concept.text.basis.q if concept.text.basis else None, geometry.head_dim)}
    widths["image"] = _image_width(concept, widths["text"])
    least = min(widths.values())
    if type(concept.reach) is not int or not 0 <= concept.reach < least:
        raise ValueError(
            f"reach is {concept.reach!r:.40}, expected 0 to {least - 1}: of {least} columns one at least tells the risk"
        )
    layout: Layout = {
        "discrimination": ((geometry.blocks, geometry.heads), -1.0, 1.0),
        "singular_values": ((count, widths["text"] - concept.reach), 0.0, torch.finfo(torch.float32).max),
    }
    for stream, width in widths.items():
        names = NAMES[stream]
        layout |= {names.basis[role]: ((count, geometry.head_dim, width), -1.0, 1.0) for role in ROLES}
        layout |= {names.gate[role]: ((count,), 0.0, 1.0) for role in ROLES}
        layout |= {names.full[role]: ((count,), LEAST_FULL, 1.0) for role in ROLES}
        layout[names.generator] = ((count, width, width), -LARGEST_ANGLE, LARGEST_ANGLE)
    return layout


def _image_width(concept: Concept, width: int) -> int:
    """Columns of the image tokens' bases, `width` where they have none of their own."""
    names, basis = NAMES["image"], concept.image.basis if concept.image else None
    if concept.image is None or basis is None or None in (basis.q, basis.k):
        own = {} if concept.image is None else tensors_of(concept.image, names)
        if alone := [name for name, tensor in own.items() if tensor is not None and name != names.generator]:
            raise ValueError(
                f"{', '.join(alone)}: without basis_image_q and basis_image_k, expected both or none of them"
            )
        return width
    return _width_of("basis_image_q", basis.q, concept.geometry.head_dim)


def _taken_stream(stream: Stream, names: Names, layout: Layout) -> Stream:
    """`stream` with copies of its tensors, all of them checked."""
    tensors = tensors_of(stream, names)
    optional = {
        *vars(names.gate).values(),
        *vars(names.full).values(),
        *(vars(names.basis).values() if stream.basis is None else ()),
    }
    for name, tensor in tensors.items():
        if tensor is not None or name not in optional:
            tensors[name] = _taken(name, tensor, *layout[name])
    for role in ROLES:
        if (basis := tensors[names.basis[role]]) is not None:
            require_orthonormal(names.basis[role], basis)
    taken = stream_of(tensors, stream.acts_on, names)
    require_skew(names.generator, taken.generator)
    return taken


def _width_of(name: str, basis: Tensor | None, head_dim: int) -> int:
    if not isinstance(basis, Tensor) or basis.ndim != 3:
        found = tuple(basis.shape) if isinstance(basis, Tensor) else type(basis).__name__
        raise ValueError(f"{name}: got {found}, expected a tensor of shape [heads, head dimension, rank]")
    width = basis.shape[-1]
    if not 2 <= width <= head_dim:
        raise ValueError(f"rank is {width}, expected 2 (one plane) to {head_dim} (the head dimension)")
    return width


def _taken(name: str, value: Tensor | None, shape: tuple[int, ...], low: float, high: float) -> Tensor:
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
    require_names(concept.slug, concept.name, concept.description)
    if not isinstance(concept.text, Stream) or not isinstance(concept.image, (Stream, type(None))):
        found = f"{type(concept.text).__name__} and {type(concept.image).__name__}"
        raise ValueError(f"text and image: got {found}, expected a Stream and a Stream or None")
    for names, stream, also in ((NAMES["text"], concept.text, ()), (NAMES["image"], concept.image, (None,))):
        if stream is not None and stream.acts_on not in (*ACTS_ON, *also):
            raise ValueError(f"{names.acts_on} is {stream.acts_on!r}, expected one of {(*ACTS_ON, *also)}")
    if concept.mode not in MODES:
        raise ValueError(f"mode is {concept.mode!r}, expected one of {MODES}")


def _check_text(what: str, text: str, longest: int, also: str = "") -> None:
    if not isinstance(text, str) or len(text) > longest:
        found = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
        raise ValueError(f"{what}: got {found}, expected text of at most {longest} characters")
    # control characters, and invisible ones such as marks that reverse the reading direction
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
    for key in ("settings", "versions"):  # code that shows a concept reads these
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


def _take(concept: Concept, name: str, value: object) -> None:
    object.__setattr__(concept, name, value)
