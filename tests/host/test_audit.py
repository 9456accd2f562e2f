"""Pictures that a real ComfyUI saves, audited by the real command; and the table of ComfyUI's nodes against the
server's.
"""

from __future__ import annotations

import copy
import json

import pytest
from typer.testing import CliRunner

from dev.node_table import row
from dev.workflow import BUNDLED, api_prompt
from saferope import cli
from saferope_core import sha256
from tinyworld.model import WEIGHTS
from workflow_lint.editor import WIDGETS
from workflow_lint.known import node_table

pytestmark = pytest.mark.host

CONCEPTS = WEIGHTS.parent / "concepts"


@pytest.fixture(scope="module")
def workflow():
    return json.loads(BUNDLED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def prompt(comfyui, workflow):
    """The bundled graph in API form with one step, and pictures saved to the output folder."""
    made = api_prompt(workflow, comfyui.object_info())
    for node in made.values():
        if node["class_type"] == "PreviewImage":
            node |= {"class_type": "SaveImage", "inputs": node["inputs"] | {"filename_prefix": "audit"}}
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 1
    return made


def half(prompt, protected):
    """The part of the bundled graph that draws with Apply, or the one that draws without."""
    (apply,) = (key for key, node in prompt.items() if node["class_type"] == "SafeRoPE_Apply")
    samplers = {
        key: node["inputs"]["model"][0] == apply for key, node in prompt.items() if node["class_type"] == "KSampler"
    }
    gone = {key for key, with_apply in samplers.items() if with_apply != protected}
    while True:  # and all that comes after it
        after = {
            key for key, node in prompt.items() if gone & {v[0] for v in node["inputs"].values() if isinstance(v, list)}
        }
        if after <= gone:
            return {key: node for key, node in copy.deepcopy(prompt).items() if key not in gone}
        gone |= after


def audit(path, *arguments):
    result = CliRunner().invoke(cli.app, ["audit", str(path), *map(str, arguments)])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def saved(comfyui, prompt, folder, workflow=None):
    """The bytes of each picture as ComfyUI saves it. Into a new folder each time:
    else an earlier run's would be shown."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        if "filename_prefix" in node["inputs"]:
            node["inputs"]["filename_prefix"] = f"{folder.name}-{len(list(folder.iterdir()))}/a"
    outputs, paths = comfyui.run(prompt, workflow=workflow), []
    for key, output in outputs.items():
        for number, reference in enumerate(output.get("images", [])):
            path = folder / f"{len(list(folder.iterdir()))}-{key}-{number}-{reference['filename']}"
            path.write_bytes(comfyui.file(reference))
            paths.append(path)
    assert paths
    return paths


@pytest.mark.parametrize(("which", "code"), [(True, 0), (False, 1)])
def test_a_picture_tells_whether_it_was_protected(comfyui, prompt, tmp_path, which, code):
    for path in saved(comfyui, half(prompt, which), tmp_path):
        found, told = audit(path)
        assert found == code, told
        assert ("SafeRoPE_Apply 7 acts" in told and "star.safetensors" in told) is which


def test_a_picture_of_a_graph_with_both_halves_is_not_protected(comfyui, prompt, tmp_path):
    """Both pictures hold the same graph: which sampler drew which cannot be told."""
    assert {audit(path)[0] for path in saved(comfyui, prompt, tmp_path)} == {1}


def test_pins_and_files_of_a_picture(comfyui, prompt, tmp_path):
    pin = sha256(CONCEPTS / "star.safetensors")
    graph = half(prompt, True)
    (load,) = (node for node in graph.values() if node["class_type"] == "SafeRoPE_LoadConcept")
    load["inputs"]["sha256"] = pin
    (path, *_) = saved(comfyui, graph, tmp_path)
    assert audit(path, "--require-sha256", pin, "--concepts", CONCEPTS)[0] == 0
    assert audit(path, "--require-sha256", "0" * 64)[0] == 1
    (tmp_path / "star.safetensors").write_bytes(b"another file")
    assert audit(path, "--concepts", tmp_path)[0] == 1


def test_what_ran_and_what_the_editor_showed(comfyui, prompt, workflow, tmp_path):
    (path, *_) = saved(comfyui, half(prompt, True), tmp_path, workflow=workflow)
    code, told = audit(path)
    assert code == 0 and "DISAGREEMENT" in told, "the editor's has the unprotected half too"
    muted = copy.deepcopy(workflow)
    kept = {int(key) for key in half(prompt, True)}
    for node in muted["nodes"]:
        node["mode"] = 0 if node["id"] in kept else 2
    (path, *_) = saved(comfyui, half(prompt, True), tmp_path, workflow=muted)
    code, told = audit(path)
    assert code == 0 and "DISAGREEMENT" not in told


@pytest.mark.parametrize("kind", ["SaveAnimatedWEBP", "SaveAnimatedPNG"])
def test_animated_pictures(comfyui, prompt, tmp_path, kind):
    """ComfyUI's other nodes put the same texts elsewhere: EXIF of a WEBP, a chunk of their own after a PNG's pixels."""
    more = (
        {"fps": 6.0, "lossless": True, "quality": 80, "method": "default"}
        if kind.endswith("WEBP")
        else {"fps": 6.0, "compress_level": 4}
    )
    for which, code in ((True, 0), (False, 1)):
        graph = half(prompt, which)
        for node in graph.values():
            if node["class_type"] == "SaveImage":
                node |= {"class_type": kind, "inputs": node["inputs"] | more}
        assert {audit(path)[0] for path in saved(comfyui, graph, tmp_path)} == {code}


def test_the_table_of_nodes_is_that_of_the_server(comfyui):
    """Nodes that both know take and give the same models and pictures; a newer ComfyUI may know more."""
    info, table = comfyui.object_info(), node_table()
    both = [name for name in info if name in table]
    assert len(both) > 300, "python -m dev.node_table"
    assert {name for name in info if name.startswith("SafeRoPE_")} <= set(both)
    wrong = {name: (table[name], row(info[name])) for name in both if _slots(table[name]) != _slots(row(info[name]))}
    assert wrong == {}, "python -m dev.node_table"


@pytest.mark.parametrize("name", WIDGETS)
def test_widgets_are_in_the_order_of_the_nodes(comfyui, name):
    """The editor saves them by position."""
    inputs = comfyui.object_info()[name]["input"]
    slots = inputs.get("required", {}) | inputs.get("optional", {})
    kinds = ("FLOAT", "STRING", "COMBO", "BOOLEAN", "INT")
    found = tuple(key for key, spec in slots.items() if isinstance(spec[0], list) or spec[0] in kinds)
    gone = {"control_after_generate", "orthogonalise"}  # the editor's own, beside a seed; one of earlier versions
    assert found == tuple(key for key in WIDGETS[name] if key not in gone)


def _slots(entry):
    inputs, outputs = entry
    while outputs and not outputs[-1]:  # a later version of a node may give more of what does not count
        outputs = outputs[:-1]
    return {name: kind for name, kind in inputs.items() if kind}, outputs
