"""Workflows from strangers, through a real ComfyUI's HTTP API: every node of ours is fed every wrong thing.

What is wrong is refused by ComfyUI, or is an error of ours that names the input; never anything else. Afterwards the
same server draws the same picture, bit for bit, as a fresh one.
"""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch

from dev.comfyui import ComfyUI, ComfyUIError, copy_pack
from saferope_core import FLUX1, Concept, Roles, Stream, save_concepts, skew

pytestmark = pytest.mark.host

TEXT = "a red star in the center on a white background"
TRAVERSAL = [
    "../../../etc/passwd",
    "..\\..\\secret",
    "\\\\host\\share\\a.safetensors",
    "//host/share",
    "C:\\a",
    "/etc/passwd",
]
NUMBERS = [-1, -1e308, 1e308, 2**70, float("nan"), float("inf"), float("-inf"), "NaN", "", "one", [], {}, None, True]
TEXTS = (("25", "name"), ("25", "unsafe"), ("24", "license"), ("4", "blocks"), ("2", "sha256"))
OURS = r"raised (ValueError|FileNotFoundError|\S*ConceptFileError): "
LINKED = {
    "FLOAT": ("PrimitiveFloat", [1e308, -1.0]),
    "INT": ("PrimitiveInt", [-1]),
    "STRING": ("PrimitiveString", ["../../a"]),
    "COMBO": ("PrimitiveString", ["../../a"]),
}


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def good(
    seed: int = 7, concept: str = "star.safetensors", steps: int = 4, strength: float = 1.0, text: str = TEXT
) -> dict:
    """A protected picture of the tiny world, and every other node of ours around it."""
    sampling = {
        "seed": seed,
        "steps": steps,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
    }
    links = {"model": ["4", 0], "positive": ["5", 0], "negative": ["5", 0], "latent_image": ["6", 0]}
    return {
        "1": node("SafeRoPE_TinyWorld"),
        "2": node("SafeRoPE_LoadConcept", concept=concept, strength=1.0, sha256=""),
        "3": node("SafeRoPE_CombineConcepts", **{"concepts.concept0": ["2", 0]}),
        "4": node("SafeRoPE_Apply", model=["1", 0], concept=["3", 0], strength=strength),
        "5": node("CLIPTextEncode", clip=["1", 1], text=text),
        "6": node("EmptySD3LatentImage", width=96, height=96, batch_size=1),
        "7": node("KSampler", **sampling, **links),
        "8": node("VAEDecode", samples=["7", 0], vae=["1", 2]),
        "9": node("PreviewImage", images=["8", 0]),
    }


def around() -> dict:
    """The nodes of ours that `good` leaves out, each complete, with an output that asks for it."""
    prompts = "a red [star] on a white background\na blue [star] on a white background"
    return good() | {
        "20": node("SafeRoPE_InspectConcept", concept=["2", 0]),
        "21": node("PreviewImage", images=["20", 0]),
        "22": node(
            "SafeRoPE_RiskProbe",
            model=["1", 0],
            concept=["2", 0],
            positive=["5", 0],
            flag_above=0.4,
            if_flagged="report",
        ),
        "23": node("SafeRoPE_RiskMap", recorder=["4", 1], latent=["7", 0]),
        "24": node("SafeRoPE_SaveConcept", concept=["2", 0], name="saved", half=True, license="NOASSERTION"),
        "25": node(
            "SafeRoPE_CalibrateConcept",
            model=["1", 0],
            clip=["1", 1],
            name="n",
            unsafe=prompts,
            safe=prompts.replace("[star]", "heart"),
        ),
        "26": node("PreviewImage", images=["25", 2]),
    }


def needed(graph: dict, number: str) -> dict:
    """The part of a graph that a node and what shows it need."""
    shows = {"2": "21", "3": "9", "4": "9", "20": "21", "25": "26"}.get(number, number)
    wanted, todo = set(), [shows]
    while todo:
        each = todo.pop()
        if each in graph and each not in wanted:
            wanted.add(each)
            todo += [
                v[0] for v in graph[each]["inputs"].values() if isinstance(v, list) and v and isinstance(v[0], str)
            ]
    return {key: graph[key] for key in graph if key in wanted}


def changed(graph: dict, number: str, name: str, value) -> dict:
    copy = json.loads(json.dumps(graph))
    copy[number]["inputs"][name] = value
    return copy


@pytest.fixture(scope="module")
def server(comfyui):
    """The one that all host tests share. This file abuses it, and so comes last (conftest.py)."""
    return comfyui


@pytest.fixture(scope="module")
def reference(server):
    return pixels(server, good())


def pixels(server, graph) -> bytes:
    (picture,) = server.images(server.run(graph))
    return picture.tobytes()


@pytest.fixture(autouse=True)
def _unharmed(server, reference):
    """After every test, the next good prompt works, and is drawn anew to the same picture."""
    yield
    server._post("/free", {"free_memory": True})  # nothing is taken from the cache
    assert pixels(server, good()) == reference


def refusal(server, graph) -> str:
    """What is told of a graph that must not run."""
    with pytest.raises(ComfyUIError) as refused:
        server.run(graph, timeout=120)
    return str(refused.value)


def inputs(server):
    """(node id, input, kind, spec) of every input of ours in `around`."""
    graph, info = around(), server.object_info()
    for number, each in graph.items():
        if each["class_type"].startswith("SafeRoPE"):
            declared = info[each["class_type"]]["input"]
            for name, spec in (declared.get("required", {}) | declared.get("optional", {})).items():
                yield number, name, spec[0] if isinstance(spec[0], str) else "COMBO", spec[1] if len(spec) > 1 else {}


def test_the_graph_around_is_good(server):
    """The control of all others: whole, it runs."""
    outputs = server.run(around())
    assert len(outputs) >= 6


def test_numbers_out_of_range_and_no_numbers(server):
    """As widgets' values ComfyUI itself refuses them, or makes a number in the range of them."""
    tried = 0
    for number, name, kind, spec in inputs(server):
        if kind in ("FLOAT", "INT"):
            graph = needed(around(), number)
            values = [*NUMBERS, spec["min"] - 1, 2 * spec["max"] + 1]
            for value in values:
                told = asked(server, changed(graph, number, name, value))
                tried += 1
                fits = isinstance(value, bool) and spec["min"] <= value <= spec["max"]
                if not told and not fits:  # NaN is neither below nor above: our nodes look themselves
                    told = posted(server, changed(graph, number, name, value))
                    assert told and re.search(OURS, told), (number, name, value, told)
    assert tried > 150


def asked(server, graph) -> str | None:
    """What ComfyUI says when it refuses a graph; None where it would run it, which is called off: fast."""
    try:
        key = server._queue(graph, None)
    except (ComfyUIError, urllib.error.HTTPError) as refused:
        return str(refused)
    server._post("/queue", {"delete": [key]})
    server._post("/interrupt", {"prompt_id": key})
    return None


def posted(server, graph) -> str | None:
    """What ComfyUI or a node says when it refuses a graph; None where it runs to its end."""
    try:
        key = server._queue(graph, None)
    except ComfyUIError as refused:
        return str(refused)
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    return finished(server, key)


def finished(server, key: str) -> str | None:
    """The error that a queued graph ends with; None where it ends well."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        entry = server.get(f"/history/{key}").get(key)
        if entry:
            errors = [detail for kind, detail in entry["status"]["messages"] if kind == "execution_error"]
            return f"raised {errors[0]['exception_type']}: {errors[0]['exception_message']}" if errors else None
        time.sleep(0.02)
    raise AssertionError("it never ended")


def test_values_over_links(server):
    """ComfyUI checks widgets alone; what comes over a link, our nodes check: an error that names it, or it does no
    harm.
    """
    told = {}
    for number, name, kind, _ in inputs(server):
        if kind in LINKED:
            source, values = LINKED[kind]
            graph = changed(needed(around(), number), number, name, ["90", 0])
            for value in values:
                told[number, name, str(value)[:30]] = posted(server, graph | {"90": node(source, value=value)})
    strange = {key: said for key, said in told.items() if said and not re.search(f"{OURS}|refused the workflow", said)}
    assert strange == {}
    assert sum(said is not None for said in told.values()) > 20


def test_names_that_lead_out_are_refused(server):
    for name in (*TRAVERSAL, "gone.safetensors"):
        assert "value_not_in_list" in refusal(server, good(concept=name))
        linked = changed(good(), "2", "concept", ["90", 0]) | {"90": node("PrimitiveString", value=name)}
        assert re.search(r"was not found\. Expected one of|refused the workflow", refusal(server, linked)), name
        saving = changed(needed(around(), "24"), "24", "name", name)
        assert "expected 1 to 80 letters, digits" in refusal(server, saving)
    outside = [path for path in server.base.rglob("*.safetensors") if "custom_nodes" not in path.parts]
    assert {path.parent.relative_to(server.base).as_posix() for path in outside} <= {
        "output/saferope",
        "models/saferope",
    }


def test_links_of_a_wrong_kind(server):
    """Every input that takes a link, linked to something else, to nothing, to itself, in a circle."""
    for number, name, kind, _ in inputs(server):
        if kind in ("FLOAT", "INT", "STRING", "COMBO", "BOOLEAN") or kind.startswith("COMFY_"):
            continue
        wrong = ["90", 0]
        for link in (wrong, ["404", 0], [number, 0], ["1", 99], ["1", -1], [], ["1"], {"a": 1}, "text"):
            graph = changed(needed(around(), number), number, name, link)
            graph["90"] = node("EmptyImage", width=16, height=16, batch_size=1, color=0)
            said = posted(server, graph)
            # a value in the place of a link goes through to the node, which does not look at a CLIP without a text
            harmless = (name == "clip" and not isinstance(link, list)) or (kind == "IMAGE" and link is wrong)
            harmless |= kind == "VAE" and link == ["1", -1]  # ComfyUI counts from the end, and the last one is a VAE
            assert said or harmless, (number, name, link)


def test_text_is_only_text(server):
    """Prompts, names and words that look like something else; empty, or without end."""
    for value in ("", " ", "\n" * 500, "a\0b", "\u202ea", "{{7*7}}", "x" * 100_000):
        assert posted(server, good(text=value)) is None
    for number, name in TEXTS:
        for value in ("", "../../a", "\u202e\x1b[2J", "x" * 100_000):
            said = posted(server, changed(needed(around(), number), number, name, value))
            assert said is None or re.search(OURS, said), (name, value[:40], said[:300])


def test_latents_of_no_size_and_of_the_least(server):
    graph = good()
    for width, height in ((0, 0), (-16, 96), (10**9, 96)):
        graph["6"]["inputs"] |= {"width": width, "height": height}
        assert "refused the workflow" in refusal(server, graph)
    graph["6"]["inputs"] |= {"width": 16, "height": 16}
    assert posted(server, graph) is None


def foreign(path, geometry):
    heads = torch.tensor([[0, 0, 0]], dtype=torch.int32)
    basis, generator = torch.eye(geometry.head_dim)[None, :, :2], skew(torch.ones(1, 2, 2).triu())
    delta = torch.zeros(geometry.blocks, geometry.heads)
    text = Stream(generator, Roles(basis, basis), acts_on="qk")
    save_concepts(path, [Concept("f", "f", "", geometry, heads, text, Stream(generator), delta)])
    return path


def test_concepts_of_other_models_and_broken_files(server, tmp_path):
    name = server.add_concept(foreign(tmp_path / "foreign.safetensors", FLUX1))
    assert "was made for FLUX.1, but the model is the tiny world" in refusal(server, good(concept=name))
    broken = server.add_concept(foreign(tmp_path / "broken.safetensors", FLUX1))
    (server.concepts / broken).write_bytes((server.concepts / broken).read_bytes()[:-9])
    assert re.search(
        OURS + r".*broken\.safetensors' cannot be used: .*damaged or cut short", refusal(server, good(concept=broken))
    )
    pinned = changed(good(), "2", "sha256", "0" * 64)
    assert "It is another file than the one this workflow was made with" in refusal(server, pinned)


@pytest.mark.slow
def test_a_thousand_concepts(server):
    """More than the node offers inputs are refused before they are compared in pairs;
    as many as it offers are taken."""
    graph = good()
    graph["3"]["inputs"] |= {f"concepts.concept{i}": ["2", 0] for i in range(1000)}
    said = posted(server, graph)
    assert "unexpected keyword argument 'concepts.concept32'" in said, "the host's own words: its Autogrow ends there"
    for i in range(32):
        graph[f"c{i}"] = node("SafeRoPE_LoadConcept", concept="star.safetensors", strength=i / 32, sha256="")
    graph["3"]["inputs"] = {f"concepts.concept{i}": [f"c{i}", 0] for i in range(32)}
    assert posted(server, graph) is None, "32 it takes"


def test_cancelled_in_the_middle(server):
    """Interrupted while it samples; and taken from the queue."""
    for _ in range(3):
        key = server._queue(good(seed=99, steps=2000), None)
        while not server.get("/queue")["queue_running"]:
            time.sleep(0.01)
        time.sleep(0.3)
        server._post("/interrupt", {"prompt_id": key})
        until = time.monotonic() + 60
        while not (entry := server.get(f"/history/{key}").get(key)) and time.monotonic() < until:
            time.sleep(0.05)
        assert entry and entry["status"]["status_str"] == "error"
        assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])


def test_eight_clients_at_once(server):
    """Each gets the picture of its own seed and strength, as when it asks alone."""
    wanted = [(seed, strength) for seed in (1, 2, 3, 4) for strength in (0.0, 1.0)]
    found, alone = {}, {}
    clients = [
        threading.Thread(
            target=lambda pair=pair: found.update({pair: pixels(server, good(seed=pair[0], strength=pair[1]))})
        )
        for pair in wanted
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join(120)
    for pair in wanted[::-3]:
        alone[pair] = pixels(server, good(seed=pair[0], strength=pair[1]))
    assert alone.items() <= found.items() and len(set(found.values())) == 8


def test_bodies_that_are_no_workflow(server):
    for body in (
        b"",
        b"[]",
        b"{",
        b"null",
        b'{"prompt": []}',
        b'{"prompt": {"1": 5}}',
        b'{"prompt": {"1": {"class_type": []}}}',
    ):
        request = urllib.request.Request(server.address + "/prompt", body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=30)


@pytest.mark.slow  # the start of a second server
def test_the_abused_server_draws_as_a_fresh_one(server, reference, tmp_path):
    with ComfyUI(tmp_path, pack=copy_pack(tmp_path / "custom_nodes" / "SafeRoPE")) as fresh:
        assert pixels(fresh, good()) == reference == pixels(server, good())
        assert pixels(fresh, good(seed=8)) != reference, "control"
