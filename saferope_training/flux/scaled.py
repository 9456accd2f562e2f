"""ComfyUI's scaled fp8: 8-bit values, and beside them the scale that makes weights of them. weight = value x scale.

Two spellings: `<layer>.scale_weight`, with a tensor `scaled_fp8` that marks the file; and `<layer>.weight_scale`, with
the format as JSON in `<layer>.comfy_quant` or in the header's `_quantization_metadata`. Both come in diffusers' names
as well as in FLUX.1's own. Scales of inputs (`scale_input`, `input_scale`) belong to products in fp8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

SCALES = (".scale_weight", ".weight_scale")
HEADER = "_quantization_metadata"
_MARKS = ("scaled_fp8", ".comfy_quant", ".scale_input", ".input_scale")
_FORMAT = ".comfy_quant"
_LONGEST = 4096  # bytes of a layer's format, which has some dozens: one cut here is no JSON any more
_OTHER = (".weight_scale_2", ".pre_quant_scale")  # of nvfp4
_FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_NEWER = "name an fp8, bf16 or .gguf file of the same model"


def is_scale(name: str) -> bool:
    """Whether a tensor of this name is no weight but a scale of weights or inputs, or a mark that there are some."""
    return name.endswith((*SCALES, *_MARKS, *_OTHER))


def require_fp8(weights: dict[str, Tensor], header: Mapping[str, str] | None, name: str) -> None:
    """ValueError where a layer is in another quantised format than fp8, which only ComfyUI reads.

    `weights` hold the `comfy_quant` of layers, `header` is the file's metadata.
    """
    said = [value for key, value in weights.items() if key.endswith(_FORMAT)]
    try:
        texts = [bytes(value[:_LONGEST].flatten().tolist()) for value in said]
        layers = json.loads((header or {}).get(HEADER, "{}")).get("layers", {})
        found = {str(layer.get("format")) for layer in [*map(json.loads, texts), *layers.values()]}
    except (ValueError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"model {name!r}: got formats of weights that are not readable JSON; {_NEWER}") from error
    others = sorted(found - _FP8.keys()) or sorted(key for key in weights if key.endswith(_OTHER))
    if others:
        raise ValueError(
            f"model {name!r}: got weights in {', '.join(others[:3])!r:.120}, expected {' or '.join(_FP8)}: other "
            f"formats of ComfyUI are not read; {_NEWER}"
        )


def unscaled(weights: dict[str, Tensor], dtype: torch.dtype, name: str) -> dict[str, Tensor]:
    """The weights alone: fp8 values times their scales, multiplied in fp32 and rounded once to `dtype`.

    A scale is one number, or one a row. ValueError where one has no fp8 weight, or is not finite and positive.
    """
    plain = {key: value for key, value in weights.items() if not is_scale(key)}
    for key, scale in weights.items():
        ending = next((ending for ending in SCALES if key.endswith(ending)), None)
        if ending is not None:
            layer = f"{key.removesuffix(ending)}.weight"
            plain[layer] = _product(plain.get(layer), scale, f"model {name!r}: {key}").to(dtype)
    return plain


def _product(value: Tensor | None, scale: Tensor, where: str) -> Tensor:
    if value is None or value.dtype not in _FP8.values() or value.ndim != 2:
        got = "no weight" if value is None else f"{value.dtype} {list(value.shape)}"
        raise ValueError(f"{where}: got {got} beside it, expected a matrix in {' or '.join(_FP8)}; {_NEWER}")
    if scale.numel() != 1 and tuple(scale.shape) not in ((len(value),), (len(value), 1)):
        raise ValueError(
            f"{where}: got scales {list(scale.shape)} for a weight {list(value.shape)}, expected one, or one a row; "
            f"{_NEWER}"
        )
    factor = scale.float().reshape(-1, 1)
    if not (factor.isfinite().all() and (factor > 0).all()):
        raise ValueError(f"{where}: got a scale that is not finite and positive; fetch it again")
    return value.float() * factor
