"""One process or several: their numbers, sums over all, and the one that writes.

`accelerate launch` starts several on GPUs. On CPUs `python -m torch.distributed.run` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

PATIENCE = timedelta(days=7)  # of a process that waits while another fits a baseline; NCCL's own is ten minutes
_apart: ContextVar[bool] = ContextVar("apart", default=False)


def _state() -> Any:
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


@contextmanager
def apart() -> Iterator[None]:
    """Within, this process counts as the only one: for work that is its alone, whose sums must not wait for others'."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def count() -> int:
    """How many processes share the work."""
    return 1 if _apart.get() else _state().num_processes


def index() -> int:
    """Which of them this is, from 0."""
    return 0 if _apart.get() else _state().process_index


def is_main() -> bool:
    """Whether this one writes files."""
    return index() == 0


def own_device(name: str) -> str:
    """The device of this process: of several that were all told "cuda", each takes its own GPU."""
    return f"cuda:{_state().local_process_index}" if name == "cuda" and count() > 1 else name


def require_device(name: str) -> None:
    """ValueError where this machine, or its PyTorch, has no such device."""
    try:
        if torch.empty(0, device=name).is_meta:
            raise RuntimeError("a device without memory")
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without CUDA
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        gpus = torch.cuda.device_count()
        here = "cpu" + (", cuda" if gpus else "") + "".join(f", cuda:{number}" for number in range(gpus))
        raise ValueError(
            f"device {name!r}: got none here ({why}), expected one of {here}; name one with --device, or install a "
            "PyTorch that knows it"
        ) from None


def wait() -> None:
    """Returns when all processes have come here."""
    if count() > 1:
        _state().wait_for_everyone()


def fair_share(costs: Sequence[int]) -> list[int]:
    """The numbers, in order, of this process's jobs: the dearest first, each to the least loaded."""
    load, mine = [0] * count(), []
    for job in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        least = load.index(min(load))
        load[least] += costs[job]
        mine += [job] if least == index() else []
    return sorted(mine)


def share_out(jobs: Sequence[Callable[[], object]]) -> None:
    """Does the jobs, each whole and by one process; returns when all are done."""
    for job in jobs[index() :: count()]:
        with apart():
            job()
    wait()


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes."""
    if count() == 1:
        return x
    from accelerate.utils import reduce

    device = x.device
    return reduce(x.to(_state().device), reduction="sum").to(device)


def gathered(value: Any) -> list:
    """Every process's picklable value, in their order."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])
