"""comfy-test's level SYNTAX, its rule of forbidden patterns, for what runs as nodes: devices and types are ComfyUI's.

Elsewhere in the repository we differ; docs/nodes.md says where and why.
"""

from __future__ import annotations

import re

import pytest

from dev.comfyui import ROOT

LAYERS = r"(?<![\w.])(?:torch\.)?nn\.(?:Linear|Conv[123]d|ConvTranspose[12]d|LayerNorm|GroupNorm|Embedding)\s*\("
FORBIDDEN = re.compile(
    r"\.cuda\s*\(|\.to\s*\(\s*(?:torch\.device\s*\(\s*)?[\"']cuda|autocast|torch\.load\s*\(|" + LAYERS
)


@pytest.mark.parametrize("line", ["x.cuda()", 'x.to("cuda:0")', "with torch.autocast(d):", "nn.Linear(1, 2)"])
def test_the_rule_finds(line):
    assert FORBIDDEN.search(line)


def test_nodes_leave_devices_and_types_to_comfyui():
    files = [ROOT / "__init__.py", *sorted((ROOT / "nodes").glob("*.py"))]
    assert len(files) > 5
    found = {file.name: FORBIDDEN.findall(file.read_text(encoding="utf-8")) for file in files}
    assert [name for name, matches in found.items() if matches] == []
