"""What we ship passes what we ship: every workflow of this pack with its verdict, and the rule for blueprints."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from workflow_lint.file import Unreadable, sorted_out
from workflow_lint.verdict import Required, audit_file

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path for folder in ("example_workflows", "subgraphs") for path in (ROOT / folder).glob("*.json"))
COMPARING = {"SafeRoPE several concepts": "12", "SafeRoPE tiny world": "8"}  # by name: the sampler without protection
MAKING = {"SafeRoPE make a concept for your FLUX", "SafeRoPE make a concept, tiny world"}  # no sampler is in them
BLUEPRINT = ROOT / "subgraphs" / "Safe FLUX sampler.json"
WHOLE = Required(full=True)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def audited(workflow, required=WHOLE):
    return audit_file(sorted_out(copy.deepcopy(workflow)), required)


def unprotected(workflow):
    return [sampler.node for sampler in audited(workflow).samplers if not sampler.protected]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_workflow_has_its_verdict(path):
    workflow, bare = read(path), COMPARING.get(path.stem)
    if path.stem in MAKING:
        assert audited(workflow).samplers == [] and not audited(workflow).protected
        return
    assert unprotected(workflow) == ([bare] if bare else []) and audited(workflow).protected == (bare is None)
    if bare:
        notes = [str(node["widgets_values"]) for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
        assert any("saferope audit" in note and f"**{bare}**" in note for note in notes), "the workflow says so itself"
        next(node for node in workflow["nodes"] if str(node["id"]) == bare)["mode"] = 2
        assert audited(workflow).protected, "as its note says"


def apply_of(workflow):
    return next(node for node in inner(workflow)["nodes"] if node["type"] == "SafeRoPE_Apply")


def inner(workflow):
    return workflow["definitions"]["subgraphs"][0]


def put_somewhere(workflow):
    workflow["nodes"].append({"id": 2, "type": "VAELoader", "mode": 0, "inputs": [], "outputs": []})


def bypass(workflow):
    apply_of(workflow)["mode"] = 4


def switch_off(workflow):
    apply_of(workflow)["widgets_values"][0] = 0.0


def around(workflow):
    """The sampler's model straight from the blueprint's input."""
    sampler = next(node for node in inner(workflow)["nodes"] if node["type"] == "KSampler")
    link = next(each for each in inner(workflow)["links"] if each["id"] == sampler["inputs"][0]["link"])
    link["origin_id"], link["origin_slot"] = -10, 0


def strange(workflow):
    apply_of(workflow)["type"] = "SafeRoPE_Applies"


def muted(workflow):
    workflow["nodes"][0]["mode"] = 2


@pytest.mark.parametrize("change", [put_somewhere, bypass, switch_off, around, strange, muted])
def test_a_blueprint_asks_for_protection_by_its_own_paths_alone(change):
    workflow = read(BLUEPRINT)
    assert any("this is a blueprint" in note for note in audited(workflow).notes)
    change(workflow)
    assert not audited(workflow).protected


def test_a_blueprints_concept_is_pinned_to_nothing():
    assert not audited(read(BLUEPRINT), Required(("0" * 64,))).protected
    assert (
        not audited(read(BLUEPRINT), Required(every_pinned=True)).protected
        and audited(read(BLUEPRINT), Required()).protected
    )


def test_no_file_may_name_the_outside_of_a_blueprint():
    prompt = {
        "1": {"class_type": "outside of the blueprint, node", "inputs": {}},
        "2": {"class_type": "SafeRoPE_Apply", "inputs": {"model": ["1", 0], "concept": ["1", 1], "strength": 1.0}},
        "3": {"class_type": "KSampler", "inputs": {"model": ["2", 0]}},
    }
    node = {"id": 1, "type": "outside of the blueprint, node", "inputs": [], "outputs": []}
    for forged in (prompt, {"nodes": [node], "links": []}):
        with pytest.raises(Unreadable, match="expected"):
            audited(forged)
