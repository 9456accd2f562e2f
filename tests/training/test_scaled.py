"""Scaled fp8 is multiplied out or refused by name, no tensor is dropped in silence, and weights of a wrong size are
noticed.
"""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from saferope_training.flux import checkpoint, plausible
from saferope_training.flux.loading import load_model
from saferope_training.flux.models import encode
from tests.support.flux import answer, make_flux
from tinyworld import model as tiny

WEIGHTS = tiny.WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors"
FP8, WIDE = torch.float8_e4m3fn, torch.float8_e5m2
LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def full():
    return load_file(WEIGHTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Encoders, tokenizers, codec of the tiny world."""
    path = tmp_path_factory.mktemp("rest")
    tiny.load_pipeline().save_pretrained(path)
    return path


def quantised(full: dict, dtype=FP8, rows: bool = False) -> tuple[dict, dict]:
    """Matrices of the blocks as scaled files have them, all of fp8's range used; and layer -> scale."""
    values, scales = dict(full), {}
    for name, weight in full.items():
        if weight.ndim == 2 and "transformer_blocks" in name:
            largest = weight.float().abs().amax(1, keepdim=True) if rows else weight.float().abs().amax().reshape(1)
            scale = largest / torch.finfo(dtype).max
            values[name], scales[name.removesuffix(".weight")] = (weight.float() / scale).to(dtype), scale
    return values, scales


def older(full, **choices) -> tuple[dict, dict]:
    """ComfyUI's first spelling."""
    values, scales = quantised(full, **choices)
    values |= {f"{layer}.scale_weight": scale for layer, scale in scales.items()}
    values |= {f"{layer}.scale_input": torch.ones(1) for layer in scales}
    return {**values, "scaled_fp8": torch.zeros(2, dtype=FP8)}, {}


def newer(full, prefix: str = "", form: str = "float8_e4m3fn", **choices) -> tuple[dict, dict]:
    """Its second: a format for every layer."""
    values, scales = quantised(full, **choices)
    conf = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    values |= {f"{layer}.weight_scale": scale for layer, scale in scales.items()}
    values |= {f"{layer}.comfy_quant": conf.clone() for layer in scales}
    return {prefix + name: value for name, value in values.items()}, {}


def header(full, form: str = "float8_e4m3fn") -> tuple[dict, dict]:
    """The same with the formats in the header, beside a VAE, as an all-in-one file has it."""
    values, scales = quantised(full)
    values |= {f"{layer}.weight_scale": scale.reshape(()) for layer, scale in scales.items()}
    values = {f"model.diffusion_model.{name}": value for name, value in values.items()}
    layers = {f"model.diffusion_model.{layer}": {"format": form} for layer in scales}
    return {**values, "vae.conv.weight": torch.zeros(2, 2)}, {"_quantization_metadata": json.dumps({"layers": layers})}


SPELLINGS = {
    "older": lambda full: older(full),
    "older, a scale a row": lambda full: older(full, rows=True),
    "bare": lambda full: ({k: v for k, v in newer(full)[0].items() if not k.endswith("comfy_quant")}, {}),
    "newer": lambda full: newer(full),
    "newer, e5m2": lambda full: newer(full, form="float8_e5m2", dtype=WIDE),
    "newer, prefixed": lambda full: newer(full, "model.diffusion_model."),
    "newer, other prefix": lambda full: newer(full, "diffusion_model."),
    "header": header,
}


def expected(full: dict, spelling: str) -> dict:
    """value x scale, in float64 from the definition, rounded once."""
    values, scales = quantised(full, WIDE if "e5m2" in spelling else FP8, "row" in spelling)
    return {
        name: (value.double() * scales[layer].double()).float()
        if (layer := name.removesuffix(".weight")) in scales
        else value
        for name, value in values.items()
    }


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_scales_are_multiplied_out_exactly(full, spelling, tmp_path):
    values, metadata = SPELLINGS[spelling](full)
    save_file(values, tmp_path / "scaled.safetensors", metadata)
    read = checkpoint.read_weights(tmp_path / "scaled.safetensors", torch.float32)
    wanted = expected(full, spelling)
    assert read.keys() == full.keys()
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    assert checkpoint.read_shapes(tmp_path / "scaled.safetensors") == {k: tuple(v.shape) for k, v in full.items()}
    dropped = values[next(name for name in values if name.endswith(f"{LAYER}.weight"))].float()
    assert dropped.std() > 100 * read[f"{LAYER}.weight"].std(), (
        "negative control: without its scale it is another weight"
    )


@pytest.mark.parametrize("spelling", ["older", "header"])
def test_a_scaled_file_answers_as_the_model_it_was_made_of(full, folder, spelling, tmp_path):
    values, metadata = SPELLINGS[spelling](full)
    save_file(values, tmp_path / "scaled.safetensors", metadata)
    wanted = answer(load_model("tinyworld"))
    found = answer(load_model(str(tmp_path / "scaled.safetensors"), encoders=str(folder), resolution=96))
    assert 1e-3 < (found - wanted).norm() / wanted.norm() < 0.1, "fp8 has 3 bits of mantissa"
    kind = load_model(
        str(tmp_path / "scaled.safetensors"), quantise="torchao-int8", encoders=str(folder), resolution=96
    )
    assert (answer(kind) - wanted).norm() / wanted.norm() < 0.1


def test_weights_without_their_scales_are_noticed(full, folder, tmp_path):
    """What was loaded without a word: the scales are gone, the names are all there."""
    values, _ = quantised(full)
    save_file(values, tmp_path / "lost.safetensors")
    with pytest.raises(ValueError, match=r"got a gain of [\d.,e+]+ in .* expected at most 256; a scale was lost"):
        load_model(str(tmp_path / "lost.safetensors"), encoders=str(folder), resolution=96)


REFUSED = {
    "nvfp4": (lambda f: newer(f, form="nvfp4"), "got weights in 'nvfp4', expected float8_e4m3fn or float8_e5m2"),
    "mxfp8 in the header": (lambda f: header(f, "mxfp8"), "got weights in 'mxfp8'"),
    "no JSON": (
        lambda f: ({**newer(f)[0], f"{LAYER}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, {}),
        "not readable JSON",
    ),
    "numbers": (lambda f: ({**newer(f)[0], f"{LAYER}.comfy_quant": torch.ones(3)}, {}), "not readable JSON"),
    "a number": (lambda f: ({**newer(f)[0], f"{LAYER}.comfy_quant": torch.tensor(9.5)}, {}), "not readable JSON"),
    "a list": (lambda f: (newer(f)[0], {"_quantization_metadata": "[]"}), "not readable JSON"),
    "a scale of scales": (lambda f: ({**newer(f)[0], f"{LAYER}.weight_scale_2": torch.ones(1)}, {}), "weight_scale_2"),
    "smoothing": (lambda f: ({**newer(f)[0], f"{LAYER}.pre_quant_scale": torch.ones(256)}, {}), "pre_quant_scale"),
    "blocks": (
        lambda f: ({**newer(f)[0], f"{LAYER}.weight_scale": torch.ones(256, 8)}, {}),
        "got scales [256, 8] for a weight [256, 256], expected one, or one a row",
    ),
    "columns": (lambda f: ({**newer(f)[0], f"{LAYER}.weight_scale": torch.ones(1, 256)}, {}), "got scales [1, 256]"),
    "not a number": (
        lambda f: ({**newer(f)[0], f"{LAYER}.weight_scale": torch.tensor(math.nan)}, {}),
        "not finite and positive",
    ),
    "zero": (lambda f: ({**newer(f)[0], f"{LAYER}.weight_scale": torch.zeros(1)}, {}), "not finite and positive"),
    "wide": (lambda f: ({**newer(f)[0], f"{LAYER}.weight": f[f"{LAYER}.weight"].float()}, {}), "got torch.float32"),
    "of nothing": (lambda f: ({**newer(f)[0], "nothing.weight_scale": torch.ones(1)}, {}), "got no weight beside it"),
    "twice": (
        lambda f: ({**newer(f)[0], f"{LAYER}.scale_weight": torch.ones(1)}, {}),
        "got torch.float32 [256, 256] beside it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_surely_understood_is_refused(full, folder, case, tmp_path):
    make, words = REFUSED[case]
    values, metadata = make(full)
    save_file(values, tmp_path / "odd.safetensors", metadata)
    with pytest.raises(ValueError) as error:
        load_model(str(tmp_path / "odd.safetensors"), encoders=str(folder), resolution=96)
    assert words in str(error.value) and str(error.value).isprintable()


def test_tensors_that_nobody_reads_are_told(full, folder, tmp_path):
    save_file({**full, "proj_out.lora_A.weight": torch.zeros(4, 4)}, tmp_path / "more.safetensors")
    with pytest.raises(
        ValueError, match=r"'proj_out\.lora_A\.weight' \.\.\., which are no weights .* would be dropped"
    ):
        load_model(str(tmp_path / "more.safetensors"), encoders=str(folder), resolution=96)


def test_prefixed_files_in_diffusers_names_are_read(full, folder, tmp_path):
    wanted = answer(load_model("tinyworld"))
    for prefix in ("model.diffusion_model.", "diffusion_model."):
        save_file({prefix + name: value for name, value in full.items()}, tmp_path / "named.safetensors")
        found = load_model(str(tmp_path / "named.safetensors"), encoders=str(folder), resolution=96)
        assert torch.equal(answer(found), wanted)


@pytest.fixture(scope="module")
def comfyuis_names(comfy):
    """Names and shapes of a FLUX of 1 + 1 blocks and real width as this ComfyUI's own network has them."""
    from comfy.ldm.flux.model import Flux
    from comfy.ops import disable_weight_init

    net = Flux(
        image_model="flux",
        in_channels=16,
        out_channels=16,
        vec_in_dim=768,
        context_in_dim=4096,
        hidden_size=3072,
        mlp_ratio=4.0,
        num_heads=24,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[16, 56, 56],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=True,
        txt_ids_dims=[],
        dtype=torch.bfloat16,
        device="meta",
        operations=disable_weight_init,
    )
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


def small_file(names, path, **more):
    """A file of these names, each with a value or two: only names and their order matter."""
    save_file({**{name: torch.ones(min(2, len(shape))) for name, shape in names.items()}, **more}, path)
    return path


def test_files_that_comfyui_saves_are_read(comfyuis_names, tmp_path):
    """ComfyUI 0.30 saves query_norm.weight for FLUX.1's query_norm.scale."""
    assert any(name.endswith("query_norm.weight") for name in comfyuis_names)
    path = small_file(comfyuis_names, tmp_path / "saved.safetensors")
    renamed = {name.replace("_norm.weight", "_norm.scale"): shape for name, shape in comfyuis_names.items()}
    assert checkpoint.read_weights(path, torch.float32).keys() == checkpoint.read_shapes(path).keys() == renamed.keys()
    config = checkpoint.transformer_config(renamed, "saved")
    assert (config["num_layers"], config["num_single_layers"], config["guidance_embeds"]) == (1, 1, True)
    checkpoint.require_names(config, renamed, "saved")
    with pytest.raises(ValueError, match=r"got tensors without .*query_norm\.scale"):
        checkpoint.require_names(config, comfyuis_names, "negative control: as saved")
    with pytest.raises(ValueError, match=r"'img_in\.alpha' \.\.\., which are no weights"):
        checkpoint.require_names(config, {**renamed, "img_in.alpha": (1,)}, "more")
    with pytest.raises(ValueError, match="got tensors without"):
        checkpoint.require_names(config, {k: v for k, v in renamed.items() if k != "img_in.bias"}, "less")


def test_one_tensor_under_two_names_is_refused(comfyuis_names, tmp_path):
    name = "double_blocks.0.img_attn.norm.query_norm.scale"
    path = small_file(comfyuis_names, tmp_path / "twice.safetensors", **{name: torch.ones(2)})
    with pytest.raises(ValueError, match="the same tensor"):
        checkpoint.read_shapes(path)


def test_names_without_end_make_no_network(full):
    shapes = {name: tuple(value.shape) for name, value in full.items()}
    many = {f"transformer_blocks.{index}.attn.to_q.weight": (1, 1) for index in range(checkpoint.MOST_BLOCKS + 1)}
    with pytest.raises(ValueError, match="more than 152 double blocks"):
        checkpoint.transformer_config({**shapes, **many}, "many")


def test_gains_of_what_is_known_lie_far_inside_the_range():
    pipe = tiny.load_pipeline()
    for network in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, make_flux()):
        found = plausible.gains(network).values()
        assert len(found) > 10
        assert min(found) > 10 * plausible.SMALLEST_GAIN and max(found) < plausible.LARGEST_GAIN / 100
        plausible.require_plausible(network, "known")
    for network in (pipe.vae, torch.nn.Linear(4, 4)):
        plausible.require_plausible(network, "no linear layer, or one")


def test_a_gain_is_the_root_of_the_summed_squares():
    """For x ~ N(0, 1) and W of n columns the RMS of W x is that of W times the root of n; the bias does not count."""
    layer = torch.nn.Linear(512, 1024)
    torch.nn.init.constant_(layer.bias, 1e3)
    (gain,) = plausible.gains(layer).values()
    assert gain == pytest.approx(layer.weight.square().mean().item() ** 0.5 * 512**0.5, rel=0.15)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda w: w * 3884, "expected at most 256"),
        (lambda w: w / 3884, "expected at least"),
        (lambda w: w * math.nan, "got a gain of nan"),
        (lambda w: w.index_fill(0, torch.tensor([3]), math.inf), "expected at most 256"),
    ],
)
def test_weights_of_another_size_are_refused(spoil, words):
    """3,884: the factor of the case that was found."""
    network = make_flux()
    for layer in network.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = spoil(layer.weight.data)
    with pytest.raises(ValueError, match=words):
        plausible.require_plausible(network, "spoilt")


def test_one_layer_of_another_size_is_enough():
    network = make_flux()
    network.transformer_blocks[0].attn.to_k.weight.data *= 3884
    with pytest.raises(
        ValueError, match=r"gain of [\d,]+ in transformer_blocks\.0\.attn\.to_k \(1 of 36 linear layers"
    ):
        plausible.require_plausible(network, "spoilt")
    network.transformer_blocks[0].attn.to_k.weight.data.zero_()
    plausible.require_plausible(network, "a layer may be zero")


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "text_encoder_2"])
def test_every_loader_of_a_folder_looks(folder, part, tmp_path):
    spoilt = shutil.copytree(folder, tmp_path / "spoilt")
    (weights,) = (spoilt / part).glob("*.safetensors")
    values = {key: value * 3884 if value.ndim == 2 else value for key, value in load_file(weights).items()}
    save_file(values, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="expected at most 256"):
        encode(load_model(str(spoilt), resolution=96), ["a red star"])
