"""One process or several: who am I, sums over all, and what only one of them writes.

Several are started by `accelerate launch` on GPUs, by `python -m torch.distributed.run` on CPUs: accelerate's own launcher
starts one process alone there, and its state counts as one unless told that it is on CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _state():
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def count() -> int:
    """How many processes share the work."""
    return _state().num_processes


def index() -> int:
    """Which of them this is, from 0."""
    return _state().process_index


def is_main() -> bool:
    """Whether this one writes files."""
    return _state().is_main_process


def own_device(name: str) -> str:
    """The device of this process: of several that were all told "cuda", each takes its own GPU."""
    return f"cuda:{_state().local_process_index}" if name == "cuda" and count() > 1 else name


def wait() -> None:
    """Returns when all processes have come here."""
    _state().wait_for_everyone()


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes."""
    if count() == 1:
        return x
    from accelerate.utils import reduce

    device = x.device
    return reduce(x.to(_state().device), reduction="sum").to(device)


def gathered(value) -> list:
    """Every process's picklable value, in their order."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])
