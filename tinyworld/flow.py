"""Trains the tiny FLUX: rectified flow on rendered scenes, then guidance distillation, as FLUX.1-dev was made.

The model first learns the plain velocity e - x0 at x_t = (1 - t) x0 + t e, with captions sometimes dropped. Then it
learns from a frozen copy the guided velocity v(empty) + w (v(caption) - v(empty)), as a function of the embedded
guidance. The run is resumed from its checkpoint.
"""

import copy
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from .model import GUIDANCE, TEXT_LENGTH, make_tokenizer
from .render import render
from .text import tokenize
from .world import caption, training_captions

BATCH = 48
LEARNING_RATE, WARM_UP, FLOOR = 8e-4, 100, 0.04
DISTIL_LEARNING_RATE = 2e-4
EMA = 0.999
POOLED_DROPOUT = 0.5  # so that T5 dominates, as in FLUX
CAPTION_DROPOUT = 0.1
TIME_MEAN = 0.4  # of the logit-normal time; more noise than FLUX's 0, since these latents have few tokens
FULL_SCALE = 2.5  # classifier-free scale that GUIDANCE stands for
CHECKPOINT_EVERY = 200
PATCH = 4  # latents of one image token, along the channel axis


class Scenes:
    """Rendered scenes as packed latents, each described anew whenever it is drawn."""

    def __init__(self, pipeline: FluxPipeline, count: int, seed: int, progress: Callable[[], None]) -> None:
        rng = random.Random(seed)
        codec, self.scenes, latents = pipeline.vae.codec, [], []
        for prompt in training_captions(count, seed):
            self.scenes.append(prompt.scene)
            pixels = codec.encode(render(prompt.scene, rng)[None])
            latents.append((pixels - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor)
            progress()
        stack = torch.cat(latents)
        self.tokens = pipeline._pack_latents(stack, *stack.shape)
        side = stack.shape[-1] // 2
        self.image_ids = pipeline._prepare_latent_image_ids(len(stack), side, side, "cpu", torch.float32)
        self.text_ids = torch.zeros(TEXT_LENGTH, 3)
        weights = pipeline.vae.std.detach().sqrt()
        self.weights = (weights / weights.mean()).repeat_interleave(PATCH)
        self.clip, self.t5 = pipeline.text_encoder, pipeline.text_encoder_2
        self.tokenizers = make_tokenizer(clip=True), make_tokenizer(clip=False)

    def text(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """T5's hidden states and CLIP's pooled vectors."""
        clip, t5 = (tokenize(tokenizer, texts) for tokenizer in self.tokenizers)
        with torch.no_grad():
            return self.t5(t5).last_hidden_state, self.clip(clip).pooler_output

    def draw(self, rng: random.Random, count: int) -> tuple[Tensor, list[str]]:
        """Packed latents [count, 36, 64] and fresh captions of randomly drawn scenes."""
        chosen = [rng.randrange(len(self.scenes)) for _ in range(count)]
        return self.tokens[chosen], [caption(self.scenes[i], rng).text for i in chosen]

    def error(self, velocity: Tensor, target: Tensor) -> Tensor:
        """Mean squared error, each latent channel weighted with the root of its share in a picture's pixels.

        The best velocity is the same without weights; with them, blocks agree about their brightness sooner.
        """
        return ((velocity - target.to(velocity.device)).square() * self.weights.to(velocity.device)).mean()

    def velocity(self, net: FluxTransformer2DModel, x: Tensor, t: Tensor, guidance: Tensor, text: Any) -> Tensor:
        """The transformer's velocity, computed in bfloat16 where the transformer is, returned in float32."""
        given = {
            "hidden_states": x,
            "timestep": t,
            "guidance": guidance,
            "encoder_hidden_states": text[0],
            "pooled_projections": text[1],
            "img_ids": self.image_ids,
            "txt_ids": self.text_ids,
        }
        moved = {name: value.to(net.device) for name, value in given.items()}
        with torch.autocast(net.device.type, torch.bfloat16):
            return net(**moved, return_dict=False)[0].float()


def noised(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and the noise e. Drawn where the latents are, on the CPU, so that a seed means the same everywhere."""
    noise = torch.randn_like(latents)
    t = torch.sigmoid(torch.randn(len(latents)) + TIME_MEAN)
    at = t[:, None, None]
    return (1 - at) * latents + at * noise, t, noise


def _drop(text: tuple[Tensor, Tensor], empty: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Drop whole captions, and pooled vectors besides."""
    hidden, pooled = text
    gone = torch.rand(len(hidden)) < CAPTION_DROPOUT
    hidden, pooled = hidden.clone(), pooled.clone()
    hidden[gone], pooled[gone] = empty[0], empty[1]
    pooled[torch.rand(len(pooled)) < POOLED_DROPOUT] = 0
    return hidden, pooled


def flow_loss(net: FluxTransformer2DModel, scenes: Scenes, rng: random.Random) -> Tensor:
    """Error of the plain velocity; guidance 1 stands for none."""
    latents, texts = scenes.draw(rng, BATCH)
    x, t, noise = noised(latents)
    text = _drop(scenes.text(texts), scenes.text([""]))
    return scenes.error(scenes.velocity(net, x, t, torch.ones(BATCH), text), noise - latents)


def distillation_loss(
    net: FluxTransformer2DModel, teacher: FluxTransformer2DModel, scenes: Scenes, rng: random.Random
) -> Tensor:
    """Error against the frozen model's guided velocity, at a random guidance in [1, 2 GUIDANCE - 1]."""
    latents, texts = scenes.draw(rng, BATCH)
    x, t, _ = noised(latents)
    hidden, pooled = _drop(scenes.text(texts), scenes.text([""]))
    empty = scenes.text([""])
    nothing = empty[0].expand(BATCH, -1, -1), empty[1].expand(BATCH, -1)
    guidance = 1 + torch.rand(BATCH) * 2 * (GUIDANCE - 1)
    with torch.no_grad():
        plain = torch.ones(BATCH)
        without = scenes.velocity(teacher, x, t, plain, nothing)
        along = scenes.velocity(teacher, x, t, plain, (hidden, pooled)) - without
    scale = (1 + (guidance - 1) * (FULL_SCALE - 1) / (GUIDANCE - 1)).to(along.device)
    return scenes.error(scenes.velocity(net, x, t, guidance, (hidden, pooled)), without + scale[:, None, None] * along)


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to FLOOR."""
    return min(1, (step + 1) / WARM_UP) * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _update_average(average: FluxTransformer2DModel, net: FluxTransformer2DModel, step: int) -> None:
    weight = 1 - min(EMA, (step + 1) / (step + 10))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), weight)


def fit(
    net: FluxTransformer2DModel,
    loss_of: Callable[[FluxTransformer2DModel, random.Random], Tensor],
    steps: int,
    learning_rate: float,
    seed: int,
    checkpoint: Path,
    progress: Callable[[int, float], None],
) -> FluxTransformer2DModel:
    """Minimise a loss, where the net is; returns the exponential moving average of the weights.

    Every CHECKPOINT_EVERY steps all state goes to `checkpoint`, from which an interrupted run resumes. Each step's
    randomness comes from the seed and its number alone.
    """
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        net.load_state_dict(state["net"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    for step in range(start, steps):
        torch.manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _rate(step, steps)
        loss = loss_of(net, random.Random(f"{seed}/{step}"))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        _update_average(average, net, step)
        progress(step, loss.item())
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            state = {"net": net.state_dict(), "average": average.state_dict(), "step": step + 1}
            torch.save(state | {"optimizer": optimizer.state_dict()}, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
    return average
