"""The memory plan: counted from shapes, against what autograd really keeps of the tiny model."""

from __future__ import annotations

import builtins
import io
import os
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from typer.testing import CliRunner

from saferope import cli
from saferope_benchmark.costs.held import Holding
from saferope_training.flux import encoders, loading, models
from saferope_training.flux.attach import attached
from saferope_training.flux.loading import load_model
from saferope_training.flux.models import encode, noise, velocity
from saferope_training.making import heads, memory, recipe
from saferope_training.making.recipe import Recipe
from saferope_training.settings import Settings
from tinyworld.model import WEIGHTS

FLUX_DEV = {
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


def test_weights_are_those_of_the_file():
    size = (WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    counted = memory.transformer_bytes(loading.config_of("tinyworld"), None, torch.bfloat16)
    assert counted == pytest.approx(size, rel=0.01)
    assert memory.transformer_bytes(FLUX_DEV, None, torch.bfloat16) / 1e9 == pytest.approx(23.8, abs=0.1)


@pytest.mark.parametrize("batch", [2, 8])
def test_count_is_what_a_real_pass_keeps(tmp_path, batch, monkeypatch):
    """With the rotation that is trained, on the tiny world's own weights: within 15 %."""
    model = load_model("tinyworld")
    settings = Settings(unsafe_prompts=8, benign_prompts=24)
    Recipe(model, settings, tmp_path).heads()
    critical, _ = heads.load_critical(tmp_path / recipe.CRITICAL, model.geometry)
    from saferope_training.making.train import initial_rotation

    rotation = initial_rotation(critical, model, settings)
    text, x = encode(model, ["a red star , center"] * batch), noise(model, batch, torch.Generator().manual_seed(0))
    monkeypatch.setattr(
        "saferope_training.flux.models._faster_in_fp32", lambda *_: False
    )  # the count is of bf16, as on a GPU
    with memory.counting(memory.storages(model.transformer)) as kept, attached(model.transformer, rotation.rotate):
        velocity(model, x, torch.ones(batch), text)
    config = loading.config_of("tinyworld")
    counted = memory.activation_bytes(config, 24, 36, batch, checkpointing=False)
    assert counted == pytest.approx(kept[0], rel=0.15)
    assert memory.activation_bytes(config, 24, 36, 4 * batch, False) > 2 * counted


ENCODERS, LAYER = 9_770_000_000, 2 * 32128 * 4096  # T5-XXL's encoder and CLIP-L in bf16; the largest is T5's embedding


@pytest.fixture
def flux_dev(monkeypatch, tmp_path):
    """The plan of FLUX.1-dev on a GPU, of which only shapes are known, or of a GGUF file as large as a Q4."""
    file = tmp_path / "flux1-dev-Q4_K_S.gguf"
    with file.open("wb") as sparse:
        sparse.truncate(6_810_000_000)  # as city96 lists it; it takes no room
    monkeypatch.setattr(loading, "config_of", lambda name, encoders: FLUX_DEV)

    def plan(kind: str | None, side: int, training: bool = True, encoders: int = ENCODERS, **changes) -> memory.Plan:
        outline = loading.Outline(512, side, encoders, LAYER, 170_000_000)
        monkeypatch.setattr(loading, "outline", lambda *_: outline)
        model = str(file) if kind == "gguf" else "black-forest-labs/FLUX.1-dev"
        named = {"quantise": None if kind == "gguf" else kind, "passes_of": 1, "checkpointing": True}
        return memory.plan_for(Settings(model=model, **{**named, **changes}), "cuda", training, previews=training)

    return plan


@pytest.mark.parametrize(
    ("kind", "side", "room"),
    [("nf4", 32, 12), ("gguf", 32, 12), ("nf4", 64, 16), ("gguf", 64, 16), ("int8", 32, 24), ("int8", 64, 24)],
)
def test_flux_dev_trains_on_a_consumer_card(flux_dev, kind, side, room):
    """The goals, counted: 16 GiB in NF4, 12 with a Q4 GGUF; checkpointed, a prompt at a time; 512 and 1024 pixels."""
    plan = flux_dev(kind, side)
    assert plan.peak < room * memory.GIB
    assert flux_dev(None, side).peak > 24 * memory.GIB, "negative control: not without quantisation"


@pytest.mark.parametrize("kind", ["nf4", "gguf"])
def test_flux_dev_is_listened_to_on_a_small_card(flux_dev, kind):
    """Extraction at 512 x 512 in NF4 takes 10 GiB. The sums alone are 2 GiB and more."""
    plan = flux_dev(kind, 32, training=False)
    assert plan.peak < {"nf4": 10, "gguf": 11}[kind] * memory.GIB and plan.gathering > 2 * memory.GIB
    many = flux_dev(kind, 32, training=False, passes_of=48)
    assert many.peak > 16 * memory.GIB, "control: 48 at a time"


def test_lent_encoders_weigh_a_layer(flux_dev, monkeypatch):
    plan = flux_dev("nf4", 32)
    assert plan.encoders < 1.2 * memory.GIB
    monkeypatch.setattr(memory, "lends", lambda device: False)
    assert flux_dev("nf4", 32).peak > 16 * memory.GIB, "control: whole, they are the most of all stages"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_t5_makes_of_a_batch_is_bounded(attention):
    """One layer of T5-XXL, run without memory: layers follow each other, and what one made is gone."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 2, "vocab_size": 32128}
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", attn_implementation=attention)
    with FakeTensorMode(), torch.no_grad(), memory._default(torch.bfloat16):
        encoder = T5EncoderModel(config).eval()
        tokens = torch.zeros(models.ENCODE_TOKENS // 512, 512, dtype=torch.long)
        with Holding() as held:
            encoder(tokens)
    assert encoders.MADE / 2 < held.most / tokens.numel() < encoders.MADE


FEW = ["--unsafe-prompts", "6", "--benign-prompts", "8", "--timesteps", "1", "--reservoir", "64"]


@pytest.mark.parametrize("free, warned", [(2**20, True), (2**50, False)])
def test_a_plan_for_more_than_is_free_is_told_and_tried(monkeypatch, tmp_path, free, warned):
    monkeypatch.setattr(memory, "available", lambda device: free)
    result = CliRunner().invoke(cli.app, ["extract", "star", "--out", str(tmp_path), *FEW])
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "transformer, frozen" in told and (tmp_path / recipe.STATISTICS).exists()
    assert ("warning: memory: got 0.0 GiB free on cpu, expected" in told and "Try --quantise" in told) == warned


def test_free_memory_is_read_without_names_that_only_linux_has(monkeypatch):
    """os.sysconf has no SC_AVPHYS_PAGES on macOS, and on Windows is not there."""
    monkeypatch.delattr(os, "sysconf")
    assert 0 < memory.available("cpu") <= psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform != "linux", reason="Linux names both numbers")
def test_cached_files_count_as_free(monkeypatch):
    """MemAvailable, not MemFree: of 8 GiB with 1 free and 6 in caches, 7 can be had."""
    facts = {"MemTotal": 8, "MemFree": 1, "MemAvailable": 7, "Buffers": 0, "Cached": 6, "Shmem": 0}
    facts |= dict.fromkeys(("Active", "Inactive", "Slab", "SReclaimable"), 0)
    lines = b"".join(f"{name}: {size * 2**20} kB\n".encode() for name, size in facts.items())
    real = builtins.open

    def opened(name, *args, **kwargs):
        return io.BytesIO(lines) if name == "/proc/meminfo" else real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", opened)
    assert memory.available("cpu") == 7 * memory.GIB


class Full:
    """A Recipe that needs more bytes than a machine has addresses for."""

    def __init__(self, model, *_, **__) -> None:
        self.prompts = list
        if model is not None:
            torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("what", ["the machine's", "Python's", "a GPU's", "a loader's"])
def test_memory_that_runs_out_is_told_in_words(monkeypatch, tmp_path, what):
    errors = {"Python's": MemoryError(), "a GPU's": torch.cuda.OutOfMemoryError("CUDA out of memory")}
    errors["a loader's"] = ValueError("model 'x': cannot be loaded (CUDA out of memory); fetch it again")
    errors["a loader's"].__cause__ = errors["a GPU's"]

    def recipe_of(model, *_, **__):
        if model is None:
            return SimpleNamespace(prompts=list)
        raise errors[what]

    monkeypatch.setattr(recipe, "Recipe", Full if what == "the machine's" else recipe_of)
    result = CliRunner().invoke(cli.app, ["extract", "star", "--out", str(tmp_path / "out")])
    told = " ".join(result.output.split())
    assert result.exit_code == 2 and "saferope: memory: ran out on cpu" in told, told
    assert "fetch it again" not in told and "Try --quantise" in told and told.count("transformer, frozen") == 2, (
        "the plan, before and in the error"
    )


def test_other_errors_are_no_lack_of_memory(monkeypatch, tmp_path):
    def recipe_of(*_, **__):
        raise RuntimeError("shapes")

    monkeypatch.setattr(recipe, "Recipe", recipe_of)
    result = CliRunner().invoke(cli.app, ["extract", "star", "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, RuntimeError) and str(result.exception) == "shapes"
