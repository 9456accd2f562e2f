"""Low-rank weights on the transformer's linear layers, through peft, that always come off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_PREFIX = "transformer."  # with it diffusers' and ComfyUI's LoRA loaders take the tensors as they are (alpha = rank)
_NAME = "default"


@contextmanager
def added(transformer: nn.Module, targets: str, rank: int, seed: int = 0) -> Iterator[dict[str, nn.Parameter]]:
    """Layers whose names match the pattern `targets` get an adapter of alpha = rank; yields its weights, fp32.

    A starts random, B at zero: the model is unchanged. Blocks are checkpointed on a GPU, where FLUX would not fit else.
    """
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), _NAME)
    try:
        if next(transformer.parameters()).is_cuda:
            transformer.enable_gradient_checkpointing()
        weights = {name: weight for name, weight in transformer.named_parameters() if "lora_" in name}
        for weight in weights.values():
            weight.data = weight.data.float()
            weight.requires_grad_()
        yield weights
    finally:
        transformer.disable_gradient_checkpointing()
        transformer.unload_lora()


def state_of(weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The weights on the CPU, under the names that LoRA files have."""
    return {
        _PREFIX + name.replace(f".{_NAME}.", "."): weight.detach().cpu().clone() for name, weight in weights.items()
    }


@contextmanager
def applied(transformer: nn.Module, state: dict[str, Tensor], targets: str, strength: float) -> Iterator[None]:
    """The adapter of `state_of`, times `strength`; none at all where it is 0 or the state empty."""
    if not state or strength == 0:
        yield
        return
    rank = min(next(iter(state.values())).shape)
    with added(transformer, targets, rank) as weights:
        for name, weight in weights.items():
            known = state[_PREFIX + name.replace(f".{_NAME}.", ".")]
            weight.data.copy_(known * strength if "lora_B" in name else known)
            weight.requires_grad_(False)
        yield
