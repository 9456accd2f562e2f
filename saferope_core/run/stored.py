"""Plans of all blocks in one buffer for each dtype: a sampling run copies them to its device at once, and drops them.

A thousand small copies, and packing them anew, would take longer than a step of the model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

ALIGNED = 64  # numbers between two tensors' beginnings: 16 bytes or more, which wide loads of a GPU ask for


class Place(NamedTuple):
    """Where a tensor lies in the buffer of its dtype."""

    dtype: torch.dtype
    first: int
    shape: torch.Size


class Stored(NamedTuple):
    """Any tree of tensors, with its other leaves as they are."""

    buffers: dict[torch.dtype, Tensor]  # on the CPU, each one-dimensional
    leaves: list[Any]  # a Place for each tensor
    form: TreeSpec


@torch.inference_mode(False)
@torch.no_grad()
def stored(tree: Any) -> Stored:
    """The tree's tensors, copied to the CPU."""
    leaves, form = tree_flatten(tree)
    parts: dict[torch.dtype, list[Tensor]] = {}
    placed, ends = [], dict.fromkeys({leaf.dtype for leaf in leaves if isinstance(leaf, Tensor)}, 0)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            placed.append(Place(leaf.dtype, ends[leaf.dtype], leaf.shape))
            gap = -leaf.numel() % ALIGNED
            parts.setdefault(leaf.dtype, []).extend((leaf.reshape(-1).cpu(), leaf.new_zeros(gap, device="cpu")))
            ends[leaf.dtype] += leaf.numel() + gap
        else:
            placed.append(leaf)
    return Stored({dtype: torch.cat(each) for dtype, each in parts.items()}, placed, form)


@torch.inference_mode(False)
def on_device(held: Stored, device: torch.device) -> Any:
    """The tree on a device; its tensors are views of one buffer for each dtype."""
    buffers = {dtype: buffer.to(device) for dtype, buffer in held.buffers.items()}

    def tensor(place: Place) -> Tensor:
        return buffers[place.dtype][place.first : place.first + place.shape.numel()].view(place.shape)

    leaves = [tensor(leaf) if isinstance(leaf, Place) else leaf for leaf in held.leaves]
    return tree_unflatten(leaves, held.form)
