"""Work on block after block, shared out to a few threads of one core each.

LAPACK gains nothing from threads on matrices as small as a head's Gram matrix. Its threads spin while they wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

WORKERS = 4  # each holds a few float64 copies of a block's Gram matrices, 3 MB each at FLUX.1's size

T = TypeVar("T")


def each_row(do: Callable[[int], T], rows: Iterable[int]) -> list[T]:
    """[do(row) for row in rows]. PyTorch has one thread meanwhile, and as many as before afterwards. The first row's
    error is raised.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(WORKERS, threads)) as workers:
            return list(workers.map(do, rows))
    finally:
        torch.set_num_threads(threads)
