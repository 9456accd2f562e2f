"""`saferope audit` on workflows that once passed though they do not protect (seen in ComfyUI 0.30.0), beside honest
twins.

Some were made by hand in the editor, others by somebody who wanted to get through; and some that protect and once
failed.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from tests.support.workflows import PIN, STAR, editor, node, protected
from workflow_lint.file import sorted_out
from workflow_lint.report import as_text
from workflow_lint.verdict import Required, audit_file

CASES = Path(__file__).parents[1] / "files" / "audit"
PLAIN, FULL = Required(), Required(full=True)
STAR_PIN = "7171b39bb6ea4e38984d87edeaab409af7a52e205c07e6519fc9fbfc5106b543"


def case(name):
    return json.loads((CASES / f"{name}.json").read_text(encoding="utf-8"))


def audit(workflow, required=FULL):
    """Whether it counts as protected, and the report."""
    verdict = audit_file(sorted_out(copy.deepcopy(workflow)), required)
    return verdict.protected, as_text("f", verdict)


def entry(workflow, key):
    return next(each for each in workflow["nodes"] if each["id"] == key)


def plain_merge(workflow):
    workflow["7"]["inputs"]["model1"] = ["3", 0]


def not_apart(workflow):
    workflow["8"]["inputs"]["orthogonalise"] = False


def plain_guider(workflow):
    workflow["20"] |= {"class_type": "CFGGuider"}


def whole_denoise(workflow):
    workflow["4"]["inputs"]["denoise"] = 1.0


def same_value(workflow):
    entry(workflow, 7)["widgets_values"][0] = entry(workflow, 51)["widgets_values"][0]


def without_the_odd_sampler(workflow):
    entry(workflow, 8)["mode"] = 2


def shown_as_it_is(workflow):
    entry(workflow, 16)["widgets_values"] = [1]


def known_sampler(workflow):
    workflow["7"]["class_type"] = "KSampler"


def without_the_private_node(workflow):
    workflow["7"]["inputs"]["model"] = ["6", 0]
    del workflow["10"]


def without_the_pipe(workflow):
    if "nodes" in workflow:
        for key in (11, 12):
            if any(each["id"] == key for each in workflow["nodes"]):
                entry(workflow, key)["mode"] = 2
    else:
        workflow.pop("11"), workflow.pop("12", None)


LETS_THROUGH = [
    ("merge_value_api", plain_merge, FULL, "takes a model over a value in a wrapper"),
    ("decoy_orthogonalise_api", not_apart, FULL, "takes concepts apart (orthogonalise)"),
    ("dual_cfg_positive_only_api", plain_guider, PLAIN, "positive only under DualCFGGuider 20"),
    ("denoise_api", whole_denoise, PLAIN, "KSampler 4 may begin after that"),
    ("primitive_editor", same_value, FULL, "holds another value than the widget itself"),
    ("odd_names_editor", without_the_odd_sampler, FULL, "KS<ampler 8: is not known, takes what may be a model"),
    ("nested_editor", shown_as_it_is, FULL, "a widget that the subgraph's instance shows"),
    ("own_loop_api", known_sampler, FULL, "OwnLoopSampler 7: is not known, takes what may be a model"),
    ("private_api", without_the_private_node, FULL, "its model comes by PrivateForward 10, which is not known"),
    ("pipe_api", without_the_pipe, FULL, "easy kSampler 12: is not known, takes what may be a model"),
    ("pipe_editor", without_the_pipe, FULL, "easy kSampler 12: is not known, takes what may be a model"),
    ("own_type_api", without_the_pipe, FULL, "XFuserKSamplerAdvanced 11: is not known, takes what may be a model"),
    ("own_type_editor", without_the_pipe, FULL, "XFuserKSamplerAdvanced 11: is not known, takes what may be a model"),
]


@pytest.mark.parametrize(
    ("name", "make_honest", "required", "reason"), LETS_THROUGH, ids=[row[0] for row in LETS_THROUGH]
)
def test_what_does_not_protect_and_its_honest_twin(name, make_honest, required, reason):
    workflow = case(name)
    for each in {PLAIN, required}:
        safe, told = audit(workflow, each)
        assert not safe and reason in told, told
    make_honest(workflow)
    safe, told = audit(workflow, required)
    assert safe, told


def test_a_decoy_does_not_pass_under_the_pin_of_the_other():
    workflow = case("decoy_orthogonalise_api")
    not_apart(workflow)
    assert not audit(workflow, Required((STAR_PIN,)))[0]
    workflow["3"]["inputs"]["concept"] = ["2", 0]
    assert audit(workflow, Required((STAR_PIN,), full=True))[0]


def test_the_nested_strength_counts_wherever_it_is_0():
    """The outer instance, the inner one, the node itself: which of them runs depends on the editor's version."""
    for places in ([16], [15], [7], [16, 15], [15, 7], [16, 7]):
        workflow = case("nested_editor")
        scopes = [workflow, *workflow["definitions"]["subgraphs"]]
        for scope in scopes:
            for each in scope["nodes"]:
                if each["id"] in (16, 15, 7):
                    each["widgets_values"][0] = 0 if each["id"] in places else 1
        assert not audit(workflow, PLAIN)[0], places


def test_a_subgraphs_output_that_lists_another_link():
    """The editor follows `linkIds`: a link that leads there as well would be read, and another one run."""
    workflow = case("nested_editor")
    shown_as_it_is(workflow)
    inner = workflow["definitions"]["subgraphs"][0]
    inner["outputs"][0]["linkIds"] = [3]
    safe, told = audit(workflow)
    assert not safe and "lists other links" in told


@pytest.mark.parametrize("link", [["1", False], ["1", -3]], ids=str)
def test_links_that_comfyui_follows_and_its_editor_never_writes(link):
    workflow = case("merge_value_api")
    workflow["7"]["inputs"]["model1"] = link
    assert not audit(workflow, PLAIN)[0]


@pytest.mark.parametrize("name", ["florence_api", "lama_api", "depth_api", "upscale_api", "win_api"])
def test_helper_models_raise_no_alarm(name):
    """Captions, masks, depths and sizes; each with an unknown class in its place, that might be a sampler."""
    workflow = case(name)
    safe, told = audit(workflow)
    assert safe, told
    helper = next(key for key, each in workflow.items() if any(name.endswith("_model") for name in each["inputs"]))
    (loader,) = (value[0] for name, value in workflow[helper]["inputs"].items() if name.endswith("_model"))
    for key in (helper, loader):
        workflow[key]["class_type"] = f"Strange{key}"
    safe, told = audit(workflow)
    assert not safe and f"Strange{helper} {helper}: is not known" in told
    assert "put a node of ComfyUI's own and plain links in its place" in told


def test_a_helper_that_is_given_the_model_is_no_way_around():
    """ComfyUI refuses such a link; nothing that comes out of a helper counts as a model."""
    workflow = case("florence_api")
    workflow["4"]["inputs"]["model"] = ["13", 0]
    assert not audit(workflow, PLAIN)[0]


ELSEWHERE = "its links are not in the editor's file: audit the picture, or export the workflow in API form"


def everywhere():
    """Apply's model sent to a sampler without a link to it, as cg-use-everywhere does."""
    workflow = editor(protected() | {"7": node("KSampler", model=("3", 0))})
    entry(workflow, 7)["type"] = "Anything Everywhere"
    entry(workflow, 7)["inputs"][0]["name"] = "anything"
    entry(workflow, 4)["inputs"][0]["link"] = None
    return workflow


@pytest.mark.parametrize(
    ("workflow", "node", "advice"),
    [
        (case("setget_editor"), "SetNode 5", ELSEWHERE),
        (case("setget_editor"), "GetNode 6", ELSEWHERE),
        (everywhere(), "Anything Everywhere 7", ELSEWHERE),
        (case("context_editor"), "Context (rgthree) 5", "put plain links in its place"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_links_that_are_not_in_the_file_bring_advice(workflow, node, advice):
    safe, told = audit(workflow, PLAIN)
    assert not safe and any(node in line and advice in line for line in told.splitlines()), told


def test_the_advice_helps():
    """In API form, Set and Get are gone, and Anything Everywhere stands beside plain links."""
    assert audit(protected() | {"7": node("Anything Everywhere", anything=("3", 0))})[0]
    assert audit(protected() | {"7": node("Anything Everywhere", anything=("1", 0))})[0], "it draws nothing"
    assert not audit(protected() | {"7": node("Something Everywhere", anything=("1", 0))})[0]


def test_a_pin_is_no_way_around_what_is_not_known():
    prompt = protected() | {"2": node("SafeRoPE_LoadConcept", concept=STAR, sha256=PIN)}
    assert audit(prompt, Required((PIN,), full=True))[0]
    prompt["7"] = node("StrangeSampler", model=("3", 0))
    assert not audit(prompt, Required((PIN,), full=True))[0]
