"""Plans in one buffer for each dtype: what comes back is what was put in, and no run packs twice."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_flatten

from saferope_core import Protection
from saferope_core.run import protection
from saferope_core.run.stored import ALIGNED, on_device, stored

CPU = torch.device("cpu")


def test_a_tree_comes_back_equal():
    tree = {
        (0, "q"): [torch.randn(3, 5), (7, torch.arange(4), None)],
        (1, "k"): [torch.zeros(()), (8, torch.randn(0, 2).bfloat16(), True)],
    }
    held = stored(tree)
    assert set(held.buffers) == {torch.float32, torch.int64, torch.bfloat16}, "one copy for each dtype"
    found, form = tree_flatten(on_device(held, CPU))
    expected, same = tree_flatten(tree)
    assert form == same
    for here, there in zip(found, expected, strict=True):
        assert torch.equal(here, there) if isinstance(there, torch.Tensor) else here is there
    starts = {here.storage_offset() % ALIGNED for here in found if isinstance(here, torch.Tensor)}
    assert starts == {0}
    held.buffers[torch.float32].zero_()
    assert not on_device(held, CPU)[0, "q"][0].any(), "control: the numbers come from the buffer"


def test_a_second_run_packs_nothing(make_concept, geometry, monkeypatch):
    monkeypatch.setattr(protection, "form_of", lambda x: "plain")
    made, pack = [], protection.packed
    monkeypatch.setattr(protection, "packed", lambda *args: made.append(1) or pack(*args))
    guard = Protection([make_concept(), make_concept("zappy", rank=8)], geometry)
    x = torch.randn(1, 3, 8, 32)

    def run(dtype=torch.float32):
        result = guard.rotate(x.to(dtype), "q", "single", 1, (0, 4), (4, 8))
        guard.clear()
        return result, len(made)

    first, once = run()
    again, twice = run()
    assert once == twice > 0 and torch.equal(first, again) and not torch.equal(first, x)
    assert run(torch.bfloat16)[1] == 2 * once, "control: another dtype is packed by itself"


def test_apple_gets_no_complex_powers(make_concept, geometry):
    """Plans are packed on the CPU whatever the device, which shall not hide the device's kind."""
    guard = Protection([make_concept()], geometry)
    guard.prepare(CPU, torch.float32)
    kinds = {kind: guard._packed(kind, torch.float32) for kind in ("mps", "cuda")}
    told = {kind: {plan.turn.is_complex() for plan in plans.values()} for kind, plans in kinds.items()}
    assert told == {"mps": {False}, "cuda": {True}}
