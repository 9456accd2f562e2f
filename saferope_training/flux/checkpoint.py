"""A single-file FLUX transformer: its geometry from names and shapes of tensors, and its weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .folder import first_line
from .quantise import require_library
from .scaled import is_scale, require_fp8, unscaled

Shapes = dict[str, tuple[int, ...]]

SUFFIXES = (".safetensors", ".gguf")
ORIGINAL_WIDTH = 3072  # FLUX.1's; diffusers converts the original key layout at no other
MOST_BLOCKS = (
    152  # four times FLUX.1's 38 single ones; a small file can name many blocks, and a network of them is large
)
_AXES = {128: (16, 56, 56)}  # RoPE's axes by head dimension, FLUX.1's; the file does not tell them
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # ComfyUI puts one before the transformer's names, or none
# As ComfyUI saves the norms since 0.30, whose RMSNorm is torch's, and as FLUX.1 does
_NORMS = {"query_norm.weight": "query_norm.scale", "key_norm.weight": "key_norm.scale"}

# the same tensors in diffusers' layout and in the original one
_DIFFUSERS = {
    "double": "transformer_blocks.",
    "single": "single_transformer_blocks.",
    "norm": "transformer_blocks.0.attn.norm_q.weight",
    "picture": "x_embedder.weight",
    "text": "context_embedder.weight",
    "pooled": "time_text_embed.text_embedder.linear_1.weight",
    "guidance": "time_text_embed.guidance_embedder.linear_1.weight",
    "velocity": "proj_out.weight",
}
_ORIGINAL = {
    "double": "double_blocks.",
    "single": "single_blocks.",
    "norm": "double_blocks.0.img_attn.norm.query_norm.scale",
    "picture": "img_in.weight",
    "text": "txt_in.weight",
    "pooled": "vector_in.in_layer.weight",
    "guidance": "guidance_in.in_layer.weight",
    "velocity": "final_layer.linear.weight",
}


def read_shapes(path: Path) -> Shapes:
    """Name -> shape of every weight of the transformer in a .safetensors or .gguf file, under its plain name.

    Plain names have no prefix of ComfyUI's. Scales are left out, and so are tensors beside the transformer (encoders,
    VAE). ValueError where the file is of another kind, broken, or in a format of ComfyUI's that is not read.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"model {str(path)!r}: got a {path.suffix or 'nameless'} file, expected {' or '.join(SUFFIXES)}"
        )
    try:
        shapes = _gguf_shapes(path) if path.suffix == ".gguf" else _safetensors_shapes(path)
    except ValueError as error:
        raise ValueError(f"model {str(path)!r}: not a readable {path.suffix} file ({error}); fetch it again") from error
    names = _plain_names(shapes, str(path))
    if path.suffix == ".gguf":
        _require_read_by_diffusers(names, str(path))
    return {plain: shapes[name] for plain, name in names.items() if not is_scale(plain)}


def read_weights(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The transformer's weights in a .safetensors file, under plain names: scaled fp8 in `dtype`, others as kept.

    ValueError where its scales do not fit, or its weights are in another format of ComfyUI's.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = _plain_names(file.keys(), str(path))
        weights = {plain: file.get_tensor(name) for plain, name in names.items()}
        require_fp8(weights, file.metadata(), str(path))
    return unscaled(weights, dtype, str(path))


def require_names(config: dict, shapes: Shapes, name: str) -> None:
    """ValueError where weights of FluxTransformer2DModel(**config) are missing or left over."""
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    with torch.device("meta"):
        wanted = FluxTransformer2DModel.from_config(config).state_dict().keys()
        there = {key: torch.empty(shape) for key, shape in shapes.items()}
    try:
        found = there if _DIFFUSERS["norm"] in shapes else convert_flux_transformer_checkpoint_to_diffusers(there)
    except (LookupError, RuntimeError) as error:
        raise ValueError(
            f"model {name!r}: got tensors without {first_line(error)!r:.120}, expected all of a FLUX.1 transformer; "
            "fetch it again"
        ) from error
    require_none(name, sorted(wanted - found.keys()))
    unread = sorted(there.keys() - wanted)  # the converter removes the tensors that it reads
    if unread:
        raise ValueError(
            f"model {name!r}: got tensors {', '.join(unread[:3])!r:.200} ..., which are no weights of a FLUX.1 "
            "transformer and would be dropped, expected none; name a FLUX.1 checkpoint without them"
        )


def require_none(name: str, missing: list[str]) -> None:
    """ValueError where weights are missing. diffusers would leave them random or empty."""
    if missing:
        raise ValueError(
            f"model {name!r}: got no weights for {', '.join(missing[:3])} ..., expected all; fetch it again"
        )


def transformer_config(shapes: Shapes, name: str) -> dict:
    """The arguments of FluxTransformer2DModel that make a model of these shapes.

    ValueError where they are not a FLUX text-to-image transformer's, or of a layout that diffusers cannot convert.
    """
    layout = next((layout for layout in (_DIFFUSERS, _ORIGINAL) if layout["norm"] in shapes), None)
    if layout is None or not all(layout[part] in shapes for part in ("picture", "text", "pooled", "velocity")):
        some = ", ".join(sorted(shapes)[:3]) or "no tensor"
        raise ValueError(
            f"model {name!r}: got tensors {some} ..., expected a FLUX.1 transformer in diffusers' or the original "
            "layout; name a FLUX.1 checkpoint"
        )
    width, channels = shapes[layout["picture"]]
    head_dim = shapes[layout["norm"]][0]
    _check(name, layout, shapes, width, channels, head_dim)
    return {
        "patch_size": 1,
        "in_channels": channels,
        "num_layers": _blocks(shapes, layout["double"]),
        "num_single_layers": _blocks(shapes, layout["single"]),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": shapes[layout["text"]][1],
        "pooled_projection_dim": shapes[layout["pooled"]][1],
        "guidance_embeds": layout["guidance"] in shapes,
        "axes_dims_rope": _AXES[head_dim],
    }


def _check(name: str, layout: dict, shapes: Shapes, width: int, channels: int, head_dim: int) -> None:
    for kind in ("double", "single"):
        if _blocks(shapes, layout[kind]) > MOST_BLOCKS:
            raise ValueError(
                f"model {name!r}: got more than {MOST_BLOCKS} {kind} blocks, expected 19 and 38 as in FLUX.1; name a "
                "FLUX.1"
            )
    if head_dim not in _AXES:
        raise ValueError(f"model {name!r}: got heads of {head_dim}, expected 128 as in FLUX.1; load it as a folder")
    if shapes[layout["velocity"]][0] != channels:
        raise ValueError(
            f"model {name!r}: got {channels} channels in and {shapes[layout['velocity']][0]} out, expected the same: "
            "it takes a picture besides the prompt (Fill, Depth, Canny); name a text-to-image FLUX.1"
        )
    if layout is _ORIGINAL and width != ORIGINAL_WIDTH:
        raise ValueError(
            f"model {name!r}: got the original key layout with a width of {width}, expected {ORIGINAL_WIDTH}: "
            "diffusers converts no other; save it in diffusers' layout"
        )


def _blocks(shapes: Shapes, prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})


def _plain_names(names: Iterable[str], where: str) -> dict[str, str]:
    """Plain name -> name in the file, of the transformer's tensors. ValueError where two names are the same one."""
    names = list(names)
    prefix = next((each for each in _PREFIXES if any(name.startswith(each) for name in names)), "")
    found: dict[str, str] = {}
    for name in names:
        if name.startswith(prefix):
            plain = name.removeprefix(prefix)
            for theirs, ours in _NORMS.items():
                plain = plain.removesuffix(theirs) + ours if plain.endswith(theirs) else plain
            if plain in found:
                raise ValueError(
                    f"model {where!r}: got {found[plain]!r} and {name!r}, which are the same tensor; keep one"
                )
            found[plain] = name
    return found


def _require_read_by_diffusers(names: dict[str, str], where: str) -> None:
    """ValueError for names that diffusers cannot read in a .gguf file: it takes one prefix off the original layout."""
    for plain, name in names.items():
        if name != plain and (name != _PREFIXES[0] + plain or _ORIGINAL["norm"] not in names):
            raise ValueError(
                f"model {where!r}: got a tensor {name!r:.120}, expected {plain!r:.120} in a .gguf file; name a "
                ".safetensors file, where both are read, or another .gguf"
            )


def _safetensors_shapes(path: Path) -> Shapes:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _gguf_shapes(path: Path) -> Shapes:
    require_library("gguf", f"model {str(path)!r}")
    from gguf import GGUFReader

    # GGUF counts dimensions from the innermost
    return {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in GGUFReader(path).tensors}
