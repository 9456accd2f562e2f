"""Bases held in fewer bits, through diffusers' own configurations. Frozen: generators train on top of them in fp32.

`nf4` and `int8` are bitsandbytes' (loaded on a GPU only), `torchao-*` run anywhere; GGUF files bring their quantisation
along. The libraries are imported only when asked for.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import BitsAndBytesConfig, TorchAoConfig

KINDS = ("nf4", "int8", "torchao-int8", "torchao-float8")
_LIBRARY = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao-int8": "torchao", "torchao-float8": "torchao"}


def require_kind(kind: str) -> None:
    """ValueError where the kind is none of KINDS."""
    if kind not in KINDS:
        raise ValueError(
            f"quantisation: got {kind!r}, expected one of {', '.join(KINDS)}, or a .gguf file as the model"
        )


def require_library(library: str, what: str) -> None:
    """ValueError that says how to get the library where it is not installed."""
    if find_spec(library.replace("-", "_")) is None:
        raise ValueError(f"{what}: got no {library} installed, expected it; run `pip install {library}`")


def require_usable(kind: str, device: str) -> None:
    """ValueError where the kind is unknown, its library missing or the device not one that it can load to."""
    require_kind(kind)
    require_library(_LIBRARY[kind], f"quantisation {kind!r}")
    if _LIBRARY[kind] == "bitsandbytes" and torch.device(device).type == "cpu":
        raise ValueError(
            f"quantisation {kind!r}: got device 'cpu', expected a GPU: diffusers loads bitsandbytes weights there "
            "only; name one with --device, or take torchao-int8"
        )


def quantisation_config(kind: str, device: str, dtype: torch.dtype) -> BitsAndBytesConfig | TorchAoConfig:
    """diffusers' configuration of one of KINDS; the model computes in `dtype`.

    ValueError where it is not usable.
    """
    require_usable(kind, device)
    return _bitsandbytes(kind, dtype) if _LIBRARY[kind] == "bitsandbytes" else _torchao(kind)


def _bitsandbytes(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    from diffusers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # normal floats with scales quantised once more: QLoRA (arXiv 2305.14314), section 3
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )


def in_place(transformer: nn.Module, kind: str) -> None:
    """Quantises loaded weights, to the same bits as diffusers does while it loads a folder. For torchao's kinds.

    diffusers' loader of single files takes torchao's configuration and quantises nothing (0.42.1).
    """
    from torchao.quantization import quantize_

    quantize_(transformer, _torchao(kind).quant_type)


def require_quantised(transformer: nn.Module, kind: str, name: str) -> None:
    """ValueError where every weight is still a plain number: the user asked for fewer bits to save memory."""
    if all(type(weight) is nn.Parameter and weight.is_floating_point() for weight in transformer.parameters()):
        raise ValueError(
            f"model {name!r}: got weights in full, expected them in {kind!r}: diffusers did not quantise them; take "
            "another --quantise, or a folder in diffusers' layout"
        )


def is_torchao(kind: str | None) -> bool:
    """Whether the kind is one of torchao's, which run on any device."""
    return kind is not None and _LIBRARY.get(kind) == "torchao"


def _torchao(kind: str) -> TorchAoConfig:
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "torchao-int8" else Float8WeightOnlyConfig())
