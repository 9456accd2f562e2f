"""What the forward that a thread is in has shown: the blocks that made queries, and those whose queries came to the
patch.
"""

from __future__ import annotations

import threading
from typing import Any

from ...saferope_core import Forward
from .network import Block


class ForwardState(threading.local):
    """One patch's view of the forward its thread is in.

    acting: whether the patch turns; outside of a forward (a node that calls the model by itself) yes is the safe side.
    record: what is noted of it, or None; network: what runs, or None outside. called: blocks that called the patch;
    projected: blocks that were seen to make queries, as watched_queries tells.
    """

    def __init__(self) -> None:
        self.begin(True, None, None)

    def begin(self, acting: bool, record: Forward | None, network: Any) -> None:
        """A forward starts: nothing was seen of it yet."""
        self.acting, self.record, self.network = acting, record, network
        self.called: set[Block] = set()
        self.projected: set[Block] = set()
        self._waiting: set[Block] = set()  # made queries that the patch has not seen yet
        self._lost: set[Block] = set()  # made others before the patch had seen the first

    def end(self) -> None:
        """The forward is over; what it has shown stays to be judged."""
        self.acting, self.record, self.network = True, None, None

    def project(self, block: Block) -> None:
        """The block makes queries: these are to come to the patch next."""
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
