"""The bench: it runs, says what it could not, and judges by its targets."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from saferope_core import Protection
from training import cli
from training.bench import report, rotation
from training.bench.peak import peak_of
from training.bench.timing import Row, in_turns, ratio


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


def test_peak_counts_what_is_allocated():
    size = 2**20
    assert size <= peak_of(lambda: torch.empty(size, dtype=torch.uint8)) < 2 * size
    assert peak_of(lambda: [torch.empty(size, dtype=torch.uint8) for _ in range(3)]) >= 3 * size


def test_bench_writes_its_report(monkeypatch, small, tmp_path):
    monkeypatch.setattr("training.bench.work.start_rows", lambda *_: [])
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
