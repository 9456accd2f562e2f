"""Starting noise of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers [len(seeds), *shape], float32 on the CPU.

    Each row has a seed of its own, so that a picture depends on its seed alone, on every device and in every batch.
    """
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
