"""The tiny FLUX as a complete diffusers `FluxPipeline`: 2 double + 4 single blocks, 2 heads x 128, T5, CLIP, DCT codec.

The folder `weights` is laid out as diffusers saves pipelines; its transformer file is also what ComfyUI's own loaders
take. This module and `train` need diffusers; nothing that the nodes load does.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from .codec import CHANNELS, SCALE, SHIFT, BlockDCT
from .render import SIZE
from .world import vocabulary

WEIGHTS = Path(__file__).parent / "weights"
TEXT_LENGTH = 24  # T5 tokens; FLUX's own pipeline uses 512. The longest caption has 17
TEXT_WIDTH = 64
HEADS, DOUBLE, SINGLE = 2, 2, 4  # heads x 128, double and single blocks of the shipped weights
STEPS = 16
GUIDANCE = 3.5  # FLUX.1-dev's default, embedded as there
TIME_SHIFT = 1.15  # FLUX.1-dev's, and ComfyUI's default for it at every size

PAD, EOS, UNKNOWN, MASK, BOS = "<pad>", "</s>", "<unk>", "<mask>", "<s>"


class _Posterior:
    """A distribution with no spread, in the place of a VAE's."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.latents

    mode = sample


class AutoencoderDCT(ModelMixin, ConfigMixin):
    """The block DCT codec with the face of a diffusers autoencoder (FLUX's 16 channels and eightfold reduction)."""

    temperal_downsample = (False, True, True)  # its length tells Qwen-Image's pipeline the reduction, 2 ** 3

    @register_to_config
    def __init__(
        self,
        latent_channels: int = CHANNELS,
        block_out_channels: tuple[int, ...] = (1, 1, 1, 1),  # its length tells pipelines the reduction, 2 ** (4 - 1)
        scaling_factor: float = SCALE,
        shift_factor: float = SHIFT,
    ) -> None:
        super().__init__()
        codec = BlockDCT()
        self.mean, self.std = torch.nn.Parameter(codec.mean), torch.nn.Parameter(codec.std)

    @property
    def codec(self) -> BlockDCT:
        return BlockDCT(self.mean.detach(), self.std.detach()).to(self.mean.device)

    def encode(self, pixels: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[_Posterior]:
        posterior = _Posterior(self.codec.encode(pixels))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, latents: Tensor, return_dict: bool = True, **_) -> DecoderOutput | tuple[Tensor]:
        pixels = self.codec.decode(latents)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)


def make_transformer(heads: int = HEADS, double: int = DOUBLE, single: int = SINGLE) -> FluxTransformer2DModel:
    """A FLUX transformer of a tiny geometry, randomly initialised. ComfyUI knows FLUX by axes of 16, 56 and 56."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=128,
        num_attention_heads=heads,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )


def make_tokenizer(clip: bool) -> PreTrainedTokenizerFast:
    """One token a word, lower case. T5's ends with EOS; CLIP's also begins with BOS and pads with EOS, as FLUX's do."""
    words = [PAD, EOS, UNKNOWN, MASK, BOS, *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    specials = [(token, words.index(token)) for token in (BOS, EOS)]
    template = f"{BOS} $A {EOS}" if clip else f"$A {EOS}"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=EOS if clip else PAD,
        eos_token=EOS,
        bos_token=BOS if clip else None,
        unk_token=UNKNOWN,
        model_max_length=TEXT_LENGTH,
    )


def make_text_encoders() -> tuple[CLIPTextModel, T5EncoderModel]:
    """CLIP and T5 encoders of two layers, width 64, randomly initialised."""
    words = [PAD, EOS, UNKNOWN, MASK, BOS, *vocabulary()]
    clip = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=words.index(BOS),
        eos_token_id=words.index(EOS),
        pad_token_id=words.index(EOS),
    )
    t5 = T5Config(
        vocab_size=len(words),
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // 2,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",  # T5 1.1, as in FLUX
        dropout_rate=0.0,
        pad_token_id=words.index(PAD),
        eos_token_id=words.index(EOS),
        is_encoder_decoder=False,
    )
    return CLIPTextModel(clip).eval(), T5EncoderModel(t5).eval()


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's schedule with the shift that ComfyUI uses at every size."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=TIME_SHIFT, max_shift=TIME_SHIFT)


def load_pipeline(folder: Path = WEIGHTS, dtype: torch.dtype = torch.float32) -> FluxPipeline:
    """The tiny world's pipeline on CPU, all parts in `dtype`. OSError names the missing file, if one is."""
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler"),
        vae=AutoencoderDCT.from_pretrained(folder, subfolder="vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder, subfolder="tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(folder, subfolder="text_encoder_2", dtype=dtype),
        tokenizer_2=PreTrainedTokenizerFast.from_pretrained(folder, subfolder="tokenizer_2"),
        transformer=FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=dtype),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encode(pipeline: FluxPipeline, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """T5's hidden states [B, TEXT_LENGTH, 64] and CLIP's pooled vectors [B, 64] of some texts."""
    with torch.no_grad():
        hidden, pooled, _ = pipeline.encode_prompt(list(texts), None, max_sequence_length=TEXT_LENGTH)
    return hidden, pooled


def start_noise(seeds: Iterable[int]) -> Tensor:
    """Pure noise [B, 16, 12, 12], one generator a seed, so that a picture does not depend on its batch."""
    side = SIZE // 8
    return torch.stack([torch.randn(CHANNELS, side, side, generator=torch.Generator().manual_seed(s)) for s in seeds])


@torch.no_grad()
def generate(
    pipeline: FluxPipeline,
    texts: Sequence[str],
    seeds: Sequence[int],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch: int = 32,
    progress: Callable[[int], object] | None = None,
    t5_texts: Sequence[str] | None = None,
    encoded: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Pictures [n, 3, 96, 96] in [-1, 1] of n texts with n seeds.

    `t5_texts`: what T5 reads, where that is not what CLIP reads; `encoded`: what `encode` made of the texts, or
    something in its place. `progress` is told the size of each finished batch.
    """
    pictures = []
    for first in range(0, len(texts), batch):
        some = slice(first, first + batch)
        noise = start_noise(seeds[some])
        asked = {"prompt": list(texts[some]), "prompt_2": list((t5_texts or texts)[some])}
        if encoded is not None:
            asked = {"prompt_embeds": encoded[0][some], "pooled_prompt_embeds": encoded[1][some]}
        result = pipeline(
            **asked,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=pipeline._pack_latents(noise, *noise.shape).to(pipeline.transformer.dtype),
            height=SIZE,
            width=SIZE,
            max_sequence_length=TEXT_LENGTH,
            output_type="latent",
        ).images
        pictures.append(decode(pipeline, result))
        if progress:
            progress(len(noise))
    return torch.cat(pictures)


def decode(pipeline: FluxPipeline, tokens: Tensor) -> Tensor:
    """Pictures [B, 3, 96, 96] in [-1, 1] from packed latents [B, 36, 64]."""
    latents = pipeline._unpack_latents(tokens.float(), SIZE, SIZE, pipeline.vae_scale_factor)
    return pipeline.vae.decode(latents / SCALE + SHIFT).sample.clamp(-1, 1)
