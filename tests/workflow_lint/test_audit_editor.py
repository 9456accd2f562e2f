"""What only the editor's form has: muted and bypassed nodes, reroutes, primitives, groups, subgraphs; ComfyUI's
blueprints.
"""

from __future__ import annotations

import copy
import json

import pytest

from dev.comfyui import find_comfyui
from tests.support.workflows import editor, inside, node, protected
from workflow_lint.file import Unreadable, sorted_out
from workflow_lint.report import as_text
from workflow_lint.verdict import Required, audit_file


def verdict(workflow, required=None):
    return audit_file(sorted_out(json.loads(json.dumps(workflow))), required or Required())


def safe(workflow):
    return verdict(workflow).protected


def entry(workflow, key):
    return next(each for each in workflow["nodes"] if each["id"] == key)


def test_muted_and_bypassed_applies_do_not_act():
    assert safe(editor(protected()))
    assert not safe(editor(protected(), {"3": 2})) and not safe(editor(protected(), {"3": 4}))
    assert "SafeRoPE Apply 3 is muted" in as_text("f", verdict(editor(protected(), {"3": 2})))
    assert "SafeRoPE_Apply 3 (bypassed)" in as_text("f", verdict(editor(protected(), {"3": 4})))


def test_muted_and_bypassed_concepts_do_not_count():
    assert not safe(editor(protected(), {"2": 2})) and not safe(editor(protected(), {"2": 4}))


def test_a_muted_sampler_draws_nothing():
    two = protected() | {"7": node("KSampler", model=("1", 0))}
    assert not safe(editor(two)) and safe(editor(two, {"7": 2})) and safe(editor(two, {"7": 4}))
    assert not safe(editor(two, {"7": 2, "4": 2})), "none is left"


def test_a_bypassed_node_passes_on():
    lora = protected(model=("7", 0)) | {"7": node("LoraLoader", model=("1", 0))}
    assert safe(editor(lora, {"7": 4})) and not safe(editor(lora, {"7": 2}))
    around = lora | {"4": node("KSampler", model=("7", 0))}
    assert not safe(editor(around, {"7": 4}))
    merged = protected() | {
        "7": node("ModelMergeSimple", model1=("3", 0), model2=("1", 0)),
        "4": node("KSampler", model=("7", 0)),
    }
    assert not safe(editor(merged, {"7": 4})), "by the editor's choice it may be the second"


def reroute(workflow, target, slot, count=1):
    """Puts reroutes into the link of an input."""
    number = entry(workflow, target)["inputs"][slot]["link"]
    link = next(each for each in workflow["links"] if each[0] == number)
    for step in range(count):
        new, last = 500 + step, 900 + step
        slots = [{"name": "", "type": "*", "link": last}]
        workflow["nodes"].append(
            {"id": new, "type": "Reroute", "inputs": slots, "outputs": [{"name": "", "type": "MODEL"}]}
        )
        workflow["links"].append([last, link[1], link[2], new, 0, "MODEL"])
        link[1], link[2] = new, 0
    return workflow


@pytest.mark.parametrize("count", [1, 3])
def test_reroutes_are_followed(count):
    assert safe(reroute(editor(protected()), 4, 0, count)) and safe(reroute(editor(protected()), 3, 0, count))
    assert safe(reroute(editor(protected()), 3, 1, count)), "a concept's"
    assert not safe(reroute(editor(protected() | {"4": node("KSampler", model=("1", 0))}), 4, 0, count))
    muted = reroute(editor(protected()), 3, 1, count)
    entry(muted, 500)["mode"] = 2
    assert not safe(muted)


def test_a_circle_of_reroutes_ends():
    workflow = reroute(editor(protected()), 4, 0, 2)
    next(link for link in workflow["links"] if link[0] == 900)[1] = 501
    told = as_text("f", verdict(workflow))
    assert "does not ask for protection" in told


def primitive(values):
    workflow = editor(protected())
    entry(workflow, 3)["inputs"].append(
        {"name": "strength", "type": "FLOAT", "link": 99, "widget": {"name": "strength"}}
    )
    workflow["nodes"].append(
        {"id": 50, "type": "PrimitiveNode", "outputs": [{"name": "FLOAT", "type": "FLOAT"}], "widgets_values": values}
    )
    workflow["links"].append([99, 50, 0, 3, 2, "FLOAT"])
    return workflow


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ([1.0, "fixed"], True),
        ([1.0], True),
        ([0.0, "fixed"], False),
        ([1.0, "randomize"], False),
        ([1.0, "another"], False),
        ([], False),
    ],
)
def test_the_editors_primitive(values, answer):
    assert safe(primitive(values)) is answer


def test_a_primitive_and_the_widget_it_is_linked_to_hold_one_value():
    """Which of them runs depends on lists of links that the editor keeps; it shows and saves one value in both."""
    for widget, value, answer in ((1.0, 1.0, True), (0.0, 1.0, False), (1.0, 0.0, False)):
        workflow = primitive([value, "fixed"])
        entry(workflow, 3)["widgets_values"][0] = widget
        assert safe(workflow) is answer
    entry(workflow := primitive([1.0, "fixed"]), 3)["widgets_values"] = []
    assert not safe(workflow)


def test_a_value_from_a_muted_node_is_not_sure():
    workflow = editor(protected(strength=("7", 0)) | {"7": node("PrimitiveFloat", value=1.0)})
    entry(workflow, 3)["widgets_values"][0] = 1.0
    assert safe(workflow)
    entry(workflow, 7)["mode"] = 2
    assert not safe(workflow) and "strength comes from a muted node" in as_text("f", verdict(workflow))


def test_widgets_are_read_by_position_or_name():
    workflow = editor(protected())
    apply = entry(workflow, 3)
    assert safe(workflow)
    apply["widgets_values"] = [1.0]  # an older file: the rest are defaults
    assert safe(workflow) and verdict(workflow, Required(full=True)).protected
    apply["widgets_values"] = [0.0]
    assert not safe(workflow)
    apply["widgets_values"] = {"strength": 1.0, "end_percent": 0.5}
    assert safe(workflow) and not verdict(workflow, Required(full=True)).protected
    apply["widgets_values"] = [1.0, "as calibrated", 0.7, 0.0, 1.0, "", "both", "all", True]  # with `record`
    assert verdict(workflow, Required(full=True)).protected
    apply["widgets_values"].append("what a later version added")
    assert not safe(workflow)


def test_links_that_do_not_fit_are_not_followed():
    workflow = editor(protected())
    entry(workflow, 4)["inputs"][0]["link"] = 77
    assert not safe(workflow)
    workflow = editor(protected() | {"7": node("KSampler", model=("1", 0))})
    entry(workflow, 7)["inputs"][0]["link"] = entry(workflow, 4)["inputs"][0]["link"]  # Apply's link to another node
    assert not safe(workflow) and "leads elsewhere" not in as_text("f", verdict(editor(protected())))


def test_group_nodes_are_not_looked_into():
    workflow = editor(protected())
    workflow["nodes"].append({"id": 60, "type": "workflow>mine", "inputs": [], "outputs": []})
    assert not safe(workflow) and "a group node" in as_text("f", verdict(workflow))
    entry(workflow, 60)["mode"] = 2
    assert safe(workflow)


@pytest.mark.parametrize("mode", [2, 4])
def test_muted_subgraphs_hold_nothing(mode):
    assert safe(inside(editor(protected())))
    workflow = inside(editor(protected()), mode)
    assert not safe(workflow) and "no sampler was found" in as_text("f", verdict(workflow))
    bad = inside(editor(protected() | {"4": node("KSampler", model=("1", 0))}), mode)
    assert not safe(bad)
    bad["nodes"] += editor(protected())["nodes"]
    bad["links"] = editor(protected())["links"]
    assert safe(bad)


APPLY_INSIDE = {
    "id": "5b7a1d52-0000-4000-8000-00000000000a",
    "inputNode": {"id": -10},
    "outputNode": {"id": -20},
    "inputs": [{"name": "clip", "type": "CLIP", "linkIds": []}, {"name": "model", "type": "MODEL", "linkIds": [1]}],
    "outputs": [{"name": "model", "type": "MODEL", "linkIds": [3]}],
    "nodes": editor(protected())["nodes"][1:3],
    "links": [
        {"id": 1, "origin_id": -10, "origin_slot": 1, "target_id": 3, "target_slot": 0, "type": "MODEL"},
        {"id": 2, "origin_id": 2, "origin_slot": 0, "target_id": 3, "target_slot": 1, "type": "SAFEROPE_CONCEPT"},
        {"id": 3, "origin_id": 3, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "MODEL"},
    ],
}


def through_a_subgraph(mode=0):
    """Loader -> a subgraph that holds concept and Apply -> sampler; the instance's unlinked input is not saved."""
    workflow = editor({"1": node("UNETLoader"), "4": node("KSampler", model=("1", 0))})
    slots = [{"name": "model", "type": "MODEL", "link": 5}]
    outputs = [{"name": "model", "type": "MODEL", "links": [1]}]
    workflow["nodes"].append({"id": 8, "type": APPLY_INSIDE["id"], "mode": mode, "inputs": slots, "outputs": outputs})
    workflow["links"] = [[1, 8, 0, 4, 0, "MODEL"], [5, 1, 0, 8, 0, "MODEL"]]
    workflow["definitions"] = {"subgraphs": [copy.deepcopy(APPLY_INSIDE)]}
    return workflow


def test_an_apply_inside_a_subgraph_protects_what_goes_through():
    workflow = through_a_subgraph()
    assert safe(workflow)
    assert "path: UNETLoader 1 -> SafeRoPE_Apply 8:3 -> KSampler 4" in as_text("f", verdict(workflow))
    assert not safe(through_a_subgraph(2)) and not safe(through_a_subgraph(4))
    inner = workflow["definitions"]["subgraphs"][0]
    inner["nodes"][1]["mode"] = 4
    assert not safe(workflow)
    inner["nodes"][1]["mode"] = 0
    inner["links"][2] |= {"origin_id": -10, "origin_slot": 1}  # straight through
    assert not safe(workflow) and "UNETLoader 1 -> KSampler 4" in as_text("f", verdict(workflow))


def test_a_definition_that_is_missing_hides_what_is_in_it():
    workflow = inside(editor(protected()))
    workflow["nodes"] += editor(protected())["nodes"]
    workflow["links"] = editor(protected())["links"]
    assert safe(workflow)
    workflow["definitions"]["subgraphs"] = []
    assert not safe(workflow) and "whose definition is not in the file" in as_text("f", verdict(workflow))


def test_a_widget_that_the_instance_may_have_changed_is_not_trusted():
    workflow = inside(editor(protected()))
    workflow["nodes"][0]["properties"] = {"proxyWidgets": [["3", "strength"]]}
    assert safe(workflow), "the instance holds no values"
    workflow["nodes"][0]["widgets_values"] = [1.0]
    assert safe(workflow), "the same one"
    workflow["nodes"][0]["widgets_values"] = [0.0]
    assert not safe(workflow)


def test_a_strength_that_comes_through_the_border():
    workflow = through_a_subgraph()
    inner = workflow["definitions"]["subgraphs"][0]
    inner["inputs"].append({"name": "strength", "type": "FLOAT", "linkIds": [4]})
    inner["nodes"][1]["inputs"].append({"name": "strength", "type": "FLOAT", "link": 4, "widget": {"name": "strength"}})
    inner["links"].append(
        {"id": 4, "origin_id": -10, "origin_slot": 2, "target_id": 3, "target_slot": 2, "type": "FLOAT"}
    )
    assert safe(workflow), "nothing linked outside, nothing held: its own value"
    entry(workflow, 8)["widgets_values"] = [0.0]
    assert not safe(workflow)
    for value, answer in ((1.0, True), (0.0, False)):
        linked = copy.deepcopy(workflow)
        linked["nodes"] += editor({"9": node("PrimitiveFloat", value=value)})["nodes"]
        entry(linked, 8)["inputs"].append({"name": "strength", "type": "FLOAT", "link": 6})
        linked["links"].append([6, 9, 0, 8, 1, "FLOAT"])
        assert safe(linked) is answer


@pytest.mark.parametrize("doubled", [False, True])
def test_subgraphs_without_end_are_refused(doubled):
    """One inside itself, and 2^30 of them by doubling."""
    names = [f"5b7a1d52-0000-4000-8000-{number:012d}" for number in range(30)]
    subgraphs = [
        {"id": name, "nodes": [{"id": i, "type": below} for i in range(1 + doubled)], "links": []}
        for name, below in zip(names, names[1:] if doubled else [names[0]], strict=False)
    ]
    with pytest.raises(Unreadable, match="nested more than 32 deep" if not doubled else "more than 20000 nodes"):
        verdict({"nodes": [{"id": 1, "type": names[0]}], "definitions": {"subgraphs": subgraphs}})


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w["nodes"].append(w["nodes"][0]),
        lambda w: w["nodes"].append(w["nodes"][0] | {"id": "1"}),
        lambda w: w["nodes"].append(3),
        lambda w: w["nodes"][0].pop("type"),
        lambda w: w["nodes"][0].update(mode="4"),
        lambda w: w["nodes"][0].update(mode=9),
        lambda w: w["links"].append([1, 2]),
        lambda w: w.update(links={}),
        lambda w: w["nodes"][0].update(inputs=7),
        lambda w: w.update(definitions=[]),
    ],
)
def test_what_the_editor_never_saves_is_refused(change):
    workflow = editor(protected())
    change(workflow)
    with pytest.raises(Unreadable):
        verdict(workflow)


BLUEPRINTS = sorted((find_comfyui() / "blueprints").glob("*.json"))


def guarded(holder, new_id):
    """Puts a concept and an Apply behind every loader of a scope; the number of them."""
    loaders = [
        each
        for each in holder["nodes"]
        if each["type"] in ("UNETLoader", "CheckpointLoaderSimple", "ImageOnlyCheckpointLoader")
    ]
    for loader in loaders:
        apply, load, number = new_id, new_id + 1, new_id + 2
        new_id += 10
        for link in holder["links"]:
            if link["origin_id"] == loader["id"] and link["type"] == "MODEL":
                link |= {"origin_id": apply, "origin_slot": 0}
        made = {each["type"]: each for each in editor(protected())["nodes"]}
        made["SafeRoPE_Apply"] |= {"id": apply}
        made["SafeRoPE_LoadConcept"] |= {"id": load}
        for slot, (source, kind) in enumerate(((loader["id"], "MODEL"), (load, "SAFEROPE_CONCEPT"))):
            made["SafeRoPE_Apply"]["inputs"][slot]["link"] = number + slot
            link = {
                "id": number + slot,
                "origin_id": source,
                "origin_slot": 0,
                "target_id": apply,
                "target_slot": slot,
                "type": kind,
            }
            holder["links"].append(link)
        holder["nodes"] += [made["SafeRoPE_Apply"], made["SafeRoPE_LoadConcept"]]
    return len(loaders)


def test_real_subgraphs_of_comfyui():
    """Every blueprint that samples: not protected as it is, protected with an Apply behind each loader, not with one
    muted.
    """
    assert len(BLUEPRINTS) > 20, "nothing to look at"
    sampling = 0
    for path in BLUEPRINTS:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        found = verdict(workflow)
        assert not found.protected, path.name
        assert not found.opaque or not found.samplers, f"{path.name}: pictures from outside, to nodes that draw nothing"
        if not found.samplers:
            continue
        sampling += 1
        count = sum(guarded(each, 100_000) for each in workflow["definitions"]["subgraphs"])
        assert count and safe(workflow), path.name
        applies = [
            n for each in workflow["definitions"]["subgraphs"] for n in each["nodes"] if n["type"] == "SafeRoPE_Apply"
        ]
        for apply in applies:
            apply["mode"] = 4
        assert not safe(workflow), path.name
    assert sampling > 10
