"""The kernel for GPUs, compiled for them on a machine that has none; in a process without Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

ROWS = "import json; from saferope_benchmark.costs import compiled; {}; print(json.dumps(list(compiled.rows())))"
# control: 64 tokens of three concepts do not fit into the registers of four warps
LARGE = (
    "from saferope_core.run import fused; fused.TOKENS = {256: 64}; compiled.warps = lambda concepts: 4; "
    "compiled.TARGETS = compiled.TARGETS[:1]"
)


def rows(change: str = "") -> dict[str, dict[str, int]]:
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ROWS.format(change or "0")]
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=True)
    return {row.pop("case"): row for row in json.loads(done.stdout.splitlines()[-1])}


def test_compiles_for_every_target_and_spills_next_to_nothing():
    found = rows()
    assert len(found) == 14 and {"sm_100, 3 concepts", "gfx942, 1 concept"} <= set(found)
    for used in found.values():
        assert used["bytes spilled"] <= 16 and used["bytes of the widest load"] == 16
        assert 0 < used["registers"] <= 256 and 0 < used["bytes of shared memory"] <= 48 * 1024


def test_a_larger_tile_spills():
    assert rows(LARGE)["sm_80, 3 concepts"]["bytes spilled"] > 64
