"""The family of each of ComfyUI's network classes, and the places of its blocks, heads and query layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from ...saferope_core import FAMILIES, Geometry, titles

LONGCAT_TEXT = 3584  # comfy/model_detection.py tells LongCat-Image by the width of its text
FLUX2_TEXT = 512  # comfy/model_base.py, Flux2: shorter texts get zeros in front
Z_IMAGE_TIME = 1000.0  # and gives Z-Image this time_scale, Lumina 2 one of 1


class Layout(NamedTuple):
    """How a class holds its blocks. A way is names of attributes with dots between.

    A class that calls no attention patch needs bridge.py, and names the way to its `text`.
    """

    family: Callable[[Any], str | None]  # A network's family; None for an unknown one.
    blocks: dict[str, tuple[str, str]]  # Kind -> the blocks, and a block's way to its queries' layer.
    heads: Callable[[Any], tuple[int, int, int]]  # Query heads, key heads, head dimension.
    always: str = "final_layer"  # The way to a layer that every forward runs.
    text: str = ""  # The way to a layer whose input is the whole text stream.
    positions: int | None = None  # The argument of a block with RoPE's matrices; None without RoPE.


def _flux(network: Any) -> str:
    params = network.params
    if params.global_modulation:
        return "flux2"
    if getattr(params, "yak_mlp", False):
        return "ovis-image"
    return "longcat-image" if (params.context_in_dim, params.vec_in_dim) == (LONGCAT_TEXT, None) else "flux"


def _hunyuan(network: Any) -> str | None:
    return "hunyuan-image" if len(network.patch_size) == 2 else None  # three: video, and the image refiner


def _lumina(network: Any) -> str:
    return "z-image" if network.time_scale == Z_IMAGE_TIME else "lumina2"


def _sd3(network: Any) -> str | None:
    """SD3.5; SD3's queries and keys are not normalised."""
    return None if isinstance(network.joint_blocks[0].x_block.attn.ln_q, torch.nn.Identity) else "sd3"


def _as_flux(network: Any) -> tuple[int, int, int]:
    return network.num_heads, network.num_heads, network.hidden_size // network.num_heads


def _as_qwen(network: Any) -> tuple[int, int, int]:
    attention = network.transformer_blocks[0].attn
    return attention.heads, attention.heads, attention.dim_head


def _as_krea(network: Any) -> tuple[int, int, int]:
    attention = network.blocks[0].attn
    return attention.heads, attention.kvheads, attention.headdim


def _as_lumina(network: Any) -> tuple[int, int, int]:
    attention = network.layers[0].attention
    return attention.n_local_heads, attention.n_local_kv_heads, attention.head_dim


def _as_sd3(network: Any) -> tuple[int, int, int]:
    attention = network.joint_blocks[0].x_block.attn
    return attention.num_heads, attention.num_heads, attention.head_dim


_FLUX = {"double": ("double_blocks", "img_attn.qkv"), "single": ("single_blocks", "linear1")}
_QWEN = {"double": ("transformer_blocks", "attn.to_q")}
LAYOUTS = {
    "flux.model.Flux": Layout(_flux, _FLUX, _as_flux),
    "chroma.model.Chroma": Layout(lambda _: "chroma", _FLUX, _as_flux),
    "chroma_radiance.model.ChromaRadiance": Layout(lambda _: "chroma-radiance", _FLUX, _as_flux, "txt_in"),
    "hunyuan_video.model.HunyuanVideo": Layout(_hunyuan, _FLUX, _as_flux),
    "qwen_image.model.QwenImageTransformer2DModel": Layout(lambda _: "qwen-image", _QWEN, _as_qwen, "norm_out"),
    "mage_flow.model.MageFlowTransformer2DModel": Layout(lambda _: "mage-flow", _QWEN, _as_qwen, "norm_out"),
    "krea2.model.SingleStreamDiT": Layout(lambda _: "krea2", {"single": ("blocks", "attn.wq")}, _as_krea, "last"),
    "lumina.model.NextDiT": Layout(
        _lumina, {"single": ("layers", "attention.qkv")}, _as_lumina, text="context_refiner.0", positions=2
    ),
    "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper": Layout(
        _sd3, {"double": ("joint_blocks", "x_block.attn.qkv")}, _as_sd3, text="joint_blocks.0.context_block.attn.qkv"
    ),
}
_HOME = "comfy.ldm."
REACHED = tuple(name for name in FAMILIES if name != "flux3")  # its ComfyUI class (0.41) could not be read yet


class Part(NamedTuple):
    """A block of a network, and the layer that makes its queries; None where the block is not ComfyUI's."""

    kind: str
    number: int
    block: torch.nn.Module
    queries: torch.nn.Module | None


def layout_of(network: Any) -> Layout | None:
    """The layout of the ComfyUI class that this network is of, or derives from; None for every other network."""
    network = getattr(network, "_orig_mod", network)  # torch.compile's wrapper
    own = next((cls for cls in type(network).__mro__ if cls.__module__.startswith(_HOME)), None)
    return LAYOUTS.get(f"{own.__module__}.{own.__qualname__}".removeprefix(_HOME)) if own else None


def geometry_of(network: Any) -> Geometry:
    """Blocks and heads of a diffusion_model of a known family. Raises ValueError for every other.

    Similar networks (Cosmos, Wan) call an attention patch of the same name with other vectors, so the class decides.
    """
    network = getattr(network, "_orig_mod", network)
    layout = layout_of(network)
    try:
        family = layout.family(network) if layout else None
        if layout is not None and family is not None:
            counts = {kind: len(getattr(network, blocks)) for kind, (blocks, _) in layout.blocks.items()}
            heads, keys, head_dim = layout.heads(network)
            return Geometry(counts.get("double", 0), counts.get("single", 0), heads, head_dim, family, keys)
    except (AttributeError, IndexError):  # another node's block in the place of ComfyUI's
        pass
    home = type(network).__module__
    whose = "" if home.split(".")[0] in ("comfy", "torch") else f" by {home}"
    raise ValueError(
        f"SafeRoPE got a {type(network).__name__}{whose} model, whose attention it does not reach. Expected, as "
        f"ComfyUI's own loaders load them (safetensors or GGUF): {titles(REACHED)}."
    )


def parts(network: Any) -> Iterator[Part]:
    """The blocks of a network of a known class; none for another network."""
    network = getattr(network, "_orig_mod", network)
    layout = layout_of(network)
    for kind, (blocks, queries) in layout.blocks.items() if layout else ():
        for index, block in enumerate(getattr(network, blocks, ())):
            yield Part(kind, index, block, way(block, queries))


def way(module: Any, names: str) -> Any:
    """The object at the end of a way; None where an attribute is missing."""
    return reduce(lambda here, name: getattr(here, name, None), names.split("."), module)


def has_hook(network: Any) -> bool:
    """Whether the network's blocks call attention patches themselves."""
    layout = layout_of(network)
    return layout is not None and not layout.text


def turns_by_position(geometry: Geometry) -> bool:
    """Whether a model of this geometry applies RoPE after the patch."""
    return FAMILIES[geometry.family].rope


def masks_in_network(family: str, masks: torch.Tensor, network: Any) -> torch.Tensor:
    """Masks of text tokens bool [B, L], with the padding that the network adds to its text."""
    if family == "flux2":
        return pad(masks, (max(0, FLUX2_TEXT - masks.shape[1]), 0))
    multiple = getattr(network, "pad_tokens_multiple", None) or 1  # Z-Image's
    return pad(masks, (0, -masks.shape[1] % multiple))


def grid_of(network: Any, latent: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of image tokens of a latent [B, C, h, w] or, frames below each other, [B, C, frames, h, w]."""
    network = getattr(network, "_orig_mod", network)
    patch = getattr(network, "patch_size", None) or network.patch  # Krea 2's name for it
    side = patch if isinstance(patch, int) else patch[-1]
    rows, columns = (-(-length // side) for length in latent.shape[-2:])
    return rows * (latent.shape[2] if latent.ndim == 5 else 1), columns
