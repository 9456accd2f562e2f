"""Makes a few-step variant of the tiny FLUX, as FLUX.1-schnell is one of FLUX.1-dev: 4 steps, no embedded guidance.

    python -m tinyworld.few_step --out few_step       # a quarter of an hour on 2 CPU cores

The teacher paints captions in STEPS steps at its usual guidance. The student takes the states at its own four steps,
and learns the straight way from each to the next one (progressive distillation, Salimans & Ho 2022, four teacher steps
at once). It starts from the teacher, whose guidance embedding at GUIDANCE goes into a bias. Interrupted, the training
resumes from its last checkpoint.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import flow
from .model import GUIDANCE, STEPS, encode, load_pipeline, start_noise
from .render import SIZE
from .world import training_captions

FEW = 4  # steps, as FLUX.1-schnell
CAPTIONS = 1536
LEARNING_STEPS, LEARNING_RATE, BATCH = 600, 2e-4, 48
PAINT_BATCH = 64
SEED = 11


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the pipeline goes")
    parser.add_argument("--captions", type=int, default=CAPTIONS, help=f"painted by the teacher (default {CAPTIONS})")
    parser.add_argument("--steps", type=int, default=LEARNING_STEPS, help=f"of learning (default {LEARNING_STEPS})")
    parser.add_argument("--work", type=Path, default=Path(".cache/few_step"), help="where checkpoints go")
    return parser.parse_args()


def without_guidance(teacher: FluxTransformer2DModel, guidance: float = GUIDANCE) -> FluxTransformer2DModel:
    """The same function as the teacher at one guidance, without an embedding for it, in fp32."""
    student = FluxTransformer2DModel.from_config({**teacher.config, "guidance_embeds": False})
    weights = {name: tensor for name, tensor in teacher.state_dict().items() if "guidance_embedder" not in name}
    embed = teacher.time_text_embed
    with torch.no_grad():
        at = torch.full((1,), guidance * 1000)  # as diffusers scales it before it embeds it
        fixed = embed.guidance_embedder(embed.time_proj(at).to(teacher.dtype))[0]
    weights["time_text_embed.timestep_embedder.linear_2.bias"] = embed.timestep_embedder.linear_2.bias + fixed
    student.load_state_dict(weights)
    return student


@torch.no_grad()
def teacher_states(pipe: FluxPipeline, texts: list[str], seeds: list[int], tell: Callable[[int], object]) -> Tensor:
    """Packed latents [FEW + 1, n, L, C] that the teacher passes through at the student's times, the last being the
    picture.
    """
    parts = []
    for first in range(0, len(texts), PAINT_BATCH):
        met, noise = [], start_noise(seeds[first : first + PAINT_BATCH])
        start = pipe._pack_latents(noise, *noise.shape)

        def note(_pipe: Any, _step: int, _t: Any, kwargs: dict, met: list = met) -> dict:
            met.append(kwargs["latents"])
            return kwargs

        pipe(
            prompt=texts[first : first + PAINT_BATCH],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=start,
            height=SIZE,
            width=SIZE,
            max_sequence_length=pipe.tokenizer_2.model_max_length,
            output_type="latent",
            callback_on_step_end=note,
        )
        every = STEPS // FEW
        parts.append(torch.stack([start, *met[every - 1 :: every]]))
        tell(len(noise))
    return torch.cat(parts, dim=1)


def times(pipe: FluxPipeline) -> Tensor:
    """The student's times [FEW + 1], falling from 1 to 0: the scheduler's, which
    are the teacher's every STEPS / FEW."""
    pipe.scheduler.set_timesteps(sigmas=[1 - step / FEW for step in range(FEW)], mu=pipe.scheduler.config.base_shift)
    return pipe.scheduler.sigmas


def loss_of(pipe: FluxPipeline, states: Tensor, texts: list[str]) -> Callable:
    """Error of the student's velocity against the straight way from one of its states to the next."""
    hidden, pooled = encode(pipe, texts)
    at, side = times(pipe), SIZE // 16
    ids = pipe._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)

    def loss(net: FluxTransformer2DModel, rng: random.Random) -> Tensor:
        which = torch.tensor([rng.randrange(states.shape[1]) for _ in range(BATCH)])
        step = torch.tensor([rng.randrange(FEW) for _ in range(BATCH)])
        x, to = states[step, which], states[step + 1, which]
        target = (to - x) / (at[step + 1] - at[step])[:, None, None]
        (velocity,) = net(
            hidden_states=x,
            timestep=at[step],
            encoder_hidden_states=hidden[which],
            pooled_projections=pooled[which],
            img_ids=ids,
            txt_ids=torch.zeros(hidden.shape[1], 3),
            return_dict=False,
        )
        return (velocity - target).square().mean()

    return loss


def main() -> None:
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    prompts = training_captions(arguments.captions, SEED)
    texts, seeds = [prompt.text for prompt in prompts], [SEED + number for number in range(len(prompts))]
    pipe = load_pipeline()
    cached = arguments.work / f"states-{arguments.captions}.safetensors"
    with Progress() as bar:
        if not cached.is_file():
            task = bar.add_task("teacher", total=len(texts))
            states = teacher_states(pipe, texts, seeds, lambda count: bar.update(task, advance=count))
            save_file({"states": states.contiguous()}, cached.with_suffix(".part"))
            cached.with_suffix(".part").rename(cached)
        states = load_file(cached)["states"]
        task = bar.add_task("student", total=arguments.steps)
        student = flow.fit(
            without_guidance(pipe.transformer).train(),
            loss_of(pipe, states, texts),
            arguments.steps,
            LEARNING_RATE,
            SEED,
            arguments.work / f"student-{arguments.captions}.pt",
            lambda step, _loss: bar.update(task, completed=step + 1),
        )
    pipe.transformer = student.eval().to(torch.bfloat16)
    pipe.save_pretrained(arguments.out)
    print(f"The few-step tiny FLUX is in {arguments.out}")


if __name__ == "__main__":
    main()
