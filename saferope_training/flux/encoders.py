"""Text encoders, loaded to embed prompts and dropped afterwards, and embeddings kept on disk.

FLUX.1's encoders weigh as much as a quantised transformer and are needed once. Each prompt's embedding is a file, named
by a hash of the text, the length that it is cut to, and the encoders' weights. A prompt without a file is embedded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from saferope_core import sha256

from ..stages import save_tensors
from .folder import load_part, parts_of
from .plausible import require_plausible

# Peak bytes of T5-XXL's activations for one of 512 tokens, in bf16, by either attention of transformers: counted
MADE = 200_000


def lends(device: torch.device) -> bool:
    """Whether the device has memory of its own, to which layers are lent."""
    return device.type != "cpu"


def lend(encoder: nn.Module, device: torch.device) -> None:
    """From now on each layer of an encoder on the CPU moves to the device to compute, and leaves it afterwards."""
    from accelerate import cpu_offload

    cpu_offload(encoder, device)


def is_lent(encoder: nn.Module | None) -> bool:
    """Whether the encoder went through `lend`."""
    return encoder is not None and any(hasattr(part, "_hf_hook") for part in encoder.modules())


@dataclass(frozen=True)
class EncoderSource:
    """Where the text encoders of a pipeline lie: a diffusers folder, and the dtype they run in."""

    folder: Path
    dtype: torch.dtype

    def load(self) -> tuple[nn.Module, ...]:
        """FLUX.1's CLIP and T5, or the one of another family, frozen, on the CPU. ValueError where their weights are
        implausible."""
        found = []
        for part in parts_of(self.folder, "text_encoder"):
            found.append(load_part(self.folder, part, dtype=self.dtype, use_safetensors=True))
            require_plausible(found[-1].requires_grad_(False).eval(), f"{self.folder}, {part}")
        return tuple(found)

    def fingerprint(self) -> str:
        """sha256 over the dtype and the bytes of all files of encoders and tokenizers; nothing is loaded."""
        digest = hashlib.sha256(str(self.dtype).encode())
        for part in parts_of(self.folder, "text_encoder", "tokenizer"):
            for path in sorted(file for file in (self.folder / part).rglob("*") if file.is_file()):
                digest.update(f";{path.relative_to(self.folder).as_posix()};{sha256(path)}".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class EmbeddingCache:
    """A folder of embeddings made by encoders of this fingerprint, cut to `text_length` tokens."""

    folder: Path
    fingerprint: str
    text_length: int

    def path(self, text: str) -> Path:
        """Where the embedding of `text` lies, whether or not it is there."""
        key = f"{self.fingerprint};{self.text_length};{text}"
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """States [B, L, ...] and `pooled` [B, C'] in the encoders' dtype; None unless all are whole."""
        try:
            files = [load_file(self.path(text)) for text in texts]
            states, pooled = (torch.stack([file[part] for file in files]) for part in ("states", "pooled"))
            return states, pooled
        except (OSError, SafetensorError, KeyError):
            return None

    def write(self, texts: Sequence[str], states: Tensor, pooled: Tensor) -> None:
        """Keeps the embeddings; a file is whole or not there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for text, state, vector in zip(texts, states, pooled, strict=True):
            save_tensors(self.path(text), {"states": state.cpu(), "pooled": vector.cpu()})
