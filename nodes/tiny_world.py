"""The embedded tiny FLUX as MODEL, CLIP and VAE, so that the pack can be tried with nothing downloaded.

Stock nodes do the rest: CLIP Text Encode, an empty SD3 latent of 96 x 96, KSampler (euler, simple, 16 steps, cfg 1),
VAE Decode. The weights lie in tinyworld/weights as diffusers keeps them; everything runs in fp32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.clip_model import CLIPTextModel
from comfy.sd1_clip import SDClipModel, SDTokenizer
from comfy.supported_models_base import ClipTarget
from comfy.text_encoders.flux import FluxClipModel, FluxTokenizer
from comfy.text_encoders.t5 import T5
from comfy_api.latest import io
from einops import rearrange
from transformers import PreTrainedTokenizerFast

from ..tinyworld.codec import BLOCK, BlockDCT, load_codec

WEIGHTS = Path(__file__).resolve().parent.parent / "tinyworld" / "weights"
TEXT_LENGTH = 24  # tokens the tiny FLUX was trained with: padded and cut to it, no attention mask
T5_LENGTHS = {"min_length": TEXT_LENGTH, "max_length": 99999999, "pad_to_max_length": False}  # one row, however long
ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh"}  # transformers' name -> ComfyUI's, where they differ


def load_model() -> Any:
    """The transformer as a ModelPatcher, through the loader the stock node uses."""
    path = _file("transformer/diffusion_pytorch_model.safetensors")
    return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})


def load_clip() -> comfy.sd.CLIP:
    """Both text encoders: T5's hidden states and CLIP's pooled vector, as FluxPipeline.encode_prompt gives them."""
    clip = comfy.sd.CLIP(ClipTarget(TinyTokenizer, TinyTextEncoders), model_options={"dtype": torch.float32})
    for state in (_clip_weights(), _weights("text_encoder_2/model.safetensors")):
        missing, _ = clip.load_sd(state)
        if missing:
            raise ValueError(f"The tiny world's text encoders lack {missing}. Install the pack again.")
    return clip


class TinyTokenizer(FluxTokenizer):
    """FLUX's two token streams, `l` and `t5xxl`, with the tiny world's vocabulary."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict | None = None) -> None:
        clip, t5 = _config("text_encoder"), _config("text_encoder_2")
        self.clip_l = _tokenizer("tokenizer", "clip_l", clip, max_length=clip["max_position_embeddings"])
        self.t5xxl = _tokenizer("tokenizer_2", "t5xxl", t5, **T5_LENGTHS)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, list]:
        tokens = super().tokenize_with_weights(text, return_word_ids, **kwargs)
        tokens["t5xxl"] = [_cut(row, TEXT_LENGTH) for row in tokens["t5xxl"]]
        return tokens


class TinyTextEncoders(FluxClipModel):
    """ComfyUI's FLUX text encoders with the sizes of the tiny ones' config.json."""

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict | None = None
    ) -> None:
        torch.nn.Module.__init__(self)
        clip, t5 = _config("text_encoder"), _config("text_encoder_2")
        t5["dense_act_fn"] = ACTIVATIONS.get(t5["dense_act_fn"], t5["dense_act_fn"])
        shared = {"device": device, "dtype": dtype, "model_options": model_options or {}}
        self.clip_l = SDClipModel(
            textmodel_json_config=clip,
            model_class=_ClipText,
            special_tokens=_special(clip),
            return_projected_pooled=False,
            **shared,
        )
        self.t5xxl = SDClipModel(textmodel_json_config=t5, model_class=T5, special_tokens=_special(t5), **shared)
        self.dtypes = {dtype}


class _ClipText(CLIPTextModel):
    """ComfyUI's CLIP takes every size from the config but the vocabulary's."""

    def __init__(self, config_dict: dict, dtype: torch.dtype, device: Any, operations: Any) -> None:
        super().__init__(config_dict, dtype, device, operations)
        size = config_dict["vocab_size"], config_dict["hidden_size"]
        self.set_input_embeddings(operations.Embedding(*size, dtype=dtype, device=device))


class TinyVAE:
    """A VAE for stock nodes, around a codec that has nothing to learn, load or tile.

    decode: latents [B, 16, h, w] -> pictures [B, 8 h, 8 w, 3] in [0, 1]; encode: the inverse, cropped to multiples of
    8.
    """

    latent_channels, latent_dim, output_channels = 16, 2, 3
    downscale_ratio = upscale_ratio = BLOCK

    def __init__(self, codec: BlockDCT) -> None:
        self.first_stage_model = codec.eval()

    @torch.no_grad()
    def decode(self, samples: torch.Tensor, vae_options: dict | None = None) -> torch.Tensor:
        pixels = self.first_stage_model.decode(samples.float().cpu())
        return _hand_over(rearrange(pixels, "b c h w -> b h w c").add(1).div(2).clamp(0, 1))

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        height, width = (side // BLOCK * BLOCK for side in pixels.shape[1:3])
        cropped = pixels[:, :height, :width, : self.output_channels].float().cpu()
        cropped = rearrange(cropped, "b h w c -> b c h w")
        return _hand_over(self.first_stage_model.encode(cropped * 2 - 1))

    def decode_tiled(self, samples: torch.Tensor, **tiles: Any) -> torch.Tensor:
        return self.decode(samples)

    def encode_tiled(self, pixels: torch.Tensor, **tiles: Any) -> torch.Tensor:
        return self.encode(pixels)

    def spacial_compression_decode(self) -> int:
        return BLOCK

    def spacial_compression_encode(self) -> int:
        return BLOCK

    def temporal_compression_decode(self) -> None:
        return None

    def throw_exception_if_invalid(self) -> None:
        pass


class TinyWorld(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafeRoPE_TinyWorld",
            display_name="SafeRoPE Tiny World",
            category="SafeRoPE",
            description="A tiny FLUX with its text encoders and codec, part of this pack. It paints shapes of 96 x 96 "
            "pixels in seconds on a CPU. Try SafeRoPE without a download.",
            search_aliases=["tiny flux", "test model", "saferope"],
            outputs=[
                io.Model.Output("model", tooltip="FLUX with 2 double and 4 single blocks, for KSampler with cfg 1."),
                io.Clip.Output("clip", tooltip="For CLIP Text Encode. It takes 24 tokens and cuts longer prompts."),
                io.Vae.Output("vae", tooltip="For VAE Decode: 16 channels, 8 pixels per latent."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(
            load_model(), load_clip(), TinyVAE(load_codec(_file("vae/diffusion_pytorch_model.safetensors").parent))
        )


def _file(name: str) -> Path:
    path = WEIGHTS / name
    if not path.is_file():
        raise FileNotFoundError(
            f"The tiny world's {path} is missing. Expected the weights that come with the pack. Install the pack again."
        )
    return path


def _config(folder: str) -> dict[str, Any]:
    return json.loads(_file(f"{folder}/config.json").read_text(encoding="utf-8"))


def _special(config: dict[str, Any]) -> dict[str, int]:
    return {"end": config["eos_token_id"], "pad": config["pad_token_id"]}


def _tokenizer(folder: str, key: str, config: dict[str, Any], **lengths: Any) -> SDTokenizer:
    path = _file(f"{folder}/tokenizer.json").parent
    return SDTokenizer(
        str(path),
        embedding_key=key,
        embedding_size=config.get("hidden_size", config.get("d_model")),
        tokenizer_class=PreTrainedTokenizerFast,
        has_start_token=key == "clip_l",  # T5 has none
        pad_token=config["pad_token_id"],
        **lengths,
    )


def _cut(row: list[tuple], length: int) -> list[tuple]:
    """The first `length` tokens, the end token among them: how transformers truncates."""
    return row if len(row) <= length else [*row[: length - 1], row[-1]]


def _clip_weights() -> dict[str, torch.Tensor]:
    # transformers 5 writes the names without the prefix that version 4 and ComfyUI expect.
    state = {
        f"text_model.{k.removeprefix('text_model.')}": v for k, v in _weights("text_encoder/model.safetensors").items()
    }
    # FLUX takes the pooled vector before the projection: the file has none, and ComfyUI's model wants one.
    return state | {"text_projection.weight": torch.eye(_config("text_encoder")["hidden_size"])}


def _weights(name: str) -> dict[str, torch.Tensor]:
    return comfy.utils.load_torch_file(str(_file(name)), safe_load=True)


def _hand_over(x: torch.Tensor) -> torch.Tensor:
    return x.to(comfy.model_management.intermediate_device())
