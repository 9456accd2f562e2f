"""The example workflows and the blueprint in a real ComfyUI: nothing in them is unknown to it, and they do what they
promise.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
import urllib.error
import urllib.request

import aiohttp
import pytest
from PIL import Image, ImageChops

from dev.comfyui import PACK, ComfyUIError
from dev.workflow import BLUEPRINTS, EXAMPLES, api_prompt, change
from saferope_core.version import __version__
from tests.support.workflow_check import problems

pytestmark = pytest.mark.host

RUNNABLE = {"SafeRoPE tiny world", "SafeRoPE several concepts", "SafeRoPE probe and refuse", "SafeRoPE risk map"}
RUNNABLE |= {"SafeRoPE make a concept, tiny world"}
FLUX = {"SafeRoPE FLUX.1-dev", "SafeRoPE FLUX.1-schnell", "SafeRoPE FLUX.1 Kontext edit"}
MAKE = "SafeRoPE make a concept for your FLUX"
FLUX |= {MAKE, "SafeRoPE Safe FLUX app"}
NAMES = sorted(RUNNABLE | FLUX)
BLUEPRINT = "Safe FLUX sampler"
SIDE, STEPS, SEED = 96, 16, 7  # the tiny world's own size and steps
DEV_GUIDANCE = 3.5
STAR = "a red star in the center on a pink background"
HARMLESS = "a blue circle in the center on a pink background"
PHOTO = "example.png"  # in the input folder of every ComfyUI
KNOWN_FILES = {  # by the input that names them: files of FLUX that a workflow may ask for though the server has none
    "unet_name": {"flux1-dev.safetensors", "flux1-schnell.safetensors", "flux1-dev-kontext_fp8_scaled.safetensors"},
    "clip_name1": {"clip_l.safetensors"},
    "clip_name2": {"t5xxl_fp16.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors"},
    "vae_name": {"ae.safetensors"},
    "image": {PHOTO},
    "concept": {"nudity_00001.safetensors"},
}
THUMBNAIL_BYTES = 100_000


def read(name):
    return json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def info(comfyui):
    Image.new("RGB", (64, 64), "navy").save(comfyui.base / "input" / PHOTO)  # lies in every ComfyUI that was cloned
    return comfyui.object_info()


@pytest.fixture
def graph(info, request):
    """The API form of the workflow that a test is marked with."""
    return api_prompt(read(request.param), info)


def of(name):
    return pytest.mark.parametrize("graph", [name], indirect=True)


def shown(comfyui, graph, outputs, title):
    """The pictures of the node with a title."""
    (node,) = (number for number, each in graph.items() if each["_meta"]["title"] == title)
    return [comfyui.image(reference) for reference in outputs[node]["images"]]


def executed(comfyui, graph):
    """Runs a graph; the classes of the nodes that were really executed, as ComfyUI tells its page, and the outputs."""

    async def listen():
        ran, client = [], "test_example_workflows"
        async with (
            aiohttp.ClientSession(comfyui.address) as session,
            session.ws_connect(f"/ws?clientId={client}") as page,
        ):
            await session.post("/prompt", json={"prompt": graph, "client_id": client})
            async for message in page:
                told = json.loads(message.data) if message.type == aiohttp.WSMsgType.TEXT else {}
                if told.get("type") in ("execution_success", "execution_error"):
                    return {graph[node]["class_type"] for node in ran}
                if told.get("type") == "executing" and told["data"]["node"]:
                    ran.append(told["data"]["node"])

    ran = asyncio.run(asyncio.wait_for(listen(), 300))
    return ran, comfyui.run(graph)  # all of it cached by now


def same(one, other):
    return ImageChops.difference(one, other).getbbox() is None


def blueprint():
    return json.loads((BLUEPRINTS / f"{BLUEPRINT}.json").read_text(encoding="utf-8"))


def test_folders_hold_these_workflows_alone():
    assert {path.stem for path in EXAMPLES.glob("*.json")} == set(NAMES)
    assert {path.stem for path in BLUEPRINTS.glob("*.json")} == {BLUEPRINT}


def nodes_within(workflow):
    """All nodes of a workflow, also those inside of its subgraphs."""
    inside = workflow.get("definitions", {}).get("subgraphs", [])
    return [*workflow["nodes"], *(node for graph in inside for node in graph["nodes"])]


def test_nodes_of_the_pack_name_it_and_its_version():
    """As the editor writes them: by these ComfyUI finds the pack that a workflow lacks."""
    workflows = [*map(read, NAMES), blueprint()]
    ours = [node for workflow in workflows for node in nodes_within(workflow) if node["type"].startswith("SafeRoPE")]
    assert len(ours) > 20
    assert {(node["properties"].get("cnr_id"), node["properties"].get("ver")) for node in ours} == {
        ("saferope", __version__)
    }


@pytest.mark.parametrize("name", NAMES)
def test_server_knows_all_that_a_workflow_names(info, name):
    assert problems(read(name), info, KNOWN_FILES) == []


def test_files_that_may_be_missing_are_those_of_flux_alone(info):
    assert problems(read("SafeRoPE tiny world"), info) == []
    assert len(problems(read("SafeRoPE FLUX.1-dev"), info)) == 5  # model, two text encoders, VAE, concept


def test_blueprint_is_whole_and_offered(comfyui, info):
    assert problems(blueprint(), info) == []
    offered = comfyui.get("/global_subgraphs")
    ((key, entry),) = ((k, e) for k, e in offered.items() if e["info"]["node_pack"] == f"custom_nodes.{PACK}")
    assert entry["name"] == BLUEPRINT
    assert json.loads(comfyui.get(f"/global_subgraphs/{key}")["data"])["nodes"][0]["title"] == BLUEPRINT


@pytest.mark.parametrize("name", NAMES)
def test_workflow_is_offered_with_a_picture(comfyui, name):
    assert name in comfyui.get("/workflow_templates")[PACK]
    path = EXAMPLES / f"{name}.jpg"
    assert path.stat().st_size < THUMBNAIL_BYTES
    with Image.open(path) as picture:
        assert picture.format == "JPEG" and 400 <= picture.width <= 800
        assert picture.convert("RGB").getcolors(maxcolors=50) is None  # not one flat area


def node_of(workflow, kind):
    return next(node for node in workflow["nodes"] if node["type"] == kind)


def _value(kind, place, value):
    return lambda workflow: node_of(workflow, kind)["widgets_values"].__setitem__(place, value)


def _retyped(workflow):
    link = next(link for link in workflow["links"] if link[5] == "MODEL")
    link[5] = "CLIP"


def _moved(workflow):
    link = next(link for link in workflow["links"] if link[5] == "MODEL")
    link[2] += 1  # another output of the same node


def _loose(workflow):
    node_of(workflow, "KSampler")["inputs"][0]["link"] = None


BROKEN = {
    "an unknown node": (lambda w: node_of(w, "KSampler").update(type="KSamplr"), "there is no such node"),
    "a value too many": (lambda w: node_of(w, "KSampler")["widgets_values"].append(1), "8 widget values for 7"),
    "a value too few": (lambda w: node_of(w, "SafeRoPE_Apply")["widgets_values"].pop(), "8 widget values for 9"),
    "a choice there is not": (_value("KSampler", 4, "eulre"), "sampler_name is 'eulre'"),
    "a number out of range": (_value("SafeRoPE_Apply", 0, 2.5), "strength is 2.5, expected FLOAT from 0.0 to 2.0"),
    "text for a number": (_value("KSampler", 2, "16"), "steps is '16'"),
    "a switch for a number": (_value("KSampler", 2, True), "steps is True"),
    "a number for a switch": (_value("SafeRoPE_Apply", 8, 1), "record is 1, expected BOOLEAN"),
    "a file there is not": (_value("SafeRoPE_LoadConcept", 0, "gone.safetensors"), "concept is 'gone.safetensors'"),
    "a word of no meaning beside the seed": (
        _value("KSampler", 1, "sometimes"),
        "control_after_generate is 'sometimes'",
    ),
    "a link of the wrong type": (_retyped, "joins MODEL and MODEL as CLIP"),
    "a link from the wrong output": (_moved, "is not known to both of its ends"),
    "an input left free": (_loose, "model is not connected"),
    "a lost output": (lambda w: node_of(w, "SafeRoPE_Apply")["outputs"].pop(), "outputs ['model'], expected"),
    "a node on another": (lambda w: node_of(w, "VAEDecode").update(pos=node_of(w, "KSampler")["pos"]), "lies on"),
    "a node half in a group": (
        lambda w: node_of(w, "PrimitiveInt")["size"].__setitem__(0, 340),
        "lies across the edge",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_workflow_is_noticed(info, what):
    broken, (harm, said) = copy.deepcopy(read("SafeRoPE tiny world")), BROKEN[what]
    harm(broken)
    found = problems(broken, info)
    assert any(said in each for each in found), found


@pytest.mark.parametrize("name", sorted(FLUX))
def test_flux_lacks_nothing_but_its_files(comfyui, info, name):
    """ComfyUI's own check of the whole workflow: it complains of each file, and of nothing else."""
    request = urllib.request.Request(
        f"{comfyui.address}/prompt",
        json.dumps({"prompt": api_prompt(read(name), info)}).encode(),
        {"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request)
    nodes = json.loads(refusal.value.read())["node_errors"].values()
    complaints = [error for node in nodes for error in node["errors"]]
    assert {error["type"] for error in complaints} == {"value_not_in_list"}
    lacking = {error["extra_info"]["input_name"]: error["extra_info"]["received_value"] for error in complaints}
    asked = {"unet_name", "clip_name1", "clip_name2", "vae_name"} | (set() if name == MAKE else {"concept"})
    assert set(lacking) == asked
    assert all(file in KNOWN_FILES[name] for name, file in lacking.items())


@of("SafeRoPE several concepts")
def test_both_of_several_concepts_act(comfyui, graph):
    outputs = comfyui.run(graph)
    (plain,), (both,) = (shown(comfyui, graph, outputs, title) for title in ("Unprotected", "Protected from both"))
    assert not same(plain, both)
    (overlap,) = shown(comfyui, graph, outputs, "Overlap as a map")
    assert overlap.getcolors(maxcolors=50) is None
    (said,) = (outputs[n]["text"][0] for n, each in graph.items() if each["_meta"]["title"] == "Overlap in words")
    assert re.search(r"Star / Swirl: overlap 0\.\d+", said, re.IGNORECASE)
    alone = copy.deepcopy(graph)
    (combine,) = (each["inputs"] for each in alone.values() if each["class_type"] == "SafeRoPE_CombineConcepts")
    del combine["concepts.concept1"]
    (star,) = shown(comfyui, alone, comfyui.run(alone), "Protected from both")
    assert not same(star, both) and not same(star, plain)


@of("SafeRoPE probe and refuse")
def test_a_risky_prompt_is_refused_and_never_sampled(comfyui, graph):
    ran, outputs = executed(comfyui, graph)
    assert {"SafeRoPE_RiskProbe", "ComfySwitchNode"} <= ran and "KSampler" not in ran and "SafeRoPE_Apply" not in ran
    (answer,) = shown(comfyui, graph, outputs, "The answer")
    assert answer.size == (384, 384) and answer.getpixel((383, 383)) == (0x2B, 0x2B, 0x33)
    change(graph, "PrimitiveStringMultiline", value=HARMLESS)
    ran, outputs = executed(comfyui, graph)
    assert "KSampler" in ran and "TextOverlay" not in ran
    (answer,) = shown(comfyui, graph, outputs, "The answer")
    assert answer.size == (SIDE, SIDE) and answer.getcolors(maxcolors=10) is None


@of("SafeRoPE probe and refuse")
def test_a_service_may_stop_with_an_error(comfyui, graph):
    change(graph, "SafeRoPE_RiskProbe", if_flagged="stop with an error")
    with pytest.raises(
        ComfyUIError, match=r"SafeRoPE_RiskProbe\) raised ValueError: This prompt was refused: its risk is"
    ):
        comfyui.run(graph)


@of("SafeRoPE risk map")
def test_risk_map_names_the_word(comfyui, graph):
    outputs = comfyui.run(graph)
    risk, words = _report(graph, outputs)
    assert risk > 0.9 and words.startswith("star ")
    assert len(shown(comfyui, graph, outputs, "What was suppressed")) == 1
    change(graph, "PrimitiveStringMultiline", value=HARMLESS)
    assert _report(graph, comfyui.run(graph))[0] < 0.4


@of("SafeRoPE risk map")
def test_no_node_runs_with_a_risk_that_was_not_measured(comfyui, graph):
    """With image tokens alone the prompt has no risk; the map is shown all the same."""
    (node,) = (number for number, each in graph.items() if each["class_type"] == "SafeRoPE_RiskMap")
    graph["compared"] = {"class_type": "PreviewAny", "inputs": {"source": [node, 0]}, "_meta": {"title": "Compared"}}
    assert float(comfyui.run(graph)["compared"]["text"][0]) > 0.9, "control"
    change(graph, "SafeRoPE_Apply", streams="image")
    outputs = comfyui.run(graph)
    assert "compared" not in outputs and len(shown(comfyui, graph, outputs, "What was suppressed")) == 1
    assert outputs[node]["text"][0].startswith("Star: risk not measured")


def _report(graph, outputs):
    """The risk and the riskiest words, as the workflow says them."""
    (text,) = (outputs[node]["text"][0] for node, each in graph.items() if each["_meta"]["title"] == "In words")
    return float(re.search(r"risk ([\d.]+),", text)[1]), re.search(r"riskiest words: (.*)", text)[1]


def in_use(saved):
    """A workflow of the editor's form in which the blueprint paints a star, with a link at each of its slots."""
    chosen = [1.0, DEV_GUIDANCE, SEED, STEPS, "euler", "simple", 1.0]
    nodes = [
        {"type": "SafeRoPE_TinyWorld", "widgets_values": []},
        {"type": "SafeRoPE_LoadConcept", "widgets_values": ["star.safetensors", 1.0, ""]},
        {"type": "CLIPTextEncode", "widgets_values": [STAR], "inputs": [{"name": "clip"}]},
        {"type": "EmptySD3LatentImage", "widgets_values": [SIDE, SIDE, 1]},
        saved["nodes"][0] | {"widgets_values": chosen},
        {"type": "VAEDecode", "inputs": [{"name": "samples"}, {"name": "vae"}]},
        {"type": "PreviewImage", "inputs": [{"name": "images"}]},
    ]
    # (node, output) -> (node, input); the blueprint takes model, concept, positive, latent_image
    joined = [(1, 0, 5, 0), (2, 0, 5, 1), (3, 0, 5, 2), (4, 0, 5, 3), (1, 1, 3, 0), (5, 0, 6, 0), (1, 2, 6, 1)]
    nodes = [copy.deepcopy(node) | {"id": number} for number, node in enumerate(nodes, 1)]
    links = [[number, *ends, "*"] for number, ends in enumerate([*joined, (6, 0, 7, 0)], 1)]
    for number, _, _, target, slot, _ in links:
        nodes[target - 1]["inputs"][slot]["link"] = number
    return {"nodes": nodes, "links": links, "definitions": saved["definitions"]}


def test_blueprint_protects_as_its_nodes_do(comfyui, info):
    """In a workflow it paints the protected picture of the tiny world."""
    (picture,) = comfyui.images(comfyui.run(api_prompt(in_use(blueprint()), info)))
    tiny = api_prompt(read("SafeRoPE tiny world"), info)
    unprotected, protected = comfyui.images(comfyui.run(tiny))
    assert same(picture, protected) and not same(picture, unprotected)
