"""The codec is an exact projection: what it keeps, it keeps; FLUX's latent convention holds."""

import math
import random

import torch

from tinyworld.codec import BLOCK, CHANNELS, SCALE, SHIFT, BlockDCT, load_codec
from tinyworld.model import WEIGHTS
from tinyworld.render import render
from tinyworld.world import training_captions


def pictures(count: int = 24) -> torch.Tensor:
    rng = random.Random(0)
    return torch.stack([render(prompt.scene, rng) for prompt in training_captions(count, seed=1)])


def test_decoding_then_encoding_changes_nothing():
    torch.manual_seed(0)
    latents = torch.randn(2, CHANNELS, 3, 5, dtype=torch.float64)
    codec = BlockDCT(mean=torch.randn(CHANNELS), std=torch.rand(CHANNELS) + 0.5)
    assert torch.allclose(codec.encode(codec.decode(latents)), latents, atol=1e-5)  # inverse of JFIF's rounded matrix


def test_first_channel_is_the_mean_luminance():
    torch.manual_seed(1)
    pixels = torch.rand(1, 3, BLOCK, BLOCK, dtype=torch.float64) * 2 - 1
    luminance = 0.299 * pixels[0, 0] + 0.587 * pixels[0, 1] + 0.114 * pixels[0, 2]
    assert torch.allclose(BlockDCT().coefficients(pixels)[0, 0, 0, 0], BLOCK * luminance.mean(), atol=1e-6)


def test_a_cosine_lands_in_its_own_channel():
    n = torch.arange(BLOCK, dtype=torch.float64)
    wave = torch.cos(math.pi * (2 * n + 1) / (2 * BLOCK))  # the first horizontal frequency, written out
    pixels = wave.expand(1, 3, BLOCK, BLOCK).contiguous()
    coefficients = BlockDCT().coefficients(pixels)[0, :, 0, 0]
    assert coefficients.abs().argmax() == 1
    assert coefficients[1].abs() > 1e5 * coefficients[[0, *range(2, CHANNELS)]].abs().max()


def test_world_pictures_survive_the_codec():
    codec = load_codec(WEIGHTS / "vae")
    error = (codec.decode(codec.encode(pictures())) - pictures()).square().mean()
    assert error < 0.008
    assert (codec.decode(torch.zeros(1, CHANNELS, 12, 12)) - pictures()).square().mean() > 0.1  # the control


def test_what_the_transformer_sees_is_white():
    seen = (load_codec(WEIGHTS / "vae").encode(pictures(200)) - SHIFT) * SCALE
    assert seen.mean((0, 2, 3)).abs().max() < 0.3
    assert 0.7 < seen.std((0, 2, 3)).min() and seen.std((0, 2, 3)).max() < 1.4
