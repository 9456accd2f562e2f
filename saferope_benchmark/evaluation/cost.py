"""The cost of painting: seconds, and the peak of memory, of the GPU if there is one, else of the process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_RESET_PEAK = "5"  # written to clear_refs: see proc(5)
_PROCESS = Path("/proc/self")


@contextmanager
def measured(device: torch.device) -> Iterator[dict[str, float]]:
    """A dict that holds `seconds` when the context is left, and `peak_bytes` where the system tells (Linux, CUDA)."""
    cost: dict[str, float] = {}
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    known = cuda or _reset()
    start = time.perf_counter()
    yield cost
    if cuda:
        torch.cuda.synchronize(device)
    cost["seconds"] = time.perf_counter() - start
    if known:
        cost["peak_bytes"] = torch.cuda.max_memory_allocated(device) if cuda else _peak()


def _reset() -> bool:
    """Whether the process's peak could be set back to its present use of memory."""
    try:
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _peak() -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
