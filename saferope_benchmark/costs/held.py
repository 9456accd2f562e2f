"""The most bytes that a turn allocates, counted on tensors without memory."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Holding(TorchDispatchMode):
    """Adds up the storages that operators make, until they are let go: `most` bytes at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._known |= {_identity(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and _identity(each) not in self._known:
                self._take(each)
        return out

    def _take(self, made: Tensor) -> None:
        storage, identity = made.untyped_storage(), _identity(made)
        self._known.add(identity)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._let_go, identity, storage.nbytes())

    def _let_go(self, identity: int, size: int) -> None:
        self._known.discard(identity)  # another storage may be given this identity
        self.now -= size


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
