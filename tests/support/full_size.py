"""FLUX.1 at its full size in 2 GB: all double blocks share one block's parameters, all single ones another's.

Its vectors are those of no real model. Its geometry, and so what is allocated, kept and written, is FLUX.1's own.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

DOUBLE_BLOCKS, SINGLE_BLOCKS, HEADS, HEAD_DIM = 19, 38, 24, 128  # FLUX.1-dev's configuration


def tied(block: nn.Module, count: int) -> nn.ModuleList:
    """So many blocks, each a module of its own, for hooks, with the parameters of `block`."""
    shared = {id(each): each for each in (*block.parameters(), *block.buffers())}
    return nn.ModuleList([block, *(copy.deepcopy(block, dict(shared)) for _ in range(count - 1))])


def diffusers_flux() -> nn.Module:
    """A FluxTransformer2DModel of random weights, frozen, in float32."""
    from diffusers import FluxTransformer2DModel

    flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    flux.transformer_blocks = tied(flux.transformer_blocks[0], DOUBLE_BLOCKS)
    flux.single_transformer_blocks = tied(flux.single_transformer_blocks[0], SINGLE_BLOCKS)
    flux.register_to_config(num_layers=DOUBLE_BLOCKS, num_single_layers=SINGLE_BLOCKS)
    return flux.eval().requires_grad_(False)


def weights(model: nn.Module) -> int:
    """Bytes of its parameters, each once."""
    return sum(each.nbytes for each in {id(each): each for each in model.parameters()}.values())


def tie_comfy_flux(network: nn.Module) -> None:
    """Gives ComfyUI's FLUX of one block of each kind, FLUX.1's width, all of FLUX.1's blocks."""
    with torch.no_grad():
        network.double_blocks = tied(network.double_blocks[0], DOUBLE_BLOCKS)
        network.single_blocks = tied(network.single_blocks[0], SINGLE_BLOCKS)
