"""The kernel for GPUs, through Triton's interpreter: tiles, what it tells, and torch.compile."""

from __future__ import annotations

import pytest
import torch

from saferope_core import Geometry, Protection
from saferope_core.run.forms import turn_exact
from saferope_core.run.fused import TOKENS, turn_fused
from saferope_core.run.packed import packed
from saferope_core.run.plain import turn_plain

GEOMETRY = Geometry(double_blocks=1, single_blocks=1, heads=2, head_dim=32)
LENGTH = TOKENS[256] + 6  # a whole tile and a part of one


@pytest.fixture
def plan(make_concept):
    """Of two concepts, of which one turns one head, at strengths of which one is above 1 and one below 0."""
    first = make_concept(heads=[(1, 0, 0), (1, 0, 1)], geometry=GEOMETRY)
    second = make_concept("zappy", rank=8, heads=[(1, 0, 1)], geometry=GEOMETRY, threshold=0.25)
    guard = Protection([first, second], GEOMETRY, strengths=[3.0, -0.5])
    return guard._plans_for("dense", torch.empty(0))[1, "q", "text"]


def both(plan, x):
    """What the kernel and the exact form make of x; what the kernel counts and tells; what the plain form
    finds above its gates."""
    ready = packed(plan, GEOMETRY.heads, x.dtype, x.device)
    fused, other = x.clone(), x.clone()
    counts, passed = torch.ones(2, len(x), x.shape[2]), torch.empty(len(x), 2, x.shape[2], 2, dtype=torch.uint8)
    turn_fused(fused, ready, counts, passed)
    return (
        fused,
        turn_exact("dense", x, x, plan, (0, x.shape[2]), None, False),
        (counts, passed),
        torch.stack(turn_plain(other, ready)),
    )


def test_tiles_strengths_and_what_it_tells(plan):
    x = torch.randn(2, 2, LENGTH, 32)
    x[0, 0, 5] = 0.0
    fused, exact, (counts, passed), plain = both(plan, x)
    torch.testing.assert_close(fused, exact, rtol=0, atol=1e-5)
    assert torch.equal(passed != 0, plain > 0) and passed.max() == 1
    assert torch.equal(counts - 1, (plain > 0).float().sum(1).movedim(-1, 0)), "added to what was there"
    assert torch.equal((fused != x).any(-1), passed.any(-1))
    assert (fused != x).any(-1)[:, :, -6:].any() and not (fused != x).any(-1).all(), "control: some turn, not all"


@pytest.mark.parametrize(("most", "powers"), [(3.142, True), (12.0, True), (20.0, False)])
@pytest.mark.parametrize("sign", [1, -1])
def test_plain_turns_by_more_than_a_turn(make_concept, most, powers, sign):
    """An angle a hair above half a turn, as trained planes have, is not its negative; nor is one of several turns."""
    a = torch.zeros(1, 4, 4)
    a[0, 1, 0], a[0, 0, 1] = most, -most
    concept = make_concept(rank=4, heads=[(1, 0, 0)], geometry=GEOMETRY, generator_text=a)
    guard = Protection([concept], GEOMETRY, strengths=[sign])
    plan, x = guard._plans_for("dense", torch.empty(0))[1, "q", "text"], torch.randn(1, 2, LENGTH, 32)
    ready, result = packed(plan, GEOMETRY.heads, x.dtype, x.device), x.clone()
    turn_plain(result, ready)
    exact = turn_exact("dense", x, x, plan, (0, LENGTH), None, False)
    torch.testing.assert_close(result, exact, rtol=0, atol=3e-5)
    assert ready.turn.is_complex() == powers
    wrong = x.clone()
    turn_plain(wrong, ready._replace(turn=ready.turn.conj() if powers else -ready.turn))
    assert (wrong - exact).abs().max() > 0.1, "control: turned the other way"


def test_rows_of_other_tensors_are_left_alone(plan):
    """q and k of a block are slices of one tensor: nothing outside of the slice is written."""
    whole = torch.randn(1, LENGTH + 10, 2, 3 * 32)
    before = whole.clone()
    span = whole[..., 32:64].transpose(1, 2)[:, :, 4 : 4 + LENGTH]
    turn_fused(span, packed(plan, GEOMETRY.heads, whole.dtype, whole.device))
    changed = (whole != before).any(-1)
    assert changed.any() and not changed[:, :4].any() and not changed[:, 4 + LENGTH :].any()
    assert torch.equal(whole[..., :32], before[..., :32]) and torch.equal(whole[..., 64:], before[..., 64:])


def test_torch_compile_does_not_break_the_graph(plan):
    ready = packed(plan, GEOMETRY.heads, torch.float32, torch.device("cpu"))

    def block(x):
        x = 2 * x
        turn_fused(x, ready)
        return x + 1

    x = torch.randn(1, 2, 20, 32)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), block(x)) and not torch.equal(block(x), 2 * x + 1)

    def broken(x):
        torch._dynamo.graph_break()
        return block(x)

    with pytest.raises(torch._dynamo.exc.Unsupported):  # control
        torch.compile(broken, fullgraph=True, backend="eager")(x)
