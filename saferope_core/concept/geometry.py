"""The shape of a model as a concept sees it: how many blocks of each type, how many heads, how wide."""

from __future__ import annotations

import re
from dataclasses import dataclass

DOUBLE, SINGLE = 0, 1  # codes of the block types in a concept's `heads`
BLOCK_TYPES = ("double", "single")  # the hosts' names, in the order of the codes

SLUG = re.compile(r"[a-z0-9-]+")
_LONGEST = 60  # characters of a family
# Twice the largest of the diffusion transformers known in November 2026, so that a file cannot ask for absurd maps and
# tables: Qwen-Image has 60 blocks, FLUX.2-dev and Krea 2 have 48 heads, Ideogram 4 has 256 dimensions in a head.
MOST_BLOCKS, MOST_HEADS, LARGEST_HEAD_DIM = 128, 96, 512


@dataclass(frozen=True)
class Geometry:
    """Blocks and heads of a model whose attention vectors a concept was measured on.

    Where keys are grouped, `heads // key_heads` query heads share a key head: query head h meets key head
    h // (heads // key_heads). Raises ValueError where a number is not an integer in its range, where key heads do not
    divide the heads, or where the family is not [a-z0-9-]+.
    """

    double_blocks: int  # blocks with separate text and image streams
    single_blocks: int  # blocks with one sequence of text and image tokens
    heads: int  # of queries
    head_dim: int
    family: str = "flux"  # a row of FAMILIES, or of a later version's
    key_heads: int | None = None  # as many as `heads` unless told

    def __post_init__(self) -> None:
        if self.key_heads is None:
            object.__setattr__(self, "key_heads", self.heads)
        ranges = {
            "double_blocks": (0, MOST_BLOCKS),
            "single_blocks": (0, MOST_BLOCKS),
            "heads": (1, MOST_HEADS),
            "head_dim": (2, LARGEST_HEAD_DIM),
            "key_heads": (1, MOST_HEADS),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"geometry: {name} is {value!r:.80}, expected an integer from {low} to {high}")
        if self.heads % self.heads_of("k"):
            raise ValueError(f"geometry: {self.heads} heads share {self.key_heads} key heads, expected a divisor")
        if not 1 <= self.blocks <= MOST_BLOCKS:
            raise ValueError(
                f"geometry: {self.double_blocks} double and {self.single_blocks} single blocks, expected 1 to "
                f"{MOST_BLOCKS} blocks in all"
            )
        if not isinstance(self.family, str) or not SLUG.fullmatch(self.family) or len(self.family) > _LONGEST:
            raise ValueError(
                f"geometry: family is {self.family!r:.80}, expected letters, digits and hyphens, [a-z0-9-]+, at most "
                f"{_LONGEST}"
            )

    def heads_of(self, role: str) -> int:
        """How many heads the queries ("q") or the keys ("k") of a block have."""
        return self.key_heads if role == "k" and self.key_heads is not None else self.heads

    @property
    def group(self) -> int:
        """How many query heads share a key head; 1 where every query head has its own."""
        return self.heads // self.heads_of("k")

    @property
    def blocks(self) -> int:
        """Number of blocks of both types: the rows of a head map."""
        return self.double_blocks + self.single_blocks

    @property
    def image_blocks(self) -> int:
        """The type, DOUBLE or SINGLE, of the blocks whose image tokens turn. The paper has SINGLE. A model without
        single blocks (Qwen-Image) has DOUBLE.
        """
        return SINGLE if self.single_blocks else DOUBLE

    def row(self, block_type: str, block_index: int) -> int:
        """Row of a block in a head map: double blocks first, then single blocks. Both counts start at 0.

        Raises ValueError for a block type or index this geometry does not have.
        """
        if block_type not in BLOCK_TYPES:
            raise ValueError(f"block type {block_type!r}, expected one of {BLOCK_TYPES}")
        count = self.double_blocks if block_type == "double" else self.single_blocks
        if not 0 <= block_index < count:
            raise ValueError(f"{block_type} block {block_index} asked for, but the model is {self.describe()}")
        return block_index if block_type == "double" else self.double_blocks + block_index

    def describe(self) -> str:
        """One line for messages: 'flux: 19 double + 38 single blocks x 24 heads x 128'."""
        return (
            f"{self.family}: {self.double_blocks} double + {self.single_blocks} single blocks"
            f" x {self.heads} heads{'' if self.group == 1 else f' ({self.key_heads} of keys)'} x {self.head_dim}"
        )

    def title(self) -> str:
        """The model's usual name where it is known, else `describe()`."""
        return {FLUX1: "FLUX.1", TINY_WORLD: "the tiny world"}.get(self) or self.describe()

    def require(self, other: Geometry, what: str) -> None:
        """Raise ValueError unless `other`, the geometry of `what`, is this one.

        A concept's bases are positions of one model's heads: nothing of it carries over to another geometry.
        """
        if other != self:
            raise ValueError(
                f"{what} was made for {other.title()}, but the model is {self.title()}."
                f" Use a model of the first kind, or a concept trained for the second."
            )


FLUX1 = Geometry(double_blocks=19, single_blocks=38, heads=24, head_dim=128)  # FLUX.1 dev and schnell
TINY_WORLD = Geometry(double_blocks=2, single_blocks=4, heads=2, head_dim=128)  # the model that comes with SafeRoPE
