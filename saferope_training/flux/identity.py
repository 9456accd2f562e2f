"""Tells models apart, by digests of their parts and the numbers they run with."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..stages import sha256_of
from .pipelines import asked

if TYPE_CHECKING:
    from .models import Model


def encoders_fingerprint(model: Model) -> str:
    """sha256 over the text encoders and tokenizers. Encoders that are not loaded stay on disk."""
    if model.cache is not None:
        return model.cache.fingerprint
    if model.source is not None:
        return model.source.fingerprint()
    names = asked(model).encoders
    parts = [fingerprint(getattr(model.pipe, name)) for name in names]
    tokenizers = [getattr(model.pipe, name.replace("text_encoder", "tokenizer")) for name in names]
    words = [_words(getattr(each, "tokenizer", each)) for each in tokenizers]  # a processor has one within
    return hashlib.sha256("".join(parts + words).encode()).hexdigest()


def _words(tokenizer: Any) -> str:
    """A fast tokenizer as JSON, without the settings that its last call left."""
    known = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps(known | {"truncation": None, "padding": None}, sort_keys=True)


def facts(model: Model) -> dict[str, object]:
    """The facts of a model that decide a concept made with it, for JSON: digests of its parts, sizes and numbers.

    The model's name and sampling steps are left out: making a concept uses neither.
    """
    vae = model.pipe.vae
    return {
        "transformer": fingerprint(model.transformer),
        "axes": axes_of(model.transformer.config),  # RoPE's, which the weights do not show
        "encoders": encoders_fingerprint(model),
        "text_length": model.text_length,
        "latent_side": model.latent_side,
        "guidance": model.guidance,
        "vae": [fingerprint(vae), vae.config.get("scaling_factor"), vae.config.get("shift_factor")],
    }


def axes_of(config: Any) -> list[int]:
    """RoPE's axes, by either of diffusers' names."""
    return list(config.get("axes_dims_rope") or config["axes_dims"])


def identity(model: Model) -> str:
    """sha256 of a model's `facts`. Together with the sampler they decide its pictures.

    For a pipeline that came with its encoders, such as the embedded one, it is the transformer's fingerprint alone.
    """
    known = facts(model)
    return str(known["transformer"]) if model.source is None else sha256_of(known)


def fingerprint(module: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of a module's parameters and buffers, quantised ones included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        for part in plain_tensors(tensor):
            digest.update(f"{name} {part.dtype} {tuple(part.shape)};".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The ordinary tensors that hold a tensor's data: itself, or a quantised wrapper's values, scales and so on."""
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in plain_tensors(getattr(tensor, name))]
    if hasattr(tensor, "quant_type") and hasattr(tensor, "as_tensor"):  # GGUF's
        return [tensor.as_tensor()]
    return [tensor]
