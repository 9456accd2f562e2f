"""NAG, normalised attention guidance (Chen et al., 2025): image tokens' attention is pushed off a negative prompt's.

In every block, for image tokens, with Z+ and Z- the attention outputs (before their projection) under the prompt and
under the negative prompt:

    Zg = s Z+ - (s - 1) Z-      ρ = ||Zg||_1 / ||Z+||_1      Ẑ = Zg min(ρ, τ) / ρ      Z = α Ẑ + (1 - α) Z+

The prompt's and the negative prompt's text streams run side by side. Both see the same image stream, which continues
with Z. Both are modulated with the prompt's pooled vector, or their image streams would part. Nothing is learned. The
strength is s - 1, so that 0 is no guidance. Defaults of the paper for FLUX: s 5, τ 2.5, α 0.25. The negative prompt is
the concept's word, or in the tiny world a caption of it (see `task_of`). The cost is about twice a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from saferope_training.flux.models import Model, Text, encode

from .passes import together
from .task import Progress, Task, silent

STRENGTHS = (2.0, 3.0, 4.0, 8.0)  # s - 1; 4 is the default
LARGEST_RATIO = 2.5  # τ
BLEND = 0.25  # α


def fit(model: Model, task: Task, seed: int, progress: Progress = silent) -> dict[str, Tensor]:
    """The embedding of the negative prompt."""
    text = encode(model, [task.away])
    return {"states": text.states, "pooled": text.pooled}


@contextmanager
def applied(model: Model, state: dict[str, Tensor], strength: float) -> Iterator[None]:
    """Sampling with s = 1 + `strength`; 0 changes nothing and costs nothing."""
    if not state or strength == 0:
        yield
        return
    transformer, negative = model.transformer, Text(state["states"], state["pooled"])

    def guided(x: Tensor, text_length: int) -> Tensor:
        """The attention outputs x [2 B, L, C] of text then image tokens: both halves get the guided image tokens."""
        text, image = x[:, :text_length], x[:, text_length:]
        image = normalised_guidance(*image.chunk(2), 1 + strength)
        return torch.cat([text, torch.cat([image, image])], 1)

    def before_projection(_module: nn.Module, args: tuple) -> tuple:
        return (guided(args[0], 0), *args[1:])

    def after_attention(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        return guided(output, negative.states.shape[1])

    with ExitStack() as hooks:
        hooks.enter_context(together(transformer, negative, lambda v, t: v[0], own_pooled=True))
        for block in transformer.transformer_blocks:  # a double block projects its image tokens' output alone
            hooks.callback(block.attn.to_out[0].register_forward_pre_hook(before_projection).remove)
        for block in transformer.single_transformer_blocks:
            hooks.callback(block.attn.register_forward_hook(after_attention).remove)
        yield


def normalised_guidance(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Z of attention outputs Z+ and Z- [..., C]; its L1 norm is at most (α τ + 1 - α) times that of Z+."""
    plus, minus = positive.float(), negative.float()
    guided = scale * plus - (scale - 1) * minus
    ratio = guided.norm(p=1, dim=-1, keepdim=True) / plus.norm(p=1, dim=-1, keepdim=True).clamp_min(1e-12)
    guided = guided * (LARGEST_RATIO / ratio.clamp_min(LARGEST_RATIO))
    return (BLEND * guided + (1 - BLEND) * plus).to(positive.dtype)
