"""The pipeline of each family: how to write and encode its text, and its transformer's inputs beside latents and a
time. One row a family; FLUX.1's is the first.

Encoded text is states [B, L, ...] and one more tensor, `pooled`. It has FLUX.1's pooled vectors. Where a pipeline masks
text or gives each prompt its own length, it is the mask [B, L] of a prompt's tokens. L is always the model's
`text_length`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import z_image
from .attach import Turns
from .tokens import grid, line, real

if TYPE_CHECKING:
    from .models import Model, Text

Written = tuple[str, int]  # a text in its template, and the place of its first character there


def _called(model: Model, latents: Tensor, t: Tensor, text: Text) -> Tensor:
    (found,) = model.transformer(
        hidden_states=latents,
        timestep=t.to(model.device),
        encoder_hidden_states=text.states.to(model.device),
        **asked(model).inputs(model, text),
        return_dict=False,
    )
    return found


class Asked(NamedTuple):
    """One family's pipeline. The first `cut` tokens of the template are dropped. `encoders` are names of the pipeline's
    attributes. `suffix` is the text behind the padding.

    `pads_to` is 0 where all prompts have one length. Else each prompt has its own, and the transformer pads it to a
    multiple of so many tokens, and attends to them.
    """

    encode: Callable[[Any, list[str], int, torch.device], tuple[Tensor, Tensor]]
    inputs: Callable[[Model, Text], dict[str, Any]]  # beside latents, time and states
    # of text and image tokens of these prompts; None: text is not turned
    turns: Callable[[Model, Text], tuple[Turns | None, Turns]]
    called: Callable[[Model, Tensor, Tensor, Text], Tensor] = _called  # velocity [B, L, C] of latents, times, prompts
    written: Callable[[Any, str], Written] = lambda pipe, text: (text, 0)
    cut: Callable[[Any], int] = lambda pipe: 0
    suffix: Callable[[Any], str] = lambda pipe: ""
    masked: bool = False  # `pooled` tells which tokens are attended to
    pooled: str = "prompt_embeds_mask"  # the pipeline's name for `pooled`; "": it takes none
    scale: str = "guidance_scale"  # the pipeline's name for the scale of guidance
    free_above: float = 1.0  # above this scale it guides by a second pass, unless the transformer embeds guidance
    states: Callable[[dict], tuple[int, ...]] = lambda config: (config["joint_attention_dim"],)  # of a token
    pooled_width: Callable[[dict, int], int] = lambda config, length: length
    channels: Callable[[Any], int] = lambda config: config["in_channels"]  # of packed latents
    pads_to: int = 0
    encoders: tuple[str, ...] = ("text_encoder",)


def asked(model: Model) -> Asked:
    """The row of a model's family. ValueError where its pipeline is not known."""
    return asked_of(model.geometry.family)


def asked_of(family: str) -> Asked:
    """The row of a family. ValueError where there is none."""
    if family not in PIPELINES:
        raise ValueError(f"family {family!r}: its pipeline is not known, expected one of {', '.join(PIPELINES)}")
    return PIPELINES[family]


def tokenizer_of(pipe: Any) -> Any:
    """The tokenizer in whose tokens a concept's words are found: the last one, and of a processor its own."""
    last = getattr(pipe, "tokenizer_2", None) or pipe.tokenizer
    return getattr(last, "tokenizer", last)


def _flux(pipe: Any, texts: list[str], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    states, pooled, _ = pipe.encode_prompt(texts, None, device=device, max_sequence_length=length)
    return states, pooled


def _flux_inputs(model: Model, text: Text) -> dict[str, Any]:
    guidance = None
    if model.transformer.config.guidance_embeds:
        guidance = torch.full((len(text.states),), model.guidance, device=model.device)
    return {
        "guidance": guidance,
        "pooled_projections": text.pooled.to(model.device),
        "txt_ids": torch.zeros(text.states.shape[1], 3, device=model.device),
        "img_ids": model.image_ids,
    }


def _chroma(pipe: Any, texts: list[str], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    states, mask = pipe._get_t5_prompt_embeds(texts, max_sequence_length=length, device=device)
    return states, mask


def _chroma_inputs(model: Model, text: Text) -> dict[str, Any]:
    attended = pad(text.pooled.to(model.device), (0, len(model.image_ids)), value=1.0)  # pictures are attended to
    ids = torch.zeros(text.states.shape[1], 3, device=model.device)
    return {"attention_mask": attended, "txt_ids": ids, "img_ids": model.image_ids}


def _flux2(pipe: Any, texts: list[str], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    states, _ = pipe.encode_prompt(texts, device=device, max_sequence_length=length)
    return states, torch.ones(states.shape[:2])


def _flux2_inputs(model: Model, text: Text) -> dict[str, Any]:
    guidance = None
    if model.transformer.config.guidance_embeds:
        guidance = torch.full((len(text.states),), model.guidance, device=model.device)
    return {"guidance": guidance, "txt_ids": line(model, 4, 3), "img_ids": grid(model, 4)}


def _flux2_written(pipe: Any, text: str) -> Written:
    if not hasattr(pipe.config, "is_distilled"):  # dev: Mistral's template begins with a system message
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        said = format_input([text], pipe.system_message)[0]
        whole = pipe.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=False)
        return whole, whole.rindex(text)
    return _chat(pipe, text, thinking=False)


def _chat(pipe: Any, text: str, thinking: bool) -> Written:
    whole = pipe.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    return whole, whole.index(text)


def _ovis(pipe: Any, texts: list[str], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    states, *_ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, device=device, max_sequence_length=length)
    return states, torch.ones(states.shape[:2])


def _ovis_written(pipe: Any, text: str) -> Written:
    (whole,) = pipe._get_messages(text)
    return whole, whole.index(pipe.system_prompt) + len(pipe.system_prompt)


def _qwen(pipe: Any, texts: list[str], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    states, mask = pipe._get_qwen_prompt_embeds(texts, device)
    missing = length - states.shape[1]  # negative where a prompt is longer
    return pad(states, (0, 0, 0, missing)), pad(mask, (0, missing)).float()


def _qwen_shapes(model: Model) -> list[tuple[int, int, int]]:
    return [(1, model.latent_side // 2, model.latent_side // 2)]


def _qwen_inputs(model: Model, text: Text) -> dict[str, Any]:
    mask = text.pooled.to(model.device).bool()
    return {"encoder_hidden_states_mask": mask, "img_shapes": [_qwen_shapes(model)] * len(mask)}


def _qwen_turns(model: Model, text: Text) -> tuple[Turns, Turns]:
    image, words = model.transformer.pos_embed(
        _qwen_shapes(model), max_txt_seq_len=model.text_length, device=model.device
    )
    return real(words), real(image)


def _krea(pipe: Any, texts: list[str], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    states, mask = pipe.get_text_hidden_states(texts, length, device)
    return states, mask.float()


def _krea_inputs(model: Model, text: Text) -> dict[str, Any]:
    ids = torch.cat([torch.zeros(text.states.shape[1], 3, device=model.device), grid(model, 3)])
    return {"position_ids": ids, "encoder_attention_mask": text.pooled.to(model.device).bool()}


PIPELINES = {
    "flux": Asked(
        _flux,
        _flux_inputs,
        lambda model, text: (None, model.transformer.pos_embed(model.image_ids)),
        encoders=("text_encoder", "text_encoder_2"),
        pooled="pooled_prompt_embeds",
        pooled_width=lambda config, length: config["pooled_projection_dim"],
    ),
    "chroma": Asked(
        _chroma,
        _chroma_inputs,
        lambda model, text: (None, model.transformer.pos_embed(model.image_ids)),
        masked=True,
        pooled="prompt_attention_mask",
    ),
    "flux2": Asked(
        _flux2,
        _flux2_inputs,
        lambda model, text: tuple(model.transformer.pos_embed(ids) for ids in (line(model, 4, 3), grid(model, 4))),
        written=_flux2_written,
        pooled="",
    ),
    "ovis-image": Asked(
        _ovis,
        lambda model, text: {"txt_ids": line(model, 3, 1, 2), "img_ids": model.image_ids},
        lambda model, text: tuple(model.transformer.pos_embed(ids) for ids in (line(model, 3, 1, 2), model.image_ids)),
        written=_ovis_written,
        cut=lambda pipe: pipe.user_prompt_begin_id,
        pooled="",
    ),
    "qwen-image": Asked(
        _qwen,
        _qwen_inputs,
        _qwen_turns,
        written=lambda pipe, text: (pipe.prompt_template_encode.format(text), pipe.prompt_template_encode.index("{}")),
        cut=lambda pipe: pipe.prompt_template_encode_start_idx,
        masked=True,
        scale="true_cfg_scale",
    ),
    "krea2": Asked(
        _krea,
        _krea_inputs,
        lambda model, text: (None, model.transformer.rotary_emb(grid(model, 3))),
        written=lambda pipe, text: (pipe.prompt_template_encode_prefix + text, len(pipe.prompt_template_encode_prefix)),
        cut=lambda pipe: pipe.prompt_template_encode_start_idx,
        suffix=lambda pipe: pipe.prompt_template_encode_suffix,
        masked=True,
        free_above=0.0,
        states=lambda config: (config["num_text_layers"], config["text_hidden_dim"]),
    ),
    "z-image": Asked(
        z_image.encode,
        lambda model, text: {},
        z_image.turns,
        z_image.called,
        written=lambda pipe, text: _chat(pipe, text, thinking=True),
        masked=True,
        pooled="",
        free_above=0.0,
        states=lambda config: (config["cap_feat_dim"],),
        channels=lambda config: 4 * config["in_channels"],
        pads_to=z_image.PADS_TO,
    ),
}


def tokens_of(pipe: Any, row: Asked, texts: Sequence[str], length: int) -> tuple[Tensor, list[list[tuple[int, int]]]]:
    """The attended tokens of each text, bool [B, length], and each token's characters [start, end) in the given text.

    Tokens of the template and padding lie outside of the text, at (0, 0).
    """
    tokenizer, cut = tokenizer_of(pipe), row.cut(pipe)
    behind = tokenizer(row.suffix(pipe))["input_ids"] if row.suffix(pipe) else []
    written = [row.written(pipe, text) for text in texts]
    batch = tokenizer(
        [whole for whole, _ in written],
        padding="max_length",
        max_length=length + cut - len(behind),
        truncation=True,
        return_offsets_mapping=True,
        **({"padding_side": "right"} if row.pads_to else {}),  # on the right for all: it is dropped
    )
    used = torch.tensor([mask[cut:] + [1] * len(behind) for mask in batch["attention_mask"]], dtype=torch.bool)
    if row.pads_to:
        used = torch.arange(length) < -(-used.sum(1, keepdim=True) // row.pads_to) * row.pads_to
    places = []
    for (_, start), text, offsets in zip(written, texts, batch["offset_mapping"], strict=True):
        own = [(max(0, a - start), min(len(text), b - start)) for a, b in offsets[cut:]]
        places.append([each if each[0] < each[1] else (0, 0) for each in own] + [(0, 0)] * len(behind))
    return used, places
