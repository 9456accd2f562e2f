"""The blocks of a thread's forward that made queries, and the blocks whose queries came to the patch."""

from __future__ import annotations

import threading
from typing import Any

from ...saferope_core import Forward
from .network import Block


class ForwardState(threading.local):
    """One patch's view of its thread's forward.

    - acting: whether the patch turns. It does outside of a forward (a node calls the model by itself): the safe side.
    - record: the forward's record, or None.
    - network: the network that runs, or None outside.
    - called: blocks that called the patch.
    - projected: blocks that made queries, by `watched_queries`.
    """

    def __init__(self) -> None:
        self.begin(True, None, None)

    def begin(self, acting: bool, record: Forward | None, network: Any) -> None:
        """A forward starts. No block of it was seen yet."""
        self.acting, self.record, self.network = acting, record, network
        self.called: set[Block] = set()
        self.projected: set[Block] = set()
        self._waiting: set[Block] = set()  # made queries that the patch has not seen yet
        self._lost: set[Block] = set()  # made queries again before the patch saw the first

    def end(self) -> None:
        """The forward is over. `called`, `projected` and `unturned` stay for the audit."""
        self.acting, self.record, self.network = True, None, None

    def project(self, block: Block) -> None:
        """The block makes queries. They must come to the patch next."""
        if block in self._waiting:
            self._lost.add(block)
        self.projected.add(block)
        self._waiting.add(block)

    def answer(self, block: Block) -> None:
        """The block calls the patch."""
        self.called.add(block)
        self._waiting.discard(block)

    @property
    def unturned(self) -> set[Block]:
        """Blocks with queries that never came to the patch."""
        return self._lost | self._waiting
