"""A tiny transformer of random weights of every class of diffusers' that the trainer reaches, with inputs for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch

TEXT, SIDE, BATCH, WIDTH = 5, 2, 2, 24  # tokens of text, image tokens a side, prompts, width of the text
IMAGE = SIDE * SIDE

# By hand from diffusers' source: which norms are whose. Groups: block, role.
_TWO_STREAMS = [
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_([qk])", "double", "text"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_([qk])", "double", "image"),
]
_FLUX = [*_TWO_STREAMS, (r"single_transformer_blocks\.(\d+)\.attn\.norm_([qk])", "single", "both")]
_FLUX3 = [
    (r"txt_mode_blocks\.(\d+)\.attn\.norm_([qk])", "double", "text"),
    (r"mode_blocks\.image\.(\d+)\.attn\.norm_([qk])", "double", "image"),
    _FLUX[2],
]
_KREA = [(r"transformer_blocks\.(\d+)\.attn\.norm_([qk])", "single", "both")]
_Z_IMAGE = [(r"layers\.(\d+)\.attention\.norm_([qk])", "single", "both")]


@dataclass(frozen=True)
class Tiny:
    """A class, its sizes, its inputs, and where its norms stand."""

    name: str
    sizes: dict
    inputs: Callable[[], dict]
    norms: list
    geometry: tuple  # double, single, heads, head dimension, key heads
    text: int = TEXT  # tokens in single blocks, padding included
    image: int = IMAGE
    ends: bool = False  # text behind the picture in single blocks
    heads_first: bool = False

    def make(self, **changes):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(diffusers, self.name)(**self.sizes | changes)
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    torch.nn.init.normal_(parameter, std=0.2)
        return model.eval().requires_grad_(False)

    def places(self, model):
        """(module, kind, block, role, stream) of every norm."""
        for name, module in model.named_modules():
            for pattern, kind, stream in self.norms:
                if found := re.fullmatch(pattern, name):
                    yield module, kind, int(found[1]), found[2], stream


def _random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _ids(axes, sides=True):
    ids = torch.zeros(SIDE, SIDE, axes)
    ids[..., 1] += torch.arange(SIDE)[:, None]
    ids[..., 2] += torch.arange(SIDE)[None]
    return ids.reshape(IMAGE, axes)


def _packed(channels=16, axes=3, **more):
    return lambda: {
        "hidden_states": _random(BATCH, IMAGE, channels),
        "encoder_hidden_states": _random(BATCH, TEXT, WIDTH, seed=2),
        "timestep": torch.full((BATCH,), 0.7),
        "img_ids": _ids(axes),
        "txt_ids": torch.zeros(TEXT, axes),
        "return_dict": False,
        **{name: value() for name, value in more.items()},
    }


def _qwen():
    inputs = _packed()()
    del inputs["img_ids"], inputs["txt_ids"]
    shapes = [[(1, SIDE, SIDE)]] * BATCH
    return inputs | {"img_shapes": shapes, "encoder_hidden_states_mask": torch.ones(BATCH, TEXT, dtype=torch.bool)}


def _krea():
    inputs = _packed()()
    del inputs["img_ids"], inputs["txt_ids"]
    ids = torch.cat([torch.zeros(TEXT, 3), _ids(3)])
    return inputs | {"encoder_hidden_states": _random(BATCH, TEXT, 2, WIDTH, seed=2), "position_ids": ids}


def _hunyuan():
    inputs = _packed()()
    del inputs["img_ids"], inputs["txt_ids"]
    mask = torch.ones(BATCH, TEXT, dtype=torch.bool)
    return inputs | {"hidden_states": _random(BATCH, 16, SIDE, SIDE), "encoder_attention_mask": mask}


def _z_image():
    return {
        "x": list(_random(BATCH, 16, 1, 2 * SIDE, 2 * SIDE)),
        "t": torch.full((BATCH,), 0.7),
        "cap_feats": list(_random(BATCH, TEXT, WIDTH, seed=2)),
        "return_dict": False,
    }


def _sd3():
    inputs = _packed()()
    del inputs["img_ids"], inputs["txt_ids"]
    return inputs | {"hidden_states": _random(BATCH, 4, 2 * SIDE, 2 * SIDE), "pooled_projections": _random(BATCH, 16)}


def _guidance():
    return torch.full((BATCH,), 3.5)


_SIZES = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 16}
_BOTH = _SIZES | {"num_single_layers": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6)}
_FOUR = _BOTH | {"axes_dims_rope": (4, 4, 4, 4)}
_TWO_AND_ONE = (1, 2, 2, 16, 2)

TINY = {
    "flux": Tiny(
        "FluxTransformer2DModel",
        _BOTH | {"pooled_projection_dim": 16, "guidance_embeds": True},
        _packed(pooled_projections=lambda: _random(BATCH, 16), guidance=_guidance),
        _FLUX,
        _TWO_AND_ONE,
    ),
    "flux2": Tiny(
        "Flux2Transformer2DModel",
        _FOUR,
        _packed(axes=4, guidance=_guidance),
        _FLUX,
        _TWO_AND_ONE,
    ),
    "flux3": Tiny("Flux3Transformer2DModel", _FOUR | {"cond_in_channels": 16}, _packed(axes=4), _FLUX3, _TWO_AND_ONE),
    "chroma": Tiny(
        "ChromaTransformer2DModel",
        _BOTH | {"approximator_num_channels": 64, "approximator_hidden_dim": 32, "approximator_layers": 1},
        _packed(),
        _FLUX,
        _TWO_AND_ONE,
    ),
    "longcat-image": Tiny("LongCatImageTransformer2DModel", _BOTH, _packed(), _FLUX, _TWO_AND_ONE),
    "ovis-image": Tiny("OvisImageTransformer2DModel", _BOTH | {"out_channels": 16}, _packed(), _FLUX, _TWO_AND_ONE),
    "hunyuan-image": Tiny(
        "HunyuanImageTransformer2DModel",
        _SIZES
        | {"num_single_layers": 2, "out_channels": 16, "num_refiner_layers": 1, "rope_axes_dim": (8, 8)}
        | {"text_embed_dim": WIDTH},
        _hunyuan,
        _FLUX,
        _TWO_AND_ONE,
        ends=True,
    ),
    "qwen-image": Tiny(
        "QwenImageTransformer2DModel",
        _SIZES | {"num_layers": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6), "out_channels": 4},
        _qwen,
        _TWO_STREAMS,
        (2, 0, 2, 16, 2),
    ),
    "krea2": Tiny(
        "Krea2Transformer2DModel",
        _SIZES
        | {"num_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
        | {"timestep_embed_dim": 16, "text_hidden_dim": WIDTH, "num_text_layers": 2, "text_num_attention_heads": 2}
        | {"text_num_key_value_heads": 2, "text_intermediate_size": 32, "axes_dims_rope": (4, 6, 6)},
        _krea,
        _KREA,
        (0, 2, 4, 16, 2),
    ),
    "z-image": Tiny(
        "ZImageTransformer2DModel",
        {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": WIDTH}
        | {"axes_dims": [4, 6, 6], "axes_lens": [128, 64, 64]},
        _z_image,
        _Z_IMAGE,
        (0, 2, 2, 16, 2),
        text=32,
        image=32,
        ends=True,
    ),
    "sd3": Tiny(
        "SD3Transformer2DModel",
        {"sample_size": 4, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "qk_norm": "rms_norm"}
        | {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": WIDTH}
        | {"caption_projection_dim": 32, "pooled_projection_dim": 16, "dual_attention_layers": (0,)},
        _sd3,
        _TWO_STREAMS,
        (2, 0, 2, 16, 2),
        heads_first=True,
    ),
}
