"""The cost of `saferope audit`, on the largest workflows that it takes: for whole protection, then for any."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

from saferope_benchmark.costs.timing import Row, in_turns, spread
from workflow_lint.file import sorted_out
from workflow_lint.verdict import Required, audit_file

DEEPEST = 12  # 8,192 nodes in 8,191 instances of subgraphs: once more would be beyond 20,000
GOAL = 1.0  # s, of each


def rows(repeats: int) -> Iterator[Row]:
    """Seconds for 1,000 nodes in a row, and for the subgraphs that unfold the furthest. No process is started."""
    forms = {"1,000 nodes": chained(1000), f"{2**DEEPEST * 2:,} nodes in nested subgraphs": nested(DEEPEST)}
    taken = in_turns({name: partial(_asked, form) for name, form in forms.items()}, repeats)
    for name, each in taken.items():
        yield Row(f"saferope audit, {name}", median(each), "s", GOAL, spread=spread(each))


def _asked(workflow: dict[str, Any]) -> None:
    for full in (True, False):
        audit_file(sorted_out(workflow), Required(full=full))


def chained(count: int) -> dict[str, Any]:
    """In API form: a loader, LoRAs in a row, and a sampler."""
    lora = {
        str(key): {"class_type": "LoraLoader", "inputs": {"model": [str(key - 1), 0]}} for key in range(1, count - 1)
    }
    sampler = {"class_type": "KSampler", "inputs": {"model": [str(count - 2), 0]}}
    return {"0": {"class_type": "UNETLoader", "inputs": {}}} | lora | {str(count - 1): sampler}


def nested(depth: int) -> dict[str, Any]:
    """In the editor's form, between a loader and a sampler: subgraphs of two subgraphs each, and LoRAs in the last."""
    names = [f"00000000-0000-4000-8000-{number:012d}" for number in range(depth)]
    inside = [
        {
            "id": name,
            "inputs": [{"name": "model", "linkIds": [1]}],
            "outputs": [{"name": "model", "linkIds": [3]}],
            **_in_a_row([-10, 1, 2, -20], {1: below, 2: below}),
        }
        for name, below in zip(names, [*names[1:], "LoraLoader"], strict=True)
    ]
    workflow = _in_a_row([1, 2, 3], {1: "UNETLoader", 2: names[0], 3: "KSampler"})
    return workflow | {"definitions": {"subgraphs": inside}}


def _in_a_row(keys: list[int], kinds: dict[int, str]) -> dict[str, Any]:
    """Nodes that each take the model of the one before; link n leads from the n-th to the next."""
    links = [
        {"id": number, "origin_id": source, "origin_slot": 0, "target_id": target, "target_slot": 0, "type": "MODEL"}
        for number, (source, target) in enumerate(pairwise(keys), 1)
    ]
    into = {link["target_id"]: link["id"] for link in links}
    nodes = [
        {"id": key, "type": kind, "inputs": [{"name": "model", "link": into[key]}] if key in into else []}
        for key, kind in kinds.items()
    ]
    return {"nodes": nodes, "links": links}
