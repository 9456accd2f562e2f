"""The bundled workflow in a real ComfyUI over HTTP: runs with nothing downloaded, protects, and
fails where it should."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
import torch
from PIL import ImageChops

from dev.comfyui import ComfyUIError
from dev.workflow import BUNDLED, api_prompt, fill
from saferope_core import Concept, Geometry, Roles, Stream, save_concepts, skew

pytestmark = pytest.mark.host

TINY_WORLD = Geometry(2, 4, 2, 128)
TEXT_EVENT = (3).to_bytes(4, "big")  # protocol.py: BinaryEventTypes.TEXT
TEXT = "a red star in the center on a white background"


def save_random(path, geometry):
    """A concept that turns every token of the first head of every block, by far."""
    torch.manual_seed(0)
    rows = [(0, i) for i in range(geometry.double_blocks)] + [(1, i) for i in range(geometry.single_blocks)]
    heads = torch.tensor([(kind, index, 0) for kind, index in rows], dtype=torch.int32)
    basis = torch.linalg.qr(torch.randn(len(heads), geometry.head_dim, 4))[0]
    generator = skew(20 * torch.randn(len(heads), 4, 4))
    map_of_heads = torch.zeros(geometry.blocks, geometry.heads)
    text, image = Stream(generator, Roles(basis, basis), acts_on="qk"), Stream(generator)
    concept = Concept("random", "random", "", geometry, heads, text, image, map_of_heads, threshold=0.0)
    save_concepts(path, [concept])
    return path


@pytest.fixture(scope="module")
def graph(comfyui):
    return api_prompt(json.loads(BUNDLED.read_text(encoding="utf-8")), comfyui.object_info())


@pytest.fixture(scope="module")
def random_concept(comfyui, tmp_path_factory):
    return comfyui.add_concept(save_random(tmp_path_factory.mktemp("c") / "random.safetensors", TINY_WORLD))


def test_as_bundled_it_shows_two_pictures(comfyui, graph):
    unprotected, protected = comfyui.images(comfyui.run(graph))
    assert unprotected.size == protected.size == (96, 96)
    assert ImageChops.difference(unprotected, protected).getbbox()
    assert unprotected.getcolors(maxcolors=10) is None  # more than ten colours: not one flat area


def test_strength_decides(comfyui, graph, random_concept):
    off, on = (fill(graph, TEXT, 7, random_concept, strength) for strength in (0.0, 1.0))
    unprotected, untouched = comfyui.images(comfyui.run(off))
    assert ImageChops.difference(unprotected, untouched).getbbox() is None
    again, protected = comfyui.images(comfyui.run(on))
    assert ImageChops.difference(unprotected, again).getbbox() is None
    assert ImageChops.difference(unprotected, protected).getbbox()


def test_a_foreign_concept_reaches_the_user_as_an_error(comfyui, graph, tmp_path):
    foreign = comfyui.add_concept(save_random(tmp_path / "foreign.safetensors", Geometry(19, 38, 24, 128)))
    with pytest.raises(
        ComfyUIError, match=r"SafeRoPE_Apply\) raised ValueError: .*for FLUX\.1, but the model is the tiny world"
    ):
        comfyui.run(fill(graph, TEXT, 7, foreign, 1.0))


def texts(comfyui, graph):
    """Runs a graph; what ComfyUI's page is told to write on nodes, by their ids: the last text of each."""

    async def listen():
        told, client = {}, "test_workflow"
        async with (
            aiohttp.ClientSession(comfyui.address) as session,
            session.ws_connect(f"/ws?clientId={client}") as page,
        ):
            await session.post("/prompt", json={"prompt": graph, "client_id": client})
            async for message in page:
                if message.type == aiohttp.WSMsgType.BINARY and message.data[:4] == TEXT_EVENT:
                    end = 8 + int.from_bytes(message.data[4:8], "big")
                    told[message.data[8:end].decode()] = message.data[end:].decode()
                elif message.type == aiohttp.WSMsgType.TEXT:
                    kind = json.loads(message.data).get("type")
                    assert kind != "execution_error", message.data
                    if kind == "execution_success":
                        return told

    return asyncio.run(asyncio.wait_for(listen(), 300))


def test_what_does_not_act_is_written_on_its_node(comfyui, graph, random_concept):
    """On the sampler: a run without a protected step; on Apply: a strength past half a turn.
    Both go with their cause."""
    (apply,) = (node for node, each in graph.items() if each["class_type"] == "SafeRoPE_Apply")
    (sampler,) = (node for node, each in graph.items() if each["inputs"].get("model") == [apply, 0])
    idle, acting = (fill(graph, TEXT, 7, random_concept, strength) for strength in (2.0, 1.0))
    idle[apply]["inputs"]["end_percent"] = 0.5
    idle[sampler]["inputs"]["denoise"] = 0.3
    (loader,) = (node for node, each in graph.items() if each["class_type"] == "SafeRoPE_LoadConcept")
    told = texts(comfyui, idle)
    told.pop(loader, None)  # the file's own line, unless ComfyUI has the node's result from another test
    assert set(told) == {apply, sampler}
    assert "none of the steps of this run lies in the part from 0 to 0.5" in told[sampler]
    assert "concept 'random': strength 2 acts as 1." in told[apply]
    assert texts(comfyui, acting) == dict.fromkeys((apply, sampler), "SafeRoPE: no warning")
    acting[apply]["inputs"]["strength"] = 0.9
    assert texts(comfyui, acting) == {}, "control: nothing to say, nothing to take back"


@pytest.mark.parametrize("name", ["gone.safetensors", "../../../etc/passwd"])
def test_an_unlisted_file_is_refused(comfyui, graph, name):
    with pytest.raises(ComfyUIError, match=r"(?s)refused the workflow.*value_not_in_list"):
        comfyui.run(fill(graph, TEXT, 7, name, 1.0))


def test_strength_out_of_range_is_refused(comfyui, graph, random_concept):
    with pytest.raises(ComfyUIError, match=r"(?s)refused the workflow.*value_bigger_than_max"):
        comfyui.run(fill(graph, TEXT, 7, random_concept, 3.0))


def test_rarer_inputs_may_be_left_out(comfyui, graph, random_concept):
    """A graph written by hand needs model, concept and strength."""
    short = fill(graph, TEXT, 7, random_concept, 1.0)
    (apply,) = (node for node in short.values() if node["class_type"] == "SafeRoPE_Apply")
    apply["inputs"] = {name: apply["inputs"][name] for name in ("model", "concept", "strength")}
    unprotected, protected = comfyui.images(comfyui.run(short))
    assert ImageChops.difference(unprotected, protected).getbbox()
