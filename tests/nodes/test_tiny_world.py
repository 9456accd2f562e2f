"""The embedded model as ComfyUI's MODEL, CLIP and VAE: equal to the diffusers pipeline it was trained in."""

import importlib

import pytest
import torch

from tinyworld.codec import load_codec
from tinyworld.model import WEIGHTS, encode, load_pipeline

pytestmark = pytest.mark.host

TEXTS = (
    "a red star in the center on a white background",
    "",
    "A Red STAR, in the center!",
    "an unheardof star",
    "a red star and a blue star and a green star and a pink star and a yellow star and a gray star",  # cut at 24
)


@pytest.fixture(scope="session")
def outputs(node_classes):
    return node_classes["SafeRoPE_TinyWorld"].execute()


@pytest.fixture(scope="session")
def pipeline():
    return load_pipeline()


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_encoded_as_the_pipeline_does(outputs, pipeline, text):
    clip = outputs[1]
    [[hidden, extra]] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    expected = encode(pipeline, [text])
    torch.testing.assert_close(hidden, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(extra["pooled_output"], expected[1], atol=1e-5, rtol=1e-5)
    other = encode(pipeline, ["a blue circle"])
    assert (hidden - other[0]).abs().max() > 0.1 and (extra["pooled_output"] - other[1]).abs().max() > 0.1


def test_clones_of_the_clip_encode_alike(outputs):
    clip = outputs[1]
    first, second = (c.encode_from_tokens_scheduled(c.tokenize(TEXTS[0]))[0][0] for c in (clip, clip.clone()))
    assert torch.equal(first, second)


def test_the_vae_is_the_codec(outputs):
    vae, codec = outputs[2], load_codec(WEIGHTS / "vae")
    latents = 3 * torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = ((codec.decode(latents) + 1) / 2).clamp(0, 1).movedim(1, -1)
    pixels = vae.decode(latents)
    assert pixels.shape == (2, 32, 48, 3)
    torch.testing.assert_close(pixels, expected)
    torch.testing.assert_close(vae.decode_tiled(latents, tile_x=16, tile_y=16, overlap=4), expected)
    assert ((pixels == 0) | (pixels == 1)).any()  # the clamp had something to do
    torch.testing.assert_close(vae.encode(pixels), codec.encode(pixels.movedim(-1, 1) * 2 - 1))


def test_the_vae_inverts_itself_and_crops(outputs):
    vae = outputs[2]
    smooth = torch.linspace(0.2, 0.8, 36)[None, :, None, None].expand(1, 36, 50, 4)  # with an alpha channel
    again = vae.decode(vae.encode(smooth))
    assert again.shape == (1, 32, 48, 3)
    assert (again - smooth[:, :32, :48, :3]).abs().max() < 0.02


def test_the_stock_loader_takes_the_transformer_for_flux(comfy, pack):
    import comfy.ldm.flux.model
    import comfy.model_base
    import comfy.sd

    model = comfy.sd.load_diffusion_model(str(WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors"))
    assert isinstance(model.model.diffusion_model, comfy.ldm.flux.model.Flux)
    assert model.model.model_type is comfy.model_base.ModelType.FLUX
    assert model.get_model_object("model_sampling").shift == 1.15
    geometry = importlib.import_module(f"{pack.__name__}.nodes.host.network").flux_geometry(model)
    assert geometry.describe() == "flux: 2 double + 4 single blocks x 2 heads x 128"


def test_missing_weights_are_named(pack, node_classes, tmp_path, monkeypatch):
    module = importlib.import_module(f"{pack.__name__}.nodes.tiny_world")
    monkeypatch.setattr(module, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"safetensors is missing\. Expected .* Install the pack again"):
        node_classes["SafeRoPE_TinyWorld"].execute()
