"""More than one pass a step: the transformer's forward on several texts at once, one velocity out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from saferope_training.flux.models import Text

Narrow = Callable[[Tensor, Tensor], Tensor]  # (velocities [P, B, L, C], t [B]) -> velocity [B, L, C]
_BATCHED = ("hidden_states", "timestep", "guidance", "encoder_hidden_states", "pooled_projections")


@contextmanager
def together(transformer: nn.Module, others: Text, narrow: Narrow, own_pooled: bool = False) -> Iterator[None]:
    """Every forward pass of B latents becomes one of B x (1 + n): their own text first, then each of the n `others`.

    `narrow` makes one velocity of the velocities [1 + n, B, L, C]. `own_pooled`: the others keep the prompt's pooled
    vector, so that all passes are modulated alike. The hooks come off even after an error.
    """
    count = 1 + len(others.states)

    def widen(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        assert not args, "the transformer is called by keywords"
        batch = len(kwargs["hidden_states"])
        wide = {name: _repeated(kwargs.get(name), count) for name in _BATCHED}
        _fill(wide["encoder_hidden_states"], others.states, batch)
        if not own_pooled:
            _fill(wide["pooled_projections"], others.pooled, batch)
        return args, {**kwargs, **wide}

    def join(_module: nn.Module, _args: tuple, kwargs: dict, output: tuple) -> tuple:
        velocities = output[0].unflatten(0, (count, -1))
        return (narrow(velocities, kwargs["timestep"][: velocities.shape[1]]), *output[1:])

    with ExitStack() as hooks:
        hooks.callback(transformer.register_forward_pre_hook(widen, with_kwargs=True).remove)
        hooks.callback(transformer.register_forward_hook(join, with_kwargs=True).remove)
        yield


def _repeated(tensor: Tensor | None, count: int) -> Tensor | None:
    return None if tensor is None else torch.cat([tensor] * count)


def _fill(wide: Tensor, others: Tensor, batch: int) -> None:
    """Writes one of `others` over each part of `batch` rows but the first."""
    wide[batch:] = others.to(wide).repeat_interleave(batch, 0)
