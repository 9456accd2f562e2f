"""Fixtures of the tests that sign pictures: the tiny world, keys, ComfyUI's own sampler, SafeRoPE Save Image."""

import pytest
import torch
from typer.testing import CliRunner

PROMPT = "a red star in the center on a white background"
RAN = {"1": {"class_type": "SafeRoPE_TinyWorld", "inputs": {}}}  # the workflow that the node is told of


@pytest.fixture(scope="module")
def world(node_classes):
    return node_classes["SafeRoPE_TinyWorld"].execute().args


@pytest.fixture(scope="module")
def star(node_classes):
    return node_classes["SafeRoPE_LoadConcept"].execute("star.safetensors")[0]


@pytest.fixture
def keys(monkeypatch, tmp_path):
    """A local authority and a signer, as the command makes them."""
    from saferope.cli import app

    monkeypatch.setenv("SAFEROPE_KEYS", str(tmp_path / "keys"))
    assert CliRunner().invoke(app, ["keys", "init", "--name", "a test"]).exit_code == 0
    return tmp_path / "keys"


@pytest.fixture
def sampled(world):
    """sampled(model, latent) -> ComfyUI's own KSampler's LATENT."""
    import nodes

    def run(model, start=None, denoise=1.0, cfg=1.0, batch=1, steps=2):
        conditioning = world[1].encode_from_tokens_scheduled(world[1].tokenize(PROMPT))
        start = {"samples": torch.zeros(batch, 16, 12, 12)} if start is None else start
        with torch.inference_mode():
            args = (model, 3, steps, cfg, "euler", "simple", conditioning, conditioning, start)
            return nodes.common_ksampler(*args, denoise=denoise)[0]

    return run


@pytest.fixture
def save(node_classes, world, tmp_path, monkeypatch):
    """save(latent, recorders, ...) -> the files that the node wrote."""
    import folder_paths
    from comfy_api.latest import io as api

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    hidden = {api.Hidden.prompt: RAN, api.Hidden.extra_pnginfo: {"workflow": {"nodes": []}}}
    node = node_classes["SafeRoPE_SaveImage"].PREPARE_CLASS_CLONE({"hidden_inputs": hidden})

    def run(latent, *recorders, format="PNG", require="full protection", **more):
        named = {f"recorder{number}": each for number, each in enumerate(recorders)}
        with torch.inference_mode():
            out = node.execute(latent, world[2], named, "proof", format, require, **more)
        return [tmp_path / each["filename"] for each in out.ui["images"]]

    return run
