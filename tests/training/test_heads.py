"""The heads of a concept on disk."""

from __future__ import annotations

import csv

import torch

from saferope_core import Ranks, critical_heads, read_heads
from saferope_training.making import extract
from saferope_training.making.heads import load_critical, save_critical, write_table


def test_table_and_tensors_say_what_was_read(model, records, tmp_path):
    statistics = extract.extract(model, records, (1.0,), capacity=200, seed=0)
    table = read_heads(statistics, Ranks(3, image=2), "svd", 0.7, 0.5, "calibrated", 0.99)
    table.critical[1, 0] = False  # else a random model's heads all tell: the subject is one word
    assert table.critical.sum() == table.critical.numel() - 1
    write_table(tmp_path / "heads.csv", table, model.geometry)
    lines = list(csv.DictReader((tmp_path / "heads.csv").open()))
    assert len(lines) == table.critical.numel()
    chosen = critical_heads(table, model.geometry)
    found = [(line["block_type"], int(line["block"]), int(line["head"])) for line in lines if line["critical"] == "1"]
    assert found == [(("double", "single")[kind], block, head) for kind, block, head in chosen.heads.tolist()]
    save_critical(tmp_path / "heads.safetensors", chosen, table.discrimination)
    back, delta = load_critical(tmp_path / "heads.safetensors", model.geometry)
    assert torch.equal(delta, table.discrimination) and back.reach == chosen.reach
    for named, other in ((back.basis, chosen.basis), (back.gate, chosen.gate)):
        assert named.keys() == other.keys() and all(torch.equal(named[name], other[name]) for name in named)
