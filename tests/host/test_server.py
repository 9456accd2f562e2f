"""A real ComfyUI imports the pack and offers its nodes."""

from __future__ import annotations

import urllib.request

import pytest

from dev.comfyui import PACK, ROOT, ComfyUI, ComfyUIError, copy_pack, find_comfyui
from dev.nodes_page import node_tables

pytestmark = pytest.mark.host
NAMES = ("LoadConcept", "CombineConcepts", "CalibrateConcept", "SaveConcept", "InspectConcept", "Apply")
NAMES += ("RiskProbe", "RiskMap", "SaveImage", "TinyWorld")
NODES = {f"SafeRoPE_{name}" for name in NAMES}  # for ever: workflows name them


def ours(server) -> set[str]:
    return {node for node in server.object_info() if node.startswith("SafeRoPE")}


def test_nodes_are_offered(comfyui):
    assert ours(comfyui) == NODES


def test_every_node_and_input_is_explained(comfyui):
    for node, info in comfyui.object_info().items():
        if node.startswith("SafeRoPE"):
            assert info["description"], node
            inputs = info["input"].get("required", {}) | info["input"].get("optional", {})
            assert [name for name, spec in inputs.items() if not spec[1].get("tooltip")] == [], node


def test_every_node_has_a_help_page(comfyui):
    """Where the frontend looks for them."""
    nodes = comfyui.object_info()
    for node in NODES:
        url = f"{comfyui.address}/extensions/{PACK}/docs/{node}.md"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        name = nodes[node]["display_name"]
        assert text.startswith(f"# {name}\n"), node


def test_pack_is_imported_whole(comfyui):
    assert comfyui.failed_imports() == []


@pytest.mark.slow  # the start of a second server
def test_broken_pack_is_noticed(start_comfyui, tmp_path):
    """ComfyUI starts all the same; what the tests above look at must tell."""
    pack = copy_pack(tmp_path / "SafeRoPE")
    with (pack / "nodes" / "__init__.py").open("a") as file:
        file.write("\nfrom saferope_core import Concept\n")  # absolute: works wherever the project is installed
    server = start_comfyui(pack)
    assert len(server.failed_imports()) == 1
    assert ours(server) == set()


def test_refused_workflow_tells_why(comfyui):
    with pytest.raises(ComfyUIError, match="SafeRoPE_NoSuchNode"):
        comfyui.run({"1": {"class_type": "SafeRoPE_NoSuchNode", "inputs": {}}})


def test_workflow_refused_in_part_is_refused(comfyui):
    """ComfyUI answers 200 and runs the other output: half of a comparison would look like the whole."""
    picture = {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 0}}
    too_large = {"class_type": "EmptyImage", "inputs": picture["inputs"] | {"width": 10**9}}
    outputs = {n + "0": {"class_type": "PreviewImage", "inputs": {"images": [n, 0]}} for n in "12"}
    assert len(comfyui.images(comfyui.run({"1": picture, "2": picture} | outputs))) == 2
    with pytest.raises(ComfyUIError, match="refused the workflow"):
        comfyui.run({"1": picture, "2": too_large} | outputs)


def test_failed_start_shows_the_log(tmp_path):
    broken = tmp_path / "ComfyUI"
    broken.mkdir()
    (broken / "main.py").write_text("raise SystemExit('no such luck')")
    with pytest.raises(ComfyUIError, match="no such luck"), ComfyUI(tmp_path / "base", pack=None, comfyui=broken):
        pass


def test_process_ends_with_the_block(tmp_path):
    """Even when the block raises; a stand-in for ComfyUI that only answers is enough."""
    stand_in = tmp_path / "ComfyUI"
    stand_in.mkdir()
    (stand_in / "main.py").write_text(
        "import http.server as h, sys\n"
        "class Answer(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers(); self.wfile.write(b'{}')\n"
        "h.HTTPServer(('127.0.0.1', int(sys.argv[sys.argv.index('--port') + 1])), Answer).serve_forever()\n"
    )
    with pytest.raises(KeyboardInterrupt), ComfyUI(tmp_path / "base", pack=None, comfyui=stand_in) as server:
        urllib.request.urlopen(server.address + "/system_stats").close()
        raise KeyboardInterrupt
    assert server.process.poll() is not None


@pytest.mark.parametrize("named", [True, False])
def test_missing_comfyui_says_what_to_do(monkeypatch, tmp_path, named):
    monkeypatch.setattr("dev.comfyui.FETCHED", tmp_path)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path)) if named else monkeypatch.delenv("COMFYUI_PATH", raising=False)
    with pytest.raises(ValueError, match="COMFYUI_PATH"):
        find_comfyui()


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_nodes_are_translated_whole(comfyui, language):
    """Every node, input and output that there is, and none that is not."""
    texts, nodes = comfyui.get("/i18n")[language]["nodeDefs"], comfyui.object_info()
    for node in NODES:
        info, text = nodes[node], texts[node]
        assert text["display_name"] and text["description"]
        inputs = info["input"].get("required", {}) | info["input"].get("optional", {})
        assert set(text["inputs"]) == set(inputs), node
        assert all(entry["name"] and entry["tooltip"] for entry in text["inputs"].values()), node
        assert len(text["outputs"]) == len(info["output"]), node


def test_the_page_of_nodes_is_current(comfyui):
    """docs/nodes.md is written by a command; run `python -m dev.nodes_page` after a change of a node."""
    tables = "\n".join(node_tables(comfyui.object_info())).rstrip()
    assert "| strength | FLOAT, 0 to 2, default 1 |" in tables
    assert tables in (ROOT / "docs" / "nodes.md").read_text(encoding="utf-8")
