"""The tiny world's autoencoder: an 8 x 8 block DCT as an exact 16-channel, 8x codec. It learns a whitening alone.

Of each block's coefficients it keeps ten of luminance and three of each colour difference (JFIF's YCbCr), in JPEG's
zigzag order. It whitens each channel, so that a normal distribution is a fair prior. As in FLUX, the transformer gets
(latent - SHIFT) * SCALE.
"""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

SCALE, SHIFT = 0.3611, 0.1159  # FLUX.1's VAE: scaling_factor, shift_factor
CHANNELS = 16
BLOCK = 8  # pixels per latent, along each axis

_ZIGZAG = ((0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0))
_KEPT = [(0, k, l) for k, l in _ZIGZAG] + [(c, k, l) for c in (1, 2) for k, l in _ZIGZAG[:3]]
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # JFIF


def _cosines() -> Tensor:
    """The orthonormal DCT-II of length BLOCK: rows are frequencies."""
    k, n = torch.arange(BLOCK)[:, None], torch.arange(BLOCK)[None]
    waves = torch.cos(math.pi * (2 * n + 1) * k / (2 * BLOCK)) * math.sqrt(2 / BLOCK)
    return torch.where(k == 0, waves / math.sqrt(2), waves)


class BlockDCT(nn.Module):
    """Pixels [B, 3, h, w] in [-1, 1] <-> latents [B, 16, h/8, w/8]; h and w are multiples of 8.

    `mean` and `std` [16] are the coefficients' statistics over the world; with the defaults nothing is whitened.
    """

    def __init__(self, mean: Tensor | None = None, std: Tensor | None = None) -> None:
        super().__init__()
        channel, row, column = (torch.tensor(index) for index in zip(*_KEPT, strict=True))
        waves, color = _cosines(), torch.tensor(_YCBCR)
        # [16, 3, 8, 8]: each latent channel as a filter over RGB pixels, and as a picture.
        wave = torch.einsum("ni,nj->nij", waves[row], waves[column])
        self.register_buffer("filters", torch.einsum("nij,nc->ncij", wave, color[channel]), persistent=False)
        pictures = torch.einsum("nij,nc->ncij", wave, torch.linalg.inv(color).T[channel])
        self.register_buffer("pictures", pictures, persistent=False)
        self.register_buffer("mean", torch.zeros(CHANNELS) if mean is None else mean.clone())
        self.register_buffer("std", torch.ones(CHANNELS) if std is None else std.clone())

    def coefficients(self, pixels: Tensor) -> Tensor:
        """The kept DCT coefficients, not whitened, [B, 16, h/8, w/8]."""
        return nn.functional.conv2d(pixels, self.filters.to(pixels), stride=BLOCK)

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents in FLUX's convention, [B, 16, h/8, w/8]."""
        mean, std = self._statistics(pixels)
        return (self.coefficients(pixels) - mean) / std / SCALE + SHIFT

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, h, w]; values outside [-1, 1] are kept."""
        mean, std = self._statistics(latents)
        coefficients = (latents - SHIFT) * SCALE * std + mean
        return nn.functional.conv_transpose2d(coefficients, self.pictures.to(latents), stride=BLOCK)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean.to(like)[:, None, None], self.std.to(like)[:, None, None]


def load_codec(folder: Path) -> BlockDCT:
    """The codec of a diffusers-style `vae` folder."""
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    return BlockDCT(state["mean"], state["std"])
