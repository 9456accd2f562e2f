"""What a single-file FLUX transformer is, read from the names and shapes of its tensors, without loading one of them."""

from __future__ import annotations

from pathlib import Path

from .quantise import require_library

Shapes = dict[str, tuple[int, ...]]

SUFFIXES = (".safetensors", ".gguf")
ORIGINAL_WIDTH = 3072  # the only one that diffusers' converter from the original key layout knows: FLUX.1's
_AXES = {128: (16, 56, 56)}  # RoPE's axes by head dimension, FLUX.1's; the file does not tell them
_PREFIX = "model.diffusion_model."  # ComfyUI's all-in-one files put it before every name

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
    """Name -> shape of every tensor of a .safetensors or .gguf file, ComfyUI's prefix taken off.

    ValueError where the file is neither, or broken.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"model {str(path)!r}: got a {path.suffix or 'nameless'} file, expected {' or '.join(SUFFIXES)}"
        )
    try:
        shapes = _gguf_shapes(path) if path.suffix == ".gguf" else _safetensors_shapes(path)
    except ValueError as error:
        raise ValueError(f"model {str(path)!r}: not a readable {path.suffix} file ({error}); fetch it again") from error
    return {name.removeprefix(_PREFIX): shape for name, shape in shapes.items()}


def transformer_config(shapes: Shapes, name: str) -> dict:
    """The arguments of FluxTransformer2DModel that make a model of these shapes.

    ValueError where they are not a FLUX text-to-image transformer's, or of a layout that diffusers cannot convert.
    """
    layout = next((layout for layout in (_DIFFUSERS, _ORIGINAL) if layout["norm"] in shapes), None)
    if layout is None or not all(layout[part] in shapes for part in ("picture", "text", "pooled", "velocity")):
        some = ", ".join(sorted(shapes)[:3]) or "no tensor"
        raise ValueError(
            f"model {name!r}: got tensors {some} ..., expected a FLUX.1 transformer in diffusers' or the original layout; "
            "name a FLUX.1 checkpoint"
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
    if head_dim not in _AXES:
        raise ValueError(f"model {name!r}: got heads of {head_dim}, expected 128 as in FLUX.1; load it as a folder")
    if shapes[layout["velocity"]][0] != channels:
        raise ValueError(
            f"model {name!r}: got {channels} channels in and {shapes[layout['velocity']][0]} out, expected the same: "
            "it takes a picture besides the prompt (Fill, Depth, Canny); name a text-to-image FLUX.1"
        )
    if layout is _ORIGINAL and width != ORIGINAL_WIDTH:
        raise ValueError(
            f"model {name!r}: got the original key layout with a width of {width}, expected {ORIGINAL_WIDTH}: diffusers "
            "converts no other; save it in diffusers' layout"
        )


def _blocks(shapes: Shapes, prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})


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
