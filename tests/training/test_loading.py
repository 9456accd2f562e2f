"""One model by many names gives the same velocities; what is no FLUX.1 is told in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from saferope_training.flux import checkpoint, loading, models
from saferope_training.flux.loading import load_model
from saferope_training.flux.models import encode
from saferope_training.flux.quantise import require_library
from tests.support.flux import answer
from tinyworld import model as tiny

DEV_CONFIG = {  # FLUX.1-dev's published geometry
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny world as a diffusers folder, as FLUX.1-dev would be saved."""
    path = tmp_path_factory.mktemp("dev")
    tiny.load_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    """The same without a guidance embedding."""
    path = tmp_path_factory.mktemp("schnell")
    pipe = tiny.load_pipeline()
    weights = {key: value for key, value in pipe.transformer.state_dict().items() if "guidance" not in key}
    config = {**pipe.transformer.config, "guidance_embeds": False}
    pipe.transformer = FluxTransformer2DModel.from_config(config)
    pipe.transformer.load_state_dict(weights)
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def single(folder):
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def test_folder_and_single_files_answer_as_the_embedded_model(folder, single, tmp_path):
    wanted = answer(load_model("tinyworld"))
    assert torch.equal(answer(load_model(str(folder), resolution=96)), wanted)
    assert torch.equal(answer(load_model(str(single), encoders=str(folder), resolution=96)), wanted)
    weights, changed = load_file(single), tmp_path / "changed.safetensors"
    weights["proj_out.bias"] += 0.01
    save_file(weights, changed)
    other = answer(load_model(str(changed), encoders=str(folder), resolution=96))
    assert not torch.equal(other, wanted), "negative control: the file's weights count"


def test_dev_and_schnell_are_told_apart_by_the_transformer(folder, schnell):
    dev, fast = (load_model(str(path), resolution=96) for path in (folder, schnell))
    assert (dev.guidance, dev.steps, dev.text_length) == (3.5, 28, 24)
    assert (fast.guidance, fast.steps, fast.text_length) == (0.0, 4, 24)
    assert loading.SCHNELL.text_length == 256
    weights = schnell / "transformer" / "diffusion_pytorch_model.safetensors"
    alone = load_model(str(weights), encoders=str(schnell), resolution=96)
    assert torch.equal(answer(fast), answer(alone)) and not torch.equal(answer(fast), answer(dev))
    assert torch.equal(answer(fast), answer(fast)) and answer(fast).isfinite().all()


def test_schnell_never_asks_the_hub_for_a_config(schnell, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("asked the hub")

    monkeypatch.setattr("diffusers.loaders.single_file_model.fetch_diffusers_config", refused)
    weights = schnell / "transformer" / "diffusion_pytorch_model.safetensors"
    load_model(str(weights), encoders=str(schnell), resolution=96)


def original_names(config: dict) -> checkpoint.Shapes:
    """Shapes of FLUX.1's own checkpoint layout, written down from its architecture."""
    d, h, text, pooled = 3072, 128, config["joint_attention_dim"], config["pooled_projection_dim"]

    def linear(name, out, into):
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    shapes = linear("img_in", d, 64) | linear("txt_in", d, text) | linear("final_layer.linear", 64, d)
    shapes |= linear("final_layer.adaLN_modulation.1", 2 * d, d)
    embedded = {"time_in": 256, "vector_in": pooled} | ({"guidance_in": 256} if config["guidance_embeds"] else {})
    for name, width in embedded.items():
        shapes |= linear(f"{name}.in_layer", d, width) | linear(f"{name}.out_layer", d, d)
    norms = ("norm.query_norm.scale", "norm.key_norm.scale")
    for block in (f"double_blocks.{i}" for i in range(config["num_layers"])):
        for stream in ("img", "txt"):
            name = f"{block}.{stream}"
            shapes |= linear(f"{name}_mod.lin", 6 * d, d) | linear(f"{name}_attn.qkv", 3 * d, d)
            shapes |= linear(f"{name}_attn.proj", d, d) | {f"{name}_attn.{norm}": (h,) for norm in norms}
            shapes |= linear(f"{name}_mlp.0", 4 * d, d) | linear(f"{name}_mlp.2", d, 4 * d)
    for block in (f"single_blocks.{i}" for i in range(config["num_single_layers"])):
        shapes |= linear(f"{block}.modulation.lin", 3 * d, d) | linear(f"{block}.linear1", 7 * d, d)
        shapes |= linear(f"{block}.linear2", d, 5 * d) | {f"{block}.{norm}": (h,) for norm in norms}
    return shapes


@pytest.mark.parametrize("guidance", [True, False])
def test_original_layout_of_the_real_geometry_fits_diffusers(guidance):
    """diffusers' converter has FLUX.1's width built in, so the tiny world cannot be converted; meta tensors can."""
    wanted = {**DEV_CONFIG, "guidance_embeds": guidance}
    shapes = original_names(wanted)
    config = checkpoint.transformer_config(shapes, "flux")
    assert config == wanted
    with torch.device("meta"):
        empty = {name: torch.empty(shape) for name, shape in shapes.items()}
        model = FluxTransformer2DModel.from_config(config)
    converted = convert_flux_transformer_checkpoint_to_diffusers(dict(empty))
    state = model.state_dict()
    assert {name: value.shape for name, value in converted.items()} == {name: v.shape for name, v in state.items()}
    assert checkpoint.transformer_config({name: tuple(v.shape) for name, v in state.items()}, "flux") == wanted


def test_comfyuis_prefix_is_taken_off(single, tmp_path):
    path = tmp_path / "prefixed.safetensors"
    save_file({f"model.diffusion_model.{key}": value for key, value in load_file(single).items()}, path)
    assert checkpoint.read_shapes(path) == checkpoint.read_shapes(single)


def test_text_encoders_come_only_when_asked(folder):
    model = load_model(str(folder), resolution=96)
    assert model.pipe.text_encoder is None and model.pipe.text_encoder_2 is None
    encode(model, ["a red star"])
    assert model.pipe.text_encoder_2 is not None


def test_lent_encoders_give_the_same_and_stay_away(folder, monkeypatch):
    """A layer is on the device for its own turn alone; who asks for whole encoders gets them."""
    whole, lent = load_model(str(folder), resolution=96), load_model(str(folder), resolution=96)
    wanted = encode(whole, ["a red star"])
    monkeypatch.setattr(models, "lends", lambda device: True)
    for _ in range(2):
        found = encode(lent, ["a red star"])
        assert torch.equal(found.states, wanted.states) and torch.equal(found.pooled, wanted.pooled)
    away = [parameter.is_meta for encoder in models._encoders(lent) for parameter in encoder.parameters()]
    assert all(away) and not any(parameter.is_meta for parameter in whole.pipe.text_encoder_2.parameters())
    assert not any(parameter.is_meta for encoder in models.load_encoders(lent) for parameter in encoder.parameters())
    assert torch.equal(encode(lent, ["a red star"]).states, wanted.states)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def told(error, *words) -> None:
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_what_is_not_there_is_told(offline, tmp_path, single):
    with pytest.raises(ValueError) as error:
        load_model(str(tmp_path / "none"))
    told(error, "no folder with a model_index.json", "hub id")
    with pytest.raises(OSError) as error:
        load_model("nobody/no-such-model")
    told(error, "nobody/no-such-model", "go online", "hf auth login")
    with pytest.raises(ValueError) as error:
        load_model(str(single))
    told(error, "--encoders")
    with pytest.raises(ValueError) as error:
        load_model(str(single), encoders=str(tmp_path))
    told(error, str(tmp_path), "model_index.json")


def test_other_pipelines_and_layouts_are_refused(folder, single, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(ValueError) as error:
        load_model(str(other))
    told(error, "got a 'StableDiffusionXLPipeline'", "expected one of FluxPipeline, ")

    (other / "model_index.json").write_text("{")
    with pytest.raises(ValueError) as error:
        load_model(str(other))
    told(error, "not readable JSON")

    (other / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(other / "vae")
    with pytest.raises(ValueError) as error:
        load_model(str(other))
    told(error, "no folder 'vae'")

    config = other / "transformer" / "config.json"
    shutil.copytree(folder / "vae", other / "vae")
    config.write_text(config.read_text().replace("FluxTransformer2DModel", "SD3Transformer2DModel"))
    with pytest.raises(ValueError) as error:
        load_model(str(other))
    told(error, "got a transformer 'SD3Transformer2DModel'")


def test_broken_and_foreign_files_are_refused(folder, single, tmp_path):
    foreign, cut, pickle = (tmp_path / name for name in ("foreign.safetensors", "cut.safetensors", "model.ckpt"))
    save_file({"conv_in.weight": torch.zeros(4, 4)}, foreign)
    cut.write_bytes(single.read_bytes()[:5000])
    pickle.write_bytes(b"x")
    for path, words in (
        (foreign, ("conv_in.weight", "expected a FLUX.1 transformer")),
        (cut, ("not a readable .safetensors",)),
        (pickle, ("got a .ckpt file", "expected .safetensors or .gguf")),
    ):
        with pytest.raises(ValueError) as error:
            load_model(str(path), encoders=str(folder))
        told(error, *words)

    shapes = checkpoint.read_shapes(single)
    with pytest.raises(ValueError, match="takes a picture besides the prompt"):
        checkpoint.transformer_config({**shapes, "x_embedder.weight": (256, 384)}, "fill")
    narrow = {**original_names(DEV_CONFIG), "img_in.weight": (256, 64)}
    with pytest.raises(ValueError, match="width of 256, expected 3072"):
        checkpoint.transformer_config(narrow, "narrow")


def test_missing_weights_in_a_folder_are_told(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError) as error:
        load_model(str(other))
    told(error, "cannot be loaded")


def test_a_weight_that_is_missing_is_told(folder, single, tmp_path):
    """diffusers would go on without it."""
    other = shutil.copytree(folder, tmp_path / "other")
    part = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({key: value for key, value in load_file(single).items() if key != "proj_out.bias"}, part)
    for name, encoders in ((other, None), (part, str(folder))):
        with pytest.raises(ValueError) as error:
            load_model(str(name), encoders=encoders)
        told(error, "proj_out.bias", "expected all")


@pytest.mark.parametrize("choices", [{"encoders": "x"}, {"resolution": 512}])
def test_the_embedded_model_has_its_own_parts(choices):
    with pytest.raises(ValueError, match="leave both out"):
        load_model("tinyworld", **choices)


def test_resolution_is_a_multiple_of_16(folder):
    with pytest.raises(ValueError, match="multiple of 16"):
        load_model(str(folder), resolution=500)


def test_a_missing_library_says_how_to_get_it():
    with pytest.raises(ValueError, match="pip install no_such_library"):
        require_library("no_such_library", "quantisation 'x'")
