"""The bench: it runs, says what it could not, and judges by its targets."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from saferope import cli
from saferope_benchmark.costs import on_gpu, report, rotation, whole
from saferope_benchmark.costs.making import flux_of
from saferope_benchmark.costs.peak import peak_of
from saferope_benchmark.costs.timing import Row, in_turns, ratio
from saferope_core import Protection
from saferope_training.flux.attach import geometry_of
from saferope_training.flux.models import Text, cpu_has_bf16, noise, velocity
from tinyworld.model import TEXT_WIDTH


@pytest.fixture
def small():
    return rotation.Size(resolution=64, heads=2, text=16, dtype=torch.float32)


def test_rows_are_judged_by_their_targets():
    assert Row("a", 1.0, "x", 1.0).met and not Row("a", 1.1, "x", 1.0).met
    assert Row("a", 50, "x", 40, at_least=True).met and Row("a", 50, "x").met is None
    text = report.table([Row("a", 2.0, "ms", 1.0), Row("b", None, "x", 1.01, note="not measured: no GPU here")])
    assert "| a | 2.0 ms |  | ≤ 1 ms | **no** |" in text and "| b | not measured: no GPU here |  | ≤ 1.01 |  |" in text


def test_forms_take_turns():
    order = []
    taken = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3 and {name: len(each) for name, each in taken.items()} == {"a": 2, "b": 2}
    assert ratio([2.0, 6.0], [1.0, 2.0], plus=1.0) == (3.5, 0.25)


def test_the_work_timed_is_what_is_meant(small):
    """About as many tokens turn as a calibrated gate lets through, and the concept's own words do."""
    big = replace(small, resolution=1024)
    concept = rotation.concept_of(big)
    x = rotation.vectors(big, concept)
    turned = (Protection([concept], big.geometry).rotate(x, "q", "single", 0, (0, 16), (16, x.shape[2])) != x).any(-1)
    assert turned[:, :, : rotation.WORD].all() and 0.0005 < turned[:, :, 16:].float().mean() < 0.006


CPUS = {  # machine, oneDNN's answer, capability, AVX512_BF16, AMX -> whether bf16 is multiplied by instructions
    "Cooper Lake, Zen 4": ("x86_64", True, "AVX512", True, False, True),
    "Sapphire Rapids on Windows": ("AMD64", True, "AVX512", False, True, True),
    "Skylake, Cascade Lake, Ice Lake Xeons": ("x86_64", True, "AVX512", False, False, False),
    "AVX2 alone": ("x86_64", False, "AVX2", False, False, False),
    "told to use AVX2": ("x86_64", True, "AVX2", True, False, False),
    "ARM with bf16": ("aarch64", True, "DEFAULT", False, False, True),
    "ARM without": ("aarch64", False, "DEFAULT", False, False, False),
    "a PyTorch that cannot be asked": ("x86_64", True, "AVX512", None, None, False),
    "a PyTorch without oneDNN": ("arm64", None, "DEFAULT", False, False, False),
}


@pytest.fixture
def cpu(request, monkeypatch):
    """The process believes that it runs on this CPU. None: this PyTorch has no such function."""
    machine, onednn, capability, avx512, amx, _ = CPUS[request.param]
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(), raising=False)
    answers = ((torch.ops.mkldnn, "_is_mkldnn_bf16_supported", onednn), (torch.cpu, "_is_amx_tile_supported", amx))
    for owner, name, answer in (*answers, (torch.cpu, "_is_avx512_bf16_supported", avx512)):
        if answer is None:
            monkeypatch.delattr(owner, name, raising=False)
        else:
            monkeypatch.setattr(owner, name, lambda answer=answer: answer, raising=False)
    return request.param


@pytest.mark.parametrize("cpu", CPUS, indirect=True)
def test_bf16_is_used_where_the_cpu_has_it(cpu, model):
    """And nowhere else, by the transformer and in the bench's words. AVX-512 alone is not enough."""
    native = CPUS[cpu][-1]
    assert cpu_has_bf16() == native
    assert f"has {'' if native else 'no '}bf16 instructions" in report.machine()
    used = []
    hook = model.transformer.proj_out.register_forward_hook(lambda _module, _inputs, output: used.append(output.dtype))
    text = Text(torch.zeros(1, model.text_length, TEXT_WIDTH), torch.zeros(1, TEXT_WIDTH))
    with torch.no_grad():
        velocity(model, noise(model, 1, torch.Generator().manual_seed(0)), torch.ones(1), text)
    hook.remove()
    assert used == [torch.bfloat16 if native else torch.float32]


def test_peak_counts_what_is_allocated():
    size = 2**20
    assert size <= peak_of(lambda: torch.empty(size, dtype=torch.uint8)) < 2 * size
    assert peak_of(lambda: [torch.empty(size, dtype=torch.uint8) for _ in range(3)]) >= 3 * size


def test_bench_writes_its_report(monkeypatch, small, tmp_path):
    monkeypatch.setattr("saferope_benchmark.costs.work.start_rows", lambda *_: [])
    monkeypatch.setattr(rotation, "curves", lambda *_: {"rank": [(2, 1.0), (5, 2.0)]})
    options = ["--resolution", "64", "--heads", "1", "--repeats", "1", "--dtype", "float32", "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.app, ["bench", *options])
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"bench.md", "bench.json", "bench.png"}
    rows = {row["what"]: row for row in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    assert rows["concept file, 400 heads, fp16"]["value"] <= 1.1
    assert rows["training step / two forward passes and one backward"]["value"] > 0
    assert "GPU" in rows["the same, compiled"]["note"] and rows["the same, compiled"]["value"] is None
    refused = CliRunner().invoke(cli.app, ["bench", "--dtype", "int4", "--out", str(tmp_path)])
    assert refused.exit_code == 2 and "got 'int4', expected one of" in " ".join(refused.output.split())


def test_every_form_of_a_gpu_is_timed(small, monkeypatch):
    """On tensors of the CPU: what is timed turns the same tokens, whatever the form."""
    monkeypatch.setattr(on_gpu, "CALLS", 1)
    found = {row.what: row for row in on_gpu.rows(small, 1, "cpu", ("plain", "dense"))}
    names = ["block", *(form + case for form in ("plain", "dense") for case in on_gpu.CASES)]
    assert list(found) == names + [f"block and {name} / block" for name in names[1:]]
    assert all(row.value > 0 for row in found.values()) and found["block and plain / block"].value > 1
    turned, turn, tiny = [], on_gpu.turn_packed, replace(small, resolution=16, **rotation.TRAINED)
    monkeypatch.setattr(on_gpu, "turn_packed", lambda *args: turned.append(turn(*args)))
    for form in ("plain", "fused"):
        on_gpu.turning(form, tiny, "cpu")()
    assert len(turned) == 8 and torch.allclose(turned[3], turned[7], atol=1e-4)
    before = rotation.vectors(tiny, rotation.concept_of(tiny))
    assert not torch.allclose(turned[3], before, atol=1e-2), "control"


def test_whole_steps_are_timed(small, monkeypatch):
    """On tensors of the CPU, of one block of each kind; protection there turns something."""
    monkeypatch.setattr(whole, "peak_on", lambda _, run: (run() and 1) or 1)
    found = {row.what: row.value for row in whole.rows(replace(small, resolution=32), 1, (1, 1), "cpu")}
    assert len(found) == 12 and found["protected / unprotected, all heads"] > 0
    tiny = replace(small, resolution=32, **rotation.TRAINED)
    flux = flux_of(tiny, (1, 1))
    guard = whole.protection_of(tiny, geometry_of(flux.transformer))
    seen, real = [], guard.rotate
    monkeypatch.setattr(guard, "rotate", lambda *args, **more: seen.append(real(*args, **more)) or seen[-1])
    with torch.no_grad():
        whole.step(flux, guard)
    assert len(seen) == 6, "q and k of both streams of the double block, and of the single one"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_machine_without_a_gpu_says_so(tmp_path):
    result = CliRunner().invoke(cli.app, ["bench", "--device", "cuda", "--out", str(tmp_path)])
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    assert "got 'cuda', expected a GPU that PyTorch sees" in result.output and "leave --device out" in result.output
    refused = CliRunner().invoke(cli.app, ["bench", "--device", "tpu"])
    assert refused.exit_code == 2 and "got 'tpu', expected one of cpu, cuda" in refused.output
