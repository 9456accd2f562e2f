"""Makes all weights of the tiny world again, from a seed: text encoders, codec, FLUX, detector.

    python -m tinyworld.train       # about 50 minutes on 2 CPU cores, into tinyworld/weights
    python -m tinyworld.train --flow-steps 40 --distillation-steps 20 --out tiny_weights   # a quick look
    python -m tinyworld.train --heads 3 --reuse --device cuda --out wide        # another FLUX of the same world

Interrupt it as you like: it resumes from its last checkpoint in --work. diffusers, transformers and rich are needed.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import CLIPTextModel, T5EncoderModel

from . import flow, text
from .codec import BlockDCT
from .detector import train_detector
from .model import (
    DOUBLE,
    HEADS,
    SINGLE,
    WEIGHTS,
    AutoencoderDCT,
    load_pipeline,
    make_scheduler,
    make_tokenizer,
    make_transformer,
)
from .render import render
from .world import training_captions

SCENES = 16_000  # rendered once; every scene is described anew each time it is drawn
CODEC_SCENES = 600


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of everything (default 0)")
    parser.add_argument("--flow-steps", type=int, default=3200, help="steps of rectified flow (default 3200)")
    parser.add_argument(
        "--distillation-steps", type=int, default=500, help="steps of guidance distillation (default 500)"
    )
    parser.add_argument("--heads", type=int, default=HEADS, help=f"of 128 channels each (default {HEADS})")
    parser.add_argument("--double", type=int, default=DOUBLE, help=f"double blocks (default {DOUBLE})")
    parser.add_argument("--single", type=int, default=SINGLE, help=f"single blocks (default {SINGLE})")
    parser.add_argument(
        "--reuse", action="store_true", help="take codec and text encoders of the shipped weights; train no detector"
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the weights go (default tinyworld/weights)")
    parser.add_argument("--device", default="cpu", help="that the transformer learns on (default cpu)")
    parser.add_argument("--work", type=Path, default=Path(".cache/tinyworld"), help="where checkpoints go")
    arguments = parser.parse_args()
    shipped = (arguments.seed, *geometry(arguments), arguments.reuse) == (0, HEADS, DOUBLE, SINGLE, False)
    if arguments.out.resolve() == WEIGHTS.resolve() and not shipped:
        parser.error(f"got another seed, size or --reuse, which would replace {WEIGHTS}; name another folder as --out")
    arguments.work /= "-".join(map(str, (arguments.seed, *geometry(arguments), *["reuse"] * arguments.reuse)))
    return arguments


def geometry(arguments: argparse.Namespace) -> tuple[int, int, int]:
    """Heads, double and single blocks."""
    return arguments.heads, arguments.double, arguments.single


def text_encoders(work: Path, seed: int, bar: Progress) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Train the text encoders, or load them if an earlier run has finished them."""
    folder = work / "text"
    if not folder.exists():
        task = bar.add_task("text encoders", total=2 * text.STEPS, loss="")
        clip, t5 = text.train_text_encoders(seed, lambda loss: bar.update(task, advance=1, loss=f"{loss:.4f}"))
        clip.save_pretrained(folder.with_suffix(".part") / "clip")
        t5.save_pretrained(folder.with_suffix(".part") / "t5")
        folder.with_suffix(".part").rename(folder)
    clip, t5 = CLIPTextModel.from_pretrained(folder / "clip"), T5EncoderModel.from_pretrained(folder / "t5")
    return clip.eval().requires_grad_(False), t5.eval().requires_grad_(False)


def fit_codec(seed: int) -> AutoencoderDCT:
    """The codec, whitened with the statistics of some scenes."""
    rng = random.Random(seed)
    plain = BlockDCT()
    some = torch.cat([plain.coefficients(render(p.scene, rng)[None]) for p in training_captions(CODEC_SCENES, seed)])
    autoencoder = AutoencoderDCT()
    autoencoder.mean.data, autoencoder.std.data = some.mean((0, 2, 3)), some.std((0, 2, 3))
    return autoencoder.requires_grad_(False)


def assemble(arguments: argparse.Namespace, bar: Progress) -> FluxPipeline:
    """The pipeline with everything trained but its transformer."""
    seed = arguments.seed
    if arguments.reuse:
        pipeline = load_pipeline()
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            part.eval().requires_grad_(False)
        torch.manual_seed(seed)
        pipeline.transformer = make_transformer(*geometry(arguments))
        return pipeline
    clip, t5 = text_encoders(arguments.work, seed, bar)
    torch.manual_seed(seed)
    return FluxPipeline(
        scheduler=make_scheduler(),
        vae=fit_codec(seed + 1),
        text_encoder=clip,
        tokenizer=make_tokenizer(clip=True),
        text_encoder_2=t5,
        tokenizer_2=make_tokenizer(clip=False),
        transformer=make_transformer(*geometry(arguments)),
    )


def train_transformer(pipeline: FluxPipeline, arguments: argparse.Namespace, bar: Progress) -> None:
    """Rectified flow, then guidance distillation; `pipeline.transformer` becomes the result."""
    task = bar.add_task("scenes", total=SCENES, loss="")
    scenes = flow.Scenes(pipeline, SCENES, arguments.seed + 2, lambda: bar.update(task, advance=1))
    log = (arguments.work / "log.jsonl").open("a", buffering=1)

    def stage(name: str, net: Any, loss_of: Any, steps: int, rate: float, seed: int) -> Any:
        task = bar.add_task(name, total=steps, loss="")

        def progress(step: int, loss: float) -> None:
            bar.update(task, completed=step + 1, loss=f"{loss:.4f}")
            log.write(json.dumps({"stage": name, "step": step, "loss": loss}) + "\n")

        return flow.fit(net, loss_of, steps, rate, seed, arguments.work / f"{name}.pt", progress)

    teacher = stage(
        "flow",
        pipeline.transformer.train().to(arguments.device),
        lambda net, rng: flow.flow_loss(net, scenes, rng),
        arguments.flow_steps,
        flow.LEARNING_RATE,
        arguments.seed + 3,
    )
    student = make_transformer(*geometry(arguments))
    student.load_state_dict(teacher.state_dict())
    pipeline.transformer = stage(
        "distillation",
        student.to(arguments.device),
        lambda net, rng: flow.distillation_loss(net, teacher, scenes, rng),
        arguments.distillation_steps,
        flow.DISTIL_LEARNING_RATE,
        arguments.seed + 4,
    ).eval()


def export(pipeline: FluxPipeline, out: Path) -> None:
    """Write the pipeline as diffusers does; the transformer in bfloat16, the rest, which is small, in float32."""
    pipeline.transformer.to("cpu", torch.bfloat16).save_pretrained(out / "transformer")
    for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        getattr(pipeline, name).save_pretrained(out / name)
    pipeline.save_config(out)  # model_index.json, by which `--model` knows the folder


def main() -> None:
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    with Progress(
        *Progress.get_default_columns()[:3],
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    ) as bar:
        pipeline = assemble(arguments, bar)
        train_transformer(pipeline, arguments, bar)
        export(pipeline, arguments.out)
        if not arguments.reuse:
            train_detector(arguments.out, arguments.seed + 5, bar)
    print(f"The tiny world's weights are in {arguments.out}")


if __name__ == "__main__":
    main()
