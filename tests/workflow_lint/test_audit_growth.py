"""`saferope audit` does work in proportion to a workflow, counted in calls of functions: no clock decides."""

from __future__ import annotations

import sys

import pytest

from saferope.audit_cost import chained, nested
from tests.support.workflows import editor, inside, node, protected
from workflow_lint.file import Unreadable, sorted_out
from workflow_lint.verdict import MOST_LOOKED_AT, Required, audit_file

MOST = 2.5  # times the work for twice the size; sets and sorting grow a little faster than their content


def audited(workflow):
    return audit_file(sorted_out(workflow), Required(full=True))


def calls(function, argument):
    """How many functions are called, those of C too."""
    count = 0

    def seen(frame, event, _):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        function(argument)
    finally:
        sys.setprofile(None)
    return count


def merged(count):
    """Merges in a row, each of the last one with itself over two LoRAs: 2^count ways."""
    prompt, last = protected(), "1"
    for key in range(100, 100 + 3 * count, 3):
        prompt |= {str(key + step): node("LoraLoader", model=(last, 0)) for step in (0, 1)}
        prompt[last := str(key + 2)] = node("ModelMergeSimple", model1=(str(key), 0), model2=(str(key + 1), 0))
    prompt["3"]["inputs"]["model"] = [last, 0]
    return prompt


def sampled(count):
    return protected() | {f"s{key}": node("KSampler", model=("3", 0), denoise=1.0) for key in range(count)}


def wide(count):
    """One merge of many models: ComfyUI takes two, a file may hold any number."""
    loaders = {f"m{key}": node("UNETLoader") for key in range(count)}
    merge = node("ModelMergeSimple", model1=("1", 0), **{f"model1.{key}": (key, 0) for key in loaders})
    return protected(model=("7", 0)) | loaders | {"7": merge}


def shown(count):
    """A subgraph of many Load Concepts, all of whose strengths its instance shows."""
    loads = {str(key): node("SafeRoPE_LoadConcept", strength=1.0) for key in range(100, 100 + count)}
    workflow = inside(editor(protected() | loads))
    workflow["nodes"][0]["properties"] = {"proxyWidgets": [[key, "strength"] for key in loads]}
    return workflow


@pytest.mark.parametrize(
    ("make", "size", "twice"),
    [
        (chained, 500, 1000),
        (nested, 7, 8),
        (merged, 100, 200),
        (sampled, 90, 180),
        (wide, 500, 1000),
        (shown, 200, 400),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_twice_the_workflow_is_twice_the_work(make, size, twice):
    audited(make(size))  # what is kept from the first call on is not counted
    assert calls(audited, make(twice)) < MOST * calls(audited, make(size))


def test_a_quadratic_walk_would_be_seen():
    def every_pair(count):
        return [abs(a - b) for a in range(count) for b in range(count)]

    assert calls(every_pair, 200) > MOST * calls(every_pair, 100)


def test_more_samplers_than_can_be_looked_at_are_refused():
    assert audited(sampled(MOST_LOOKED_AT - 2)).protected
    with pytest.raises(Unreadable, match="too many to look at"):
        audited(sampled(MOST_LOOKED_AT - 1))


def test_what_the_benchmark_times_is_what_it_says():
    assert len(audited(chained(1000)).graph.nodes) == 1000
    found = audited(nested(5))
    assert len(found.graph.nodes) == 2 + 2**5 and not found.protected
    assert found.samplers[0].failures[0][1] == list(found.graph.nodes), "one way through all of them"
