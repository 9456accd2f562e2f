"""A tiny network of random weights for every family, of ComfyUI's own classes, and what is known of its tokens.

Sizes are what ComfyUI's code allows: heads of 128 where it knows a model by them. The numbers of text tokens in the
network are worked out here by hand, from the models' own papers and code, not by asking SafeRoPE.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tests.support.layouts import CPU, latent, prompt

TEXT = 5  # tokens of a prompt

_FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 16,
    "context_in_dim": 32,
    "hidden_size": 256,
    "mlp_ratio": 1.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
_FLUX2 = {
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "axes_dim": [32] * 4,
    "global_modulation": True,
    "mlp_silu_act": True,
    "qkv_bias": False,
    "ops_bias": False,
    "txt_ids_dims": [3],
    "theta": 2000,
    "vec_in_dim": None,
    "patch_size": 1,
}
_CHROMA = {
    **{name: value for name, value in _FLUX.items() if name != "guidance_embed"},
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 256,
    "hidden_dim": 32,
    "n_layers": 1,
    "vec_in_dim": None,
    "depth": 19,  # its modulation vectors are counted for 19 and 38
    "depth_single_blocks": 38,
}
_RADIANCE = {
    "image_model": "chroma_radiance",
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 16,
    "nerf_hidden_size": 8,
    "nerf_mlp_ratio": 1,
    "nerf_depth": 1,
    "nerf_max_freqs": 2,
    "nerf_tile_size": 0,
    "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32,
    "use_x0": False,
    "use_sequential_txt_ids": False,
}
_LONGCAT = {"vec_in_dim": None, "context_in_dim": 3584, "guidance_embed": False, "txt_ids_dims": [1, 2]}
_OVIS = {"vec_in_dim": None, "yak_mlp": True, "txt_norm": True, "guidance_embed": False, "txt_ids_dims": [1, 2]}
_HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": None,
    "axes_dim": [64, 64],
    "patch_size": [1, 1],
    "theta": 256,
    "guidance_embed": False,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
_QWEN = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "num_attention_heads": 2}
_QWEN |= {"joint_attention_dim": 32}
_MAGE = {"image_model": "mage_flow", "in_channels": 128, "num_layers": 2, "num_attention_heads": 2}
_MAGE |= {"joint_attention_dim": 32}
_KREA = {"image_model": "krea2", "features": 512, "tdim": 16, "txtdim": 16, "heads": 4, "kvheads": 2, "multiplier": 1}
_KREA |= {"layers": 2, "txtlayers": 2, "txtheads": 2, "txtkvheads": 2}
_LUMINA = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "cap_feat_dim": 32, "n_layers": 2}
_LUMINA |= {"dim": 384, "n_heads": 4, "n_kv_heads": 2, "n_refiner_layers": 1, "qk_norm": True}
_LUMINA |= {"axes_dims": [32, 32, 32], "multiple_of": 16, "ffn_dim_multiplier": 1.0}
_Z_IMAGE = {"dim": 256, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "rope_theta": 256.0}
_Z_IMAGE |= {"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}
_SD3 = {"in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 16, "qk_norm": "rms"}
_SD3 |= {"context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}}}
_SD3 |= {"num_patches": 64, "pos_embed_max_size": 8, "pos_embed_scaling_factor": None, "out_channels": 16}
_SD3 |= {"x_block_self_attn_layers": [0]}  # as SD3.5 medium: image tokens attend to each other once more


@dataclass(frozen=True)
class Tiny:
    """One family: its classes in comfy.supported_models and comfy.model_base, its sizes, and its tokens."""

    config: str
    base: str
    sizes: dict
    geometry: tuple  # double, single, heads, head dimension, key heads
    width: int = 32  # of the text
    channels: int = 16
    side: int = 8  # rows and columns of the latent
    image: int = 16  # tokens of it, padding included
    text: int = TEXT  # tokens of a prompt in the network, padding included
    frames: bool = False  # latents are [B, C, frames, h, w]
    mask: bool = False  # takes a mask of text tokens
    references: int | None = None  # tokens of a reference picture of half the side; None where it takes none
    more: dict = field(default_factory=dict)  # of the conditioning

    def latent(self, batch: int = 1, seed: int = 3, side: int | None = None) -> torch.Tensor:
        side = side or self.side
        flat = latent(side, side, batch, self.channels, seed)
        return flat[:, :, None] if self.frames else flat

    def prompt(self, seed: int = 0, tokens: int = TEXT, **more):
        return prompt(tokens, seed, self.width, **self.more, **more)


TINY = {
    "flux": Tiny("Flux", "Flux", _FLUX, (1, 2, 2, 128, 2), references=4),
    "flux2": Tiny("Flux2", "Flux2", _FLUX | _FLUX2, (1, 2, 2, 128, 2), channels=128, side=4, text=512, references=4),
    "chroma": Tiny("Chroma", "Chroma", _CHROMA, (19, 38, 2, 128, 2)),
    "chroma-radiance": Tiny(
        "ChromaRadiance",
        "ChromaRadiance",
        _CHROMA | _RADIANCE,
        (19, 38, 2, 128, 2),
        channels=3,
        side=32,
        image=4,
    ),
    "longcat-image": Tiny("LongCatImage", "LongCatImage", _FLUX | _LONGCAT, (1, 2, 2, 128, 2), 3584, references=4),
    "ovis-image": Tiny("Flux", "Flux", _FLUX | _OVIS, (1, 2, 2, 128, 2), references=4),
    "hunyuan-image": Tiny(
        "HunyuanImage21",
        "HunyuanImage21",
        {name: value for name, value in (_FLUX | _HUNYUAN).items() if name != "txt_ids_dims"},
        (1, 2, 2, 128, 2),
        channels=64,
        side=4,
        mask=True,
    ),
    "qwen-image": Tiny("QwenImage", "QwenImage", _QWEN, (2, 0, 2, 128, 2), frames=True, mask=True, references=4),
    "mage-flow": Tiny("MageFlow", "MageFlow", _MAGE, (2, 0, 2, 128, 2), channels=128, side=4, mask=True, references=4),
    "krea2": Tiny("Krea2", "Krea2", _KREA, (0, 2, 4, 128, 2), frames=True, references=4),
    "z-image": Tiny("ZImage", "Lumina2", _LUMINA | _Z_IMAGE, (0, 2, 2, 128, 2), text=32, image=32),
    "lumina2": Tiny("Lumina2", "Lumina2", _LUMINA, (0, 2, 4, 96, 2)),
    "sd3": Tiny("SD3", "SD3", _SD3, (2, 0, 2, 64, 2)),
}


def make_model(family: str, seed: int = 0):
    """A ModelPatcher of the family's tiny network, as ComfyUI's loaders make it."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models

    tiny = TINY[family]
    config = getattr(comfy.supported_models, tiny.config)(dict(tiny.sizes))
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = comfy.ops.manual_cast
    model = getattr(comfy.model_base, tiny.base)(config, device=CPU)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.startswith("diffusion_model.") and tensor.is_floating_point() and tensor.numel():
                norm = "norm" in name or ".ln_" in name
                value = torch.ones(tensor.shape) if norm else 0.06 * torch.randn(tensor.shape)
                tensor.copy_(value)
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)
