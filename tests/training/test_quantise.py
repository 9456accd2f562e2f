"""Quantised bases stay near the full one, stay frozen, and let generators train on top of them.

torchao and GGUF run on any machine; diffusers loads bitsandbytes weights on a GPU only, so of those the configuration
is tested everywhere and the rest where there is a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import gguf
import pytest
import torch
from safetensors.torch import load_file

from saferope_core import BLOCK_TYPES, CriticalHeads
from saferope_training.flux import quantise
from saferope_training.flux.identity import fingerprint, plain_tensors
from saferope_training.flux.loading import config_of, load_model
from saferope_training.flux.models import encode, noise, velocity
from saferope_training.flux.plausible import gains
from saferope_training.making import material, memory, train
from saferope_training.prompts import tiny_world_prompts
from saferope_training.settings import Settings
from tinyworld import model as tiny

SINGLE = tiny.WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors"
ERROR = {"torchao-int8": 0.1, "torchao-float8": 0.1, "gguf": 0.1}  # measured: half or less
if torch.cuda.is_available():
    ERROR |= {"nf4": 0.2, "int8": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder")
    tiny.load_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """The tiny transformer with its matrices in Q8_0."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "flux")
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in load_file(SINGLE).items():
        values = tensor.float().numpy()
        if values.ndim == 2:
            writer.add_tensor(name, gguf.quantize(values, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def load(folder, gguf_file):
    """Loads the tiny world with a kind of quantisation."""

    def loaded(kind: str):
        if kind == "gguf":
            return load_model(str(gguf_file), encoders=str(folder), resolution=96)
        device = "cuda" if kind in ("nf4", "int8") else "cpu"
        return load_model(str(folder), device, quantise=kind, resolution=96)

    return loaded


@pytest.fixture(scope="module")
def wanted(folder):
    return answer(load_model(str(folder), resolution=96))


def answer(model):
    x = noise(model, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return velocity(model, x, torch.full((2,), 0.7), encode(model, ["a red star , center", "a blue circle"]))


@pytest.mark.parametrize("kind", ERROR)
def test_quantised_bases_stay_near_and_frozen(load, wanted, kind):
    model = load(kind)
    error = ((answer(model) - wanted).norm() / wanted.norm()).item()
    assert 1e-3 < error < ERROR[kind], "not the full model, and not another one"
    assert not any(parameter.requires_grad for parameter in model.transformer.parameters())
    held = sum(part.nbytes for value in model.transformer.parameters() for part in plain_tensors(value))
    full = 4 * sum(value.numel() for value in load_file(SINGLE).values())
    assert held < 0.35 * full, "8 bits and less of 32"
    assert fingerprint(model.transformer) == fingerprint(load(kind).transformer)


@pytest.mark.parametrize("kind", [kind for kind in ERROR if kind.startswith("torchao")])
def test_a_single_file_is_quantised_as_a_folder_is(load, folder, kind):
    """It was loaded in full, without a word."""
    single = load_model(str(SINGLE), quantise=kind, encoders=str(folder), resolution=96)
    assert fingerprint(single.transformer) == fingerprint(load(kind).transformer)
    full = load_model(str(SINGLE), encoders=str(folder), resolution=96).transformer
    assert fingerprint(full) != fingerprint(single.transformer), "negative control"
    quantise.require_quantised(single.transformer, kind, "single")
    with pytest.raises(ValueError, match=f"got weights in full, expected them in '{kind}'"):
        quantise.require_quantised(full, kind, "full")


@pytest.mark.parametrize("kind", ERROR)
def test_quantised_layers_have_the_gains_of_full_ones(load, folder, kind):
    full = gains(load_model(str(folder), resolution=96).transformer)
    held = gains(load(kind).transformer)
    assert held == pytest.approx(full, rel=0.1)


def every_head(model, rank: int = 4) -> CriticalHeads:
    g = model.geometry
    places = [(0, b, h) for b in range(g.double_blocks) for h in range(g.heads)]
    places += [(1, b, h) for b in range(g.single_blocks) for h in range(g.heads)]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(places), g.head_dim, rank, generator=generator)
    basis = torch.linalg.qr(drawn).Q
    gate = torch.zeros(len(places))
    assert BLOCK_TYPES == ("double", "single")
    numbers = torch.tensor(places, dtype=torch.int32)
    return CriticalHeads(numbers, {"q": basis, "k": basis}, {"q": gate, "k": gate}, torch.ones(len(places), rank))


@pytest.mark.parametrize("kind", ERROR)
def test_generators_train_on_top(load, kind, tmp_path):
    model = load(kind)
    before = fingerprint(model.transformer)
    settings = Settings(steps=2, phase=1, batch=2, learning_rate=0.05)
    records = tiny_world_prompts("star", 4, 4, seed=0)
    material.make_latents(model, records, (1.0,), 0, tmp_path / "latents.safetensors")
    seen = material.load_material(model, records, (1.0,), tmp_path / "latents.safetensors")
    log = []
    still = train.train(model, every_head(model), seen, replace(settings, learning_rate=0.0))
    moved = train.train(model, every_head(model), seen, settings, log.append)
    assert all(entry["velocity_mse"] > 0 for entry in log)
    assert not torch.equal(still[0], moved[0]) and moved[0].isfinite().all()
    assert fingerprint(model.transformer) == before


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_asks_for_a_gpu(folder, kind):
    with pytest.raises(ValueError, match="got device 'cpu', expected a GPU"):
        load_model(str(folder), quantise=kind)


def test_bitsandbytes_configurations_say_what_they_should():
    four = quantise.quantisation_config("nf4", "cuda", torch.bfloat16)
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("nf4", True)
    assert four.bnb_4bit_compute_dtype == torch.bfloat16 and four.load_in_4bit
    assert quantise.quantisation_config("int8", "cuda", torch.bfloat16).load_in_8bit


def test_unknown_kinds_and_twice_quantised_files_are_refused(folder, gguf_file):
    with pytest.raises(ValueError, match="got 'int3', expected one of nf4"):
        load_model(str(folder), quantise="int3")
    with pytest.raises(ValueError, match="quantised already"):
        load_model(str(gguf_file), encoders=str(folder), quantise="torchao-int8")


@pytest.mark.parametrize("library, kind", [("bitsandbytes", "nf4"), ("torchao", "torchao-int8")])
def test_a_missing_library_is_told(folder, monkeypatch, library, kind):
    monkeypatch.setattr(quantise, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install {library}"):
        load_model(str(folder), quantise=kind)


def test_the_plan_counts_a_gguf_file_as_it_is(folder, gguf_file):
    settings = Settings(model=str(gguf_file), encoders=str(folder), resolution=96)
    weights = memory.plan_for(settings, "cpu", training=False).weights
    assert weights == gguf_file.stat().st_size
    whole = memory.transformer_bytes(config_of(str(gguf_file), str(folder)), None, torch.bfloat16)
    assert weights < 0.7 * whole, "control: as bf16 weights it would be twice as much"
