"""Makes a second tiny model of the same world, of Qwen-Image's layout: double blocks alone, and a language model in
front.

    python -m tinyworld.double_only --out double_only    # --device cuda: on a GPU

Four double blocks of 2 heads x 128, between a Qwen2.5-VL of width 64 that reads the pipeline's own chat template word
by word, and the tiny world's codec. Encoder and transformer are trained together on rectified flow. Then the
transformer learns its own guided velocity at one scale, since Qwen-Image embeds no guidance. Interrupted, it
resumes from its last checkpoint.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from rich.progress import Progress
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from . import flow
from .model import PAD, TEXT_LENGTH, TEXT_WIDTH, UNKNOWN, load_pipeline, make_scheduler
from .render import SIZE
from .train import SCENES
from .world import vocabulary

STEPS, DISTILLATION_STEPS = 4200, 300
SEED = 21
TURN = "<|im_start|>", "<|im_end|>"
_TEMPLATE = (  # the words of QwenImagePipeline's own
    "system describe the image by detailing the color shape size texture quantity text spatial relationships of the "
    "objects and background user assistant"
)
SHAPES = [(1, SIZE // 16, SIZE // 16)]  # frames, rows and columns of image tokens


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the pipeline goes")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of rectified flow (default {STEPS})")
    parser.add_argument(
        "--distillation-steps", type=int, default=DISTILLATION_STEPS, help=f"(default {DISTILLATION_STEPS})"
    )
    parser.add_argument("--scenes", type=int, default=SCENES, help=f"to learn from (default {SCENES})")
    parser.add_argument("--device", default="cpu", help="that learns, such as cuda (default cpu)")
    parser.add_argument("--work", type=Path, default=Path(".cache/double_only"), help="where checkpoints go")
    return parser.parse_args()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, mark or line break, lower case: the template's beginning has Qwen-Image's 34 tokens."""
    words = list(dict.fromkeys([PAD, UNKNOWN, *TURN, "\n", ":", ",", ".", *_TEMPLATE.split(), *vocabulary()]))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.Split(Regex(r" +"), "removed"),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in TURN])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TEXT_LENGTH,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=TURN[1],
        padding_side="right",
    )


def make_text_encoder(words: int) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers, width 64, randomly initialised; its eye is as small as the class allows, and is never used."""
    text = {"vocab_size": words, "hidden_size": TEXT_WIDTH, "intermediate_size": 2 * TEXT_WIDTH}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    eye = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": TEXT_WIDTH}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=eye)
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    return Qwen2_5_VLForConditionalGeneration(config)


def make_transformer() -> QwenImageTransformer2DModel:
    """The transformer of the tiny geometry, randomly initialised; axes as in Qwen-Image."""
    return QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=4,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(16, 56, 56),
    )


def make_pipeline(seed: int = SEED) -> QwenImagePipeline:
    """The whole pipeline; all but its codec is random."""
    torch.manual_seed(seed)
    words = make_tokenizer()
    return QwenImagePipeline(
        scheduler=make_scheduler(),
        vae=load_pipeline().vae,
        text_encoder=make_text_encoder(len(words)),
        tokenizer=words,
        transformer=make_transformer(),
    )


def encode(pipe: QwenImagePipeline, texts: list[str]) -> tuple[Tensor, Tensor]:
    """States [B, TEXT_LENGTH, 64] behind the template's beginning, and the mask of tokens that are attended to."""
    states, mask = pipe._get_qwen_prompt_embeds(texts, pipe.text_encoder.device)
    missing = TEXT_LENGTH - states.shape[1]
    return pad(states, (0, 0, 0, missing)), pad(mask, (0, missing)).bool()


def velocity(net: nn.Module, x: Tensor, t: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
    """The velocity, on the transformer's device, where `text` lies: computed in bfloat16, returned in float32."""
    with torch.autocast(net.device.type, torch.bfloat16):
        (found,) = net(
            hidden_states=x.to(net.device),
            timestep=t.to(net.device),
            encoder_hidden_states=text[0],
            encoder_hidden_states_mask=text[1],
            img_shapes=[SHAPES] * len(x),
            return_dict=False,
        )
    return found.float()


def flow_loss(both: nn.ModuleDict, pipe: QwenImagePipeline, scenes: flow.Scenes, rng: random.Random) -> Tensor:
    """Error of the plain velocity, captions sometimes dropped."""
    latents, texts = scenes.draw(rng, flow.BATCH)
    x, t, noise = flow.noised(latents)
    pipe.text_encoder = both["text_encoder"]
    text = encode(pipe, ["" if rng.random() < flow.CAPTION_DROPOUT else each for each in texts])
    return scenes.error(velocity(both["transformer"], x, t, text), noise - latents)


def distillation_loss(
    net: nn.Module, teacher: nn.Module, pipe: QwenImagePipeline, scenes: flow.Scenes, rng: random.Random
) -> Tensor:
    """Error against the frozen model's velocity guided at FULL_SCALE."""
    latents, texts = scenes.draw(rng, flow.BATCH)
    x, t, _ = flow.noised(latents)
    with torch.no_grad():
        text = encode(pipe, texts)
        without = velocity(teacher, x, t, encode(pipe, [""] * len(texts)))
        target = without + flow.FULL_SCALE * (velocity(teacher, x, t, text) - without)
    return scenes.error(velocity(net, x, t, text), target)


def train(pipe: QwenImagePipeline, scenes: flow.Scenes, arguments: argparse.Namespace, bar: Progress) -> None:
    """Both stages; `pipe` holds the result."""
    log = (arguments.work / "log.jsonl").open("a", buffering=1)

    def stage(name: str, net: nn.Module, loss_of: Any, steps: int, rate: float, seed: int) -> Any:
        task = bar.add_task(name, total=steps)

        def progress(step: int, loss: float) -> None:
            bar.update(task, completed=step + 1)
            log.write(json.dumps({"stage": name, "step": step, "loss": loss}) + "\n")

        return flow.fit(net, loss_of, steps, rate, seed, arguments.work / f"{name}.pt", progress)

    both = nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})
    both = both.train().to(arguments.device)
    both = stage(
        "flow", both, lambda net, rng: flow_loss(net, pipe, scenes, rng), arguments.steps, flow.LEARNING_RATE, SEED + 1
    )
    teacher, pipe.text_encoder = both["transformer"], both["text_encoder"].eval()
    student = make_transformer()
    student.load_state_dict(teacher.state_dict())
    pipe.transformer = stage(
        "distillation",
        student.train().to(arguments.device),
        lambda net, rng: distillation_loss(net, teacher, pipe, scenes, rng),
        arguments.distillation_steps,
        flow.DISTIL_LEARNING_RATE,
        SEED + 2,
    ).eval()


def save(pipe: QwenImagePipeline, out: Path) -> None:
    """Writes the pipeline as diffusers does, its transformer in bfloat16."""
    pipe.to("cpu").transformer.to(torch.bfloat16)
    pipe.register_to_config(is_distilled=True)  # so that pipelines do not guide it again
    pipe.save_pretrained(out)


def main() -> None:
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    pipe = make_pipeline()
    with Progress() as bar:
        task = bar.add_task("scenes", total=arguments.scenes)
        scenes = flow.Scenes(load_pipeline(), arguments.scenes, SEED, lambda: bar.update(task, advance=1))
        train(pipe, scenes, arguments, bar)
    save(pipe, arguments.out)
    print(f"The tiny model of double blocks is in {arguments.out}")


if __name__ == "__main__":
    main()
