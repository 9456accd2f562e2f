"""Tiny random pipelines of other families than FLUX.1, with real classes of tokenizers, text encoders and VAEs."""

from __future__ import annotations

import diffusers
import torch
import transformers

from dev.comfyui import find_comfyui
from saferope_training.flux.models import Model, from_pipeline
from saferope_training.flux.pipelines import tokenizer_of
from tests.support.diffusers_models import TINY
from tinyworld import model as tiny

LENGTH, SIDE = 24, 4  # tokens of text; rows and columns of the latent: 2 x 2 image tokens
LENGTHS = {"flux2-dev": 64, "z-image": 64}  # where the template is longer; where it is a multiple of 32
TEMPLATE = (  # Qwen3's, less what one prompt does not need
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
_MISTRAL = (  # Mistral's, less what one prompt does not need
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content[0].text }}"
    "{% else %}[INST]{{ m.content[0].text }}[/INST]{% endif %}{% endfor %}"
)
_TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
_TEXT |= {"max_position_embeddings": 256}
_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}


def _words():
    """Qwen's tokenizer with its whole vocabulary, which ComfyUI has."""
    folder = find_comfyui() / "comfy" / "text_encoders" / "qwen25_tokenizer"
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.chat_template, tokenizer.padding_side = TEMPLATE, "right"
    return tokenizer


_VAE = {"block_out_channels": (4, 4, 4, 4), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
_FOUR = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "mid_block_add_attention": False,
}


def _qwen_vae():
    means = {"latents_mean": [0.5, -0.5, 0.1, 0.2], "latents_std": [2.0, 1.0, 3.0, 0.5]}
    return diffusers.AutoencoderKLQwenImage(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **means)


def _flux2_vae():
    vae = diffusers.AutoencoderKLFlux2(**_VAE, **_FOUR)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def _chroma(transformer):
    t5 = transformers.T5EncoderModel(tiny.make_text_encoders()[1].config)
    vae = diffusers.AutoencoderKL(**_VAE, **_FOUR, shift_factor=0.1, scaling_factor=0.4)
    return diffusers.ChromaPipeline(tiny.make_scheduler(), vae, t5, tiny.make_tokenizer(clip=False), transformer)


def _flux2(transformer):
    words = _words()
    config = transformers.Qwen3Config(**_TEXT, vocab_size=len(words), num_hidden_layers=28, head_dim=8)
    text = transformers.Qwen3ForCausalLM(config)
    return diffusers.Flux2KleinPipeline(tiny.make_scheduler(), _flux2_vae(), text, words, transformer)


def _ovis(transformer):
    words = _words()
    text = transformers.Qwen3Model(
        transformers.Qwen3Config(**_TEXT, vocab_size=len(words), num_hidden_layers=2, head_dim=8)
    )
    vae = diffusers.AutoencoderKL(**_VAE, **_FOUR, shift_factor=0.1, scaling_factor=0.4)
    return diffusers.OvisImagePipeline(tiny.make_scheduler(), vae, text, words, transformer)


def _flux2_dev(transformer):
    words = _words()
    words.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    words.padding_side = words.init_kwargs["padding_side"] = "left"  # Mistral's; the second is what is saved
    processor = transformers.PixtralProcessor(transformers.PixtralImageProcessor(), words, chat_template=_MISTRAL)
    config = transformers.Mistral3Config(
        text_config=_TEXT | {"model_type": "mistral", "vocab_size": len(words), "num_hidden_layers": 31, "head_dim": 8},
        vision_config={"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "head_dim": 8},
    )
    text = transformers.Mistral3ForConditionalGeneration(config)
    return diffusers.Flux2Pipeline(tiny.make_scheduler(), _flux2_vae(), text, processor, transformer)


def _qwen(transformer):
    words = _words()
    config = transformers.Qwen2_5_VLConfig(
        text_config=_TEXT | {"vocab_size": len(words), "num_hidden_layers": 2}, vision_config=_VISION
    )
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return diffusers.QwenImagePipeline(tiny.make_scheduler(), _qwen_vae(), text, words, transformer)


def _krea(transformer):
    words = _words()
    config = transformers.Qwen3VLConfig(
        text_config=_TEXT | {"vocab_size": len(words), "num_hidden_layers": 2, "head_dim": 8},
        vision_config=_VISION | {"deepstack_visual_indexes": [0]},
    )
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = transformers.Qwen3VLModel(config)
    return diffusers.Krea2Pipeline(
        tiny.make_scheduler(), _qwen_vae(), text, words, transformer, text_encoder_select_layers=(1, 2)
    )


def _z_image(transformer):
    words = _words()
    text = transformers.Qwen3Model(
        transformers.Qwen3Config(**_TEXT, vocab_size=len(words), num_hidden_layers=3, head_dim=8)
    )
    vae = diffusers.AutoencoderKL(**_VAE, **_FOUR, shift_factor=0.1, scaling_factor=0.4)
    return diffusers.ZImagePipeline(tiny.make_scheduler(), vae, text, words, transformer)


_MAKERS = {
    "chroma": (_chroma, {"joint_attention_dim": tiny.TEXT_WIDTH}),
    "flux2": (_flux2, {"joint_attention_dim": 48, "guidance_embeds": False}),  # three layers of 16; klein's
    "flux2-dev": (_flux2_dev, {"joint_attention_dim": 48}),
    "ovis-image": (_ovis, {"joint_attention_dim": 16}),
    "qwen-image": (_qwen, {"joint_attention_dim": 16}),
    "krea2": (_krea, {"text_hidden_dim": 16}),
    "z-image": (_z_image, {"in_channels": 4, "cap_feat_dim": 16}),
}
FAMILIES = list(_MAKERS)


def make_pipeline(family: str) -> diffusers.DiffusionPipeline:
    """Every part of its real class; tokenizers take LENGTH tokens."""
    make, sizes = _MAKERS[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = make(TINY[family.removesuffix("-dev")].make(**sizes))
    tokenizer_of(pipe).model_max_length = LENGTHS.get(family, LENGTH)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.eval()
    return pipe


def make_model(family: str) -> Model:
    """The pipeline as training sees it."""
    return from_pipeline("random", make_pipeline(family), LENGTHS.get(family, LENGTH), SIDE)
