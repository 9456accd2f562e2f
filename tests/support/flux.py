"""A FLUX pipeline with every part real and random, small enough to run in milliseconds."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from saferope_training.flux.models import Model, encode, from_pipeline, noise, velocity
from saferope_training.prompts import PromptRecord, tiny_world_prompts
from saferope_training.settings import Settings
from tinyworld import model as tiny


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


def make_flux(seed: int = 0) -> FluxTransformer2DModel:
    """A random transformer of 1 double and 2 single blocks, 2 heads x 16, that takes the tiny world's text and
    latents."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flux = FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=tiny.TEXT_WIDTH,
            pooled_projection_dim=tiny.TEXT_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
    return flux.eval().requires_grad_(False)


def flux_inputs(text: int = 5, side: int = 2, batch: int = 2, seed: int = 1) -> dict:
    """Keyword arguments of a forward pass over `text` text tokens and side x side image tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, side * side, 64, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, tiny.TEXT_WIDTH, generator=generator),
        "pooled_projections": torch.randn(batch, tiny.TEXT_WIDTH, generator=generator),
        "timestep": torch.full((batch,), 0.7),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def answer(model: Model, t: float = 0.7) -> torch.Tensor:
    """The model's velocity for fixed prompts and noise, the same to the last bit wherever its weights came from.

    Weights may lie in a file's own memory, and how a product is rounded depends on where they start: so they are
    copied.
    """
    for parameter in model.transformer.parameters():
        parameter.data = parameter.data.clone()
    x = noise(model, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return velocity(model, x, torch.full((2,), t), encode(model, ["a red star , center", "a blue circle"]))


@pytest.fixture
def flux() -> FluxTransformer2DModel:
    return make_flux()


@pytest.fixture
def inputs() -> dict:
    return flux_inputs()


@pytest.fixture
def model() -> Model:
    """The whole pipeline around `make_flux`, with the tiny world's tokenizers and codec."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip, t5 = tiny.make_text_encoders()
    pipe = FluxPipeline(
        scheduler=tiny.make_scheduler(),
        vae=tiny.AutoencoderDCT(),
        text_encoder=clip,
        tokenizer=tiny.make_tokenizer(clip=True),
        text_encoder_2=t5,
        tokenizer_2=tiny.make_tokenizer(clip=False),
        transformer=make_flux(),
    )
    return from_pipeline("random", pipe, tiny.TEXT_LENGTH, latent_side=12)


@pytest.fixture
def records() -> list[PromptRecord]:
    return tiny_world_prompts("star", unsafe=12, benign=12, seed=0)


@pytest.fixture
def settings() -> Settings:
    """Few steps, and no head left out: a random model tells nothing apart."""
    few = dict(
        rank=3, padding_rank=1, words_rank=1, reach=2, image_rank=2, steps=4, phase=2, batch=4, learning_rate=0.05
    )
    return Settings(**few, acts_on="qk", cut=-1.0, gate="fixed", threshold=0.05, relative_rank=0)
